"""The model card of a run: what the hub reads, figures with their sources, and what was not measured."""
from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from cvnb.benchmark import model_card as module
from cvnb.benchmark.model_card import model_card
from cvnb.cli.app import main
from cvnb.core.errors import CvnbError, UsageError


@pytest.fixture(scope="module")
def card(smoke_run: Path) -> str:
    "The card of a whole run."
    return model_card(smoke_run, "reading digits", "apache-2.0")


def test_the_hub_reads_the_metadata(card, smoke_run):
    data = ModelCard(card).data
    assert data.library_name == "cvnb" and data.pipeline_tag == "image-classification" and data.license == "apache-2.0"
    bundle = json.loads((smoke_run/"export/bundle/bundle.json").read_text())
    values = {result.metric_name: result.metric_value for result in data.eval_results}
    assert values and all(value == pytest.approx(bundle["metrics"][name]["value"], abs=1e-4)
                          for name, value in values.items())


def test_every_section_is_filled_by_a_whole_run(card):
    titles = re.findall(r"^## (.+)$", card, re.M)
    assert titles == ["Verdict", "Use", *module._SECTIONS, "Origin"]
    assert "Not measured" not in card and "reading digits" in card and "No licence" not in card
    for source in "audit/audit.json", "train/stage.json", "errors/errors.json", "benchmark/benchmark.json":
        assert source in card


def test_figures_are_those_of_the_run(card, smoke_run):
    metrics = json.loads((smoke_run/"train/stage.json").read_text())["metrics"]
    (line,) = [line for line in card.splitlines() if line.startswith("| train: accuracy_test |")]
    assert f"{metrics['accuracy_test']['value']:.4g}"[:5] in line
    assert "accuracy_val" not in card, "the table says that its figures are of the test images"
    digest = json.loads((smoke_run/"audit/stage.json").read_text())["data"]["digest"]
    assert digest in card


def test_what_was_not_measured_is_named(smoke_run, tmp_path):
    run = tmp_path/"run"
    shutil.copytree(smoke_run, run, symlinks=True)
    for stage in "errors", "benchmark": shutil.rmtree(run/stage)
    card = model_card(run)
    assert "Not measured: errors has not finished." in card and "Not measured: benchmark has not finished." in card
    assert "The makers have not said what the model is for" in card and "No licence was given" in card
    shutil.rmtree(run/"export")
    with pytest.raises(CvnbError, match="export has not finished"): model_card(run)


def test_names_cannot_break_a_table_or_become_html():
    lines = module._table(["class", "n"], [("a|b\n<script>`x`", 3)])
    assert lines[-1] == "| a&#124;b &lt;script&gt;&#96;x&#96; | 3 |"
    assert module._table(["x"], [(i,) for i in range(30)])[-1] == "\n… and 10 more"


def test_the_command_prints_or_writes_and_overwrites_nothing(smoke_run, tmp_path, monkeypatch, capsys):
    def call(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["cvnb", "card", *map(str, args)])
        with pytest.raises(SystemExit) as end: main()
        return end.value.code or 0
    out = tmp_path/"README.md"
    assert call(smoke_run, "--out", out) == 0 and call(smoke_run) == 0
    assert capsys.readouterr().out == out.read_text()
    assert call(smoke_run, "--out", out) == 2 and "exists. Give another file" in capsys.readouterr().err


def test_other_tasks_are_refused(smoke_run, monkeypatch):
    monkeypatch.setattr(module, "read_record", lambda *_: dict(task="regression"))
    with pytest.raises(UsageError, match="is of the task regression"): model_card(smoke_run)
