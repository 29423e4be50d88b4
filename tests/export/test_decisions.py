"""A bundle answers by the thresholds or costs that it carries, says so, and refuses those of other labels."""
from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from bundles import IMAGES, LABELS, make_bundle
from PIL import Image

from cvnb.cli.app import main
from cvnb.core.errors import CvnbError
from cvnb.core.records import record_digest
from cvnb.core.stage import Stage
from cvnb.export.bundle import Bundle
from cvnb.export.parity import QUANTIZED, REFERENCE_RUNTIME, ParityReport, confirm_quantized, measure_parity
from cvnb.metrics.decision import DecisionRule
from cvnb.metrics.objective import Objective

DOG = dict(thresholds=dict(cat=0.5, dog=1e-15, owl=0.5))   # the images are owls with a probability of nearly 1


@pytest.fixture
def folder(tmp_path: Path) -> Path: return make_bundle(tmp_path/"run")


def rewrite(folder: Path, **fields: object) -> Path:
    "Change bundle.json, with a digest that fits."
    record = json.loads((folder/"bundle.json").read_text()) | fields
    record["digest"] = record_digest(record)
    (folder/"bundle.json").write_text(json.dumps(record))
    return folder


def test_labels_follow_thresholds_and_the_confidence_is_that_of_the_label(folder):
    plain = Bundle.load(folder).predict(IMAGES)
    chosen = Bundle.load(rewrite(folder, **DOG)).predict(IMAGES)
    assert {p["label"] for p in chosen} == {"dog"} and {p["label"] for p in plain} == {"owl"}
    assert all(p["confidence"] == p["probabilities"]["dog"] for p in chosen)
    assert [p["probabilities"] for p in chosen] == [p["probabilities"] for p in plain]


def test_labels_follow_costs(folder):
    costs = {a: {b: float(a != b) for b in LABELS} for a in LABELS}
    costs["dog"] = dict(cat=1e15, dog=0.0, owl=1e15)
    assert {p["label"] for p in Bundle.load(rewrite(folder, costs=costs)).predict(IMAGES)} == {"dog"}


def test_bundle_of_an_earlier_version_answers_by_the_largest_probability(folder):
    record = json.loads((folder/"bundle.json").read_text())
    assert record["thresholds"] is None and record["temperature"] is None
    for name in "thresholds", "costs", "temperature", "objective": record.pop(name, None)
    record["digest"] = record_digest(record)
    (folder/"bundle.json").write_text(json.dumps(record))
    bundle = Bundle.load(folder)
    assert bundle.rule.plain and bundle.decision_note == ""
    assert all(p["confidence"] == max(p["probabilities"].values()) for p in bundle.predict(IMAGES))


@pytest.mark.parametrize("fields, message", [
    (dict(thresholds=dict(cat=0.5, dog=0.5)), "the thresholds lack 'owl'"),
    (dict(thresholds=dict(cat=0.3, dog=0.3, eel=0.4)), "the thresholds name 'eel'"),
    (dict(thresholds=dict(cat=3, dog=0.3, owl=0.4)), "thresholds.cat should be"),
    (dict(costs=dict(cat=dict(cat=0.0))), "the costs lack 'dog'")])
def test_bundle_with_decisions_of_other_labels_is_refused(folder, fields, message):
    with pytest.raises(CvnbError, match=message): Bundle.load(rewrite(folder, **fields))


def test_predict_says_how_labels_are_chosen(folder, tmp_path, capsys, monkeypatch):
    Image.fromarray(IMAGES[0]).save(tmp_path/"a.png")
    rewrite(folder, **DOG, temperature=1.8)
    monkeypatch.setattr(sys, "argv", ["cvnb", "predict", str(folder), str(tmp_path/"a.png"), "--json"])
    with pytest.raises(SystemExit): main()
    out, err = capsys.readouterr()
    assert json.loads(out)["label"] == "dog"
    assert "temperature 1.8" in err and "labels follow thresholds" in err and "dog 1e-15" in err


def test_parity_and_its_accuracy_are_those_of_the_rule():
    expected = np.array([[0.7, 0.3], [0.9, 0.1]])
    found = np.array([[0.74, 0.26], [0.9, 0.1]])
    labels = np.array([1, 0])
    plain = measure_parity("x", expected, found, labels, ["a", "b"])
    ruled = measure_parity("x", expected, found, labels, ["a", "b"], None, DecisionRule((0.72, 0.28)),
                           Objective("balanced", ("ok", "defect")))
    assert (plain.same.value, plain.accuracy.value) == (1.0, 0.5)
    assert (ruled.same.value, ruled.accuracy.value, ruled.objective.value) == (0.5, 0.5, 0.5)


def test_int8_file_that_loses_a_rare_class_is_rejected_by_the_objective(tmp_path):
    targets = np.repeat([0, 1], [1900, 100])
    loses = np.where((targets == 1) & (np.arange(2000) % 5 == 0), 0, targets)
    answers = {"trained": {REFERENCE_RUNTIME: targets, QUANTIZED: loses}}
    correct = {"trained": {name: found == targets for name, found in answers["trained"].items()}}
    report = ParityReport({}, correct, {}, None, answers)
    images = pd.DataFrame(dict(path=[f"{i:04}" for i in range(2000)], label=np.array(["ok", "defect"])[targets]))
    images["pixel_sha256"] = images.path
    accepted = {}
    for objective in (None, Objective("balanced", ("ok", "defect"))):
        stage = Stage("export", tmp_path/str(objective and objective.name))
        tested = confirm_quantized(stage, report, "trained", images.path, 0.03, images, objective)
        accepted[objective and objective.name] = tested.accepted
    assert accepted == {None: True, "balanced": False}
    assert replace(tested).to_json()["objective"]["words"] == "balanced accuracy"
    assert "its balanced accuracy differs by -10.0" in tested.notes[0]


def test_served_answer_is_that_of_predict(folder):
    from cvnb.serve.served_model import ModelOptions, ServedModel
    served = ServedModel(Bundle.load(rewrite(folder, **DOG)), "x", "0" * 64, ModelOptions())
    answers = [served.describe(p) for p in served.bundle._predict_arrays(IMAGES)]
    assert [a["label"] for a in answers] == [p["label"] for p in served.bundle.predict(IMAGES)] == ["dog"] * 4
    assert all(a["confidence"] == a["probabilities"]["dog"] for a in answers)
