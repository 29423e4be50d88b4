"""Interrupted trainings: they resume from their last checkpoint and end like an uninterrupted training."""
from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from fit_helpers import (
    BATCHNORM,
    CVNB,
    NO_BATCHNORM,
    PLAIN,
    Interrupts,
    Recorder,
    SpoilsThirdEpoch,
    curves,
    kill_with_children,
    out_of_memory_above,
    same_weights,
)
from train_job import CLASSES, fresh

from cvnb.core.errors import CvnbError
from cvnb.core.files import read_json, sha256_file
from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model, save_model
from cvnb.training import fit as fit_module
from cvnb.training.fit import fit
from cvnb.training.options import FitOptions
from cvnb.training.tracking import StepTracker

RICH = FitOptions(epochs=3, batch_size=30, lr=5e-3, device="cpu", tune="head_first", optimizer="muon", ema=0.9,
                  mixup=0.2, cutmix=0.5, erasing=0.3, balance="sampling", accumulate=2, clip=1.0, keep="best",
                  resolution=0.5, augment="light", shift=1)


def call_in_fork(function: Callable[[], object]) -> int:   # id of the process
    "Call a function in a fork of this process, which has no imports to repeat."
    if pid := os.fork(): return pid
    try:
        torch.set_num_threads(1)
        function()
        os._exit(0)
    finally: os._exit(1)


def kill_after_saves(pid: int, checkpoint: Path, saves: int, seconds: float) -> int:   # steps in the last checkpoint
    "Let a training write some checkpoints and continue for some seconds, and kill it."
    seen = {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else {0}
    while len(seen) <= saves:
        assert not os.waitpid(pid, os.WNOHANG)[0], "the training ended before it was killed"
        with contextlib.suppress(FileNotFoundError): seen.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_killed_training_gives_the_same_result_as_without_interruption(data, tmp_path, monkeypatch):
    "With many options on, and kills within an epoch: weights, predictions and curves are the same."
    whole, resumed, rng = fresh(BATCHNORM), fresh(BATCHNORM), random.Random(5)
    expected = fit(whole, *data, RICH, tmp_path/"whole")
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    checkpoint = tmp_path/"cut/checkpoints/last.ckpt"
    steps = []
    for saves in 2, 3, 2, 2:
        pid = call_in_fork(lambda: fit(fresh(BATCHNORM), *data, RICH, tmp_path/"cut"))
        steps.append(kill_after_saves(pid, checkpoint, saves, rng.random() * 0.05))
    assert steps == sorted(steps) and any(step % 5 for step in steps), steps     # five steps make an epoch
    history = fit(resumed, *data, RICH, tmp_path/"cut")
    assert same_weights(whole, resumed) and curves(history).equals(curves(expected))
    assert (predict_logits(whole, data[1].images) == predict_logits(resumed, data[1].images)).all()
    assert sha256_file(tmp_path/"whole/history.csv") == sha256_file(tmp_path/"cut/history.csv")


class ReadableCSVLogger(pl.loggers.CSVLogger):
    "A CSV logger whose columns can be read."
    def column(self, name: str) -> list[float]:
        self.save()
        return pd.read_csv(Path(self.log_dir)/"metrics.csv")[name].dropna().to_list()


@pytest.mark.parametrize("options", [dict(ema=0.9), dict(lr=0.0, epochs=9, patience=2), dict(keep="best")], ids=str)
def test_completed_training_returns_the_same_result_again(data, tmp_path, options, monkeypatch):
    "A stage can be killed between the last checkpoint and its files."
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    options = replace(PLAIN, **options)
    first, again, progress = fresh(BATCHNORM), fresh(BATCHNORM), Recorder()
    expected = fit(first, *data, options, tmp_path/"run")
    logger = ReadableCSVLogger(tmp_path)
    history = fit(again, *data, options, tmp_path/"run", progress=progress, logger=logger, callbacks=[StepTracker()])
    assert same_weights(first, again) and curves(history).equals(curves(expected)) and progress.done == [1.0]
    assert logger.column("epoch/val_loss") == expected.val_loss.to_list()
    assert history.attrs["notes"] == expected.attrs["notes"]


def test_patience_continues_after_kills(data, tmp_path, monkeypatch):
    "Early stopping decides before an epoch is saved, so a resumed training has the same patience left."
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    options = replace(PLAIN, epochs=9, lr=0.0, patience=3)
    expected = fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"whole")
    for epochs in 1, 2, 3:
        with pytest.raises(SystemExit):
            fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"cut", callbacks=[Interrupts(epochs)])
    history = fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"cut")
    assert len(history) == len(expected) == 4 and curves(history).equals(curves(expected))


def test_resumed_training_knows_its_best_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    options = replace(PLAIN, epochs=3, keep="best")
    with pytest.raises(SystemExit): fit(fresh(BATCHNORM), *data, options, tmp_path, callbacks=[Interrupts(2)])
    model = fresh(BATCHNORM)
    history = fit(model, *data, options, tmp_path, callbacks=[SpoilsThirdEpoch()])
    accuracy = (predict_logits(model, data[1].images).argmax(1) == data[1].targets).mean()
    assert accuracy == pytest.approx(history.val_accuracy.max()) and accuracy > history.val_accuracy.iloc[-1] + 0.1


@pytest.mark.parametrize("tune", ["full", "head_first"])
def test_interrupted_model_can_be_passed_again(data, tmp_path, tune):
    "As in a notebook whose cell was interrupted and is run once more."
    options = replace(PLAIN, tune=tune, resolution=0.5)
    whole, cut, progress = fresh(BATCHNORM), fresh(BATCHNORM), Recorder()
    expected = fit(whole, *data, options, tmp_path/"whole")
    with pytest.raises(SystemExit): fit(cut, *data, options, tmp_path/"cut", callbacks=[Interrupts()])
    assert same_weights(cut, fresh(BATCHNORM)) and cut.preprocess.size == 16
    history = fit(cut, *data, options, tmp_path/"cut", progress=progress)
    first_epoch = min(done for done, text in zip(progress.done, progress.texts) if "epoch" in text)
    assert first_epoch > 0.5 and same_weights(whole, cut) and curves(history).equals(curves(expected))


class SmoothedLoss:
    "A loss with an identity."
    def __init__(self, smoothing: float): self.smoothing, self.identity = smoothing, f"smoothing {smoothing}"

    def __call__(self, logits, targets, images):
        return torch.nn.functional.cross_entropy(logits, targets, label_smoothing=self.smoothing)


def test_other_loss_or_validation_images_start_a_new_training(data, tmp_path):
    train, val = data

    def train_again(criterion: object, val: object) -> tuple[pd.DataFrame, bool]:   # history; whether it resumed
        progress, options = Recorder(), replace(PLAIN, keep="best")
        history = fit(fresh(NO_BATCHNORM), train, val, options, tmp_path, criterion, progress)
        return curves(history), min(progress.done) > 0.5

    first, _ = train_again(SmoothedLoss(0.0), val)
    again, resumed = train_again(SmoothedLoss(0.0), val)
    assert again.equals(first) and resumed
    other, resumed = train_again(SmoothedLoss(0.5), val)
    assert not other.equals(first) and not resumed
    _, resumed = train_again(SmoothedLoss(0.5), val.take(np.arange(90)))
    assert not resumed


def test_changed_image_starts_new_training(data, tmp_path):
    train, val = data
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), train, val, PLAIN, tmp_path, callbacks=[Interrupts()])
    images, progress = train.images.copy(), Recorder()
    images[7, 3, 3] ^= 1
    fit(fresh(NO_BATCHNORM), replace(train, images=images), val, PLAIN, tmp_path, progress=progress)
    assert min(progress.done) < 0.5


def test_other_backbone_starts_new_training(data, tmp_path):
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, callbacks=[Interrupts()])
    assert (tmp_path/"checkpoints/last.ckpt").exists()
    progress = Recorder()
    history = fit(fresh(BATCHNORM), *data, PLAIN, tmp_path, progress=progress)
    assert min(progress.done) < 0.5 and len(history) == 2


def test_damaged_weights_are_refused(tmp_path):
    save_model(fresh(NO_BATCHNORM), tmp_path)
    file = tmp_path/"model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CvnbError, match="model.safetensors"): create_model(NO_BATCHNORM, CLASSES, 16, weights=str(file))


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    "The process that started the tests may ignore SIGINT."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressesCtrlC(pl.Callback):
    "Interrupt the second epoch."
    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1: signal.raise_signal(signal.SIGINT)


def test_ctrl_c_interrupts_the_call_only(data, tmp_path, ctrl_c):
    "A second Ctrl-C works too, and the same call resumes."
    whole, model, progress = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), Recorder()
    fit(whole, *data, PLAIN, tmp_path/"whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="call again to resume"):
            fit(model, *data, PLAIN, tmp_path/"cut", callbacks=[PressesCtrlC()])
    fit(model, *data, PLAIN, tmp_path/"cut", progress=progress)
    assert min(progress.done) >= 0.5 and same_weights(model, whole)


def test_changed_code_starts_new_training(data, tmp_path, monkeypatch, ctrl_c):
    "A checkpoint of code with a fault is not used after the fault was corrected."
    def train_first_epoch() -> list[float]:
        progress = Recorder()
        with pytest.raises(KeyboardInterrupt):
            fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, progress=progress, callbacks=[PressesCtrlC()])
        return progress.done

    assert train_first_epoch() and not train_first_epoch()     # the second call resumes after the first epoch
    monkeypatch.setattr(fit_module, "code_fingerprint", lambda *_: "corrected")
    assert train_first_epoch()


@pytest.fixture
def interrupted(data, tmp_path) -> Path:
    "A folder with the checkpoint of a training that was interrupted after its first epoch."
    with pytest.raises(SystemExit):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path/"cut", callbacks=[Interrupts()])
    return tmp_path/"cut"


def reason_to_restart(folder: Path, *data: object, model: object = None, options: FitOptions = PLAIN) -> str:
    "Train, and return what was announced before the first progress; empty for a training that resumes."
    said = []

    def progress(done: float, text: str, **_: object) -> None: raise SystemExit("begun")

    with pytest.raises(SystemExit):
        fit(model or fresh(NO_BATCHNORM), *data, options, folder, progress=progress, announce=said.append)
    return "".join(said)


def test_training_that_resumes_announces_nothing(data, interrupted):
    assert reason_to_restart(interrupted, *data) == ""


def test_changed_option_is_named_before_the_training_begins(data, interrupted):
    expected = "training begins anew, its checkpoint (epochs finished: 1) is not used: "
    said = reason_to_restart(interrupted, *data, options=replace(PLAIN, lr=0.001, epochs=3))
    assert said == expected + "epochs changed from 2 to 3; lr changed from 0.005 to 0.001"


def test_changed_images_and_weights_are_named(data, interrupted):
    train = replace(data[0], targets=data[0].targets[::-1].copy())
    torch.manual_seed(7)
    other = create_model(NO_BATCHNORM, CLASSES, 16)
    said = reason_to_restart(interrupted, train, data[1], model=other)
    assert said.endswith(": the starting weights changed; the training images or their labels changed")


def test_changed_functions_and_packages_are_named(data, interrupted, monkeypatch):
    parts = fit_module.code_parts(fit_module._TRAINING_CODE, *fit_module._TRAINING_PACKAGES)
    functions = parts["functions"] | {"training.optim.make_optimizer": "0", "training.new": "1"}
    monkeypatch.setattr(fit_module, "code_parts", lambda *_: dict(
        functions=functions, packages=parts["packages"] | dict(torch="9.9")))
    said = reason_to_restart(interrupted, *data)
    assert "cvnb.training.new is new; cvnb.training.optim.make_optimizer changed; torch changed from" in said
    assert said.endswith('to "9.9"')


def test_checkpoint_of_an_older_version_is_named(data, interrupted):
    record = interrupted/"checkpoints/training.json"
    record.write_text('{"identity": "0", "halved": 0}')
    assert reason_to_restart(interrupted, *data).endswith("is not used: an earlier version of cvnb wrote it")


def cpu_out_of_memory() -> Exception:
    return RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")


def test_resumed_training_keeps_its_halved_batch(data, tmp_path):
    hungry = out_of_memory_above(25, cpu_out_of_memory)
    whole, resumed = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    with pytest.warns(UserWarning, match="2 batches of 25"):
        expected = fit(whole, *data, PLAIN, tmp_path/"whole", hungry)
    with pytest.warns(UserWarning), pytest.raises(SystemExit):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path/"cut", hungry, callbacks=[Interrupts()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = fit(resumed, *data, PLAIN, tmp_path/"cut", hungry)
    assert same_weights(whole, resumed) and curves(history).equals(curves(expected))
    assert history.attrs["notes"] == expected.attrs["notes"] == ["out of memory: 2 batches of 25 now make a step"]


def cvnb_train(run: Path) -> list[object]: return [CVNB, "run", "train", "--run", run]


@pytest.mark.slow
def test_killed_stage_resumes(smoke_run, tmp_path):
    "The notebook starts anew, the training resumes."
    run, env = tmp_path/"run", os.environ | dict(CVNB_SAVE_EVERY="0")
    run.mkdir()
    shutil.copytree(smoke_run/"audit", run/"audit")
    shutil.copy(smoke_run/"run.json", run)
    process = subprocess.Popen(cvnb_train(run), env=env, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run/"train/checkpoints/last.ckpt").exists(): time.sleep(0.002)
    kill_with_children(process)
    steps = torch.load(run/"train/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert steps and not (run/"train/stage.json").exists()
    done = subprocess.run(cvnb_train(run), capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    for name in "model.safetensors", "predictions.parquet", "history.csv":
        assert sha256_file(run/"train"/name) == sha256_file(smoke_run/"train"/name), name
    earlier, = read_json(run/"train/stage.json")["environment"]["wandb"]["earlier"]   # restored from the checkpoint
    assert next((run/"train/wandb").glob(f"offline-run-*-{earlier}"))
