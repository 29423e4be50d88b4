"""OpenVINO's own INT8 of a model is a peer whose answers count."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cvnb.benchmark import peer_models
from cvnb.benchmark.peer_models import quantize_with_nncf
from cvnb.export.onnx import export_onnx
from cvnb.export.portable_graph import write_portable
from cvnb.export.runtimes import load_openvino
from cvnb.models.weights import create_model

IMAGES = list(np.random.default_rng(0).integers(0, 256, (24, 24, 24, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A small network."
    folder = tmp_path_factory.mktemp("peer")
    torch.manual_seed(0)
    model = create_model("test_resnet", ["cat", "dog", "owl"], 24).eval()
    return write_portable(export_onnx(model, folder/"plain.onnx"), folder/"model.onnx")


@pytest.mark.parametrize("shares, mended", [([1.0], False), ([0.2, 0.9], True)])
def test_classifier_stays_in_fp32_where_int8_ruins_the_answers(
    shares: list[float], mended: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen = iter(shares)   # planted: what share of the images keeps its class
    monkeypatch.setattr(peer_models, "_same_classes", lambda *_: next(seen))
    text = quantize_with_nncf(source, tmp_path/"int8.xml", IMAGES).read_text()
    monkeypatch.setattr(peer_models, "_same_classes", lambda *_: 1.0)
    default = quantize_with_nncf(source, tmp_path/"default.xml", IMAGES).read_text()
    layers = [xml.count('type="FakeQuantize"') for xml in (default, text)]
    assert next(seen, None) is None and layers[0] > 4
    assert layers[0] - layers[1] in ((1, 2) if mended else (0,)), "the last layer, and no other"


def test_share_of_images_that_keep_their_class(source: Path, tmp_path: Path) -> None:
    import openvino
    core = openvino.Core()
    model = core.read_model(source)
    assert peer_models._same_classes(model, core.read_model(source), IMAGES) == 1.0
    other = create_model("test_resnet", ["cat", "dog", "owl"], 24).eval()
    with torch.no_grad(): other.net.fc.bias += torch.tensor([0.0, 0.0, 1e4])   # always an owl
    path = write_portable(export_onnx(other, tmp_path/"other.onnx"), tmp_path/"owl.onnx")
    kept = float(np.mean([load_openvino(source, 1)(image[None]).argmax() == 2 for image in IMAGES]))
    assert peer_models._same_classes(model, core.read_model(path), IMAGES) == pytest.approx(kept) != 1.0
