"""The sides of the training benchmark. Each side runs in its own process, reads a job from a JSON file, and writes its
measurements to a JSON file.

    python benchmarks/train_sides.py SIDE JOB.json RESULT.json

`train.py` starts it. A job names the prepared folder, the recipe and the number of threads. Timing begins after the
imports. The stock sides follow the documentation of torchvision and Lightning: ImageFolder, its transforms on single
images in worker processes, and a LightningModule of a dozen lines. Their model gets uint8 images too, so
normalisation is a part of the same model on both sides.
"""
from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import psutil
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cvnb.models.weights import create_model
from cvnb.training.augment import Augmentation
from cvnb.training.fit import fit
from cvnb.training.loaders import LabelledImages, TrainLoader, load_labelled
from cvnb.training.optim import make_optimizer, make_schedule
from cvnb.training.options import FitOptions
from cvnb.training.predict import predict_with_tta
from cvnb.training.tuning import autotune

AFFINE = dict(degrees=10, translate=(.08, .08), scale=(.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)
# The augmentation of both sides, besides mirroring: cvnb's options, and transforms with the same distribution.
CHANGES = {
    "crop": (dict(augment="none"), lambda size: [v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]),
    "light": (dict(augment="light"), lambda size: [v2.RandomAffine(**AFFINE)]),
    "none": (dict(augment="none"), lambda size: []),
}


class StepClock(pl.Callback):
    "Time each training step of this side, and let the other sides run between the steps."
    def __init__(self, job: dict):
        self.go, self.done = job["turns"]   # file descriptors of pipes
        self.sides = job["sides"]
        self.batch_size = job["batch_size"]
        self.seconds: list[float] = []

    def wait_for_turn(self) -> None:
        "Report the end of a turn, and wait for the next one."
        os.write(self.done, b".")
        os.read(self.go, 1)
        self.begin = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        for callback in trainer.callbacks:   # their clocks also run while other sides have their turns
            if hasattr(callback, "every_s"): callback.every_s *= self.sides
        self.wait_for_turn()

    def on_train_batch_end(self, *_) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        self.wait_for_turn()

    def speeds(self) -> dict:
        "Return the speed of each step."
        return dict(images_per_s=[self.batch_size / s for s in self.seconds])


class CpuTimes(pl.Callback):
    "Record the processor time at the end of each epoch, after its validation."
    def __init__(self, begin: float):
        self.begin = begin
        self.cpu_s: list[float] = []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_) -> None:
        self.cpu_s.append(cpu_seconds() - self.begin)
        accuracy = float(trainer.callback_metrics["val_accuracy"])
        print(f"{self.cpu_s[-1]:.0f} CPU s, validation {accuracy:.4f}", flush=True)


def cpu_seconds() -> float:
    "Add up the processor time of this process and of its children, also of those that are running."
    running = [child.cpu_times() for child in psutil.Process().children(recursive=True)]
    return sum(os.times()[:4]) + sum(times.user + times.system for times in running)


def quiet_trainer() -> dict:   # arguments of Lightning's Trainer
    "Turn off checkpoints and output, which are not timed."
    return dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                enable_model_summary=False, num_sanity_val_steps=0)


def fit_options(job: dict, **more) -> FitOptions:
    "Make cvnb's options for a job. Precision and workers are picked, as in the stage."
    params = dict(precision="auto", workers=-1) | job.get("recipe", {}) | more
    if "change" in job:
        shift = job["size"] // 8 if job["change"] == "crop" else 0
        params |= CHANGES[job["change"]][0] | dict(flip=job["flip"], shift=shift)
    return FitOptions.from_params(params)


def load_ours(job: dict, split: str) -> LabelledImages:
    "Load the images of a split as the stage does: from the cache, by their digests."
    table = pd.read_parquet(Path(job["folder"])/"manifest.parquet")
    return load_labelled(job["folder"], table[table.split == split], sorted(set(table.label)), job["size"])


def make_our_batches(data: LabelledImages, o: FitOptions) -> Callable[[], Iterator]:   # returns an epoch's batches
    "Make cvnb's training batches without a Trainer."
    loader = TrainLoader(data, o.batch_size, Augmentation(o.augment, o.flip, o.shift), o.seed, workers=o.workers)

    def batches() -> Iterator:
        loader.set_epoch(loader.epoch + 1)
        return iter(loader)

    return batches


def make_stock_loader(job: dict, split: str = "train", augment: bool = True) -> DataLoader:
    "Load images as in torchvision's documentation, in worker processes."
    size, steps = job["size"], []
    if job["resize"]: steps.append(v2.Resize((size, size)))
    if augment: steps += CHANGES[job["change"]][1](size)
    if augment and job["flip"]: steps.append(v2.RandomHorizontalFlip())
    data = ImageFolder(Path(job["folder"])/split, v2.Compose([*steps, v2.PILToTensor()]))
    return DataLoader(data, job["batch_size"], shuffle=augment, drop_last=augment, num_workers=job["workers"],
                      persistent_workers=True)


def epoch_speeds(batches: Callable[[], Iterator], repeats: int) -> list[float]:   # images per second
    "Time whole epochs of a loader, after one epoch of warm-up."
    speeds = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        n = sum(len(batch[1]) for batch in batches())
        speeds.append(n / (time.perf_counter() - begin))
    return speeds[1:]


def loader_ours(job: dict) -> dict:
    "Time the loader alone, from an empty cache."
    with TemporaryDirectory() as cache:
        os.environ["CVNB_CACHE"] = cache
        begin = time.perf_counter()
        data = load_ours(job, "train")
        batches = make_our_batches(data, fit_options(job, batch_size=job["batch_size"], workers=job["workers"]))
        n = sum(len(batch[1]) for batch in batches())
        first = n / (time.perf_counter() - begin)
        begin = time.perf_counter()
        load_ours(job, "train")
        again_s = time.perf_counter() - begin
        return dict(first=first, again_s=again_s, images_per_s=epoch_speeds(batches, job["repeats"]))


def loader_stock(job: dict) -> dict:
    "Time the loader alone, which decodes in every epoch."
    loader = make_stock_loader(job)
    begin = time.perf_counter()
    n = sum(len(labels) for _, labels in loader)
    first = n / (time.perf_counter() - begin)
    return dict(first=first, images_per_s=epoch_speeds(lambda: iter(loader), job["repeats"]))


def build_model(job: dict) -> nn.Module:
    "Create the job's model."
    torch.manual_seed(job.get("seed", 0))
    classes = sorted(p.name for p in (Path(job["folder"])/"train").iterdir())
    model = create_model(job["backbone"], classes, job["size"], job["stem"], job["weights"])
    return model.to(memory_format=torch.channels_last)


def make_stock_optimizer(model: nn.Module, job: dict, steps: int) -> tuple:   # optimizer, schedule
    "Make AdamW with one-cycle, or the SGD with a cosine schedule of torchvision's reference."
    lr, decay = job["lr"], job["weight_decay"]
    if job.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=decay)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=decay)
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 5), pct_start=0.25)


class StockModule(pl.LightningModule):
    "The module of Lightning's documentation."
    def __init__(self, model: nn.Module, job: dict):
        super().__init__()
        self.model = model
        self.job = job
        self.accuracies: list[float] = []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0].permute(0, 2, 3, 1)), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        correct = self.model(batch[0].permute(0, 2, 3, 1)).argmax(1) == batch[1]
        self.log("val_accuracy", correct.float().mean(), batch_size=len(correct))

    def on_validation_epoch_end(self) -> None:
        self.accuracies.append(float(self.trainer.callback_metrics["val_accuracy"]))

    def configure_optimizers(self) -> dict:
        steps = int(self.trainer.estimated_stepping_batches)
        optimizer, schedule = make_stock_optimizer(self.model, self.job, steps)
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval="step"))


def plain_loop(model: nn.Module, batches: Iterator, job: dict) -> dict:   # speeds
    "Train in a plain loop of torch, with cvnb's optimizer and schedule."
    optimizer = make_optimizer(model.net, "adamw", job["lr"], job["weight_decay"])
    clock = StepClock(job)
    clock.wait_for_turn()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, make_schedule("one-cycle", job["steps"], 0.25))
    model.train()
    for images, targets, *_ in batches:
        loss = F.cross_entropy(model(images), targets)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        clock.on_train_batch_end()
    return clock.speeds()


def speed_ceiling(job: dict) -> dict:
    "Train on random images in memory."
    generator = torch.Generator().manual_seed(0)
    shape = (job["batch_size"], job["size"], job["size"], 3)
    batches = []
    for _ in range(8):
        images = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
        batches.append((images, torch.randint(0, 10, shape[:1], generator=generator)))
    return plain_loop(build_model(job), islice(cycle(batches), job["steps"]), job)


def speed_plain(job: dict) -> dict:
    "Train with cvnb's batches in a plain loop."
    data, model = load_ours(job, "train"), build_model(job)
    options = fit_options(job, batch_size=job["batch_size"], workers=0)
    with TemporaryDirectory() as folder: options = autotune(options, model, data, folder).options
    return plain_loop(model, make_our_batches(data, options)(), job)


def speed_ours(job: dict) -> dict:
    "Train with `cvnb.training.fit.fit`."
    data = load_ours(job, "train")
    val = data.take(np.arange(job["batch_size"]))   # validation is not timed
    params = dict(epochs=1, batch_size=job["batch_size"], lr=job["lr"], weight_decay=job["weight_decay"], workers=0)
    model, clock = build_model(job), StepClock(job)
    with TemporaryDirectory() as folder:
        options = autotune(fit_options(job, **params), model, data, folder).options
        fit(model, data, val, options, folder, callbacks=[clock])
    return clock.speeds()


def speed_stock(job: dict) -> dict:
    "Train with Lightning from ImageFolder."
    clock = StepClock(job)
    trainer = pl.Trainer(max_epochs=1, callbacks=[clock], **quiet_trainer())
    trainer.fit(StockModule(build_model(job), job), make_stock_loader(job))
    return clock.speeds()


def count_correct(model: nn.Module, job: dict) -> dict:   # right, n
    "Count the correctly predicted test images, with test-time augmentation if the recipe has it."
    data = load_ours(job, "test")
    logits = predict_with_tta(model, data, job.get("recipe", {}).get("tta", "none"))
    return dict(right=int((logits.argmax(1) == data.targets).sum()), n=len(data))


def accuracy_ours(job: dict) -> dict:
    "Train the recipe with `cvnb.training.fit.fit`, from an empty cache."
    with TemporaryDirectory() as temp:
        os.environ["CVNB_CACHE"] = temp
        cpu_times, begin = CpuTimes(cpu_seconds()), time.perf_counter()
        train, val, model = load_ours(job, "train"), load_ours(job, "val"), build_model(job)
        folder = Path(temp)/"fit"
        options = autotune(fit_options(job), model, train, folder).options
        history = fit(model, train, val, options, folder, callbacks=[cpu_times])
        wall_s = time.perf_counter() - begin
        accuracy = history.val_accuracy.tolist()
        return dict(cpu_s=cpu_times.cpu_s, accuracy=accuracy, wall_s=wall_s) | count_correct(model, job)


def accuracy_stock(job: dict) -> dict:
    "Train the documented recipe with Lightning from ImageFolder."
    cpu_times, begin = CpuTimes(cpu_seconds()), time.perf_counter()
    pl.seed_everything(job["seed"], verbose=False)
    module = StockModule(build_model(job), job)
    trainer = pl.Trainer(max_epochs=job["epochs"], callbacks=[cpu_times], **quiet_trainer())
    trainer.fit(module, make_stock_loader(job), make_stock_loader(job, "val", False))
    wall_s = time.perf_counter() - begin
    return dict(cpu_s=cpu_times.cpu_s, accuracy=module.accuracies, wall_s=wall_s) | count_correct(module.model, job)


def main() -> None:
    "Run one side."
    side, job_file, result_file = sys.argv[1:]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    job = json.loads(Path(job_file).read_text())
    torch.set_num_threads(job["threads"])
    Path(result_file).write_text(json.dumps(globals()[side](job) | dict(load=os.getloadavg()[0])))


if __name__ == "__main__": main()
