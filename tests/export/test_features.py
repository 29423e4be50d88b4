"""A bundle's second output: what the classifier gets, equal to torch's, in FP32 and INT8."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper
from PIL import Image

from cvnb.core.errors import CvnbError, UsageError
from cvnb.export.bundle import Bundle, write_bundle
from cvnb.export.features import add_features
from cvnb.export.onnx import ExportedModels, export_models
from cvnb.export.quantize import QuantizationData, quantize_models
from cvnb.models.weights import create_model, save_model

CLASSES = ["cat", "dog", "eel"]


def torch_features(model, images: np.ndarray) -> np.ndarray:
    "Compute what the classifier gets, in torch."
    with torch.inference_mode():
        maps = model.net.forward_features(model.preprocess(torch.from_numpy(images)))
        return model.net.forward_head(maps, pre_logits=True).numpy()


def write(run: Path, features: bool) -> tuple[Path, object, np.ndarray]:
    "Write a bundle of an untrained network; return it, the network and images."
    torch.manual_seed(0)
    model = create_model("test_resnet", CLASSES, 24).eval()
    save_model(model, run/"train")
    (run/"export").mkdir()
    path = lambda name: run/"export"/name
    fp32: ExportedModels = export_models(dict(trained=model), path)
    images = np.random.default_rng(0).integers(0, 256, (8, 24, 24, 3), dtype=np.uint8)
    int8 = quantize_models(fp32, path, QuantizationData(images, images, np.zeros(8, int)), tolerance=1.0)
    described = [add_features(file) for file in [*fp32.files.values(), *int8.files.values()]] if features else [None]
    details = dict(run="x", shipped=dict(model="trained"), metrics={}, features=described[0], int8=dict(ships=True))
    return write_bundle(run/"bundle", run, "trained", model.spec, list(images[:2]), details), model, images


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, object, np.ndarray]:
    "A bundle with features, its network, and images."
    return write(tmp_path_factory.mktemp("features"), True)


def test_features_are_those_of_torch_and_predictions_stay(written, tmp_path: Path) -> None:
    folder, model, images = written
    plain, *_ = write(tmp_path, False)
    bundle = Bundle.load(folder)
    found = bundle.embed(list(images))
    assert found.shape == (8, *bundle.description["features"]["shape"][1:]) and found.dtype == np.float32
    assert np.allclose(found, torch_features(model, images), atol=1e-4)
    without = Bundle.load(plain)
    assert [p["probabilities"] for p in bundle.predict(list(images))] == \
           [p["probabilities"] for p in without.predict(list(images))]
    with pytest.raises(UsageError, match="returns no features.*export.features=true"): without.embed(images[0])
    bundle.verify()


def test_int8_file_has_features_near_those_of_fp32(written) -> None:
    folder, model, images = written
    found, expected = Bundle.load(folder, "int8").embed(list(images)), torch_features(model, images)
    assert np.corrcoef(found.ravel(), expected.ravel())[0, 1] > 0.95 and not np.allclose(found, expected, atol=1e-6)


def test_files_of_any_size_and_an_empty_list(written, tmp_path: Path) -> None:
    bundle = Bundle.load(written[0])
    rng = np.random.default_rng(0)
    sizes = (24, 24), (40, 31), (24, 24), (9, 60)
    paths = []
    for i, (height, width) in enumerate(sizes):
        paths.append(tmp_path/f"{i}.png")
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(paths[-1])
    together = bundle.embed(paths)
    assert np.allclose(together, np.concatenate([bundle.embed(path) for path in paths]), atol=1e-5)
    assert bundle.embed([]).shape == (0, together.shape[1])


def test_graph_without_a_linear_classifier_is_refused_and_unchanged(tmp_path: Path) -> None:
    x = helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3])
    y = helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])
    graph = helper.make_graph([helper.make_node("Softmax", ["images"], ["probabilities"])], "g", [x], [y])
    file = tmp_path/"model.onnx"
    onnx.save(helper.make_model(graph), file)
    before = file.read_bytes()
    with pytest.raises(CvnbError, match="model.onnx has no vector before its classifier.*features=false"):
        add_features(file)
    assert file.read_bytes() == before
