"""A small bundle, made without training."""
from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from cvnb.export.bundle import write_bundle
from cvnb.models.vision_model import ModelSpec

LABELS = ["cat", "dog", "owl"]
SHAPE = ["batch", "height", "width", 3]
rng = np.random.default_rng(0)
IMAGES = [rng.integers(0, 256, (6, 5 + i % 3, 3), dtype=np.uint8) for i in range(4)]


def write_graph(
    path: Path,                                          # ONNX file to write
    end: Callable[[], list[onnx.NodeProto]] | None = None,   # nodes from "logits" to "probabilities"
    given: str = "images",                               # name of the input
    weights: dict[str, np.ndarray] | None = None,        # that `end` needs
    labels: list[str] = LABELS,
) -> Path:
    "Write a small classifier of mean colours."
    nodes = [helper.make_node("Cast", [given], ["pixels"], to=TensorProto.FLOAT),
             helper.make_node("ReduceMean", ["pixels", "sides"], ["means"], keepdims=0),
             helper.make_node("MatMul", ["means", "weight"], ["logits"])]
    nodes += end() if end else [helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1)]
    arrays = dict(sides=np.array([1, 2]), weight=np.linspace(-0.2, 0.3, 9, dtype=np.float32).reshape(3, 3))
    tensors = [numpy_helper.from_array(a, name) for name, a in (arrays | (weights or {})).items()]
    values = [helper.make_tensor_value_info(given, TensorProto.UINT8, SHAPE),
              helper.make_tensor_value_info("probabilities", TensorProto.FLOAT, ["batch", 3])]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:1], values[1:], tensors),
                              opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    helper.set_model_props(model, dict(task="classification", labels=json.dumps(labels)))
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(model, path)
    return path


def make_bundle(
    run: Path,   # run directory, which gets the files
) -> Path:       # the bundle
    "Write a bundle of the small classifier."
    for name in "trained.onnx", "trained_int8.onnx": write_graph(run/"export"/name)
    spec = ModelSpec("mean_colour", LABELS, 6, [0.5] * 3, [0.5] * 3)
    details = dict(run="x", shipped=dict(model="trained"), metrics={})
    return write_bundle(run/"bundle", run, "trained", spec, IMAGES, details)
