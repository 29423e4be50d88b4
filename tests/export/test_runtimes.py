"""The table of runtimes: a new entry is all that a new runtime needs."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvnb.benchmark.report import benchmark_html, benchmark_summary, plot_benchmark
from cvnb.benchmark.table import Benchmark, benchmark_rows, list_candidates
from cvnb.benchmark.timing import Measurements, Timings, check_control
from cvnb.core.errors import CvnbError
from cvnb.export.bundle import BUNDLE_FILES, BUNDLE_RUNTIMES
from cvnb.export.parity import REFERENCE_RUNTIME, check_parity, parity_table
from cvnb.export.runtimes import MODELS, RUNTIMES, Predict, Runtime, load_torch
from cvnb.metrics.classification import accuracy
from cvnb.models.weights import create_model, load_model, save_model

CLASSES = ["cat", "dog"]


def test_entries_are_unambiguous() -> None:
    for name, runtime in RUNTIMES.items(): assert runtime.name == name and runtime.precision in ("fp32", "int8")
    for field in "metric_suffix", "marker":
        values = [getattr(runtime, field) for runtime in RUNTIMES.values()]
        assert len(set(values)) == len(values), f"two runtimes have the same {field}"
    assert RUNTIMES[REFERENCE_RUNTIME].in_parity


def test_bundle_has_one_file_per_precision() -> None:
    assert {precision: r.file_name("model") for precision, r in BUNDLE_RUNTIMES.items()} == {
        "fp32": "model.onnx", "int8": "model_int8.onnx"}
    assert BUNDLE_FILES == ("model.onnx", "model_int8.onnx", "labels.txt", "reference.npz")
    assert len(BUNDLE_RUNTIMES) == sum(runtime.in_bundle for runtime in RUNTIMES.values())


def test_modules_of_production_import_nothing_heavy() -> None:
    heavy = ("torch", "torchvision", "pandas", "scipy", "onnx", "onnxruntime", "openvino", "timm", "matplotlib")
    code = f"""import sys
import cvnb.benchmark.workers, cvnb.export.bundle, cvnb.export.runtimes
print(set({heavy}) & sys.modules.keys())"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "set()\n"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A run with two models and three test images."
    torch.manual_seed(0)
    for folder in MODELS.values(): save_model(create_model("test_resnet", CLASSES, 24), tmp_path/folder)
    rng = np.random.default_rng(0)
    for i in range(3): Image.fromarray(rng.integers(0, 256, (30, 24 + i, 3), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    return tmp_path


@pytest.fixture
def new_runtime(monkeypatch: pytest.MonkeyPatch) -> Runtime:
    "A runtime that runs torch's folder once more; of the others only the reference is left."
    runtime = Runtime("new fp32", load_torch, "", "torch", "fp32", metric_suffix="new_fp32", marker="*", in_parity=True)
    for name in RUNTIMES.keys() - {REFERENCE_RUNTIME}: monkeypatch.delitem(RUNTIMES, name)
    monkeypatch.setitem(RUNTIMES, runtime.name, runtime)
    return runtime


def test_parity_compares_new_runtime(run: Path, new_runtime: Runtime) -> None:
    models = {name: load_model(run/folder) for name, folder in MODELS.items()}
    test = pd.DataFrame(dict(path=[f"{i}.png" for i in range(3)], label=["cat", "dog", "cat"]))
    parity = check_parity(models, run, run, test, CLASSES)
    parity.require(1e-4)
    table = parity_table(parity.results)
    assert table.runtime.tolist() == [REFERENCE_RUNTIME, "new fp32"] * 2
    assert list(parity.metrics("trained")) == ["accuracy_test_trained_new_fp32", "max_difference_trained_new_fp32"]
    assert [record["runtime"] for record in parity.to_json()] == table.runtime.tolist()


def test_parity_refuses_runtime_that_differs(run: Path, new_runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(path: Path, threads: int) -> Predict: return lambda images: np.full((len(images), 2), 0.5, np.float32)

    constant = Runtime("constant", load, "", "numpy", "fp32", metric_suffix="constant", marker="P", in_parity=True)
    monkeypatch.setitem(RUNTIMES, constant.name, constant)
    test = pd.DataFrame(dict(path=["0.png"], label=["cat"]))
    parity = check_parity(dict(trained=load_model(run/"train")), run, run, test, CLASSES)
    with pytest.raises(CvnbError, match=r"constant differs from torch by .* on 0\.png, and the tolerance is 1e-06"):
        parity.require(1e-6)


def test_benchmark_and_report_list_new_runtime(run: Path, new_runtime: Runtime) -> None:
    candidates = list_candidates(run)
    names = [c.name for c in candidates]
    assert names == ["trained, torch eager", "trained, new fp32", "compressed, torch eager", "compressed, new fp32"]
    assert candidates[1].metric_suffix == "trained_new_fp32" and candidates[1].path == str(run/"train")
    rng = np.random.default_rng(0)
    timings = {c: Timings(rng.lognormal(-6, 0.1, (5, 4)), np.full((3, 1), 0.1), 100.0) for c in candidates}
    rows = benchmark_rows(timings, {c: accuracy(rng.random(50) < 0.9) for c in candidates}, batch_size=8)
    control = check_control(candidates[1], timings[candidates[1]].seconds, timings[candidates[1]].seconds)
    result = Benchmark(Measurements(timings, control, {}, (0.0, 0.0)), rows)
    bundle = dict(shipped=dict(model="trained"), files={})
    page = benchmark_html(benchmark_summary("x", result, [np.zeros((4, 4, 3), np.uint8)], bundle))
    assert page.count("<td>new fp32</td>") == 2
    lines = plot_benchmark(rows).axes[0].containers
    assert [line[0].get_marker() for line in lines] == ["o", "*"] * 2


def test_runtime_whose_package_is_missing_is_left_out(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Runtime("absent fp32", load_torch, "", "no_such_package", "fp32", metric_suffix="absent", marker="P",
                     in_parity=True)
    monkeypatch.setitem(RUNTIMES, absent.name, absent)
    assert not absent.installed and "absent fp32" not in {c.runtime.name for c in list_candidates(run)}
