"""The table of runtimes: a new entry is all that a new runtime needs."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvnb.benchmark.report import benchmark_html, benchmark_summary, plot_benchmark
from cvnb.benchmark.table import Benchmark, benchmark_rows, list_candidates, list_left_out
from cvnb.benchmark.timing import Measurements, Timings, check_control
from cvnb.cli.doctor import check_installation
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import file_record
from cvnb.core.records import record_digest
from cvnb.export.bundle import Bundle, bundle_files, bundle_runtimes, write_bundle
from cvnb.export.onnx import export_onnx
from cvnb.export.parity import REFERENCE_RUNTIME, bundle_metrics, check_parity, parity_table
from cvnb.export.runtimes import MODELS, RUNTIMES, OnnxModel, Predict, Runtime, load_torch
from cvnb.metrics.classification import accuracy
from cvnb.models.weights import create_model, load_model, save_model

CLASSES = ["cat", "dog"]


def test_runtimes_have_distinct_suffixes_and_markers() -> None:
    for name, runtime in RUNTIMES.items():
        assert runtime.name == name
        assert not runtime.in_bundle or (runtime.file and runtime.in_parity)
    for field in "metric_suffix", "marker":
        values = [getattr(runtime, field) for runtime in RUNTIMES.values()]
        assert len(set(values)) == len(values), f"two runtimes have the same {field}"
    assert RUNTIMES[REFERENCE_RUNTIME].in_parity


def test_bundle_has_file_of_every_runtime_in_it() -> None:
    assert {name: r.file_name("model") for name, r in bundle_runtimes().items()} == {
        "onnx fp32": "model.onnx", "onnx int8": "model_int8.onnx"}
    assert bundle_files() == ["model.onnx", "model_int8.onnx", "labels.txt", "reference.npz"]


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
    for name in [n for n in reversed(RUNTIMES) if n not in {REFERENCE_RUNTIME}]:
        monkeypatch.delitem(RUNTIMES, name)
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

    test = pd.DataFrame(dict(path=["0.png"], label=["cat"]))
    reason = r"constant differs from torch by .* on 0\.png, and the tolerance is 1e-06"
    for ships in True, False:
        constant = Runtime("constant", load, "", "numpy", "fp32", metric_suffix="constant", marker="P", in_parity=True,
                           in_bundle=ships)
        monkeypatch.setitem(RUNTIMES, constant.name, constant)
        parity = check_parity(dict(trained=load_model(run/"train")), run, run, test, CLASSES)
        with pytest.raises(CvnbError, match=reason): parity.require(1e-6)
        if ships:
            with pytest.raises(CvnbError, match=reason): parity.require(1e-6, "trained")
            continue
        note, = parity.require(1e-6, "trained")
        assert note.startswith("trained, constant differs from torch by ") and "file does not ship" in note


def test_benchmark_and_report_list_new_runtime(run: Path, new_runtime: Runtime) -> None:
    candidates = {c.name: c for c in list_candidates(run)}
    assert list(candidates) == [f"{model}, {runtime}" for model in MODELS for runtime in ("torch eager", "new fp32")]
    new = candidates["trained, new fp32"]
    assert new.metric_suffix == "trained_new_fp32" and new.path == str(run/"train")
    rng = np.random.default_rng(0)
    calls = rng.lognormal(-6, 0.1, (5, 4))
    timings = {c: Timings(calls, calls, np.full((3, 1), 0.1), 100.0) for c in candidates.values()}
    rows = benchmark_rows(timings, {c: accuracy(rng.random(50) < 0.9) for c in timings}, batch_size=8)
    pair = (np.stack([calls, calls]),) * 2
    control = check_control(new, pair, pair)
    result = Benchmark(Measurements(timings, control, {}, (0.0, 0.0)), rows)
    bundle = dict(shipped=dict(model="trained"), files={})
    page = benchmark_html(benchmark_summary("x", result, [np.zeros((4, 4, 3), np.uint8)], bundle))
    assert page.count("<td>new fp32</td>") == 2
    lines = plot_benchmark(rows, control).axes[0].containers
    assert [line[0].get_marker() for line in lines] == ["o", "*"] * 2


def test_runtime_that_cannot_run_is_left_out_and_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in reversed(RUNTIMES) if n not in {REFERENCE_RUNTIME}]:
        monkeypatch.delitem(RUNTIMES, name)
    absent = Runtime("absent fp32", load_torch, "", "no_such_package", "fp32", metric_suffix="absent", marker="P",
                     device="gpu", in_parity=True)
    unwritten = Runtime("own fp16", load_torch, "{model}.own", "torch", "fp16", metric_suffix="own", marker="X",
                        in_parity=True)
    for runtime in absent, unwritten: monkeypatch.setitem(RUNTIMES, runtime.name, runtime)
    expected = {}
    for model in MODELS:
        expected[f"{model}, absent fp32"] = "package no_such_package is not installed"
        expected[f"{model}, own fp16"] = f"export/{model}.own does not exist"
    assert {c.runtime.name for c in list_candidates(run)} == {REFERENCE_RUNTIME}
    assert list_left_out(run) == expected
    test = pd.DataFrame(dict(path=["0.png"], label=["cat"]))
    parity = check_parity({name: load_model(run/folder) for name, folder in MODELS.items()}, run, run, test, CLASSES)
    assert parity.left_out == expected and list(parity.results["trained"]) == [REFERENCE_RUNTIME]
    assert "trained, absent fp32 was left out: package no_such_package is not installed." in repr(parity)
    row = next(row for row in check_installation() if row["part"] == "runtime absent fp32")
    assert row["found"] == "package no_such_package not installed, device gpu" and not row["ok"]


@pytest.fixture
def exported(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A run whose trained model has an ONNX file; of the runtimes, torch and ONNX FP32 are left."
    for name in [n for n in reversed(RUNTIMES) if n not in {REFERENCE_RUNTIME, "onnx fp32"}]:
        monkeypatch.delitem(RUNTIMES, name)
    (run/"export").mkdir()
    export_onnx(load_model(run/"train"), run/"export/trained.onnx")
    return run


def write_test_bundle(run: Path) -> Path:
    "Write a bundle of the trained model, with parity over three images."
    model = load_model(run/"train")
    test = pd.DataFrame(dict(path=[f"{i}.png" for i in range(3)], label=["cat", "dog", "cat"]))
    metrics = bundle_metrics(check_parity(dict(trained=model), run, run, test, CLASSES).results["trained"])
    images = [np.asarray(Image.open(run/path)) for path in test.path]
    details = dict(run="x", shipped=dict(model="trained"), metrics=metrics)
    return write_bundle(run/"bundle", run, "trained", model.spec, images, details)


def test_bundle_keeps_two_runtimes_of_one_precision(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_copy(path: Path, threads: int) -> Predict:
        model = OnnxModel(path, threads)
        return lambda images: model(images)   # without `n_outputs`

    def load_half(path: Path, threads: int) -> Predict:
        model = OnnxModel(path, threads)
        return lambda images: model(images).astype(np.float16).astype(np.float32)

    (exported/"export/trained.copy").write_bytes((exported/"export/trained.onnx").read_bytes())
    fields = dict(in_parity=True, in_bundle=True)
    for runtime in (
        Runtime("copy fp32", load_copy, "{model}.copy", "onnxruntime", "fp32", "copy", "P", **fields),
        Runtime("same fp32", load_copy, "{model}.onnx", "onnxruntime", "fp32", "same", "X", **fields),
        Runtime("half fp16", load_half, "{model}.onnx", "onnxruntime", "fp16", "half", "*", **fields,
                reference_tolerance=0.01),
    ): monkeypatch.setitem(RUNTIMES, runtime.name, runtime)
    bundle = write_test_bundle(exported)
    names = {file.name for file in bundle.iterdir()}
    assert names == {"model.onnx", "model.copy", "labels.txt", "reference.npz", "bundle.json"}
    with np.load(bundle/"reference.npz") as reference: assert {"model", "model.copy"} < set(reference.files)
    for precision, name in dict(fp32="onnx fp32", fp16="half fp16").items():
        assert Bundle.load(bundle, precision).runtime.name == name
    for name in bundle_runtimes():
        loaded = Bundle.load(bundle, name)
        assert loaded.runtime.name == name and loaded.verify()["images"] == 3
    with pytest.raises(UsageError, match="precision 'int8' does not exist.*'fp32' or 'fp16'"):
        Bundle.load(bundle, "int8")
    record = json.loads((bundle/"bundle.json").read_text())
    record["labels"].append("eel")
    (bundle/"labels.txt").write_text("cat\ndog\neel\n")
    record["files"]["labels.txt"] = file_record(bundle/"labels.txt")
    (bundle/"bundle.json").write_text(json.dumps(record | dict(digest=record_digest(record))))
    with pytest.raises(CvnbError, match="model.copy was exported with other labels"): Bundle.load(bundle, "copy fp32")


def test_bundle_is_refused_without_runtime_in_it(exported: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absent = Runtime("absent fp32", load_torch, "{model}.onnx", "no_such_package", "fp32", "absent", "P",
                     in_parity=True, in_bundle=True)
    monkeypatch.setitem(RUNTIMES, absent.name, absent)
    with pytest.raises(CvnbError, match="the bundle needs absent fp32, and package no_such_package is not installed"):
        write_test_bundle(exported)
    assert not (exported/"bundle").exists()
