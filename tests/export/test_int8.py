"""INT8 runs in INT8 throughout, and ships only where it is faster than FP32."""
from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pandas as pd
import pytest
import torch
from bundles import IMAGES, LABELS, write_graph
from torch import nn

from cvnb.core.errors import CvnbError, UsageError
from cvnb.export import runtimes
from cvnb.export.bundle import Bundle, verify_bundle, write_bundle
from cvnb.export.int8_graph import prepare_for_int8
from cvnb.export.onnx import ExportedModels, export_onnx
from cvnb.export.quantize import (
    CALIBRATION_METHODS,
    Int8Decision,
    QuantizationResult,
    QuantizedModels,
    decide_int8,
    quantize,
)
from cvnb.export.runtimes import OnnxModel, open_session
from cvnb.metrics.estimates import Estimate
from cvnb.models.vision_model import ModelSpec
from cvnb.models.weights import create_model

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def mobilenet(tmp_path_factory) -> tuple[Path, np.ndarray]:
    "MobileNetV3 with random weights, exported, and its answers."
    torch.manual_seed(0)
    model = create_model("mobilenetv3_small_050", list("abc"), 32, "full").eval()
    nn.init.normal_(model.net.classifier.weight, std=5.0)
    source = export_onnx(model, tmp_path_factory.mktemp("mobilenet")/"model.onnx")
    return source, OnnxModel(source, 1)(PIXELS)


def run_kinds(path: Path) -> Counter:
    "Count the operations that ONNX Runtime runs, after its own optimization."
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(path.with_suffix(".optimized.onnx"))
    options.log_severity_level = 4
    ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)


def test_mobilenet_v3_enters_int8_once_and_leaves_it_once(mobilenet, tmp_path):
    source, expected = mobilenet
    result = quantize(source, tmp_path/"int8.onnx", PIXELS, PIXELS, expected.argmax(1), tolerance=1.0)
    kinds = run_kinds(tmp_path/"int8.onnx")
    assert (kinds["QuantizeLinear"], kinds["DequantizeLinear"]) == (1, 1), kinds
    assert kinds["QLinearConv"] == len(result.layers) - 1 and not {"HardSwish", "HardSigmoid", "Sigmoid"} & set(kinds)
    found = OnnxModel(tmp_path/"int8.onnx", 1)(PIXELS)
    assert np.abs(found - expected).mean() < 0.1 and not result.fell_back


def test_rewritten_graph_computes_the_same(mobilenet, tmp_path):
    source, expected = mobilenet
    onnx.save(prepare_for_int8(onnx.load(source)), tmp_path/"prepared.onnx")
    assert np.allclose(OnnxModel(tmp_path/"prepared.onnx", 1)(PIXELS), expected, atol=1e-5)


def test_calibration_is_chosen_on_the_validation_images(mobilenet, tmp_path, monkeypatch):
    source, expected = mobilenet
    monkeypatch.setattr("cvnb.export.quantize.has_depthwise_layers", lambda model: False)   # no fourth try
    losses = dict(minmax=-0.3, entropy=-0.1, percentile=-0.2)
    monkeypatch.setattr("cvnb.export.quantize._trial_row", lambda objective, labels, fp32, int8, kept: dict(
        kept_fp32=kept, difference=losses[order.pop(0)], low=0, high=0, n=1))
    order = [*CALIBRATION_METHODS, "entropy"]   # the last one is made again: the file is of another calibration
    result = quantize(source, tmp_path/"int8.onnx", PIXELS, PIXELS, expected.argmax(1), 0.5, method="auto")
    assert result.calibration == "entropy" and result.tries.calibration.tolist() == [*CALIBRATION_METHODS, "entropy"]
    losses["minmax"] = 0.0
    order = ["minmax"]
    result = quantize(source, tmp_path/"int8.onnx", PIXELS, PIXELS, expected.argmax(1), 0.5, method="auto")
    assert result.calibration == "minmax", "nothing is lost, so nothing else is tried"
    with pytest.raises(UsageError, match="no calibration 'minmix'.*minmax"):
        quantize(source, tmp_path/"int8.onnx", PIXELS, PIXELS, expected.argmax(1), method="minmix")


def test_file_that_would_be_fp32_throughout_is_not_written(mobilenet, tmp_path):
    source, expected = mobilenet
    target = tmp_path/"int8.onnx"
    target.write_bytes(b"of an earlier run")
    wrong = (expected.argmax(1) + 1) % 3
    monkey = pytest.MonkeyPatch()
    monkey.setattr("cvnb.export.quantize.layer_sensitivity", lambda *args: dict.fromkeys(["net.conv_stem"], 1.0))
    monkey.setattr("cvnb.export.quantize.weight_layers", lambda model: ["net.conv_stem"])
    result = quantize(source, target, PIXELS, PIXELS, wrong, tolerance=-1.0)
    monkey.undo()
    assert result.fell_back and not target.exists() and "no INT8 file" in str(result)


class Speed:
    "A measurement with a planted ratio."
    def __init__(self, ratio: float): self.ratio = ratio
    def __call__(self, files: dict[str, Path], side: int) -> Speed: return self
    def speed(self, *names: str) -> Estimate: return Estimate(self.ratio, 0.9 * self.ratio, 1.1 * self.ratio, 9)


def quantized(kept: int) -> tuple[QuantizedModels, ExportedModels]:
    "Models of which one has an INT8 file, unless all its layers stay FP32."
    spec = ModelSpec("mean_colour", LABELS, 6, [0.5] * 3, [0.5] * 3)
    model = type("Model", (), dict(spec=spec))()
    layers = ["a", "b"]
    tries = pd.DataFrame([dict(difference=0.0, low=0.0, high=0.0, n=9)])
    files = {} if kept == 2 else dict(trained=Path("trained_int8.onnx"))
    result = QuantizationResult(layers, layers[:kept], tries)
    exported = ExportedModels(dict(trained=model), dict(trained=Path("trained.onnx")), {})
    return QuantizedModels(files, dict(trained=result), {}), exported


@pytest.mark.parametrize("kept, ratio, ships, why", [
    (0, 1.5, True, "1.50 [1.35, 1.65] times the speed"), (0, 0.6, False, "0.60 [0.54, 0.66] times the speed"),
    (0, float("nan"), False, "nan"), (1, 1.5, True, "1.50"), (2, 1.5, False, "all 2 layers stay FP32")])
def test_int8_ships_only_where_it_is_faster(kept: int, ratio: float, ships: bool, why: str):
    decision = decide_int8(*quantized(kept), "trained", Speed(ratio))
    assert decision.ships == ships and why in decision.why and bool(decision.notes) != ships


def bundle_with(tmp_path: Path, decision: Int8Decision) -> Path:
    "Write a bundle whose INT8 file was measured."
    for name in "trained.onnx", "trained_int8.onnx": write_graph(tmp_path/"run/export"/name)
    spec = ModelSpec("mean_colour", LABELS, 6, [0.5] * 3, [0.5] * 3)
    details = dict(run="x", shipped=dict(model="trained"), metrics={}, int8=decision.to_json())
    return write_bundle(tmp_path/"bundle", tmp_path/"run", "trained", spec, IMAGES, details)


def test_bundle_without_int8_is_whole_and_says_why(tmp_path):
    folder = bundle_with(tmp_path, Int8Decision(False, "INT8 runs at 0.60 times the speed of FP32"))
    assert sorted(p.name for p in folder.iterdir()) == ["bundle.json", "labels.txt", "model.onnx", "reference.npz"]
    assert Bundle.load(folder, threads=1).verify()["files"] == 3 and verify_bundle(folder)
    with pytest.raises(UsageError, match="has no int8 file .INT8 runs at 0.60 times.*precision fp32"):
        Bundle.load(folder, "int8")


def test_bundle_that_promises_int8_is_refused_without_it(tmp_path):
    folder = bundle_with(tmp_path, Int8Decision(True, "INT8 runs at 1.5 times the speed of FP32"))
    (folder/"model_int8.onnx").unlink()
    with pytest.raises(CvnbError, match="model_int8.onnx is missing"): Bundle.load(folder, "int8")
    with pytest.raises(CvnbError, match="model_int8.onnx is missing"): verify_bundle(folder)


@pytest.mark.parametrize("flags, exact", [(["avx2", "avx512_vnni"], True), (["avx2", "avx_vnni"], True),
                                          (["avx2", "avx512f"], False), ([], False)])
def test_slow_exact_kernels_are_for_processors_without_vnni(flags: list[str], exact: bool, tmp_path, monkeypatch):
    monkeypatch.setattr(runtimes, "machine_info", lambda: dict(cpu=dict(flags=flags)))
    runtimes.has_exact_int8.cache_clear()
    path = write_graph(tmp_path/"model.onnx")
    options = open_session(path, 1).get_session_options()
    runtimes.has_exact_int8.cache_clear()
    assert runtimes.has_exact_int8.__wrapped__() == exact
    try: found = options.get_session_config_entry("session.x64quantprecision")
    except RuntimeError: found = ""
    assert (found == "1") != exact


def test_int8_without_images_is_refused(mobilenet, tmp_path):
    for calibration, images in (PIXELS[:0], PIXELS), (PIXELS, PIXELS[:0]):
        with pytest.raises(UsageError, match="INT8 needs images"):
            quantize(mobilenet[0], tmp_path/"int8.onnx", calibration, images, np.zeros(len(images), int))


def depthwise_graph(path: Path, rounded: float) -> Path:
    "Write a classifier of brightness: a depthwise layer whose small weights are all rounded in one direction."
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(3, 8, 1)
            self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8)
            self.last = nn.Conv2d(8, 2, 1)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            x = self.first(images.permute(0, 3, 1, 2).float() / 255).relu()
            return self.last(self.depthwise(x).relu()).mean((2, 3)).softmax(1)
    net = Net()
    with torch.no_grad():
        net.first.weight.fill_(1 / 3)
        net.first.bias.zero_()
        net.depthwise.weight.fill_((5 + rounded) / 127)
        net.depthwise.weight[:, :, 0, 0] = 1
        net.depthwise.bias.fill_(0.01)
        net.last.weight[0] = 50.0
        net.last.weight[1] = 0.0
        x = torch.full((1, 32, 32, 3), 128, dtype=torch.uint8)
        net.last.bias[:] = torch.tensor([0.0, 0.0])
        probe = net.first(x.permute(0, 3, 1, 2).float() / 255).relu()
        net.last.bias[1] = float(net.last(net.depthwise(probe).relu()).mean((2, 3))[0, 0])
    torch.onnx.export(net, (x,), path, dynamo=False, input_names=["images"], output_names=["probabilities"],
                      dynamic_axes=dict(images={0: "n", 1: "h", 2: "w"}, probabilities={0: "n"}))
    return path


@pytest.mark.parametrize("rounded, corrected", [(0.45, True), (0.0, False)])
def test_biases_take_back_what_rounded_weights_shift(rounded, corrected, tmp_path):
    source = depthwise_graph(tmp_path/"model.onnx", rounded)
    levels = np.arange(96, 160, dtype=np.uint8)   # around the threshold of 128
    images = np.broadcast_to(levels[:, None, None, None], (64, 32, 32, 3)).copy()
    labels = OnnxModel(source, 1)(images).argmax(1)
    assert 20 < labels.sum() < 44
    result = quantize(source, tmp_path/"int8.onnx", images, images, labels, tolerance=1.0)
    assert result.bias_corrected == corrected
    if corrected:
        before, after = result.tries.difference[:2]
        assert before < -0.02 and after > before
        found = OnnxModel(tmp_path/"int8.onnx", 1)(images).argmax(1)
        assert (found != labels).mean() == pytest.approx(-after), "the corrected file is the one that is kept"
