"""The label that a file chooses itself: that of the bundle, by thresholds and by costs, in FP32 and INT8."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cvnb.core.errors import CvnbError
from cvnb.core.files import write_json
from cvnb.core.records import record_digest
from cvnb.export.bundle import Bundle, verify_bundle, write_bundle
from cvnb.export.decision_output import DECISION, add_decision
from cvnb.export.features import add_features
from cvnb.export.onnx import export_models
from cvnb.export.portable_graph import write_portable
from cvnb.export.quantize import QuantizationData, quantize_models
from cvnb.export.runtimes import RUNTIMES, OnnxModel
from cvnb.models.vision_model import VisionModel, task_of
from cvnb.models.weights import create_model, save_model

CLASSES = ["cat", "dog", "eel"]
COSTS = {"cat": dict(cat=0, dog=1, eel=4), "dog": dict(cat=1, dog=0, eel=1), "eel": dict(cat=2, dog=1, eel=0)}
RULES = {"thresholds": dict(thresholds=dict(cat=0.2, dog=0.36, eel=0.44)), "costs": dict(costs=COSTS)}


def set_rule(model: VisionModel, name: str) -> VisionModel:
    "Give a model a temperature, and thresholds or costs."
    model.spec = replace(model.spec, temperature=1.7, **RULES[name])
    return model


def spread_answers(model: VisionModel, images: list[np.ndarray]) -> None:
    "Let each logit of an untrained network have the mean 0 and the same spread over images."
    head = model.net.get_classifier()
    with torch.no_grad():
        logits = torch.cat([model(torch.from_numpy(image[None])) for image in images])
        head.weight /= logits.std(0)[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))


@pytest.fixture(scope="module", params=RULES)
def written(request: pytest.FixtureRequest, tmp_path_factory) -> tuple[Path, VisionModel, list[np.ndarray]]:
    "A bundle whose files choose labels, its network, and images of several sizes."
    run = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(0)
    model = set_rule(create_model("test_resnet", CLASSES, 24).eval(), request.param)
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (rng.integers(9, 90), 24 + i % 9, 3), dtype=np.uint8) // (1 + i % 4)
              for i in range(60)]
    spread_answers(model, images)
    save_model(model, run/"train")
    (run/"export").mkdir()
    path = lambda name: run/"export"/name
    fp32 = export_models(dict(trained=model), path)
    small = rng.integers(0, 256, (16, 24, 24, 3), dtype=np.uint8)
    int8 = quantize_models(fp32, path, QuantizationData(small, small, np.zeros(16, int)), tolerance=1.0)
    files = [*fp32.files.values(), *int8.files.values()]
    features = [add_features(file) for file in files]
    decision = [add_decision(file, task_of(model.spec).rule) for file in files]
    details = dict(run="x", shipped=dict(model="trained"), metrics={}, features=features[0], decision=decision[0],
                   int8=dict(ships=True))
    return write_bundle(run/"bundle", run, "trained", model.spec, images[:3], details), model, images


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_file_chooses_the_labels_of_the_bundle(written, precision: str) -> None:
    folder, model, images = written
    bundle = Bundle.load(folder, precision)
    expected = [p["label"] for p in bundle.predict(images)]
    found = [bundle.labels[int(bundle.model(image[None], output=DECISION)[0])] for image in images]
    assert found == expected
    largest = [max(p["probabilities"], key=p["probabilities"].get) for p in bundle.predict(images)]
    assert largest != expected, "the rule decides some image"
    assert len(set(expected)) > 1


def test_temperature_is_in_the_file(written) -> None:
    folder, model, images = written
    with torch.inference_mode(): logits = model(torch.from_numpy(images[0][None]))
    found = Bundle.load(folder).predict(images[0])[0]["probabilities"]
    assert np.allclose(list(found.values()), torch.softmax(logits / 1.7, 1)[0], atol=1e-4)


def test_bundle_with_other_thresholds_than_its_file_is_refused(written) -> None:
    folder, *_ = written
    assert verify_bundle(folder)
    content = (folder/"bundle.json").read_text()
    record = json.loads(content)
    lead = Bundle.load(folder)._decide([IMAGE := np.zeros((24, 24, 3), np.uint8)])[0]
    assert IMAGE.size and record["decision"] == dict(
        name=DECISION, dtype="int64", shape=["batch"], meaning=record["decision"]["meaning"])
    limits = {name: 0.01 if i == (lead + 1) % 3 else 0.495 for i, name in enumerate(CLASSES)}
    record |= dict(thresholds=limits, costs=None)
    write_json(folder/"bundle.json", record | dict(digest=record_digest(record)))
    try:
        with pytest.raises(CvnbError, match="chooses other labels in its file than by bundle.json"):
            verify_bundle(folder)
        record = json.loads(content) | dict(decision=None)
        write_json(folder/"bundle.json", record | dict(digest=record_digest(record)))
        with pytest.raises(CvnbError, match="has the inputs and outputs .*decision"): Bundle.load(folder)
    finally: (folder/"bundle.json").write_text(content)


def test_openvino_runs_the_file_too(written, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    folder, _, images = written
    portable = write_portable(folder/"model.onnx", tmp_path/"portable.onnx")
    found = RUNTIMES["openvino fp32"].load(portable, 1)(images[0][None])
    assert np.abs(found - OnnxModel(portable)(images[0][None])).max() < 1e-4
