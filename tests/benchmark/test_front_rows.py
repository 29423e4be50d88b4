"""Candidates of the front in the benchmark: their rows, their answers against torch's, and names that are wrong."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from cvnb.benchmark.answers import compare_answers
from cvnb.benchmark.front_rows import FrontRows, split_names, write_front_rows
from cvnb.benchmark.report import plot_benchmark
from cvnb.compress.front import find_candidate
from cvnb.core.errors import UsageError
from cvnb.export.runtimes import RUNTIMES, predict_files
from cvnb.models.weights import create_model, save_model


class Bench:
    "The stage as far as the rows need it."
    def __init__(self, run: Path):
        self.run = run
        self.dir = run/"benchmark"
        self.dir.mkdir()

    def input(self, stage: str, name: str) -> Path: return self.run/stage/name

    def path(self, name: str) -> Path: return self.dir/name


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    "A run with two candidates and six test images."
    torch.manual_seed(0)
    for name in "macs-50", "macs-25":
        save_model(create_model("test_resnet", ["cat", "dog"], 24).eval(), tmp_path/"compress/front"/name)
    pd.DataFrame(dict(candidate=["trained", "macs-50", "macs-25"])).to_parquet(tmp_path/"compress/front.parquet")
    rng = np.random.default_rng(0)
    for i in range(6): Image.fromarray(rng.integers(0, 256, (90, 30 + i, 3), dtype=np.uint8)).save(tmp_path/f"{i}.png")
    return Bench(tmp_path)


def images() -> list[np.ndarray]:
    return [np.random.default_rng(1).integers(0, 256, (40, 30, 3), dtype=np.uint8)]


def test_candidate_has_a_row_in_each_runtime_and_answers_as_torch_does(bench: Bench) -> None:
    rows = write_front_rows(bench, "macs-25", find_candidate, images, [])
    names = {c.runtime.name for c in rows.candidates}
    assert {"torch eager", "onnx fp32"} <= names and {c.model for c in rows.candidates} == {"macs-25"}
    assert ("openvino fp32" in names) == RUNTIMES["openvino fp32"].installed and not any("int8" in n for n in names)
    paths = [f"{i}.png" for i in range(6)]
    expected = rows.predict(bench.run, paths)
    files = [bench.run/path for path in paths]
    classes = {c: rows.rules["macs-25"].decide(predict_files(c.runtime.load(c.path, 1), files)).tolist()
               for c in rows.candidates}
    answers = compare_answers(rows.candidates, [], classes, expected, 0.01, rules=rows.rules)
    assert len(answers) == len(rows.candidates) and all(a.agrees and a.same.n == 6 for a in answers.values())
    first = rows.candidates[0]
    swapped = compare_answers([first], [], {first: [1 - k for k in classes[first]]}, expected, 0.01, rules=rows.rules)
    assert swapped[first].same.value == 0 and swapped[first].agrees == (swapped[first].max_difference <= 0.01)


def test_excluded_package_and_missing_int8_are_named(bench: Bench) -> None:
    rows = write_front_rows(bench, "macs-50, macs-25", find_candidate, images, ["openvino"])
    assert rows.left_out["macs-25, onnx int8"] == "all of its layers stay FP32, to keep its accuracy"
    assert rows.left_out["macs-50, openvino fp32"] == "package openvino is excluded"
    assert {c.model for c in rows.candidates} == {"macs-50", "macs-25"}


@pytest.mark.parametrize("text", ["macs-05", "trained", "../../train"])
def test_unknown_candidate_is_refused_with_the_nearest(bench: Bench, text: str) -> None:
    with pytest.raises(UsageError, match="no candidate '.*' in the front of") as e:
        write_front_rows(bench, f"macs-50,{text}", find_candidate, images, [])
    assert "\n" not in str(e.value) and not [*bench.dir.iterdir()]


def test_run_without_a_front_says_so(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    with pytest.raises(UsageError, match="has no front to choose 'macs-50' from. Run the compress stage"):
        write_front_rows(bench, "macs-50", find_candidate, images, [])
    assert write_front_rows(bench, " , ", find_candidate, images, []) == FrontRows()
    assert split_names(" , ") == []


def test_plot_gives_candidates_colours() -> None:
    figures = dict(accuracy=0.9, accuracy_low=0.8, accuracy_high=0.95, p50_ms=1.0)
    rows = [figures | dict(model=model, runtime="onnx fp32") for model in ("trained", "compressed", "macs-25")]
    lines = plot_benchmark(rows, dict(clock="wall")).axes[0].containers
    assert len({line[0].get_color() for line in lines}) == 3
