"""The sides of the training benchmark. Each runs in a process of its own, takes one task as JSON and writes what it measured as JSON.

    python benchmarks/train_sides.py SIDE TASK.json ANSWER.json

`train.py` calls it. A task names the prepared folder, the recipe and the number of threads; whatever is timed begins after the imports.
Stock sides are what torchvision's and Lightning's own pages show: ImageFolder, its transforms on one image at a time in worker processes, and
a LightningModule of a dozen lines. They hand their model uint8 images too, so that normalising is part of the same model on both sides.
"""
from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

from cvnb.training.augment import augmentation
from cvnb.training.loaders import Labelled, TrainLoader, labelled
from cvnb.models.weights import create_model
from cvnb.training.optim import make_optimizer, schedule
from cvnb.training.options import FitOptions
from cvnb.training.fit import answer, fit
from cvnb.training.tuning import settle

# What both sides do to an image, besides mirroring it: cvnb's options, and the transforms of the same distribution.
CHANGES = {
    "crop": (dict(augment="none"), lambda size: [v2.RandomCrop(size, padding=size // 8, padding_mode="reflect")]),
    "light": (dict(augment="light"), lambda size: [v2.RandomAffine(10, (.08, .08), (.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR)]),
    "none": (dict(augment="none"), lambda size: []),
}


class Clock(pl.Callback):
    "Note how long each training step takes, from its turn on; after each it is the next side's turn."
    def __init__(self, task: dict):
        (self.go, self.done), self.sides, self.batch_size, self.seconds = task["turns"], task["sides"], task["batch_size"], []

    def wait(self) -> None:
        "Give the turn away, and wait for the next one."
        os.write(self.done, b".")
        os.read(self.go, 1)
        self.begin = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, *_) -> None:
        for saver in (c for c in trainer.callbacks if hasattr(c, "every_s")): saver.every_s *= self.sides   # its clock goes on in others' turns
        self.wait()

    def on_train_batch_end(self, *_) -> None:
        self.seconds.append(time.perf_counter() - self.begin)
        self.wait()

    def rates(self) -> dict:
        "Give the speed of each step."
        return dict(images_per_s=[self.batch_size / s for s in self.seconds])


class Ledger(pl.Callback):
    "Note how much processor time had been used when each epoch had been trained and validated."
    def __init__(self, begin: float): self.begin, self.cpu_s = begin, []

    def on_train_epoch_end(self, trainer: pl.Trainer, *_) -> None:
        self.cpu_s.append(cpu_s() - self.begin)
        print(f"{self.cpu_s[-1]:.0f} CPU s, validation {float(trainer.callback_metrics['val_accuracy']):.4f}", flush=True)


def cpu_s() -> float:   # seconds
    "Add up the processor time of this process and its children, those at work included."
    import psutil
    own, alive = os.times(), [c.cpu_times() for c in psutil.Process().children(recursive=True)]
    return sum(own[:4]) + sum(c.user + c.system for c in alive)


def quiet() -> dict:   # arguments for Lightning's Trainer
    "Turn off what would be written or printed; nothing of it is timed."
    return dict(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
                num_sanity_val_steps=0)


def options(task: dict, **more) -> FitOptions:
    "Give cvnb's options for a task: its recipe's, and what every side is told. Precision and workers are picked, as in the stage."
    told = dict(precision="auto", workers=-1) | task.get("recipe", {}) | more
    if "change" in task: told |= CHANGES[task["change"]][0] | dict(flip=task["flip"], shift=task["size"] // 8 * (task["change"] == "crop"))
    return FitOptions.of(told)


def ours_data(task: dict, split: str) -> Labelled:
    "Read a split's images as the stage does: decoded once for all, under their digests."
    table = pd.read_parquet(Path(task["folder"])/"manifest.parquet")
    classes, rows = sorted(set(table.label)), table[table.split == split]
    return labelled(task["folder"], rows, classes, task["size"])


def ours_batches(data: Labelled, o: FitOptions) -> Callable[[], Iterator]:   # gives an epoch's batches
    "Give cvnb's training batches without a Trainer."
    loader = TrainLoader(data, o.batch_size, augmentation(o.augment, o.flip, o.shift), o.seed, workers=o.workers)

    def batches() -> Iterator:
        loader.set_epoch(loader.epoch + 1)
        return iter(loader)
    return batches


def stock_loader(task: dict, split: str = "train", changes: bool = True) -> DataLoader:
    "Read images as torchvision's pages do, in worker processes."
    size = task["size"]
    steps = [*([v2.Resize((size, size))] if task["resize"] else []), *(CHANGES[task["change"]][1](size) if changes else []),
             *([v2.RandomHorizontalFlip()] if changes and task["flip"] else []), v2.PILToTensor()]
    data = ImageFolder(Path(task["folder"])/split, v2.Compose(steps))
    return DataLoader(data, task["batch_size"], shuffle=changes, drop_last=changes, num_workers=task["workers"], persistent_workers=True)


def epoch_rates(batches: Callable[[], Iterator], repeats: int) -> list[float]:   # images per second
    "Time whole epochs of a loader alone, after one that warms up."
    rates = []
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        n = sum(len(batch[1]) for batch in batches())
        rates.append(n / (time.perf_counter() - begin))
    return rates[1:]


def loader_ours(task: dict) -> dict:
    "The loader alone, from a cache that is empty at first."
    with TemporaryDirectory() as cache:
        os.environ["CVNB_CACHE"] = cache
        begin = time.perf_counter()
        data = ours_data(task, "train")
        batches = ours_batches(data, options(task, batch_size=task["batch_size"], workers=task["workers"]))
        n = sum(len(batch[1]) for batch in batches())
        first = n / (time.perf_counter() - begin)
        begin = time.perf_counter()
        ours_data(task, "train")
        return dict(first=first, again_s=time.perf_counter() - begin, images_per_s=epoch_rates(batches, task["repeats"]))


def loader_stock(task: dict) -> dict:
    "The loader alone; every epoch decodes."
    loader = stock_loader(task)
    begin = time.perf_counter()
    n = sum(len(labels) for _, labels in loader)
    return dict(first=n / (time.perf_counter() - begin), images_per_s=epoch_rates(lambda: iter(loader), task["repeats"]))


def model_of(task: dict) -> nn.Module:
    "Build the task's model."
    torch.manual_seed(task.get("seed", 0))
    classes = sorted(p.name for p in (Path(task["folder"])/"train").iterdir())
    model = create_model(task["backbone"], classes, task["size"], task["stem"], task["weights"])
    return model.to(memory_format=torch.channels_last)


def optimizers(model: nn.Module, task: dict, steps: int) -> tuple:
    "Give AdamW with one-cycle, or the SGD with cosine of torchvision's reference."
    lr = task["lr"]
    if task.get("optimizer") == "sgd":
        optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=task["weight_decay"])
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    optimizer = torch.optim.AdamW(model.parameters(), lr, weight_decay=task["weight_decay"])
    return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 5), pct_start=0.25)


class Stock(pl.LightningModule):
    "What a page about Lightning shows."
    def __init__(self, model: nn.Module, task: dict):
        super().__init__()
        self.model, self.task, self.right = model, task, []

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        loss = F.cross_entropy(self.model(batch[0].permute(0, 2, 3, 1)), batch[1])
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], _: int) -> None:
        right = self.model(batch[0].permute(0, 2, 3, 1)).argmax(1) == batch[1]
        self.log("val_accuracy", right.float().mean(), batch_size=len(right))

    def on_validation_epoch_end(self) -> None: self.right.append(float(self.trainer.callback_metrics["val_accuracy"]))

    def configure_optimizers(self) -> dict:
        optimizer, schedule = optimizers(self.model, self.task, int(self.trainer.estimated_stepping_batches))
        return dict(optimizer=optimizer, lr_scheduler=dict(scheduler=schedule, interval="step"))


def loop(model: nn.Module, batches: Iterator, task: dict) -> dict:   # speeds
    "Train in a plain loop of torch, with cvnb's optimizer and schedule."
    optimizer, clock = make_optimizer(model.net, "adamw", task["lr"], task["weight_decay"]), Clock(task)
    clock.wait()
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule("one-cycle", task["steps"], 0.25))
    model.train()
    for images, labels, *_ in batches:
        loss = F.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
        clock.on_train_batch_end()
    return clock.rates()


def speed_ceiling(task: dict) -> dict:
    "The model on random images that are in memory."
    shape = (task["batch_size"], task["size"], task["size"], 3)
    g = torch.Generator().manual_seed(0)
    ready = [(torch.randint(0, 256, shape, dtype=torch.uint8, generator=g), torch.randint(0, 10, shape[:1], generator=g)) for _ in range(8)]
    return loop(model_of(task), islice(cycle(ready), task["steps"]), task)


def speed_plain(task: dict) -> dict:
    "The work of cvnb's training, its batches too, in a plain loop."
    data, model = ours_data(task, "train"), model_of(task)
    with TemporaryDirectory() as folder: o, _ = settle(options(task, batch_size=task["batch_size"], workers=0), model, data, folder)
    return loop(model, ours_batches(data, o)(), task)


def speed_ours(task: dict) -> dict:
    "Training through `cvnb.train.fit`."
    data = ours_data(task, "train")
    val = data.take(np.arange(task["batch_size"]))   # validating is not timed
    told = dict(epochs=1, batch_size=task["batch_size"], lr=task["lr"], weight_decay=task["weight_decay"], workers=0)
    model = model_of(task)
    with TemporaryDirectory() as folder:
        o, _ = settle(options(task, **told), model, data, folder)
        fit(model, data, val, o, folder, callbacks=[clock := Clock(task)])
    return clock.rates()


def speed_stock(task: dict) -> dict:
    "Training with Lightning from ImageFolder."
    trainer = pl.Trainer(max_epochs=1, callbacks=[clock := Clock(task)], **quiet())
    trainer.fit(Stock(model_of(task), task), stock_loader(task))
    return clock.rates()


def tested(model: nn.Module, task: dict) -> dict:
    "Count the test images that a trained model gets right, with their mirror images where the recipe says so."
    data = ours_data(task, "test")
    right = answer(model, data, task.get("recipe", {}).get("tta", "none")).argmax(1) == data.labels
    return dict(right=int(right.sum()), n=len(right))


def accuracy_ours(task: dict) -> dict:
    "The recipe through `cvnb.train.fit`, from an empty cache."
    with TemporaryDirectory() as temp:
        os.environ["CVNB_CACHE"] = temp
        begin, wall = cpu_s(), time.perf_counter()
        train, val, model = ours_data(task, "train"), ours_data(task, "val"), model_of(task)
        o, _ = settle(options(task), model, train, folder := Path(temp)/"fit")
        history = fit(model, train, val, o, folder, callbacks=[ledger := Ledger(begin)])
        seconds = time.perf_counter() - wall
        return dict(cpu_s=ledger.cpu_s, accuracy=history.val_accuracy.tolist(), wall_s=seconds) | tested(model, task)


def accuracy_stock(task: dict) -> dict:
    "The book's recipe with Lightning from ImageFolder."
    begin, wall = cpu_s(), time.perf_counter()
    pl.seed_everything(task["seed"], verbose=False)
    module = Stock(model_of(task), task)
    trainer = pl.Trainer(max_epochs=task["epochs"], callbacks=[ledger := Ledger(begin)], **quiet())
    trainer.fit(module, stock_loader(task), stock_loader(task, "val", False))
    seconds = time.perf_counter() - wall
    return dict(cpu_s=ledger.cpu_s, accuracy=module.right, wall_s=seconds) | tested(module.model, task)


def main() -> None:
    "Run one side."
    import logging
    import warnings
    side, task, answer = sys.argv[1:]
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    task = json.loads(Path(task).read_text())
    torch.set_num_threads(task["threads"])
    Path(answer).write_text(json.dumps(globals()[side](task) | dict(load=os.getloadavg()[0])))


if __name__ == "__main__": main()
