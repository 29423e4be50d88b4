"""A model's description carries its temperature and its rule, and every later prediction follows."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnxruntime
import pandas as pd
import pytest

from cvnb.core.errors import CvnbError
from cvnb.export.onnx import export_onnx
from cvnb.metrics.objective import Objective
from cvnb.models.inference import predict_logits, predict_proba
from cvnb.models.vision_model import VisionModel, task_of
from cvnb.models.weights import create_model, load_model, save_model
from cvnb.training.decisions import decide_on_validation
from cvnb.training.loaders import LabelledImages
from cvnb.training.predict import predict_table

CLASSES = ["ok", "defect"]


@pytest.fixture(scope="module")
def images() -> np.ndarray: return np.random.default_rng(0).integers(0, 256, (60, 16, 16, 3), dtype=np.uint8)


def decided(**decisions: object) -> VisionModel:
    "A small network whose description has these decisions."
    model = create_model("test_resnet", CLASSES, 16).eval()
    model.spec = replace(model.spec, **decisions)
    return model


def test_onnx_probabilities_have_the_temperature(images, tmp_path):
    model = decided(temperature=0.25)
    logits = predict_logits(model, images)
    powers = np.exp(4 * logits)
    expected = powers / powers.sum(1, keepdims=True)
    assert np.allclose(predict_proba(model, images), expected, atol=1e-5)
    session = onnxruntime.InferenceSession(export_onnx(model, tmp_path/"model.onnx"))
    assert np.allclose(session.run(None, dict(images=images))[0], expected, atol=1e-4)


def test_predictions_follow_thresholds_and_costs(images):
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(60)], split="val", label="ok"))
    data = LabelledImages(images, np.zeros(60, int))
    always = dict(thresholds={"ok": 1 - 1e-6, "defect": 1e-6}), dict(costs={"ok": {"ok": 0.0, "defect": 1e-9},
                                                                         "defect": {"ok": 1.0, "defect": 0.0}})
    for decisions in always:
        table = predict_table(decided(**decisions), rows, data, device="cpu")
        assert set(table.predicted) == {"defect"} and not table.correct.any()
        assert np.allclose(table.confidence, [p[1] for p in table.probabilities]), "of the answer, not the largest"
        metrics = task_of(decided(**decisions).spec).metrics(np.zeros((4, 2)), np.array([1, 1, 1, 0]))
        assert metrics["accuracy"].value == 0.75


def test_description_keeps_decisions_and_older_ones_have_none(images, tmp_path):
    model = decided(temperature=1.7, thresholds={"ok": 0.8, "defect": 0.2})
    save_model(model, tmp_path)
    assert load_model(tmp_path).spec == model.spec
    import json
    record = json.loads((tmp_path/"model.json").read_text())
    for name in "temperature", "thresholds", "costs": del record[name]
    (tmp_path/"model.json").write_text(json.dumps(record))
    old = load_model(tmp_path)
    assert old.spec.temperature is None and task_of(old.spec).rule.plain
    record["thresholds"] = {"ok": 0.5, "scratch": 0.5}
    (tmp_path/"model.json").write_text(json.dumps(record))
    with pytest.raises(CvnbError, match="the thresholds name 'scratch'"): task_of(load_model(tmp_path).spec)


def test_decisions_are_fitted_anew_and_not_on_top_of_earlier_ones(images):
    model = decided(temperature=9.0, thresholds={"ok": 0.999, "defect": 0.001})
    fresh = decided()
    fresh.load_state_dict(model.state_dict())
    labels = predict_logits(model, images).argmax(1)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(60)], pixel_sha256=[str(i) for i in range(60)]))
    found = [decide_on_validation(m, LabelledImages(images, labels), rows, Objective("balanced", tuple(CLASSES)), "cpu")
             for m in (model, fresh)]
    assert found[0].fit == found[1].fit and model.spec == fresh.spec and model.spec.thresholds is None


def test_other_tasks_have_no_decisions(images):
    model = create_model("test_resnet", ["value"], 16, task="regression", target_mean=[0.0], target_std=[1.0])
    data = LabelledImages(images, np.zeros((60, 1)))
    found = decide_on_validation(model, data, pd.DataFrame(), Objective("r2"), "cpu")
    assert found.notes == [] and model.spec.temperature is None
