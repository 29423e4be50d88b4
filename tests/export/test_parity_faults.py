"""A fault planted in preprocessing is found by parity in every runtime, over images much larger than the network's."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pandas as pd
import pytest
import torch
from hard_images import CLASSES, DECODING, FILES, READER_FAULTS, SIDE, TOLERANCE, write_images
from onnx import helper, numpy_helper

from cvnb.core.errors import CvnbError
from cvnb.export import pixels
from cvnb.export.onnx import export_models
from cvnb.export.parity import REFERENCE_RUNTIME, ParityReport, check_parity
from cvnb.export.portable_graph import write_runtime_graphs
from cvnb.export.runtimes import RUNTIMES, read_pixels
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model, save_model

ONNX_FILES = {name: r for name, r in RUNTIMES.items()
              if r.in_parity and r.precision == "fp32" and r.file.endswith(".onnx") and r.device == "cpu"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisionModel]:
    "A run with the files of every runtime at hand, and its model, whose answers change with each image."
    run = tmp_path_factory.mktemp("run")
    write_images(run)
    torch.manual_seed(0)
    model = create_model("test_resnet", CLASSES, SIDE).eval()
    with torch.no_grad(): model.net.get_classifier().weight *= 30
    save_model(model, run/"train")
    (run/"export").mkdir()
    path = lambda name: run/"export"/name
    exported = export_models(dict(trained=model), path)
    write_runtime_graphs(dict(trained=model), exported.files, [read_pixels(run/name, DECODING) for name in FILES], path)
    return run, model


@pytest.fixture
def run(whole: tuple[Path, VisionModel], tmp_path: Path) -> Path:
    "A copy of the run."
    return Path(shutil.copytree(whole[0], tmp_path/"run"))


def compare(run: Path, model: VisionModel) -> ParityReport:
    "Compare every runtime with torch."
    test = pd.DataFrame(dict(path=FILES, label=(CLASSES * len(FILES))[:len(FILES)]))
    return check_parity(dict(trained=model), run, run, test, CLASSES, DECODING)


def gap(report: ParityReport, runtime: str) -> float: return report.results["trained"][runtime].max_difference


def before_all(graph: onnx.GraphProto, *nodes: onnx.NodeProto) -> None:
    "Put nodes that turn `images` into `planted` in front of a graph."
    for node in graph.node: node.input[:] = ["planted" if name == "images" else name for name in node.input]
    rest = [*graph.node]
    del graph.node[:]
    graph.node.extend([*nodes, *rest])


def swap_red_and_blue(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array([2, 1, 0]), "bgr"))
    before_all(graph, helper.make_node("Gather", ["images", "bgr"], ["planted"], axis=3))


def change_the_mean(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node if node.op_type == "Sub" for name in node.input}
    mean = next(w for w in graph.initializer if w.name in used and list(w.dims) == [1, 3, 1, 1])
    mean.CopyFrom(numpy_helper.from_array(np.full((1, 3, 1, 1), 60, np.float32), mean.name))


def resize_without_antialiasing(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        if node.op_type == "Resize":
            for attribute in node.attribute:
                if attribute.name in ("antialias", "exclude_outside"): attribute.i = 0
        if node.name.endswith("_support_Max"): node.input[0] = node.input[1]


def read_as_channels_first(graph: onnx.GraphProto) -> None:
    graph.initializer.append(numpy_helper.from_array(np.array([0, 3, 1, 2]), "order"))
    before_all(graph, helper.make_node("Shape", ["images"], ["sizes"]),
               helper.make_node("Gather", ["sizes", "order"], ["wrong"], axis=0),
               helper.make_node("Reshape", ["images", "wrong"], ["first"]),
               helper.make_node("Transpose", ["first"], ["planted"], perm=[0, 2, 3, 1]))


GRAPH_FAULTS: dict[str, Callable[[onnx.GraphProto], None]] = {
    "BGR": swap_red_and_blue, "mean": change_the_mean, "resize": resize_without_antialiasing,
    "layout": read_as_channels_first}


@pytest.mark.parametrize("runtime", ONNX_FILES)
def test_every_runtime_agrees_on_images_larger_than_the_network(whole, runtime: str) -> None:
    if not RUNTIMES[runtime].installed: pytest.skip(f"package {RUNTIMES[runtime].package} is not installed")
    run, model = whole
    report = compare(run, model)
    assert report.require(TOLERANCE) == [] and gap(report, runtime) <= TOLERANCE
    expected = report.answers["trained"][REFERENCE_RUNTIME]
    assert np.array_equal(report.answers["trained"][runtime], expected)
    assert report.decodings.largest == "1000 × 700" and report.decodings.n_deep == 1
    assert set(report.decodings.orientations) == {"1", "6"}


@pytest.mark.parametrize("fault", GRAPH_FAULTS)
@pytest.mark.parametrize("runtime", ONNX_FILES)
def test_fault_in_the_graph_is_found(runtime: str, fault: str, run: Path, whole, monkeypatch) -> None:
    if not RUNTIMES[runtime].installed: pytest.skip(f"package {RUNTIMES[runtime].package} is not installed")
    for other in [n for n in reversed(RUNTIMES) if n not in {REFERENCE_RUNTIME, runtime}]:
        monkeypatch.delitem(RUNTIMES, other)
    file = RUNTIMES[runtime].model_path(run, "trained")
    model = onnx.load(file)
    GRAPH_FAULTS[fault](model.graph)
    onnx.save(model, file)
    report = compare(run, whole[1])
    assert gap(report, runtime) > 5 * TOLERANCE
    with pytest.raises(CvnbError, match=rf"{runtime} differs from torch by .* the preprocessing in the graph") as e:
        report.require(TOLERANCE)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("fault", READER_FAULTS)
def test_fault_of_the_reader_is_found_in_every_runtime(fault: str, whole, monkeypatch) -> None:
    run, model = whole
    function, instead = READER_FAULTS[fault]
    monkeypatch.setattr(pixels, function, instead)
    report = compare(run, model)
    worst = {"EXIF": "turned.jpg", "depth": "deep.png"}[fault]
    for runtime in ONNX_FILES.keys() & report.results["trained"].keys():
        assert gap(report, runtime) > TOLERANCE and report.results["trained"][runtime].worst == worst, runtime
    with pytest.raises(CvnbError, match=f"the bundle decodes {worst} .* otherwise than training"):
        report.require(TOLERANCE)


def test_openvino_with_onnx_resize_is_found_on_large_images(run: Path, whole) -> None:
    if not RUNTIMES["openvino fp32"].installed: pytest.skip("package openvino is not installed")
    shutil.copy(run/"export/trained.onnx", run/"export/trained_openvino.onnx")
    report = compare(run, whole[1])
    assert gap(report, "openvino fp32") > 5 * TOLERANCE and gap(report, "onnx fp32") <= TOLERANCE
    assert report.require(TOLERANCE, "trained")[0].startswith("trained, openvino fp32 differs from torch by ")
