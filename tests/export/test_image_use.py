"""Which images a model was trained, calibrated and tested on: watched where they are used, and recorded by digest."""
from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image

from cvnb.core.errors import CvnbError
from cvnb.core.files import digest
from cvnb.core.stage import Stage
from cvnb.data.dataset import locate_data, scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.split_names import SPLITS
from cvnb.data.splits import IMAGE_ROLES, assign_splits, record_images
from cvnb.data.tables import write_table
from cvnb.export import quantize
from cvnb.export.onnx import export_models
from cvnb.export.parity import check_parity
from cvnb.models.weights import create_model
from cvnb.training.fit import fit
from cvnb.training.loaders import SplitImages, load_splits
from cvnb.training.options import FitOptions
from cvnb.training.predict import predict_splits

SIDE = 8   # pixels, that of the files, so that no image is resized


def contents(images: Any) -> set[str]:
    "Digest each image of a batch (N, H, W, 3), an array or a tensor."
    return {hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest() for image in np.asarray(images)}


@dataclass
class Watch(pl.Callback):
    "Collect the images that a training sees."
    train: set[str] = field(default_factory=set)
    val: set[str] = field(default_factory=set)

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: tuple, number: int) -> None:
        self.train |= contents(batch[0])

    def on_validation_batch_start(self, trainer: pl.Trainer, module: Any, batch: tuple, *_: int) -> None:
        self.val |= contents(batch[0])


@dataclass
class Used:
    "The images that each step got, by content, and the stage that recorded them."
    files: dict[str, set[str]]   # split -> images of the manifest, decoded here
    seen: dict[str, set[str]]    # step -> images that reached it
    stage: Stage


def write_run(folder: Path) -> tuple[Path, dict, dict[str, set[str]]]:   # manifest, audit, split -> contents of files
    "Write an audit of sixty digits."
    root = folder/"photos"
    for label in "1", "7":
        (root/label).mkdir(parents=True)
        for path in sorted((locate_data("digits")/label).iterdir())[:30]: shutil.copy(path, root/label)
    table = assign_splits(inspect_images(root, scan_dataset(root)), val=0.2, test=0.2)
    audit = dict(root=str(root), classes=["1", "7"], task="classification")
    decode = lambda path: np.asarray(Image.open(root/path).convert("RGB"))
    files = {split: contents([decode(path) for path in table.path[table.split == split]]) for split in SPLITS}
    assert decode(table.path[0]).shape == (SIDE, SIDE, 3) and all(files.values())
    return write_table(folder/"manifest.parquet", table), audit, files


def use_images(folder: Path, patch: pytest.MonkeyPatch) -> Used:
    "Train, predict, calibrate and compare, as the stages do."
    manifest, audit, files = write_run(folder)
    stage = Stage("train", folder/"run")
    seen: dict[str, set[str]] = {}
    data = load_splits(manifest, audit, image_size=SIDE)
    record_images(stage, data.rows["train"], "weights", images=data.images["train"].images)
    record_images(stage, data.rows["val"], "epoch", images=data.images["val"].images)
    model = create_model("test_resnet", data.classes, SIDE, "small")
    watch = Watch()
    options = FitOptions(epochs=1, batch_size=len(data.rows["train"]), augment="none", device="cpu")
    fit(model, data.images["train"], data.images["val"], options, stage.dir, callbacks=[watch])
    seen |= dict(train=watch.train, val=watch.val)
    record_images(stage, data.rows["test"], "report", images=data.images["test"].images)
    with watching(model) as seen["predicted"]: predict_splits(model, data, device="cpu")
    return Used(files, seen | export_and_compare(model, data, stage, patch), stage)


@contextlib.contextmanager
def watching(model: torch.nn.Module) -> Iterator[set[str]]:
    "Collect the images that a model gets."
    seen: set[str] = set()
    hook = model.register_forward_pre_hook(lambda module, args: seen.update(contents(args[0])))
    yield seen
    hook.remove()


def export_and_compare(
    model: Any, data: SplitImages, stage: Stage, patch: pytest.MonkeyPatch,
) -> dict[str, set[str]]:   # "calibration", "layers", "compared by torch"
    "Quantize and compare a model, and collect the images that this takes."
    calibration: set[str] = set()
    next_batch = quantize.CalibrationReader.get_next

    def watched(reader: quantize.CalibrationReader) -> dict[str, np.ndarray] | None:
        batch = next_batch(reader)
        calibration.update(contents(batch["images"] if batch else []))
        return batch

    patch.setattr(quantize.CalibrationReader, "get_next", watched)
    (stage.run/"export").mkdir(parents=True)
    path = lambda name: stage.run/"export"/name
    exported = export_models(dict(trained=model), path)
    rows = data.rows
    images = quantize.load_quantization_data(data.root, rows["train"], rows["val"], data.classes, SIDE, 16, 50)
    record_images(stage, images.calibration_rows, "calibration", images=images.calibration)
    record_images(stage, images.validation_rows, "layers", images=images.images)
    quantize.quantize_models(exported, path, images)
    with watching(model) as by_torch:
        check_parity(dict(trained=model), stage.run, data.root, rows["test"], data.classes)
    return {"calibration": calibration, "layers": contents(images.images), "compared by torch": by_torch}


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Used:
    "A model that was trained, predicted with, calibrated and compared."
    with pytest.MonkeyPatch.context() as patch: return use_images(tmp_path_factory.mktemp("used"), patch)


def test_training_calibration_and_test_share_no_image(used: Used) -> None:
    seen = used.seen
    for name in "train", "val", "calibration", "layers":
        for test in used.files["test"], seen["compared by torch"]:
            assert not seen[name] & test, f"an image of {name} is one of the test"
    assert not seen["train"] & (seen["val"] | seen["layers"]) and not seen["calibration"] & seen["val"]


def test_each_step_uses_the_images_of_its_split(used: Used) -> None:
    files = used.files
    assert used.seen["train"] == files["train"] and used.seen["val"] == files["val"]
    assert used.seen["predicted"] == files["val"] | files["test"]
    assert used.seen["compared by torch"] == files["test"]
    assert used.seen["calibration"] < files["train"] and len(used.seen["calibration"]) == 16
    assert used.seen["layers"] == files["val"]


def test_recorded_digests_are_of_the_images_that_were_used(used: Used) -> None:
    steps = dict(weights="train", epoch="val", calibration="calibration", layers="layers", report="compared by torch")
    assert used.stage.images.keys() == steps.keys()
    for role, step in steps.items():
        assert used.stage.images[role]["pixels"] == digest(sorted(used.seen[step])), role
        assert used.stage.images[role]["n"] == len(used.seen[step]), role


def test_nothing_is_chosen_on_test_images() -> None:
    on_test = {role for role, use in IMAGE_ROLES.items() if use.split == "test"}
    assert on_test == {"acceptance", "report"}
    by_training = {role for role, use in IMAGE_ROLES.items() if use.split == "train"}
    assert by_training == {"weights", "calibration", "peer"}


ROWS = pd.DataFrame(dict(split=["train", "train"], pixel_sha256=["a", "b"]))


def test_images_of_another_split_or_number_are_not_recorded(tmp_path: Path) -> None:
    stage = Stage("train", tmp_path)
    with pytest.raises(CvnbError, match="train uses images of train for its report, which test decides"):
        record_images(stage, ROWS, "report")
    mixed = pd.concat([ROWS, ROWS.assign(split="test")])
    with pytest.raises(CvnbError, match="train uses images of test for its weights"):
        record_images(stage, mixed, "weights")
    with pytest.raises(CvnbError, match="train uses 3 images for its weights, and the manifest has 2"):
        record_images(stage, ROWS, "weights", images=np.zeros((3, 4, 4, 3), np.uint8))
    assert stage.images == {}
