"""Helpers of the tests of training: options, callbacks that disturb a training, and comparisons of results."""
from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pandas as pd
import psutil
import pytorch_lightning as pl
import torch

from cvnb.models.vision_model import VisionModel
from cvnb.training.loaders import LabelledImages
from cvnb.training.options import FitOptions

JOB = Path(__file__).with_name("train_job.py")
CVNB = Path(sys.executable).with_name("cvnb")
NO_BATCHNORM, BATCHNORM = "test_mambaout", "test_efficientnet"   # timm's smallest networks
ONE_THREAD = dict(OMP_NUM_THREADS="1")   # for jobs that are compared with this process: bits depend on the threads
PLAIN = FitOptions(epochs=2, batch_size=50, lr=5e-3, augment="none", device="cpu")
TWO = replace(PLAIN, devices=2, strategy="ddp_fork")


def same_weights(a: VisionModel, b: VisionModel) -> bool:
    "Compare all weights to the bit."
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def largest_difference(a: VisionModel, b: VisionModel) -> float:
    "Measure the largest difference of two models' weights."
    pairs = zip(a.state_dict().values(), b.state_dict().values())
    return max(float((x - y).abs().max()) for x, y in pairs)


def curves(history: pd.DataFrame) -> pd.DataFrame:
    "Leave out the speed, which differs between identical trainings."
    return history.drop(columns="images_per_s")


def manifest_rows(data: LabelledImages) -> pd.DataFrame:
    "List images as a manifest does; each is an image of its own."
    labels = data.targets.astype(str)
    return pd.DataFrame(dict(path=data.names, split="train", label=labels, pixel_sha256=data.names))


def out_of_memory_above(largest: int, error: Callable[[], Exception]) -> Callable:
    "Make a loss that raises an error for batches of more images."
    def loss(logits: torch.Tensor, targets: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        if len(images) > largest: raise error()
        return torch.nn.functional.cross_entropy(logits, targets)

    return loss


def gpu_out_of_memory() -> Exception: return torch.OutOfMemoryError("CUDA out of memory")


class Interrupts(pl.Callback):
    "End a training after some epochs."
    def __init__(self, epochs: int = 1): self.epochs = epochs

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: object) -> None:
        if trainer.current_epoch == self.epochs: raise SystemExit("killed")


class SpoilsThirdEpoch(pl.Callback):
    "Make the third epoch the worst."
    def on_validation_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        if trainer.current_epoch == 2: module.model.net.get_classifier().weight.data.zero_()


class Recorder:
    "Keep the calls of `progress`."
    def __init__(self) -> None: self.done, self.texts, self.curves, self.pids = [], [], [], []

    def __call__(self, done: float, text: str = "", **values: list[float]) -> None:
        self.done.append(done)
        self.texts.append(text)
        self.curves.append(values)
        self.pids.append(os.getpid())


def kill_with_children(process: subprocess.Popen) -> None:
    "Kill a process and its children, and wait for them."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for member in family:
        with contextlib.suppress(psutil.NoSuchProcess): member.kill()
    psutil.wait_procs(family, 20)
    process.wait()
