"""LiteRT: the resize outside of its file, its environment, its parity, planted faults, and what is missing."""
from __future__ import annotations

import shutil
import sys
import sysconfig
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import torch
from hard_images import CLASSES, DECODING, FILES, READER_FAULTS, SIDE, TOLERANCE, write_images

from cvnb.benchmark.table import list_candidates, list_left_out
from cvnb.benchmark.workers import Candidate, RuntimeWorker
from cvnb.core.errors import CvnbError
from cvnb.data.images import resize_images
from cvnb.export import environments, pixels
from cvnb.export.bundle import Bundle, verify_bundle, write_bundle
from cvnb.export.litert import load_litert, resize_with_products
from cvnb.export.onnx import export_models
from cvnb.export.other_formats import describe_formats, write_litert, write_other_formats
from cvnb.export.parity import ParityReport, check_parity
from cvnb.export.runtimes import MODELS, RUNTIMES, load_torch, predict_files, read_pixels
from cvnb.models.vision_model import Preprocess, VisionModel
from cvnb.models.weights import create_model, save_model

NAME = "litert fp32"


@pytest.mark.parametrize(("height", "width"), [(700, 1000), (31, 33), (20, 15), (1, 200), (64, 32)])
def test_resize_in_numpy_is_that_of_training(height: int, width: int) -> None:
    images = np.random.default_rng(0).integers(0, 256, (2, height, width, 3), dtype=np.uint8)
    apart = np.abs(resize_with_products(images, 32).astype(int) - resize_images(torch.from_numpy(images), 32).numpy())
    assert apart.max() <= 1 and (apart > 0).mean() < 0.002


def test_litert_is_named_nowhere_unless_its_file_is_there(tmp_path: Path) -> None:
    for folder in *MODELS.values(), "export": (tmp_path/folder).mkdir()
    assert not any(c.runtime.name == NAME for c in list_candidates(tmp_path))
    assert not any(NAME in name for name in list_left_out(tmp_path))
    (tmp_path/"export/trained.tflite").write_bytes(b"")
    assert f"trained, {NAME}" in {c.name for c in list_candidates(tmp_path)} | list_left_out(tmp_path).keys()


@pytest.fixture
def no_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "A cache without environments, and a machine without uv; the folder that PATH names."
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    (tmp_path/"bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path/"bin"))
    monkeypatch.setattr(sys, "executable", str(tmp_path/"python"))
    return tmp_path/"bin"


def test_without_uv_or_network_one_line_per_model_is_said_and_the_stage_goes_on(no_environment: Path) -> None:
    models = {name: create_model("test_resnet", CLASSES, SIDE) for name in MODELS}
    folder = no_environment.parent
    write = lambda: write_other_formats("litert", models, folder, lambda name: folder/name)
    found = write()
    assert found.files == {} and [n.partition(": ")[0] for n in found.notes] == [f"{m}, {NAME}" for m in MODELS]
    assert all("uv, which makes a converter's environment, is not installed" in n for n in found.notes)
    (no_environment/"uv").write_text("#!/bin/sh\necho 'warning: x' >&2\necho 'error: Failed to fetch y' >&2\nexit 1\n")
    (no_environment/"uv").chmod(0o755)
    found = write()
    assert all("cannot be made (error: Failed to fetch y)" in n and "\n" not in n for n in found.notes)
    assert not [*(folder/"cache/environments").iterdir()], "half an environment looks like a whole one"
    assert write_other_formats("none", models, folder, lambda name: folder/name).notes == []


def test_file_is_refused_where_nothing_runs_it(no_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvnb.export.litert.find_spec", lambda name: None)
    assert not RUNTIMES["litert fp32"].installed
    with pytest.raises(CvnbError, match="package ai_edge_litert is not installed. pip install ai-edge-litert"):
        load_litert(no_environment/"x.tflite")


def test_packages_of_the_environment_come_behind_those_of_the_process(
    no_environment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    folder = environments.environment_folder("litert")
    where = Path(sysconfig.get_path("purelib", vars=dict(base=str(folder), platbase=str(folder))))
    (where/"numpy").mkdir(parents=True)
    (where/"only_there.py").write_text("value = 7\n")
    environments.add_packages("litert")
    environments.add_packages("litert")
    assert sys.path.count(str(where)) == 1 and import_module("only_there").value == 7
    assert Path(find_spec("numpy").origin) == Path(np.__file__)


def test_pins_name_every_package_once_and_no_address() -> None:
    lines = [line for line in (environments.asset_folder("converters")/"litert.txt").read_text().splitlines()
             if line and not line.startswith("#")]
    assert all("==" in line and "://" not in line for line in lines)
    names = [line.partition(" ;")[0] for line in lines]
    assert len(set(names)) == len(names) and {"litert-torch", "ai-edge-litert", "torch"} <= {
        n.partition("==")[0] for n in names}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, VisionModel]:
    "A run with the files of ONNX Runtime and LiteRT."
    run = tmp_path_factory.mktemp("litert")
    write_images(run)
    torch.manual_seed(0)
    model = create_model("test_resnet", CLASSES, SIDE).eval()
    with torch.no_grad(): model.net.get_classifier().weight *= 30
    save_model(model, run/"train")
    (run/"export").mkdir()
    path = lambda name: run/"export"/name
    export_models(dict(trained=model), path)
    shutil.copy(path("trained.onnx"), path("trained_int8.onnx"))
    formats = write_other_formats("litert", dict(trained=model), run/"export", path)
    assert formats.notes == [] and "uint8 (1, 32, 32, 3)" in repr(formats)
    return run, model, formats


def compare(run: Path, model: VisionModel) -> ParityReport:
    test = pd.DataFrame(dict(path=FILES, label=(CLASSES * len(FILES))[:len(FILES)]))
    return check_parity(dict(trained=model), run, run, test, CLASSES, DECODING)


@pytest.mark.long
def test_litert_agrees_on_images_of_every_size_and_ships(whole, tmp_path: Path) -> None:
    run, model, formats = whole
    report = compare(run, model)
    assert report.require(TOLERANCE) == []
    found = report.results["trained"][NAME]
    assert found.max_difference <= TOLERANCE and found.same.value == 1
    described = describe_formats(formats, "trained", found)
    details = dict(run="x", shipped=dict(model="trained"), metrics={}, formats=described)
    images = [read_pixels(run/name, DECODING) for name in FILES[1:4]]
    make = lambda name: write_bundle(tmp_path/name, run, "trained", model.spec, images, details, DECODING,
                                     {"model.tflite": formats.files["trained"]})
    bundle = make("bundle")
    said = Bundle.load(bundle).description["formats"]["litert"]
    assert said["input"] == dict(dtype="uint8", shape=[1, SIDE, SIDE, 3]) and "fixed size" in said["preprocessing"]
    assert "model.tflite" in [r["subject"] for r in verify_bundle(bundle) if r["check"] == "digest"]
    again = make("again")
    assert {p.name: p.read_bytes() for p in bundle.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}
    (bundle/"model.tflite").write_bytes(b"damaged")
    with pytest.raises(CvnbError, match="model.tflite is missing or not the file"): verify_bundle(bundle)


TORCH_FAULTS: dict[str, Callable] = {   # what training's preprocessing does instead, in the converted file
    "BGR": lambda self, images: ((images.flip(3).permute(0, 3, 1, 2).float()) - self.mean) / self.std,
    "mean": lambda self, images: (images.permute(0, 3, 1, 2).float() - self.mean / 2) / self.std,
    "layout": lambda self, images: (images.reshape(1, 3, SIDE, SIDE).float() - self.mean) / self.std}


@pytest.mark.long
@pytest.mark.parametrize("fault", [*TORCH_FAULTS, "resize", *READER_FAULTS])
def test_planted_fault_is_found(fault: str, whole, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Path(shutil.copytree(whole[0], tmp_path/"run"))
    if fault in TORCH_FAULTS:
        with monkeypatch.context() as planted:
            planted.setattr(Preprocess, "forward", TORCH_FAULTS[fault])
            write_litert(whole[1], run/"export/trained.tflite")
    if fault in READER_FAULTS: monkeypatch.setattr(pixels, *READER_FAULTS[fault])
    nearest = lambda images, side: images[:, (np.arange(side) * images.shape[1]) // side][
        :, :, (np.arange(side) * images.shape[2]) // side]
    if fault == "resize": monkeypatch.setattr("cvnb.export.litert.resize_with_products", nearest)
    report = compare(run, whole[1])
    assert report.results["trained"][NAME].max_difference > 2 * TOLERANCE
    with pytest.raises(CvnbError): report.require(TOLERANCE)


@pytest.mark.long
def test_damaged_file_is_one_line(whole, tmp_path: Path) -> None:
    (tmp_path/"x.tflite").write_bytes(b"no model")
    with pytest.raises(CvnbError, match=r"LiteRT cannot run .*x\.tflite") as e: load_litert(tmp_path/"x.tflite")
    assert "\n" not in str(e.value)
    assert RUNTIMES[NAME].is_offered(whole[0], "trained") and not RUNTIMES[NAME].is_offered(tmp_path, "trained")


@pytest.mark.long
def test_time_of_litert_is_measured_in_one_process(whole, tmp_path: Path) -> None:
    run = whole[0]
    images = [read_pixels(run/name, DECODING) for name in FILES[1:4]]
    np.savez(tmp_path/"images.npz", **{f"image_{i}": image for i, image in enumerate(images)})
    candidate = Candidate("trained", RUNTIMES[NAME], str(run/"export/trained.tflite"))
    assert candidate in list_candidates(run)
    files = [str(run/name) for name in FILES]
    with RuntimeWorker(candidate, tmp_path/"images.npz", files, DECODING) as worker:
        worker.load()
        worker.call("time", n=20, batch_size=1, warm_up=2, round_number=0)
        children = psutil.Process().children(recursive=True)
        others = [child for child in children if any("litert.py" in part for part in child.cmdline())]
        found = worker.call("classify", paths=files, decoding=DECODING.to_json())
    assert not others   # the CPU time of another process would not be counted
    assert found == predict_files(load_torch(run/"train"), files, DECODING).argmax(1).tolist()
