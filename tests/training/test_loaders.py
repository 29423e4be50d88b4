"""Loaders, optimizers, schedules and predictions."""
from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from fit_helpers import NO_BATCHNORM
from PIL import Image
from train_job import fresh

from cvnb.data.dataset import scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.tables import write_table
from cvnb.evaluate.errors import analyze_errors, prediction_table
from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model
from cvnb.tasks.labels import get_task
from cvnb.training.augment import Augmentation
from cvnb.training.loaders import LabelledImages, TrainLoader, load_splits, show_batch, split_progress
from cvnb.training.optim import SCHEDULES, make_optimizer, make_schedule
from cvnb.training.predict import predict_splits, predict_with_tta


def test_each_process_draws_its_own_changes(data):
    train = replace(data[0], images=data[0].images[:1].repeat(300, 0))
    loaders = [TrainLoader(train, 20, Augmentation("light"), rank=rank, world=2) for rank in (0, 1)]
    one, two = (next(iter(loader))[0] for loader in loaders)
    assert len(one) == len(two) == 10 and not torch.equal(one, two)


def test_batch_of_numbers_shows_each_number():
    data = LabelledImages(np.zeros((2, 8, 8, 3), np.uint8), np.array([[1.0], [0.0]], np.float32))
    figure = show_batch(data, ["value"], task=get_task("regression"))
    assert sorted(axes.get_title() for axes in figure.axes) == ["0", "1"]


def test_single_step_has_the_peak_rate():
    for name in SCHEDULES:
        assert make_schedule(name, 1, 0.25)(0) == 1 and make_schedule(name, 2, 0.5)(0) < 1


def test_schedules_have_their_published_shapes():
    cosine = pytest.approx((1 + np.cos(np.pi / 4)) / 2)
    assert make_schedule("linear", 100, 0)(25) == pytest.approx(0.75) and make_schedule("cosine", 100, 0)(25) == cosine
    assert make_schedule("one-cycle", 100, 0)(25) == cosine and make_schedule("one-cycle", 100, 0.25)(25) == 1


def test_optimizer_gets_its_options():
    net, decays = fresh(NO_BATCHNORM).net, set()
    for group in make_optimizer(net, "adamw", weight_decay=0.3).param_groups:
        decays |= {(p.ndim > 1, group["weight_decay"]) for p in group["params"]}
    assert decays == {(True, 0.3), (False, 0.0)}
    assert make_optimizer(net, "sgd", momentum=0.7).param_groups[0]["momentum"] == 0.7


def test_tta_averages_images_and_mirror_images(data):
    model, val = fresh(NO_BATCHNORM), data[1]
    logits = predict_logits(model, val.images)
    mirrored = predict_logits(model, np.ascontiguousarray(val.images[:, :, ::-1]))
    averaged = predict_with_tta(model, val, "flip", "cpu")
    np.testing.assert_allclose(averaged, (logits + mirrored) / 2, atol=1e-5)
    assert not np.allclose(averaged, logits, atol=1e-3)


def write_images(data: Path) -> None:
    "Write random images of two classes into the three splits; the test has 17 files of 4 images."
    rng = np.random.default_rng(0)
    for split in "train", "val", "test":
        for label in "a", "b":
            (data/split/label).mkdir(parents=True)
            for i in range(2):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(data/f"{split}/{label}/{i}.png")
    for i in range(13): shutil.copy(data/"test/a/0.png", data/f"test/a/copy_{i}.png")


def test_every_figure_counts_each_distinct_image_once(tmp_path):
    "Metrics, the analysis of errors, and the note; the validation without copies is complete."
    write_images(tmp_path/"data")
    table = inspect_images(tmp_path/"data", scan_dataset(tmp_path/"data"))
    manifest = table.assign(tags=[[] for _ in table.index], label_score=np.nan)
    write_table(tmp_path/"manifest.parquet", manifest)
    audit = dict(root=str(tmp_path/"data"), classes=["a", "b"], task="classification")
    splits = load_splits(tmp_path/"manifest.parquet", audit)
    model = create_model(NO_BATCHNORM, ["a", "b"], 16)
    predictions = predict_splits(model, splits, tta="flip", device="cpu")
    assert {name: m.n for name, m in predictions.metrics.items() if "accuracy" in name} == dict(
        accuracy_val=4, accuracy_test=4, balanced_accuracy_val=4, balanced_accuracy_test=4)
    assert all(m.n == 4 for m in predictions.tta_metrics.values())
    found = analyze_errors(prediction_table(predictions.table, manifest, "test"), ["a", "b"], "test")
    assert found.n == found.accuracy.n == found.confusion.to_numpy().sum() == found.per_class.n.sum() == 4
    assert splits.notes == ["test: n = 17, 4 distinct; each distinct image counts once"]
    check_figures_of_splits(model, splits)


def check_figures_of_splits(model, splits):
    "Label all test images as the model does, and all validation images otherwise."
    answers = {split: predict_logits(model, splits.images[split].images).argmax(1) for split in ("val", "test")}
    targets = dict(val=1 - answers["val"], test=answers["test"])
    labelled = splits.images | {split: replace(splits.images[split], targets=t) for split, t in targets.items()}
    found = predict_splits(model, replace(splits, images=labelled), device="cpu").metrics
    assert found["accuracy_val"].value == 0 and found["accuracy_test"].value == 1


def test_progress_over_splits_moves_once_and_names_the_split():
    seen = []
    counts = dict(train=60, val=20, test=20)
    bars = split_progress(lambda fraction, text="": seen.append((round(fraction, 3), text)), counts)
    for bar in bars.values():
        for fraction in 0.0, 0.5, 1.0: bar(fraction, "decoding")
    shares = [share for share, _ in seen]
    assert shares == sorted(shares) and shares[:3] == [0, 0.3, 0.6] and shares[-1] == 1
    assert [text for _, text in seen[::3]] == ["decoding (train)", "decoding (val)", "decoding (test)"]
    assert split_progress(None, dict(train=3)) == dict(train=None)
    assert split_progress(print, dict(train=0)).keys() == {"train"}
