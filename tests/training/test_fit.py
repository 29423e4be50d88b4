"""Training with several processes, after kills, and with something wrong: what must come out is known from an ordinary training."""
from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import pytorch_lightning as pl
import torch
from train_job import CLASSES, digits, fresh

from cvnb.training import tuning
from cvnb.training import cross_validation as folds
from cvnb.training import fit as training
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import read_json, sha256_file
from cvnb.core.stage import Stage
from cvnb.data.splits import assign_folds
from cvnb.training.cross_validation import cross_validate
from cvnb.training.loaders import Labelled
from cvnb.models.vision_model import VisionModel
from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model
from cvnb.tasks.labels import get_task as task_named
from cvnb.training.tracking import TrackSteps, close_tracker, open_tracker, read_tracked
from cvnb.training.options import FitOptions
from cvnb.training.module import DataModule
from cvnb.training.callbacks import History
from cvnb.training.fit import fit
from cvnb.training.tuning import find_batch_size, find_lr, settle

JOB = Path(__file__).with_name("train_job.py")
CVNB = Path(sys.executable).with_name("cvnb")
NO_BATCHNORM, BATCHNORM = "test_mambaout", "test_efficientnet"   # timm's smallest networks
ONE_THREAD = dict(OMP_NUM_THREADS="1")   # for jobs that are compared with what this process computes: bits depend on it
PLAIN = FitOptions(epochs=2, batch_size=50, lr=5e-3, augment="none", device="cpu")
TWO = replace(PLAIN, devices=2, strategy="ddp_fork")
RICH = FitOptions(epochs=3, batch_size=30, lr=5e-3, device="cpu", tune="head_first", optimizer="muon", ema=0.9, mixup=0.2, cutmix=0.5, erasing=0.3,
                  balance="sampling", accumulate=2, clip=1.0, keep="best", resolution=0.5, augment="light", shift=1)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    "Two processes on two cores: as many threads as processes would wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> tuple[Labelled, Labelled]:
    return digits()


def same(a: VisionModel, b: VisionModel) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def curves(history: pd.DataFrame) -> pd.DataFrame: return history.drop(columns="images_per_s")


# What is told meanwhile

def test_the_end_is_told_with_the_last_epochs_figures(data, tmp_path, monkeypatch):
    "A bar that is full after the last batch would not take the figures that come after it."
    monkeypatch.setattr(History.__init__, "__defaults__", (None, 0.0))   # every batch is told
    told = []
    fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, progress=lambda done, text, **curves: told.append((done, len(curves["loss_val"]))))
    assert len(told) > 10 and [n for done, n in told if done >= 1] == [2] and told[-1][0] == 1


# Several processes

def test_two_processes_match_one(data, tmp_path):
    "The batch is shared, so that two processes do what one does, but for rounding. Batch norm would see half of it each: this network has none."
    one, two, told = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), []
    alone = fit(one, *data, PLAIN, tmp_path/"one")
    shared = fit(two, *data, TWO, tmp_path/"two", progress=lambda done, text, **curves: told.append((os.getpid(), done, curves)))
    moved = max(float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), fresh(NO_BATCHNORM).state_dict().values()))
    apart = max(float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    assert apart < 1e-4 < 1e-2 < moved and alone.val_accuracy.iloc[-1] > 0.5
    np.testing.assert_allclose(curves(alone).to_numpy(), curves(shared).to_numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(predict_logits(one, data[1].images), predict_logits(two, data[1].images), atol=1e-3)
    assert (pd.read_csv(tmp_path/"two/history.csv").to_numpy() == curves(shared).to_numpy()).all()     # one line an epoch, and the table's
    assert {pid for pid, _, _ in told} == {os.getpid()} and told[-1][1] == 1 and len(told[-1][2]["loss_val"]) == 2
    assert "2 forked processes" in shared.attrs["notes"][-1]


def test_two_processes_weigh_rare_classes_as_one_does(data, tmp_path):
    "Each process sees other classes in its share of a batch; what they weigh is the same."
    train, val = data
    rare = train.take(np.flatnonzero((train.labels < 3) | (np.arange(len(train)) % 3 == 0)))
    one, two, plain = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    fit(one, rare, val, replace(PLAIN, balance="weights"), tmp_path/"one")
    fit(two, rare, val, replace(TWO, balance="weights"), tmp_path/"two")
    fit(plain, rare, val, PLAIN, tmp_path/"plain")
    apart = lambda other: max(float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), other.state_dict().values()))
    assert apart(two) < 1e-4 < 1e-3 < apart(plain)


class KillsItself(pl.Callback):
    "End a process as a power cut would."
    def __init__(self, rank: int, step: int): self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_process_of_two_is_killed(data, tmp_path, rank):
    "Each has batch norm's statistics of its own images; what validates, is saved and returned are the first one's."
    options, whole, resumed = replace(TWO, ema=0.9, keep="best", augment="light"), fresh(BATCHNORM), fresh(BATCHNORM)
    expected = fit(whole, *data, options, tmp_path/"whole")
    with pytest.raises(CvnbError, match="a training process was ended by SIGKILL.*go on from the last checkpoint"):
        fit(fresh(BATCHNORM), *data, options, tmp_path/"cut", callbacks=[KillsItself(rank, 9)])
    assert len(pd.read_csv(tmp_path/"cut/history.csv")) == 1
    seen = []
    history = fit(resumed, *data, options, tmp_path/"cut", progress=lambda done, *_, **__: seen.append(done))
    assert min(seen) > 0.5 and same(whole, resumed) and curves(history).equals(curves(expected))


def torchrun(folder: Path, options: FitOptions, backbone: str, job: Path = JOB) -> subprocess.Popen:
    asked = {k: v for k, v in asdict(options).items() if v != getattr(FitOptions(), k)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", job, folder, json.dumps(asked), backbone]
    how = dict(stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=os.environ | ONE_THREAD)
    return subprocess.Popen(command, start_new_session=True, **how)


def kill_all(process: subprocess.Popen) -> None:
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for p in family:
        with contextlib.suppress(psutil.NoSuchProcess): p.kill()
    psutil.wait_procs(family, 20)
    process.wait()


@pytest.mark.slow
def test_torchrun_is_killed_and_goes_on(data, tmp_path):
    "Every process is killed after the first epoch; in the end both have the weights that two forks have."
    options, forked = replace(TWO, ema=0.9, epochs=4), fresh(BATCHNORM)
    expected = fit(forked, *data, options, tmp_path/"forked")
    first = torchrun(tmp_path/"run", replace(options, strategy="ddp"), BATCHNORM)
    while first.poll() is None and not (tmp_path/"run/checkpoints/last.ckpt").exists(): time.sleep(0.005)
    assert first.poll() is None, first.stderr.read()
    kill_all(first)
    assert 1 <= len(pd.read_csv(tmp_path/"run/history.csv")) < 4
    second = torchrun(tmp_path/"run", replace(options, strategy="ddp"), BATCHNORM)
    assert second.wait(200) == 0, second.stderr.read()
    for folder in tmp_path/"run", tmp_path/"run/other":
        found = torch.load(folder/"weights.pt", weights_only=True)
        assert all(torch.equal(found[k], v) for k, v in forked.state_dict().items())
        assert json.loads((folder/"history.json").read_text()) == json.loads(curves(expected).to_json(orient="records", double_precision=15))


@pytest.mark.slow
def test_tasks_of_slurm(data, tmp_path):
    "Slurm starts a process for each task, and says so in the environment."
    forked, asked = fresh(NO_BATCHNORM), json.dumps(dict(epochs=2, batch_size=50, lr=5e-3, augment="none", device="cpu", devices=2))
    fit(forked, *data, TWO, tmp_path/"forked")
    job = dict(SLURM_JOB_ID="4321", SLURM_JOB_NAME="digits", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2", SLURM_NNODES="1", SLURM_NODEID="0",
               SLURM_NODELIST="localhost")
    tasks = [subprocess.Popen([sys.executable, JOB, tmp_path/"run", asked, NO_BATCHNORM], stderr=subprocess.PIPE, text=True,
                              env=os.environ | ONE_THREAD | job | dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i))) for i in range(2)]
    for task in tasks: assert task.wait(200) == 0, task.stderr.read()
    for folder in tmp_path/"run", tmp_path/"run/other":
        found = torch.load(folder/"weights.pt", weights_only=True)
        assert all(torch.equal(found[k], v) for k, v in forked.state_dict().items())


@pytest.mark.slow
def test_fsdp_gives_whole_weights(data, tmp_path):
    "Each process trains its part of every parameter; both have all of them in the end, and the matrices had their decay."
    options, alone = replace(PLAIN, weight_decay=1.0, keep="best"), fresh(NO_BATCHNORM)
    fit(alone, *data, options, tmp_path/"one")
    process = torchrun(tmp_path/"run", replace(options, devices=2, strategy="fsdp"), NO_BATCHNORM, JOB.with_name("fsdp_job.py"))
    assert process.wait(200) == 0, process.stderr.read()
    for folder in tmp_path/"run", tmp_path/"run/other":
        found = torch.load(folder/"weights.pt", weights_only=True)
        assert max(float((found[k] - v).abs().max()) for k, v in alone.state_dict().items()) < 1e-4


@pytest.mark.slow
def test_spawned_processes(data, tmp_path):
    "A script may have its processes spawned; everything has to be sent to them."
    options, forked = replace(TWO, ema=0.9), fresh(BATCHNORM)
    fit(forked, *data, options, tmp_path/"forked")
    asked = dict(epochs=2, batch_size=50, lr=5e-3, augment="none", device="cpu", devices=2, strategy="ddp_spawn", ema=0.9)
    subprocess.run([sys.executable, JOB, tmp_path/"spawned", json.dumps(asked), BATCHNORM], check=True, timeout=200, env=os.environ | ONE_THREAD)
    found = torch.load(tmp_path/"spawned/weights.pt", weights_only=True)
    assert all(torch.equal(found[k], v) for k, v in forked.state_dict().items())


def test_forks_after_threads(data, tmp_path):
    "Torch's threads do not come along into a fork, which would wait for them for ever."
    torch.set_num_threads(2)
    try:
        x = torch.randn(800, 800)
        assert (x @ x).isfinite().all()
        assert len(fit(fresh(NO_BATCHNORM), *data, replace(TWO, epochs=1), tmp_path)) == 1
    finally: torch.set_num_threads(1)


def test_a_fork_says_what_is_wrong(data, tmp_path):
    "Its error arrives here as an error, not as its text."
    bad = lambda logits, labels, images: torch.where(labels == 3, torch.nan, logits.sum(-1)).mean()
    with pytest.raises(CvnbError, match=r"^the loss is nan in epoch 1, batch 1 \(images: digit_\d+\.png"):
        fit(fresh(NO_BATCHNORM), *data, TWO, tmp_path, bad)

    def hungry(logits, labels, images):
        if len(images) > 12: raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.cross_entropy(logits, labels)
    with pytest.warns(UserWarning, match="2 batches of 24 now make a step"):
        fed = fit(fresh(NO_BATCHNORM), *data, replace(TWO, epochs=1), tmp_path, hungry)
    assert fed.attrs["notes"][-1] == "out of memory: 2 batches of 24 now make a step" and len(fed) == 1


def test_what_several_processes_cannot_do(data, tmp_path, monkeypatch):
    def refuse(error: type, text: str, **options: object) -> None:
        with pytest.raises(error, match=text): fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, **options), tmp_path)
    refuse(CvnbError, "fsdp spreads a network over GPUs.*strategy=ddp", strategy="fsdp", device="cpu")
    for needs in dict(ema=0.9), dict(clip=1.0), dict(optimizer="muon"): refuse(UsageError, "needs whole parameters", strategy="fsdp", **needs)
    refuse(UsageError, "batch_size 51 cannot be shared by 2 devices. Use batch_size=50", devices=2, batch_size=51)
    monkeypatch.delattr(sys, "ps1", raising=False)              # which a notebook of another test leaves
    refuse(UsageError, "Lightning refuses.*dpp", devices=2, strategy="dpp")
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)     # as in a notebook
    for name in "ddp", "ddp_spawn", "fsdp": refuse(CvnbError, "a notebook can only be forked|there is none", devices=2, strategy=name)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x"); monkeypatch.setenv("WORLD_SIZE", "4"); monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    refuse(UsageError, "torchrun started 4 processes, and devices is 2. Use devices=4", devices=2)
    refuse(UsageError, "torchrun started 4 processes, and devices is 1. Use devices=4")
    assert not (tmp_path/"checkpoints").exists()     # nothing was begun, and nothing dropped


# Kills

def in_fork(call) -> int:   # its process
    "Call something in a fork of this process, which can be killed without the seconds that imports take."
    if pid := os.fork(): return pid
    try:
        torch.set_num_threads(1)
        call()
        os._exit(0)
    finally: os._exit(1)


def killed(pid: int, checkpoint: Path, saves: int, after: float) -> int:   # steps in the checkpoint that is left
    "Let a training write some checkpoints and go on for some seconds, and kill it."
    seen = {checkpoint.stat().st_mtime_ns} if checkpoint.exists() else {0}
    while len(seen) <= saves:
        assert not os.waitpid(pid, os.WNOHANG)[0], "the training ended before it was killed"
        with contextlib.suppress(FileNotFoundError): seen.add(checkpoint.stat().st_mtime_ns)
        time.sleep(0.001)
    time.sleep(after)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return torch.load(checkpoint, weights_only=True)["global_step"]


def test_kills_within_an_epoch(data, tmp_path, monkeypatch):
    "Whatever the training is made of, it ends with the weights, answers and curves of one that was left alone."
    whole, resumed, rng = fresh(BATCHNORM), fresh(BATCHNORM), random.Random(5)
    expected = fit(whole, *data, RICH, tmp_path/"whole")
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    train = lambda: fit(fresh(BATCHNORM), *data, RICH, tmp_path/"cut")
    steps = [killed(in_fork(train), tmp_path/"cut/checkpoints/last.ckpt", saves, rng.random() * 0.05) for saves in (2, 3, 2, 2)]
    assert steps == sorted(steps) and any(s % 5 for s in steps), steps     # five steps make an epoch
    history = fit(resumed, *data, RICH, tmp_path/"cut")
    assert same(whole, resumed) and curves(history).equals(curves(expected))
    assert (predict_logits(whole, data[1].images) == predict_logits(resumed, data[1].images)).all()
    assert sha256_file(tmp_path/"whole/history.csv") == sha256_file(tmp_path/"cut/history.csv")


def test_a_fold_that_is_gone_on_with_is_as_if_left_alone(data, tmp_path):
    "Whether the folds before it were trained or looked up, it begins with the same network."
    rows = pd.DataFrame(dict(path=data[0].names, split="train", label=data[0].labels.astype(str), pixel_sha256=data[0].names))
    make = lambda: create_model(BATCHNORM, CLASSES, 16)   # another one each time
    crossed = lambda name, progress=None: cross_validate(make, rows, data[0], PLAIN, tmp_path/name, 3, progress)

    def cut(done: float, text: str, **_: object) -> None:
        if text.startswith("fold 2/3") and done > 0.5: raise SystemExit("killed")   # in its second epoch

    expected, told = crossed("whole"), []
    with pytest.raises(SystemExit): crossed("cut", cut)
    torch.rand(7)
    found = crossed("cut", lambda done, text, **_: told.append(done))
    assert min(told) > 0.45, "it began anew"
    pd.testing.assert_frame_equal(found.predictions, expected.predictions)
    assert found.table.equals(expected.table) and list(found.predictions.pixel_sha256) == data[0].names

    def others() -> VisionModel:
        model = make()
        model.net.get_classifier().bias.data += 1
        return model
    begun: list[float] = []
    cross_validate(others, rows, data[0], PLAIN, tmp_path/"cut", 3, lambda done, text, **_: begun.append(done))
    assert min(begun) < 0.3, "folds of other starting weights answered"


@pytest.mark.parametrize("seed", range(6))
def test_folds_hold_images_back_whatever_their_groups(data, seed):
    "One group is as large as all others; copies count once, and too few images are said."
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(60)], label="a", ok=True, pixel_sha256=[str(i) for i in range(60)],
                             group=["large"] * 30 + [f"small {i}" for i in range(30)]))
    asked = replace(PLAIN, keep="best", seed=seed)
    assert folds._choosing(rows, PLAIN) is None and 3 <= folds._choosing(rows, asked).sum() <= 12
    copies = rows.assign(pixel_sha256=[str(i % 9) for i in range(60)], group=None)
    with pytest.raises(UsageError, match="so few"): folds._choosing(copies, asked)


def test_what_was_picked_stays(data, tmp_path):
    "Timings differ from call to call: with another batch size the checkpoint would be another training's."
    asked = replace(PLAIN, batch_size=0, workers=-1)
    first, _ = settle(asked, fresh(NO_BATCHNORM), data[0], tmp_path)
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, first, tmp_path, callbacks=[Interrupts()])
    note = read_json(tmp_path/"checkpoints/picked.json")
    again, _ = settle(asked, fresh(NO_BATCHNORM), data[0], tmp_path)
    assert again == first and read_json(tmp_path/"checkpoints/picked.json") == note


class Interrupts(pl.Callback):
    "End a training after some epochs."
    def __init__(self, epochs: int = 1): self.epochs = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == self.epochs: raise SystemExit("killed")


@pytest.mark.parametrize("options", [dict(ema=0.9), dict(lr=0.0, epochs=9, patience=2), dict(keep="best")], ids=str)
def test_a_training_that_was_over_gives_the_same_again(data, tmp_path, options, monkeypatch):
    "Killed between its last checkpoint and the stage's files, it is asked for once more."
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    asked, first, again, told = replace(PLAIN, **options), fresh(BATCHNORM), fresh(BATCHNORM), []
    expected = fit(first, *data, asked, tmp_path/"run")
    with CSV(tmp_path) as logger:
        found = fit(again, *data, asked, tmp_path/"run", progress=lambda done, *_, **__: told.append(done), logger=logger, callbacks=[TrackSteps()])
    assert same(first, again) and curves(found).equals(curves(expected)) and told == [1.0]
    assert logger.column("epoch/val_loss") == expected.val_loss.to_list() and found.attrs["notes"] == expected.attrs["notes"]


class CSV(pl.loggers.CSVLogger):
    "A logger that can be read."
    def __enter__(self) -> CSV: return self

    def __exit__(self, *_: object) -> None: self.save()

    def column(self, name: str) -> list[float]: return pd.read_csv(Path(self.log_dir)/"metrics.csv")[name].dropna().to_list()


def test_patience_counts_on_after_a_kill(data, tmp_path, monkeypatch):
    "Each epoch is judged before it is saved: one that is gone on with has as much patience left as one that was left alone."
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    asked = replace(PLAIN, epochs=9, lr=0.0, patience=3)
    expected = fit(fresh(NO_BATCHNORM), *data, asked, tmp_path/"whole")
    for epochs in 1, 2, 3:
        with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, asked, tmp_path/"cut", callbacks=[Interrupts(epochs)])
    found = fit(fresh(NO_BATCHNORM), *data, asked, tmp_path/"cut")
    assert len(found) == len(expected) == 4 and curves(found).equals(curves(expected))


@pytest.mark.parametrize("tune", ["full", "head_first"])
def test_a_model_whose_training_was_cut_can_be_given_again(data, tmp_path, tune):
    "As in a notebook whose cell was interrupted and is run once more."
    asked, whole, cut = replace(PLAIN, tune=tune, resolution=0.5), fresh(BATCHNORM), fresh(BATCHNORM)
    expected = fit(whole, *data, asked, tmp_path/"whole")
    with pytest.raises(SystemExit): fit(cut, *data, asked, tmp_path/"cut", callbacks=[Interrupts()])
    assert same(cut, fresh(BATCHNORM)) and cut.preprocess.size == 16
    told = []
    found = fit(cut, *data, asked, tmp_path/"cut", progress=lambda done, text, **_: told.append(done) if "epoch" in text else None)
    assert min(told) > 0.5 and same(whole, cut) and curves(found).equals(curves(expected))


class Criterion:
    "A loss that says what it is made of."
    def __init__(self, smoothing: float): self.smoothing, self.identity = smoothing, f"smoothing {smoothing}"

    def __call__(self, logits, labels, images): return torch.nn.functional.cross_entropy(logits, labels, label_smoothing=self.smoothing)


def test_another_loss_or_other_validation_images_are_another_training(data, tmp_path):
    train, val = data
    begun = lambda criterion, held_out: told.clear() or fit(fresh(NO_BATCHNORM), train, held_out, replace(PLAIN, keep="best"), tmp_path, criterion,
                                                           lambda done, *_, **__: told.append(done))
    told: list[float] = []
    first = begun(Criterion(0.0), val)
    assert curves(begun(Criterion(0.0), val)).equals(curves(first)) and min(told) > 0.5
    assert not curves(begun(Criterion(0.5), val)).equals(curves(first)) and min(told) < 0.5
    begun(Criterion(0.5), val.take(np.arange(90)))
    assert min(told) < 0.5


def ready(smoke_run: Path, run: Path) -> Path:
    "A run that has its audit."
    run.mkdir()
    shutil.copytree(smoke_run/"audit", run/"audit")
    shutil.copy(smoke_run/"run.json", run)
    return run


def cvnb_train(run: Path, **options: object) -> list[object]:
    sets = [a for name, value in options.items() for a in ("--set", f"train.{name}={value}")]
    return [CVNB, "run", "train", "--run", run, *sets]


@pytest.mark.slow
def test_a_killed_stage_goes_on(smoke_run, tmp_path):
    "The notebook begins anew, the training does not."
    run, env = ready(smoke_run, tmp_path/"run"), os.environ | dict(CVNB_SAVE_EVERY="0")
    process = subprocess.Popen(cvnb_train(run), env=env, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (run/"train/checkpoints/last.ckpt").exists(): time.sleep(0.002)
    kill_all(process)
    begun = torch.load(run/"train/checkpoints/last.ckpt", weights_only=True)["global_step"]
    assert begun and not (run/"train/stage.json").exists()
    end = subprocess.run(cvnb_train(run), capture_output=True, text=True, env=env)
    assert end.returncode == 0, end.stderr
    for name in "model.safetensors", "predictions.parquet", "history.csv":
        assert sha256_file(run/"train"/name) == sha256_file(smoke_run/"train"/name), name
    earlier, = read_json(run/"train/stage.json")["environment"]["wandb"]["earlier"]   # it comes with the checkpoint that was gone on with
    assert next((run/"train/wandb").glob(f"offline-run-*-{earlier}"))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cvnb", None], ids=["forked kernel", "ordinary kernel"])
def test_two_processes_from_the_stage(smoke_run, tmp_path, engine):
    "Lightning forks the notebook's kernel; curves, notes and W&B's epochs come out of it as of one process."
    run = ready(smoke_run, tmp_path/"run")
    options = dict(devices=2, device="cpu", epochs=2)
    if engine:
        end = subprocess.run(cvnb_train(run, **options), capture_output=True, text=True)
        assert end.returncode == 0, end.stderr
    else:
        (run/"train").mkdir()
        notebook = JOB.parent.parent.parent/"nbs/stages/train.ipynb"
        papermill.execute_notebook(str(notebook), str(run/"train/notebook.ipynb"), dict(run=str(run), **options), progress_bar=False)
    results = read_json(run/"train/metrics.json")
    assert len(results["history"]) == 2 and "2 forked processes" in results["notes"][-1]
    from cvnb.training.tracking import read_tracked
    tracked = read_tracked(next((run/"train/wandb").glob("offline-run-*")))
    logged = {row["epoch"]: row["epoch/val_loss"] for row in tracked["history"] if "epoch/val_loss" in row}
    assert logged == {row["epoch"]: row["val_loss"] for row in results["history"]}


# Options that only show in what comes out

class Spoils(pl.Callback):
    "Make the third epoch the worst."
    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2: module.model.net.get_classifier().weight.data.zero_()


def test_the_best_epoch_is_kept_and_patience_ends(data, tmp_path):
    model = fresh(BATCHNORM)
    history = fit(model, *data, replace(PLAIN, epochs=3, keep="best"), tmp_path/"best", callbacks=[Spoils()])
    right = (predict_logits(model, data[1].images).argmax(1) == data[1].labels).mean()
    assert right == pytest.approx(history.val_accuracy.max()) and right > history.val_accuracy.iloc[2] + 0.2
    still = fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=9, lr=0.0, patience=2), tmp_path/"still")
    assert len(still) == 3   # nothing is learned, and two epochs are waited for
    assert still.attrs["notes"] == ["stopped after epoch 3 of 9: the validation loss had not fallen for 2"] and "notes" in history.attrs
    assert not history.attrs["notes"]


def test_a_stop_is_told_as_the_end(data, tmp_path):
    told = []
    fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=9, lr=0.0, patience=1), tmp_path, progress=lambda done, text, **_: told.append((done, text)))
    assert told[-1] == (1.0, "epoch 2/9 · stopped early") and [done for done, _ in told].count(1.0) == 1


def test_what_is_left_for_the_last_step_counts_fully(data, tmp_path):
    "Six batches of 50, of which twelve should make a step, are the step of one batch of 300."
    one, six, plain = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    asked = replace(PLAIN, epochs=1, optimizer="sgd", momentum=0.0, schedule="constant", warmup=0.0, weight_decay=0.0, lr=0.1)
    fit(one, *data, replace(asked, batch_size=300), tmp_path/"one")
    fit(six, *data, replace(asked, batch_size=50, accumulate=12), tmp_path/"six")
    apart = lambda a, b: max(float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    assert apart(one, six) < 1e-5 < 1e-3 < apart(one, plain)


def test_bfloat16_learns_too(data, tmp_path):
    exact, half = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    fit(exact, *data, PLAIN, tmp_path/"exact")
    history = fit(half, *data, replace(PLAIN, precision="bf16-mixed"), tmp_path/"half")
    assert not same(exact, half) and history.val_accuracy.iloc[-1] > 0.5


class Told:
    "A logger that remembers."
    def __init__(self): self.rows: list[tuple[int, dict]] = []

    def log_metrics(self, metrics: dict, step: int) -> None: self.rows.append((step, metrics))


def test_a_linear_probe_says_what_it_has_no_use_for(data, tmp_path):
    asked, logger = replace(PLAIN, tune="probe", mixup=0.2, balance="sampling"), Told()
    told: list[float] = []
    history = fit(fresh(BATCHNORM), *data, asked, tmp_path, logger=logger, progress=lambda done, *_, **__: told.append(done))
    assert told[0] == 0 and told[-1] == 1 and len(told) > 5
    note, = history.attrs["notes"]
    assert "mixup=0.2" in note and "balance=sampling" in note and "augment" not in note, note
    assert [(step, row["epoch"], row["epoch/val_loss"]) for step, row in logger.rows] == [(1, 1, history.val_loss[0])]
    assert "balance" not in str(fit(fresh(BATCHNORM), *data, replace(asked, balance="weights"), tmp_path).attrs["notes"])
    with pytest.raises(UsageError, match="a linear probe has the task.s own loss"):
        fit(fresh(BATCHNORM), *data, asked, tmp_path, lambda logits, labels, images: logits.sum())


@pytest.mark.parametrize(("batch", "largest"), [(8, 32), (512, 256)])
def test_validation_takes_batches_that_fit_where_the_trainings_do(data, batch, largest):
    module = DataModule(data[1], data[0], replace(PLAIN, batch_size=batch), fresh(NO_BATCHNORM).spec)   # 300 images validate
    sizes = [len(labels) for _, labels in module.val_dataloader()]
    assert sizes[0] == max(sizes) == largest and sum(sizes) == 300


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_other_tasks_are_trained_and_cross_validated(data, tmp_path, name):
    "What a digit is made of (even, round, large), and how much ink it has."
    ink = {n: part.images.mean((1, 2, 3)) / 100 for n, part in zip("tv", data)}
    parts = lambda d: "|".join(["even" if d % 2 == 0 else "odd", *(["round"] if d in (0, 6, 8, 9) else []), *(["large"] if d > 4 else [])])
    kind, labels = task_named(name), {n: pd.Series([f"{v:.3f}" for v in ink[n]] if name == "regression" else [parts(d) for d in part.labels])
                                for n, part in zip("tv", data)}
    classes = kind.classes(labels["t"])
    train, val = (replace(part, labels=kind.encode(labels[n], classes)) for n, part in zip("tv", data))
    make = lambda: create_model(NO_BATCHNORM, classes, 16, task=name, **kind.scale(train.labels))
    history = fit(make(), train, val, replace(PLAIN, epochs=6), tmp_path/"one")
    assert history[f"val_{kind.metric}"].iloc[-1] > 0.6, history
    rows = pd.DataFrame(dict(path=train.names, split="train", label=labels["t"], pixel_sha256=train.names))
    crossed = cross_validate(make, rows, train, PLAIN, tmp_path/"folds", 3)
    assert crossed.table.n_val.max() - crossed.table.n_val.min() < 30 and len(crossed.predictions) == len(rows)


def test_rare_labels_are_spread_over_folds_together(data, tmp_path):
    "Three images have a label of their own, and a hundred the one beside it."
    labels = pd.Series(["any|rare" if i < 3 else "any" if i < 100 else "any|even" if i % 2 else "other" for i in range(300)])
    kind = task_named("multilabel")
    classes = kind.classes(labels)
    train = replace(data[0], labels=kind.encode(labels, classes))
    rows = pd.DataFrame(dict(path=train.names, split="train", label=labels, pixel_sha256=train.names))
    crossed = cross_validate(lambda: create_model(NO_BATCHNORM, classes, 16, task="multilabel"), rows, train, replace(PLAIN, epochs=1), tmp_path, 5)
    assert crossed.table.n_val.tolist() == [60] * 5 and len(crossed.predictions) == 300
    alone = replace(train, labels=np.where(np.arange(300)[:, None] > 0, train.labels * (np.array(classes) != "rare"), train.labels))
    with pytest.raises(UsageError, match=r"fold \d would have to learn rare without an image of it"):
        cross_validate(lambda: create_model(NO_BATCHNORM, classes, 16, task="multilabel"),
                       rows.assign(label=[x if i == 0 else x.removesuffix("|rare") for i, x in enumerate(labels)]), alone, PLAIN, tmp_path/"one", 5)
    with pytest.raises(UsageError, match="5 folds are not possible: 'rare' has 1 images.*Add images, or leave it out"):
        assign_folds(rows.assign(label=np.where(rows.index == 0, "rare", "b"), ok=True), 5)


# Guards

def test_one_bad_image_is_named(data, tmp_path):
    bad = 77
    shown = torch.from_numpy(data[0].images[bad])
    planted = lambda logits, labels, images: torch.where((images == shown).flatten(1).all(1), torch.nan, logits.sum(-1)).mean()
    with pytest.raises(CvnbError, match=rf"the loss is nan in epoch 1, batch \d+ \(images: {data[0].names[bad]}\).*Lower the learning rate"):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, planted)


class SpoilsTheEnd(pl.Callback):
    "Lose the weights in the last step."
    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, outputs: object, batch: object, index: int) -> None:
        if index + 1 == trainer.num_training_batches: module.model.net.get_classifier().bias.data[3] = torch.nan


def test_answers_that_are_not_finite_stop_too(data, tmp_path):
    "The last step's weights are in no training loss."
    with pytest.raises(CvnbError, match=r"not finite after epoch 1 \(validation images: digit_300.png, .* and 92 more\)\. Lower the learning rate"):
        fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=1), tmp_path, callbacks=[SpoilsTheEnd()])


def test_memory_that_is_too_small_while_images_grow(data, tmp_path):
    "What begins anew sees images as large as the first attempt would have in the end."
    def hungry(logits, labels, images):
        if len(images) > 25: raise torch.OutOfMemoryError("CUDA out of memory")
        return torch.nn.functional.cross_entropy(logits, labels)
    model = fresh(NO_BATCHNORM)
    with pytest.warns(UserWarning, match="2 batches of 25"): history = fit(model, *data, replace(PLAIN, resolution=0.5), tmp_path, hungry)
    right = (predict_logits(model, data[1].images).argmax(1) == data[1].labels).mean()
    assert model.preprocess.size == 16 and right == pytest.approx(history.val_accuracy.iloc[-1])


def test_what_a_training_that_begins_anew_tells_wandb(data, tmp_path):
    "Memory that is too small once images have grown: its epochs are told from the first one on, and what the batch has become."
    seen = []

    def hungry(logits, labels, images):
        seen.append(len(images))
        if len(images) == 50 and seen.count(50) > 2 * 6: raise torch.OutOfMemoryError("CUDA out of memory")   # in the third epoch
        return torch.nn.functional.cross_entropy(logits, labels)
    stage = Stage("train", tmp_path/"run", dict(batch_size=50))
    logger, options = open_tracker(stage), replace(PLAIN, epochs=3, resolution=0.5)
    with pytest.warns(UserWarning, match="2 batches of 25"):
        history = fit(fresh(NO_BATCHNORM), *data, options, stage.dir, hungry, logger=logger, callbacks=[TrackSteps()])
    close_tracker(logger)
    found = read_tracked(stage.run/stage.environment["wandb"]["folder"])
    told = [row["epoch/val_loss"] for row in found["history"] if "epoch/val_loss" in row]
    assert told[-3:] == history.val_loss.to_list() and len(told) > 3    # before them those of the first attempt
    assert found["config"]["batch_size"] == 25 and history.attrs["changed"][0] == dict(option="batch_size", picked=25, why="out of memory")


def test_images_that_begin_too_small(data, tmp_path):
    model = create_model("vit_tiny_patch16_224", CLASSES, 32, "full")   # made for one size, whichever that is
    with pytest.raises(UsageError, match=r"resolution=0.5: vit_tiny_patch16_224 cannot see images of 16 pixels.*Use resolution=1"):
        fit(model, *(replace(d, images=d.images.repeat(2, 1).repeat(2, 2)) for d in data), replace(PLAIN, resolution=0.5), tmp_path)


@pytest.fixture
def ctrl_c() -> Iterator[None]:
    "What started the tests may have let SIGINT be ignored."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class PressesCtrlC(pl.Callback):
    def on_train_epoch_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1: signal.raise_signal(signal.SIGINT)


def test_ctrl_c_interrupts_a_call_and_not_the_program(data, tmp_path, ctrl_c):
    "Nor does it keep a second one out; the same call goes on."
    whole, model = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    fit(whole, *data, PLAIN, tmp_path/"whole")
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt, match="call again to go on"): fit(model, *data, PLAIN, tmp_path/"cut", callbacks=[PressesCtrlC()])
    seen = []
    fit(model, *data, PLAIN, tmp_path/"cut", progress=lambda done, *_, **__: seen.append(done))
    assert min(seen) >= 0.5 and same(model, whole)


def test_other_code_is_another_training(data, tmp_path, monkeypatch, ctrl_c):
    "A checkpoint of a training with a fault that has been mended since is not gone on with."
    def begins():
        seen = []
        with pytest.raises(KeyboardInterrupt):
            fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, progress=lambda done, *_, **__: seen.append(done), callbacks=[PressesCtrlC()])
        return seen
    assert begins() and not begins()     # it stops where it went on
    monkeypatch.setattr(training, "code_of", lambda *_: "mended")
    assert begins()


def test_a_label_of_several_that_is_not_in_the_training_images(data, tmp_path):
    tagged = [replace(d, labels=np.eye(10, dtype=np.float32)[d.labels]) for d in data]
    none = tagged[0].take(np.flatnonzero(data[0].labels != 7))
    with pytest.raises(CvnbError, match="no training image has the class 7"):
        fit(create_model(NO_BATCHNORM, CLASSES, 16, task="multilabel"), none, tagged[1], PLAIN, tmp_path)


def test_processes_from_outside_do_not_pick_each_for_itself(data, tmp_path, monkeypatch):
    for name, value in dict(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2").items(): monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="would each pick a batch_size and a lr of their own. Give both"):
        settle(replace(PLAIN, devices=2, lr=0), fresh(NO_BATCHNORM), data[0], tmp_path)
    assert not settle(replace(PLAIN, devices=2), fresh(NO_BATCHNORM), data[0], tmp_path)[1].option.to_list()


@pytest.mark.parametrize(("bfloat16", "capability", "picked"), [(True, (8, 0), "bf16-mixed"), (False, (7, 5), "16-mixed"),
                                                                (False, (6, 1), "32-true")])
def test_the_precision_is_one_that_a_gpu_has(monkeypatch, bfloat16, capability, picked):
    "A GPU that is older computes in bfloat16 too, in software."
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation or bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert tuning._precision(True)[0] == picked and tuning._precision(False)[0] == "32-true"


def test_what_is_picked_can_be_shared_and_fits(data, tmp_path, monkeypatch):
    "Three processes share a batch; a trial of rates that needs too much memory is made with smaller batches."
    found = find_batch_size(fresh(NO_BATCHNORM), data[0], replace(PLAIN, devices=3), most=200)
    assert (found.batch_size % 3 == 0).all() and found.chosen.sum() == 1
    tried, real = [], tuning._lr_trial

    def hungry(model, train, options, steps):
        tried.append((options.batch_size, options.accumulate))
        if options.batch_size > 25: raise torch.OutOfMemoryError("CUDA out of memory")
        return real(model, train, options, steps)
    monkeypatch.setattr(tuning, "_lr_trial", hungry)
    _, picked = settle(replace(PLAIN, lr=0.0, balance="weights", clip=1.0, layer_decay=0.8), fresh(NO_BATCHNORM), data[0], tmp_path)
    assert tried == [(50, 1), (25, 2)] and picked.why[0].endswith("tried without layer_decay")


def test_a_trial_of_rates_ends_where_they_are_too_high(data, tmp_path, monkeypatch):
    "A loss that is not finite is what a trial is for; with more batches to a step than there are, a step is an epoch."
    monkeypatch.setattr(tuning._Trial, "training_step", lambda module, *batch: _spoilt(module, *batch))

    def _spoilt(module, *batch):
        loss = tuning.Classifier.training_step(module, *batch)
        return loss * torch.nan if module.trainer.optimizers[0].param_groups[0]["lr"] > 0.1 else loss
    lr, curve = find_lr(fresh(NO_BATCHNORM), data[0], replace(PLAIN, accumulate=40), steps=60)
    assert 1e-5 < lr < 0.1 and curve.lr.max() <= 0.12 and len(curve) > 30
    monkeypatch.setattr(tuning._Trial, "training_step", lambda module, *batch: tuning.Classifier.training_step(module, *batch) * torch.nan)
    with pytest.raises(CvnbError, match="no learning rate could be picked.*Give one"): find_lr(fresh(NO_BATCHNORM), data[0], PLAIN, steps=60)


def test_a_head_that_is_not_all_is_refused(data, tmp_path):
    "This one has a normalisation between its features and the layer that it calls its classifier."
    model = create_model("shvit_s1", CLASSES, 32)
    with torch.no_grad(): model.net.head.bn.running_mean += 1
    small = [replace(d, images=d.images.repeat(2, 1).repeat(2, 2)) for d in data]
    with pytest.raises(UsageError, match="shvit_s1 are not those of a linear head on its features. Use tune=full"):
        fit(model, *small, replace(PLAIN, tune="probe"), tmp_path)


def test_a_number_that_does_not_vary_in_the_validation_images(data, tmp_path):
    "It has no r2; the best epoch is that of the smallest loss."
    kind, (train, val) = task_named("regression"), data
    labels = np.stack([train.labels, train.labels % 2], 1).astype(np.float32)
    train, val = replace(train, labels=labels), replace(val, labels=np.stack([val.labels, 0 * val.labels], 1).astype(np.float32))
    model = create_model(NO_BATCHNORM, ["a", "b"], 16, task="regression", **kind.scale(train.labels))
    history = fit(model, train, val, replace(PLAIN, epochs=3, keep="best"), tmp_path, callbacks=[Spoils()])
    found = task_named("regression", model.spec.target_std).loss(torch.tensor(predict_logits(model, val.images)), torch.tensor(val.labels))
    assert history.val_r2.isna().all() and float(found) == pytest.approx(history.val_loss.min(), abs=1e-5)
    assert history.val_loss.idxmin() == 1


def test_classes_and_sizes(data, tmp_path):
    train, val = data
    without = lambda part: part.take(np.flatnonzero(part.labels != 4))
    with pytest.raises(CvnbError, match="no training image has the class 4.*Add some"):
        fit(fresh(NO_BATCHNORM), without(train), val, PLAIN, tmp_path)
    history = fit(fresh(NO_BATCHNORM), train.take(np.arange(60)), without(val), replace(PLAIN, batch_size=64), tmp_path)
    assert "split val has the class 4" in history.attrs["notes"][0] and "larger than the 60 training images" in history.attrs["notes"][1]
    with pytest.raises(CvnbError, match="no image is in the split val"): fit(fresh(NO_BATCHNORM), train, val.take(np.arange(0)), PLAIN, tmp_path)


def test_checkpoints_of_others_and_damaged_weights(data, tmp_path):
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, callbacks=[Interrupts()])
    assert (tmp_path/"checkpoints/last.ckpt").exists()
    seen = []
    history = fit(fresh(BATCHNORM), *data, PLAIN, tmp_path, progress=lambda done, *_, **__: seen.append(done))
    assert min(seen) < 0.5 and len(history) == 2     # begun anew
    from cvnb.models.weights import save_model
    save_model(fresh(NO_BATCHNORM), tmp_path)
    file = tmp_path/"model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(CvnbError, match="model.safetensors"): create_model(NO_BATCHNORM, CLASSES, 16, weights=str(file))


def test_memory_that_was_too_small_stays_known(data, tmp_path):
    "A training that halved its batch and was killed goes on with the halved one."
    def hungry(logits, labels, images):
        if len(images) > 25: raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")
        return torch.nn.functional.cross_entropy(logits, labels)
    whole, resumed = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    with pytest.warns(UserWarning, match="2 batches of 25"): expected = fit(whole, *data, PLAIN, tmp_path/"whole", hungry)
    with pytest.warns(UserWarning), pytest.raises(SystemExit):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path/"cut", hungry, callbacks=[Interrupts()])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = fit(resumed, *data, PLAIN, tmp_path/"cut", hungry)
    assert same(whole, resumed) and curves(history).equals(curves(expected))
    assert history.attrs["notes"] == expected.attrs["notes"] == ["out of memory: 2 batches of 25 now make a step"]

    def starved(logits, labels, images): raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.warns(UserWarning), pytest.raises(CvnbError, match="out of memory with a batch of 3. Give a smaller"):
        fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path/"no", starved)


def test_what_a_cpu_has_not(data, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for text, options in {"torch sees none": dict(device="gpu"), "16-mixed needs a GPU.*bf16-mixed": dict(precision="16-mixed")}.items():
        with pytest.raises(CvnbError, match=text): fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, **options), tmp_path)
        with pytest.raises(CvnbError, match=text): settle(replace(PLAIN, batch_size=0, lr=0, **options), fresh(NO_BATCHNORM), data[0], tmp_path)


@pytest.mark.slow
def test_no_compiler(data, tmp_path):
    env = os.environ | dict(CC="/nonexistent/cc", CXX="/nonexistent/c++", TORCHINDUCTOR_CACHE_DIR=str(tmp_path/"cache"))
    asked = dict(epochs=1, batch_size=50, device="cpu", compile=True)
    end = subprocess.run([sys.executable, JOB, tmp_path, json.dumps(asked), NO_BATCHNORM], env=env, capture_output=True, text=True, timeout=300)
    for said in "cvnb.core.CvnbError: torch could not compile the network", "Use compile=false": assert said in end.stderr, end.stderr[-2000:]
