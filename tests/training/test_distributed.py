"""Several processes: a training on two of them is compared with one on a single process."""
from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import pytorch_lightning as pl
import torch
from fit_helpers import (
    BATCHNORM,
    CVNB,
    JOB,
    NO_BATCHNORM,
    ONE_THREAD,
    PLAIN,
    TWO,
    Recorder,
    curves,
    gpu_out_of_memory,
    kill_with_children,
    largest_difference,
    out_of_memory_above,
    same_weights,
)
from processes import left_after
from train_job import fresh
from wandb_file import read_wandb_file

from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import read_json
from cvnb.models.inference import predict_logits
from cvnb.training.distributed import FORK_STRATEGIES, count_nodes, launched_externally, local_gpu
from cvnb.training.fit import fit
from cvnb.training.options import FitOptions


def test_two_processes_match_one(data, tmp_path):
    "Two processes share each batch. The network has no batch norm, which would see half of each batch."
    one, two = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    progress = Recorder()
    expected = fit(one, *data, PLAIN, tmp_path/"one")
    history = fit(two, *data, TWO, tmp_path/"two", progress=progress)
    assert largest_difference(one, two) < 1e-4 < 1e-2 < largest_difference(one, fresh(NO_BATCHNORM))
    assert expected.val_accuracy.iloc[-1] > 0.5
    np.testing.assert_allclose(curves(expected).to_numpy(), curves(history).to_numpy(), rtol=1e-3, atol=1e-4)
    images = data[1].images
    np.testing.assert_allclose(predict_logits(one, images), predict_logits(two, images), atol=1e-3)
    written = pd.read_csv(tmp_path/"two/history.csv")
    assert (written.to_numpy() == curves(history).to_numpy()).all()     # one row per epoch
    assert set(progress.pids) == {os.getpid()} and progress.done[-1] == 1
    assert len(progress.curves[-1]["loss_val"]) == 2
    assert any("2 forked processes" in note for note in history.attrs["notes"])


def test_two_processes_use_the_same_class_weights_as_one(data, tmp_path):
    "Each process sees other classes in its share of a batch; their weights are the same."
    train, val = data
    rare = train.take(np.flatnonzero((train.targets < 3) | (np.arange(len(train)) % 3 == 0)))
    one, two, unweighted = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    fit(one, rare, val, replace(PLAIN, balance="weights"), tmp_path/"one")
    fit(two, rare, val, replace(TWO, balance="weights"), tmp_path/"two")
    fit(unweighted, rare, val, PLAIN, tmp_path/"unweighted")
    assert largest_difference(one, two) < 1e-4 < 1e-3 < largest_difference(one, unweighted)


class KillsProcess(pl.Callback):
    "Kill a process at a step."
    def __init__(self, rank: int, step: int): self.rank, self.step = rank, step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.step: os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("rank", [0, 1])
def test_training_resumes_after_one_of_two_processes_was_killed(data, tmp_path, rank):
    "Each process has batch norm's statistics of its own images; those of the first are validated, saved and returned."
    options = replace(TWO, ema=0.9, keep="best", augment="light")
    whole, resumed = fresh(BATCHNORM), fresh(BATCHNORM)
    expected = fit(whole, *data, options, tmp_path/"whole")
    with pytest.raises(CvnbError, match="a training process was ended by SIGKILL.*resume from the last checkpoint"):
        fit(fresh(BATCHNORM), *data, options, tmp_path/"cut", callbacks=[KillsProcess(rank, 9)])
    assert len(pd.read_csv(tmp_path/"cut/history.csv")) == 1
    progress = Recorder()
    history = fit(resumed, *data, options, tmp_path/"cut", progress=progress)
    assert min(progress.done) > 0.5 and same_weights(whole, resumed) and curves(history).equals(curves(expected))


def changed_options(options: FitOptions) -> str:
    "Write the options that differ from the defaults as JSON."
    return json.dumps({k: v for k, v in asdict(options).items() if v != getattr(FitOptions(), k)})


def torchrun(folder: Path, options: FitOptions, backbone: str, job: Path = JOB) -> subprocess.Popen:
    "Start a training with torchrun."
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
               job, folder, changed_options(options), backbone]
    return subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL,
                            text=True, env=os.environ | ONE_THREAD)


def saved_weights(folder: Path) -> list[dict[str, torch.Tensor]]:
    "Read the weights that both processes of a job left."
    return [torch.load(f/"weights.pt", weights_only=True) for f in (folder, folder/"other")]


@pytest.mark.long
def test_forked_processes_end_with_a_killed_training(tmp_path):
    options = changed_options(replace(TWO, epochs=1000))
    call = subprocess.Popen([sys.executable, JOB, tmp_path, options, NO_BATCHNORM], start_new_session=True)
    while call.poll() is None and not (tmp_path/"history.csv").exists(): time.sleep(0.05)
    forks = psutil.Process(call.pid).children(recursive=True)
    call.kill()
    call.wait()
    assert len(forks) == 2 and not left_after(forks)


@pytest.mark.slow
def test_torchrun_resumes_after_kill(data, tmp_path):
    "Every process is killed after the first epoch; in the end both have the weights of two forks."
    options = replace(TWO, ema=0.9, epochs=4)
    forked = fresh(BATCHNORM)
    expected = fit(forked, *data, options, tmp_path/"forked")
    first = torchrun(tmp_path/"run", replace(options, strategy="ddp"), BATCHNORM)
    while first.poll() is None and not (tmp_path/"run/checkpoints/last.ckpt").exists(): time.sleep(0.005)
    assert first.poll() is None, first.stderr.read()
    kill_with_children(first)
    assert 1 <= len(pd.read_csv(tmp_path/"run/history.csv")) < 4
    second = torchrun(tmp_path/"run", replace(options, strategy="ddp"), BATCHNORM)
    assert second.wait(200) == 0, second.stderr.read()
    for weights in saved_weights(tmp_path/"run"):
        assert all(torch.equal(weights[k], v) for k, v in forked.state_dict().items())
    rows = json.loads(curves(expected).to_json(orient="records", double_precision=15))
    for folder in tmp_path/"run", tmp_path/"run/other": assert json.loads((folder/"history.json").read_text()) == rows


SLURM_JOB = dict(SLURM_JOB_ID="4321", SLURM_JOB_NAME="digits", SLURM_NTASKS="2", SLURM_NTASKS_PER_NODE="2",
                 SLURM_NNODES="1", SLURM_NODEID="0", SLURM_NODELIST="localhost")


@pytest.mark.slow
def test_slurm_tasks_match_forked_processes(data, tmp_path):
    "Slurm starts a process for each task and sets environment variables."
    forked = fresh(NO_BATCHNORM)
    fit(forked, *data, TWO, tmp_path/"forked")
    options = changed_options(replace(TWO, strategy="auto"))
    command = [sys.executable, JOB, tmp_path/"run", options, NO_BATCHNORM]
    env = os.environ | ONE_THREAD | SLURM_JOB
    tasks = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True,
                              env=env | dict(SLURM_PROCID=str(i), SLURM_LOCALID=str(i))) for i in range(2)]
    for task in tasks: assert task.wait(200) == 0, task.stderr.read()
    for weights in saved_weights(tmp_path/"run"):
        assert all(torch.equal(weights[k], v) for k, v in forked.state_dict().items())


def test_slurm_and_torchrun_are_detected(monkeypatch):
    "As Lightning detects them; a Slurm job called bash or interactive is a shell."
    assert not launched_externally() and count_nodes() == 1 and local_gpu() == "cuda"
    for name, value in (SLURM_JOB | dict(SLURM_NNODES="2", SLURM_LOCALID="1")).items(): monkeypatch.setenv(name, value)
    assert launched_externally() and count_nodes() == 2 and local_gpu().startswith("cuda:")
    for name in "bash", "interactive":
        monkeypatch.setenv("SLURM_JOB_NAME", name)
        assert not launched_externally() and count_nodes() == 1
    for name, value in dict(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="8", LOCAL_WORLD_SIZE="2", LOCAL_RANK="1").items():
        monkeypatch.setenv(name, value)
    assert launched_externally() and count_nodes() == 4 and local_gpu().startswith("cuda:")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert not launched_externally()


def test_fork_strategies_are_all_that_fork():
    assert {"ddp_notebook", "ddp_fork"} < set(FORK_STRATEGIES)
    assert not {"ddp", "ddp_spawn", "fsdp"} & set(FORK_STRATEGIES)
    assert all(name.startswith(("ddp_notebook", "ddp_fork")) for name in FORK_STRATEGIES)


@pytest.mark.slow
def test_fsdp_returns_whole_weights(data, tmp_path):
    "Each process trains its part of every parameter; both have all of them in the end, and matrices had weight decay."
    options = replace(PLAIN, weight_decay=1.0, keep="best")
    alone = fresh(NO_BATCHNORM)
    fit(alone, *data, options, tmp_path/"one")
    job = JOB.with_name("fsdp_job.py")
    process = torchrun(tmp_path/"run", replace(options, devices=2, strategy="fsdp"), NO_BATCHNORM, job)
    assert process.wait(200) == 0, process.stderr.read()
    for weights in saved_weights(tmp_path/"run"):
        assert max(float((weights[k] - v).abs().max()) for k, v in alone.state_dict().items()) < 1e-4


@pytest.mark.slow
def test_spawned_processes_match_forked_ones(data, tmp_path):
    "Everything has to be pickled for spawned processes."
    options = replace(TWO, ema=0.9)
    forked = fresh(BATCHNORM)
    fit(forked, *data, options, tmp_path/"forked")
    spawned = changed_options(replace(options, strategy="ddp_spawn"))
    subprocess.run([sys.executable, JOB, tmp_path/"spawned", spawned, BATCHNORM], check=True, timeout=200,
                   env=os.environ | ONE_THREAD)
    weights = torch.load(tmp_path/"spawned/weights.pt", weights_only=True)
    assert all(torch.equal(weights[k], v) for k, v in forked.state_dict().items())


def test_fork_works_after_torch_used_threads(data, tmp_path):
    "A fork has none of its parent's threads, and torch would wait for them forever."
    torch.set_num_threads(2)
    try:
        x = torch.randn(800, 800)
        assert (x @ x).isfinite().all()
        assert len(fit(fresh(NO_BATCHNORM), *data, replace(TWO, epochs=1), tmp_path)) == 1
    finally: torch.set_num_threads(1)


def test_fork_reports_its_error(data, tmp_path):
    "The error of a forked process is raised here with its type."
    def nan_loss(logits, targets, images): return torch.where(targets == 3, torch.nan, logits.sum(-1)).mean()

    with pytest.raises(CvnbError, match=r"^the loss is nan in epoch 1, batch 1 \(images: digit_\d+\.png"):
        fit(fresh(NO_BATCHNORM), *data, TWO, tmp_path, nan_loss)
    hungry = out_of_memory_above(12, gpu_out_of_memory)
    with pytest.warns(UserWarning, match="2 batches of 24 now make a step"):
        history = fit(fresh(NO_BATCHNORM), *data, replace(TWO, epochs=1), tmp_path, hungry)
    assert history.attrs["notes"][-1] == "out of memory: 2 batches of 24 now make a step" and len(history) == 1


def test_options_that_several_processes_cannot_use_are_refused(data, tmp_path, monkeypatch):
    def refuse(error: type, text: str, **options: object) -> None:
        with pytest.raises(error, match=text): fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, **options), tmp_path)

    refuse(CvnbError, "fsdp spreads a network over GPUs.*strategy=ddp", strategy="fsdp", device="cpu")
    for needs in dict(ema=0.9), dict(clip=1.0), dict(optimizer="muon"):
        refuse(UsageError, "needs whole parameters", strategy="fsdp", **needs)
    refuse(UsageError, "batch_size 51 cannot be shared by 2 devices. Use batch_size=50", devices=2, batch_size=51)
    monkeypatch.delattr(sys, "ps1", raising=False)              # a notebook of another test may have left it
    refuse(UsageError, "Lightning refuses.*dpp", devices=2, strategy="dpp")
    monkeypatch.setattr(sys, "ps1", "In : ", raising=False)     # as in a notebook
    for name in "ddp", "ddp_spawn", "fsdp":
        refuse(CvnbError, "a notebook can only be forked|there is none", devices=2, strategy=name)
    for name, value in dict(TORCHELASTIC_RUN_ID="x", WORLD_SIZE="4", LOCAL_WORLD_SIZE="2").items():
        monkeypatch.setenv(name, value)
    refuse(UsageError, "torchrun started 4 processes, and devices is 2. Use devices=4", devices=2)
    refuse(UsageError, "torchrun started 4 processes, and devices is 1. Use devices=4")
    assert not (tmp_path/"checkpoints").exists()     # nothing was started or deleted


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["cvnb", None], ids=["forked kernel", "ordinary kernel"])
def test_stage_trains_with_two_processes(smoke_run, tmp_path, engine):
    "Lightning forks the notebook's kernel; curves, notes and W&B's epochs are those of one process."
    run = tmp_path/"run"
    run.mkdir()
    shutil.copytree(smoke_run/"audit", run/"audit")
    shutil.copy(smoke_run/"run.json", run)
    if engine:
        sets = ["--set", "train.devices=2", "--set", "train.device=cpu", "--set", "train.epochs=2"]
        done = subprocess.run([CVNB, "run", "train", "--run", run, *sets], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        (run/"train").mkdir()
        notebook = JOB.parents[2]/"nbs/stages/train.ipynb"
        parameters = dict(run=str(run), devices=2, device="cpu", epochs=2)
        papermill.execute_notebook(str(notebook), str(run/"train/notebook.ipynb"), parameters, progress_bar=False)
    results = read_json(run/"train/metrics.json")
    assert len(results["history"]) == 2 and any("2 forked processes" in note for note in results["notes"])
    tracked = read_wandb_file(next((run/"train/wandb").glob("offline-run-*")))
    logged = {row["epoch"]: row["epoch/val_loss"] for row in tracked["history"] if "epoch/val_loss" in row}
    assert logged == {row["epoch"]: row["val_loss"] for row in results["history"]}
