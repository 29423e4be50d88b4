"""Callbacks: progress, best weights, averaged weights and early stopping."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fit_helpers import BATCHNORM, NO_BATCHNORM, PLAIN, Recorder, SpoilsThirdEpoch
from torch.nn import functional as F
from train_job import fresh

from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model
from cvnb.tasks.labels import get_task
from cvnb.training import callbacks
from cvnb.training.callbacks import AveragedWeights
from cvnb.training.fit import fit
from cvnb.training.module import TrainingModule
from cvnb.training.optim import make_ema_update


def test_progress_ends_with_the_metrics_of_the_last_epoch(data, tmp_path, monkeypatch):
    "The end is not reported after the last batch, when its metrics are not known yet."
    monkeypatch.setattr(callbacks, "PROGRESS_INTERVAL_S", 0.0)
    progress = Recorder()
    fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, progress=progress)
    epochs = [len(values["loss_val"]) for done, values in zip(progress.done, progress.curves) if done >= 1]
    assert len(progress.done) > 10 and epochs == [2] and progress.done[-1] == 1


def test_early_stop_is_reported_once_as_the_end(data, tmp_path):
    progress, options = Recorder(), replace(PLAIN, epochs=9, lr=0.0, patience=1)
    fit(fresh(NO_BATCHNORM), *data, options, tmp_path, progress=progress)
    assert progress.texts[-1] == "epoch 2/9 · stopped early"
    assert progress.done[-1] == 1.0 and progress.done.count(1.0) == 1


def test_keep_best_returns_the_weights_of_the_best_epoch(data, tmp_path):
    model, options = fresh(BATCHNORM), replace(PLAIN, epochs=3, keep="best")
    history = fit(model, *data, options, tmp_path, callbacks=[SpoilsThirdEpoch()])
    accuracy = (predict_logits(model, data[1].images).argmax(1) == data[1].targets).mean()
    assert accuracy == pytest.approx(history.val_accuracy.max()) and accuracy > history.val_accuracy.iloc[2] + 0.2
    assert not history.attrs["notes"]


def test_patience_stops_training(data, tmp_path):
    "With a learning rate of 0 nothing is learned: the second and the third epoch are waited for."
    history = fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=9, lr=0.0, patience=2), tmp_path)
    assert len(history) == 3
    assert history.attrs["notes"] == ["stopped after epoch 3 of 9: the validation loss had not fallen for 2"]


def test_keep_best_uses_the_loss_where_r2_is_undefined(data, tmp_path):
    "A label that does not vary in the validation images has no r2."
    task, (train, val) = get_task("regression"), data
    train = replace(train, targets=np.stack([train.targets, train.targets % 2], 1).astype(np.float32))
    val = replace(val, targets=np.stack([val.targets, 0 * val.targets], 1).astype(np.float32))
    scale = task.target_scale(train.targets)
    torch.manual_seed(0)
    model = create_model(NO_BATCHNORM, ["a", "b"], 16, task="regression", **scale)
    options = replace(PLAIN, epochs=3, keep="best")
    history = fit(model, train, val, options, tmp_path, callbacks=[SpoilsThirdEpoch()])
    scaled = get_task("regression", model.spec.target_std)
    loss = float(scaled.loss(torch.tensor(predict_logits(model, val.images)), torch.tensor(val.targets)))
    assert history.val_r2.isna().all() and loss == pytest.approx(history.val_loss.min(), abs=1e-5)
    assert history.val_loss.idxmin() == 1


class RecordsWeights(pl.Callback):
    "Keep the weights after each step."
    def __init__(self) -> None: self.weights = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.weights.append({name: p.clone() for name, p in module.model.named_parameters()})


def test_averaged_weights_follow_their_decay(data, tmp_path):
    "The decay is reached after many updates; the first updates use a smaller one."
    average = [torch.zeros(2)]
    make_ema_update(0.99)(average, [torch.ones(2)], 10**6)
    assert torch.allclose(average[0], torch.tensor(0.01))
    recorder, model = RecordsWeights(), fresh(NO_BATCHNORM)
    fit(model, *data, replace(PLAIN, ema=0.3), tmp_path, callbacks=[recorder])
    expected = recorder.weights[0]
    for n, weights in enumerate(recorder.weights[1:], 1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {name: decay * v + (1 - decay) * weights[name] for name, v in expected.items()}
    for name, value in model.named_parameters(): assert torch.allclose(value, expected[name], atol=1e-5), name


def test_averaged_weights_lie_on_the_device_of_the_training(data):
    "Lightning takes the device of the model, which is still on the CPU."
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average = AveragedWeights(multi_avg_fn=make_ema_update(0.9))
    average.setup(trainer, TrainingModule(fresh(NO_BATCHNORM), PLAIN), "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}


def test_keep_best_saves_the_averaged_weights(data, tmp_path):
    model = fresh(NO_BATCHNORM)
    history = fit(model, *data, replace(PLAIN, epochs=3, ema=0.3, keep="best"), tmp_path)
    loss = F.cross_entropy(torch.tensor(predict_logits(model, data[1].images)), torch.tensor(data[1].targets))
    assert float(loss) == pytest.approx(history.val_loss[history.val_accuracy.idxmax()], rel=1e-4)
