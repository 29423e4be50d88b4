"""Options of a training and their checks: results are compared with values computed without `fit`."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from fit_helpers import (
    BATCHNORM,
    JOB,
    NO_BATCHNORM,
    PLAIN,
    Recorder,
    gpu_out_of_memory,
    out_of_memory_above,
    same_weights,
)
from train_job import CLASSES, fresh
from wandb_file import read_wandb_file

from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.stage import Stage
from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model
from cvnb.pipeline.params import read_contracts
from cvnb.tasks.labels import get_task
from cvnb.training.augment import AUGMENTS
from cvnb.training.fit import fit
from cvnb.training.optim import OPTIMIZERS, SCHEDULES
from cvnb.training.options import BALANCE_MODES, DEVICES, KEEP_MODES, TUNE_MODES
from cvnb.training.tracking import TRACKERS, StepTracker, close_tracker, open_tracker
from cvnb.training.tuning import autotune


@pytest.fixture(scope="module")
def plain_model(data, tmp_path_factory) -> Iterator[VisionModel]:
    "A model trained with few options."
    model = fresh(NO_BATCHNORM)
    fit(model, *data, PLAIN, tmp_path_factory.mktemp("plain"))
    return model


@pytest.mark.parametrize("change", [
    dict(ema=0.9), dict(clip=0.1), dict(mixup=0.4), dict(cutmix=1.0), dict(erasing=1.0), dict(flip=True), dict(shift=2),
    dict(augment="light"), dict(augment="trivial"), dict(balance="sampling"), dict(label_smoothing=0.1),
    dict(resolution=0.5), dict(layer_decay=0.5), dict(weight_decay=0.5), dict(schedule="constant"),
    dict(schedule="linear"), dict(warmup=0.6), dict(seed=1), dict(accumulate=2), dict(optimizer="muon"),
    dict(optimizer="sgd")], ids=str)
def test_option_changes_the_weights(data, plain_model, tmp_path, change):
    model = fresh(NO_BATCHNORM)
    fit(model, *data, replace(PLAIN, **change), tmp_path)
    assert not same_weights(model, plain_model)


def test_stage_offers_every_entry_of_the_tables():
    "The choices of the train stage's parameters are typed in its notebook."
    offered = {p.name: get_args(p.type) for p in read_contracts()["train"].params}
    tables = dict(augment=AUGMENTS, optimizer=OPTIMIZERS, schedule=SCHEDULES, tracking=TRACKERS, device=DEVICES,
                  tune=TUNE_MODES, balance=BALANCE_MODES, keep=KEEP_MODES)
    for name, table in tables.items(): assert offered[name] == tuple(table), name


@pytest.mark.parametrize("option", ["device", "tune", "balance", "keep"])
def test_value_outside_of_a_table_is_refused(data, tmp_path, option):
    with pytest.raises(UsageError, match=f"{option} 'other' is none of .*, "):
        fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, **{option: "other"}), tmp_path)


def test_bfloat16_learns(data, tmp_path, plain_model):
    half = fresh(NO_BATCHNORM)
    history = fit(half, *data, replace(PLAIN, precision="bf16-mixed"), tmp_path)
    assert not same_weights(plain_model, half) and history.val_accuracy.iloc[-1] > 0.5


def describe_digit(digit: int) -> str:
    "List what a digit is made of."
    names = ["even" if digit % 2 == 0 else "odd"]
    if digit in (0, 6, 8, 9): names.append("round")
    if digit > 4: names.append("large")
    return "|".join(names)


def task_labels(name: str, data: tuple) -> list[pd.Series]:   # of the training and validation images
    "Label digits for a task: with what they are made of, or with the amount of ink."
    if name == "multilabel": return [pd.Series(map(describe_digit, part.targets)) for part in data]
    return [pd.Series(part.images.mean((1, 2, 3)) / 100).map("{:.3f}".format) for part in data]


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_other_tasks_are_trained(data, tmp_path, name):
    task, labels = get_task(name), task_labels(name, data)
    classes = task.classes(labels[0])
    train, val = (replace(part, targets=task.encode(text, classes)) for part, text in zip(data, labels))
    torch.manual_seed(0)
    model = create_model(NO_BATCHNORM, classes, 16, task=name, **task.target_scale(train.targets))
    history = fit(model, train, val, replace(PLAIN, epochs=6), tmp_path)
    assert history[f"val_{task.main_metric}"].iloc[-1] > 0.6, history


def test_regression_refuses_options_for_classes(data, tmp_path):
    train, val = (replace(part, targets=part.targets[:, None].astype(np.float32)) for part in data)
    scale = get_task("regression").target_scale(train.targets)
    model = create_model(NO_BATCHNORM, ["value"], 16, task="regression", **scale)
    for options in dict(balance="weights"), dict(mixup=0.2), dict(cutmix=1.0):
        with pytest.raises(UsageError, match="regression has no classes to balance or to mix. Use balance=none"):
            fit(model, train, val, replace(PLAIN, **options), tmp_path)


def test_halved_batch_uses_full_images_at_the_end(data, tmp_path):
    "The training that starts anew sees the same sizes as the first attempt would have."
    model, hungry = fresh(NO_BATCHNORM), out_of_memory_above(25, gpu_out_of_memory)
    with pytest.warns(UserWarning, match="2 batches of 25"):
        history = fit(model, *data, replace(PLAIN, resolution=0.5), tmp_path, hungry)
    accuracy = (predict_logits(model, data[1].images).argmax(1) == data[1].targets).mean()
    assert model.preprocess.size == 16 and accuracy == pytest.approx(history.val_accuracy.iloc[-1])


def test_batch_that_cannot_be_halved_raises(data, tmp_path):
    def starved_loss(logits, targets, images): raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.warns(UserWarning), pytest.raises(CvnbError, match="out of memory with a batch of 3. Give a smaller"):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, starved_loss)


def test_tracker_gets_all_epochs_of_a_halved_training(data, tmp_path):
    "Memory runs out in the third epoch: the epochs of the second attempt are logged from the first one on."
    seen = []

    def hungry_loss(logits, targets, images):
        seen.append(len(images))
        if len(images) == 50 and seen.count(50) > 2 * 6: raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.cross_entropy(logits, targets)

    stage = Stage("train", tmp_path/"run", dict(batch_size=50))
    tracker, options = open_tracker(stage), replace(PLAIN, epochs=3, resolution=0.5)
    with pytest.warns(UserWarning, match="2 batches of 25"):
        history = fit(fresh(NO_BATCHNORM), *data, options, stage.dir, hungry_loss, logger=tracker,
                      callbacks=[StepTracker()])
    close_tracker(tracker)
    tracked = read_wandb_file(stage.run/stage.environment["wandb"]["folder"])
    logged = [row["epoch/val_loss"] for row in tracked["history"] if "epoch/val_loss" in row]
    assert logged[-3:] == history.val_loss.to_list() and len(logged) > 3    # before them, those of the first attempt
    assert tracked["config"]["batch_size"] == 25
    assert history.attrs["changed"][0] == dict(option="batch_size", picked=25, why="out of memory")


def test_resolution_that_a_network_cannot_use_is_refused(data, tmp_path):
    model = create_model("vit_tiny_patch16_224", CLASSES, 32, "full")   # accepts a single size
    enlarged = (replace(part, images=part.images.repeat(2, 1).repeat(2, 2)) for part in data)
    with pytest.raises(UsageError, match="resolution=0.5: vit_tiny_patch16_224 .*16 pixels.*Use resolution=1"):
        fit(model, *enlarged, replace(PLAIN, resolution=0.5), tmp_path)


def test_missing_classes_stop_training_or_become_notes(data, tmp_path):
    train, val = data
    without = lambda part: part.take(np.flatnonzero(part.targets != 4))
    with pytest.raises(CvnbError, match="no training image has the class 4.*Add some"):
        fit(fresh(NO_BATCHNORM), without(train), val, PLAIN, tmp_path)
    history = fit(fresh(NO_BATCHNORM), train.take(np.arange(60)), without(val), replace(PLAIN, batch_size=64), tmp_path)
    assert "split val has the class 4" in history.attrs["notes"][0]
    assert "larger than the 60 training images" in history.attrs["notes"][1]
    with pytest.raises(CvnbError, match="no image is in the split val"):
        fit(fresh(NO_BATCHNORM), train, val.take(np.arange(0)), PLAIN, tmp_path)


def test_missing_label_of_several_stops_training(data, tmp_path):
    tagged = [replace(part, targets=np.eye(10, dtype=np.float32)[part.targets]) for part in data]
    incomplete = tagged[0].take(np.flatnonzero(data[0].targets != 7))
    model = create_model(NO_BATCHNORM, CLASSES, 16, task="multilabel")
    with pytest.raises(CvnbError, match="no training image has the class 7"):
        fit(model, incomplete, tagged[1], PLAIN, tmp_path)


def test_gpu_options_are_refused_on_a_cpu(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    cases = {"torch finds no GPU": dict(device="gpu"), "16-mixed needs a GPU.*bf16-mixed": dict(precision="16-mixed")}
    for text, options in cases.items():
        with pytest.raises(CvnbError, match=text): fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, **options), tmp_path)
        with pytest.raises(CvnbError, match=text):
            autotune(replace(PLAIN, batch_size=0, lr=0, **options), fresh(NO_BATCHNORM), data[0], tmp_path)


@pytest.mark.slow
def test_missing_compiler_is_explained(data, tmp_path):
    env = os.environ | dict(CC="/nonexistent/cc", CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path/"cache"))
    options = json.dumps(dict(epochs=1, batch_size=50, device="cpu", compile=True))
    command = [sys.executable, JOB, tmp_path, options, NO_BATCHNORM]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    for text in "CvnbError: torch could not compile the network", "Use compile=false":
        assert text in done.stderr, done.stderr[-2000:]


class RowsLogger:
    "A logger that keeps what it gets."
    def __init__(self): self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics: dict, step: int) -> None: self.rows.append((step, metrics))


def test_linear_probe_names_the_options_it_ignores(data, tmp_path):
    options, logger, progress = replace(PLAIN, tune="probe", mixup=0.2, balance="sampling"), RowsLogger(), Recorder()
    history = fit(fresh(BATCHNORM), *data, options, tmp_path, logger=logger, progress=progress)
    assert progress.done[0] == 0 and progress.done[-1] == 1 and len(progress.done) > 5
    note, = history.attrs["notes"]
    assert "mixup=0.2" in note and "balance=sampling" in note and "augment" not in note, note
    logged = [(step, row["epoch"], row["epoch/val_loss"]) for step, row in logger.rows]
    assert logged == [(1, 1, history.val_loss[0])]
    weighted = fit(fresh(BATCHNORM), *data, replace(options, balance="weights"), tmp_path)
    assert "balance" not in str(weighted.attrs["notes"])
    with pytest.raises(UsageError, match="a linear probe has the task.s own loss"):
        fit(fresh(BATCHNORM), *data, options, tmp_path, lambda logits, targets, images: logits.sum())


def test_linear_probe_refuses_a_network_with_more_than_a_linear_head(data, tmp_path):
    "This network has a normalisation between its features and its classifier."
    model = create_model("shvit_s1", CLASSES, 32)
    with torch.no_grad(): model.net.head.bn.running_mean += 1
    enlarged = [replace(part, images=part.images.repeat(2, 1).repeat(2, 2)) for part in data]
    with pytest.raises(UsageError, match="shvit_s1 are not those of a linear head on its features. Use tune=full"):
        fit(model, *enlarged, replace(PLAIN, tune="probe"), tmp_path)


def test_head_first_keeps_the_statistics_of_batch_norm(data, tmp_path):
    model = fresh(BATCHNORM)
    fit(model, *data, replace(PLAIN, tune="head_first"), tmp_path)
    before = fresh(BATCHNORM).state_dict()
    running = [name for name in before if "running_" in name]
    assert running and all(torch.equal(model.state_dict()[name], before[name]) for name in running)


def test_images_that_fill_no_batch_are_counted(data, tmp_path):
    "With the batch size that uses nearly all, where that is worth it."
    notes = lambda n, **changes: fit(fresh(NO_BATCHNORM), data[0].take(np.arange(n)), data[1], replace(
        PLAIN, epochs=1, batch_size=64, **changes), tmp_path/f"{n} {changes}").attrs["notes"]
    left_out = [note for note in notes(127) if note.startswith("an epoch uses 64 of the 127 training images")]
    assert len(left_out) == 1 and left_out[0].endswith("(with batch_size=63 it would use 126)")
    assert not any("an epoch uses" in note for n in (128, 60) for note in notes(n))
    assert not any("an epoch uses" in note for note in notes(127, balance="sampling") + notes(127, tune="probe"))
