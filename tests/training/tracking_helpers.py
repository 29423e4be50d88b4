"""Helpers of the tests of tracking: a small training, predictions, and the file of an offline W&B run."""
from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytorch_lightning as pl
import torch
from wandb_file import read_wandb_file

from cvnb.core.stage import Stage
from cvnb.training.callbacks import EpochHistory


def run_folder(stage: Stage) -> Path: return stage.run/stage.environment["wandb"]["folder"]


def read_run(stage: Stage) -> dict: return read_wandb_file(run_folder(stage))


class Adder(pl.LightningModule):
    "Learn to add four numbers."
    def __init__(self, pause_s: float = 0.0):
        super().__init__()
        self.layer = torch.nn.Linear(4, 1)
        self.pause_s = pause_s

    def training_step(self, batch: list[torch.Tensor], number: int) -> dict:
        time.sleep(self.pause_s)
        return dict(loss=self.layer(batch[0]).sub(batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer: return torch.optim.SGD(self.parameters(), lr=0.05)


class FixedHistory(EpochHistory):
    "A history with made-up values, for a module without validation metrics."
    def __init__(self) -> None: self.rows = []

    def setup(self, *_: object, **__: object) -> None: pass

    def on_train_start(self, *_: object) -> None: pass

    def on_train_epoch_start(self, *_: object) -> None: pass

    def on_train_batch_end(self, *_: object) -> None: pass

    def on_fit_end(self, *_: object) -> None: pass

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        self.rows.append(dict(epoch=epoch, val_loss=1 / epoch, images_per_s=100.0))


def train_adder(
    logger: object, *callbacks: pl.Callback, steps: int = 10, pause_s: float = 0.0, **options: object,
) -> Adder:
    "Train for two epochs."
    torch.manual_seed(0)
    x = torch.randn(4 * steps, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    model = Adder(pause_s)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=logger, callbacks=list(callbacks),
                         enable_progress_bar=False, enable_checkpointing=False, enable_model_summary=False, **options)
    trainer.fit(model, loader)
    return model


def make_predictions(n: int = 60) -> tuple[pd.DataFrame, np.ndarray]:   # a table, and its images
    "Draw random predictions."
    rng = np.random.default_rng(0)
    names = ["cat", "dog", "$5"]
    table = pd.DataFrame(dict(path=[f"a/{i}.png" for i in range(n)], split="val", label=rng.choice(names, n),
                              predicted=rng.choice(names, n), confidence=rng.uniform(0.4, 1, n)))
    return table.assign(correct=table.label == table.predicted), rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def make_audit() -> dict:
    "Make the content of an audit.json with two checks."
    checks = {}
    for name, n in dict(near_duplicates=3, label_errors=5).items():
        share = dict(value=n / 60, low=0.0, high=0.2, n=60)
        checks[name] = dict(about=f"What {name} are.", n=n, n_checked=60, share=share)
    return dict(n_images=60, checks=checks)
