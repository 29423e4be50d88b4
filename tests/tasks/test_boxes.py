"""A task whose targets are lists of boxes: identity, batches, augmentation, predictions and validation."""
from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cvnb.core.errors import UsageError
from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import ModelSpec, VisionModel, check_image_size, task_of
from cvnb.tasks.labels import TASKS, Task
from cvnb.training.augment import Augmentation
from cvnb.training.loaders import LabelledImages, TrainLoader, show_batch
from cvnb.training.module import SequentialLoader, TrainingModule
from cvnb.training.options import FitOptions


def pad_boxes(boxes: Tensor, n: int) -> Tensor:
    "Fill boxes (…, M, 4) with rows of -1 up to `n`."
    return F.pad(boxes, (0, 0, 0, n - boxes.shape[-2]), value=-1)


class Boxes(Task):
    "Boxes as left, top, right and bottom; a label is '0 0 0.5 0.5;0.5 0 1 1', and may be empty."
    name = "boxes"
    main_metric = "closeness"
    output_name = "boxes"
    has_classes = False
    geometric_augmentation = False

    def classes(self, labels: pd.Series, paths: Sequence[str] | None = None) -> list[str]: return ["box"]

    def output_shape(self, classes: list[str]) -> list[int | str]: return ["batch", "boxes", 4]

    def encode(self, labels: pd.Series, classes: list[str], paths: Sequence[str] | None = None) -> np.ndarray:
        targets = np.empty(len(labels), object)
        for i, label in enumerate(labels):
            targets[i] = [[float(v) for v in box.split()] for box in label.split(";") if box]
        return targets

    def collate_targets(self, targets: np.ndarray, index: np.ndarray | Tensor) -> Tensor:
        return self.concatenate([torch.tensor(targets[i]).reshape(1, -1, 4) for i in np.asarray(index)])

    def concatenate(self, batches: Sequence[Tensor]) -> Tensor:
        most = max(batch.shape[1] for batch in batches)
        return torch.cat([pad_boxes(batch, most) for batch in batches])

    def average_mirrored(self, logits: np.ndarray, mirrored: np.ndarray) -> np.ndarray:
        back = mirrored.copy()
        back[..., 0], back[..., 2] = 1 - mirrored[..., 2], 1 - mirrored[..., 0]
        return np.where(logits >= 0, (logits + back) / 2, logits)

    def loss(self, logits: Tensor, targets: Tensor, smoothing: float = 0.0, weights: Tensor | None = None) -> Tensor:
        most = max(logits.shape[1], targets.shape[1])
        return (pad_boxes(logits, most) - pad_boxes(targets, most)).abs().mean()

    def predict(self, logits: Tensor) -> Tensor: return logits

    def score(self, logits: Tensor, targets: Tensor) -> float: return -self.loss(logits, targets).item()

    def metrics(self, logits: np.ndarray, targets: np.ndarray) -> dict: return {}

    def prediction_table(self, classes: list[str], rows: pd.DataFrame, logits: np.ndarray) -> pd.DataFrame: return rows

    def strata(self, labels: pd.Series, ranges: int = 10, paths: Sequence[str] | None = None) -> pd.Series:
        return labels.str.count(";").astype(str)


class MovingBoxes(Boxes):
    "Boxes that are mirrored together with their images."
    geometric_augmentation = True

    def augment_batch(self, images: Tensor, targets: Tensor, augment: Callable, generator: torch.Generator) -> tuple:
        boxes = targets.clone()
        boxes[..., 0], boxes[..., 2] = 1 - targets[..., 2], 1 - targets[..., 0]
        return images.flip(2), torch.where(targets < 0, targets, boxes)


class DrawsBoxes(nn.Module):
    "Return as many boxes as the brightest image of a batch has tens of grey levels; those of other images are -1."
    def forward(self, x: Tensor) -> Tensor:   # (B, 3, S, S) -> (B, M, 4)
        counts = (x.mean((1, 2, 3)) * 255 / 10).round().long()
        numbers = torch.arange(max(int(counts.max()), 1))
        boxes = torch.where(numbers < counts[:, None], numbers / 10, -1)
        return boxes[..., None].expand(-1, -1, 4)


LABELS = pd.Series(["0 0 0.5 0.5", "0 0 0.25 1;0.5 0 1 1", "", "0.5 0.5 1 1"])
COUNTS = (1, 2, 0, 3)   # boxes that `DrawsBoxes` returns


def box_images(labels: pd.Series = LABELS) -> LabelledImages:
    "Make grey images with boxes."
    images = np.empty((len(labels), 8, 8, 3), np.uint8)
    images[:] = 10 * np.array(COUNTS, np.uint8)[:, None, None, None]
    return LabelledImages(images, Boxes().encode(labels, ["box"]), [f"{i}.png" for i in range(len(labels))])


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> VisionModel:
    "A model of the task, whose network returns boxes."
    monkeypatch.setitem(TASKS, "boxes", Boxes)
    spec = ModelSpec("boxes", ["box"], 8, [0.0] * 3, [1.0] * 3, task="boxes")
    net = DrawsBoxes()
    net.register_parameter("unused", nn.Parameter(torch.zeros(1)))
    return VisionModel(spec, net)


def test_equal_boxes_have_equal_identities() -> None:
    data = box_images()
    assert data.identity == box_images().identity
    assert data.identity != box_images(LABELS.replace("0 0 0.5 0.5", "0 0 0.5 0.75")).identity
    assert data.identity != box_images(LABELS.replace("", "0 0 1 1")).identity
    kept = data.take(np.array([1, 3]))
    assert kept.targets.tolist() == [data.targets[1], data.targets[3]] and kept.identity != data.identity


def test_arrays_of_boxes_are_identified_by_content_and_shape() -> None:
    def identity(*boxes: np.ndarray) -> str:
        targets = np.empty(len(boxes), object)
        targets[:] = boxes
        return LabelledImages(np.zeros((len(boxes), 8, 8, 3), np.uint8), targets).identity

    one, none = np.zeros((1, 4), np.float32), np.zeros((0, 4), np.float32)
    assert identity(one, none) == identity(one.copy(), none.copy()) != identity(none, one)
    assert identity(one, none) != identity(one.ravel(), none) and identity(one, none) != identity(one.astype(int), none)


def test_batches_of_boxes_are_padded() -> None:
    data = box_images()
    images, targets, index = next(iter(TrainLoader(data, 4, Augmentation(erasing=1.0), task=Boxes())))
    assert targets.shape == (4, 2, 4) and len(images) == 4
    for boxes, i in zip(targets, index.tolist()):
        assert boxes[boxes[:, 0] >= 0].tolist() == data.targets[i]
    assert [len(targets[0]) for _, targets in SequentialLoader(data, Boxes(), 2)] == [2, 1]


def test_batch_of_boxes_is_shown_with_its_numbers() -> None:
    titles = [axes.get_title() for axes in show_batch(box_images(), ["box"], task=Boxes()).axes]
    assert len(titles) == 4 and "0 0 0.5 0.5 -1 -1 -1 -1" in titles


@pytest.mark.parametrize("change", [
    dict(augment=Augmentation("light")), dict(augment=Augmentation("trivial")), dict(augment=Augmentation(flip=True)),
    dict(augment=Augmentation(shift=1)), dict(mixup=0.2), dict(cutmix=0.2)])
def test_changes_that_move_boxes_are_refused(change: dict) -> None:
    with pytest.raises(UsageError, match="the targets of the task boxes cannot be mirrored") as e:
        TrainLoader(box_images(), 4, task=Boxes(), **change)
    assert "augment_batch" in e.value.remedy


def test_task_can_move_its_boxes_with_the_images() -> None:
    data = box_images(pd.Series(["0 0 0.25 1"] * 4))
    _, targets, _ = next(iter(TrainLoader(data, 4, Augmentation(flip=True), task=MovingBoxes())))
    assert targets.tolist() == [[[0.75, 0, 1, 1]]] * 4


def test_predicted_boxes_of_several_batches_are_joined(model: VisionModel) -> None:
    check_image_size(model)
    data = box_images()
    logits = predict_logits(model, data.images, batch_size=2)
    assert logits.shape == (4, 3, 4) and (logits[..., 0] >= 0).sum(1).tolist() == list(COUNTS)
    assert np.array_equal(logits, predict_logits(model, data.images, batch_size=4))
    mirrored = Boxes().average_mirrored(logits, logits)
    assert mirrored.shape == logits.shape and np.array_equal(mirrored < 0, logits < 0)


def test_other_outputs_than_boxes_are_refused(model: VisionModel) -> None:
    model.net = nn.Sequential(model.net, nn.Flatten())
    with pytest.raises(UsageError, match="outputs of the shape"): check_image_size(model)


def test_boxes_are_validated_over_all_batches(model: VisionModel) -> None:
    module, task = TrainingModule(model, FitOptions()), task_of(model.spec)
    data = box_images()
    for i, batch in enumerate(SequentialLoader(data, task, 2)): module.validation_step(batch, i)
    logits = torch.from_numpy(predict_logits(model, data.images))
    expected = float(task.loss(logits, task.collate_targets(data.targets, np.arange(4))))
    assert module.compute_validation_metrics() == dict(val_loss=expected, val_closeness=-expected)


def test_image_with_an_infinite_box_is_named(model: VisionModel) -> None:
    module, task = TrainingModule(model, FitOptions()), task_of(model.spec)
    data = box_images()
    logits = torch.zeros(4, 2, 4)
    logits[2, 1, 3] = torch.inf
    targets = task.collate_targets(data.targets, np.arange(4))
    assert module._find_culprits(logits, targets, None).tolist() == [False, False, True, False]
    assert task.are_finite(logits).tolist() == [True, True, False, True]
