"""The Lightning module: losses, steps, sizes and guards against values that are not finite."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from fit_helpers import NO_BATCHNORM, PLAIN, largest_difference
from torch.nn import functional as F
from train_job import fresh

from cvnb.core.errors import CvnbError
from cvnb.models.inference import predict_logits
from cvnb.training.fit import fit, loss_class_weights
from cvnb.training.module import DataModule, TrainingModule, batches_in_step
from cvnb.training.optim import make_schedule

ONE_STEP = replace(PLAIN, epochs=1, batch_size=300, optimizer="sgd", momentum=0.0, schedule="constant", warmup=0.0,
                   weight_decay=0.0, lr=0.1)


def test_incomplete_last_step_counts_fully(data, tmp_path):
    "Six batches of 50, where twelve should make a step, are the step of one batch of 300."
    one, six = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    fit(one, *data, ONE_STEP, tmp_path/"one")
    fit(six, *data, replace(ONE_STEP, batch_size=50, accumulate=12), tmp_path/"six")
    assert largest_difference(one, six) < 1e-5 < 1e-3 < largest_difference(one, fresh(NO_BATCHNORM))


def test_clipped_step_has_the_length_of_clip(data, tmp_path):
    model = fresh(NO_BATCHNORM)
    fit(model, *data, replace(ONE_STEP, clip=0.1), tmp_path)
    moved = [(a - b).square().sum() for a, b in zip(model.parameters(), fresh(NO_BATCHNORM).parameters())]
    assert float(torch.stack(moved).detach().sum().sqrt()) == pytest.approx(0.1 * 0.1, rel=1e-3)


def test_training_loss_is_the_mean_over_the_images(data, tmp_path):
    history = fit(fresh(NO_BATCHNORM), *data, replace(ONE_STEP, lr=0.0, batch_size=100), tmp_path)
    logits = torch.tensor(predict_logits(fresh(NO_BATCHNORM), data[0].images))
    expected = float(F.cross_entropy(logits, torch.tensor(data[0].targets)))
    assert history.train_loss[0] == pytest.approx(expected, rel=1e-4)


def test_loss_weighs_rare_classes_more_and_smooths_labels(data):
    "By hand: a class with a third of the images of another weighs three times as much."
    some = np.flatnonzero((data[0].targets == 0) | (np.arange(300) % 3 == 0))   # all images of 0, a third of the others
    train = data[0].take(some)
    options = replace(PLAIN, balance="weights", label_smoothing=0.1)
    model = fresh(NO_BATCHNORM)
    weights = loss_class_weights(model, train, options)
    counts = torch.tensor(np.bincount(train.targets, minlength=10))
    assert torch.allclose(weights * counts, torch.full((10,), len(train) / 10)) and weights.argmin() == 0
    logits = torch.tensor(predict_logits(model, train.images))
    targets = torch.tensor(train.targets)
    loss = TrainingModule(model, options, weights=weights)._loss(logits, targets, None)
    right = logits.log_softmax(1)
    smoothed = 0.9 * F.one_hot(targets, 10) + 0.01
    assert loss.item() == pytest.approx(float(-(smoothed * right * weights).sum() / len(train)), rel=1e-5)
    assert loss_class_weights(model, train, PLAIN) is None


def test_validation_loss_has_neither_smoothing_nor_weights(data, tmp_path):
    options = replace(ONE_STEP, lr=0.0, balance="weights", label_smoothing=0.3)
    history = fit(fresh(NO_BATCHNORM), *data, options, tmp_path)
    logits = torch.tensor(predict_logits(fresh(NO_BATCHNORM), data[1].images))
    assert history.val_loss[0] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(data[1].targets))), rel=1e-4)


def test_learning_rate_follows_the_schedule_over_optimizer_steps(data, tmp_path):
    "Six batches, of which four make a step: two steps an epoch, the second with the remaining two batches."
    history = fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=3, accumulate=4), tmp_path)
    share = make_schedule("one-cycle", 6, PLAIN.warmup)
    assert history.lr.to_list() == pytest.approx([PLAIN.lr * share(step) for step in (2, 4, 6)])
    trainer = SimpleNamespace(num_training_batches=10, accumulate_grad_batches=4)
    assert [batches_in_step(trainer, i) for i in range(10)] == [4] * 8 + [2] * 2


class RecordsSizes(pl.Callback):
    "Note the size at which each batch is seen."
    def __init__(self) -> None: self.sizes = []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.sizes.append(("train", module.model.preprocess.size))

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.sizes.append(("val", module.model.preprocess.size))


def test_validation_uses_full_images_while_training_images_grow(data, tmp_path):
    recorder = RecordsSizes()
    fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, resolution=0.5), tmp_path, callbacks=[recorder])
    assert list(dict.fromkeys(recorder.sizes)) == [("train", 8), ("val", 16), ("train", 16)]


@pytest.mark.parametrize(("batch", "largest"), [(8, 32), (512, 256)])
def test_validation_batches_fit_where_training_batches_fit(data, batch, largest):
    options = replace(PLAIN, batch_size=batch)
    module = DataModule(data[1], data[0], options, fresh(NO_BATCHNORM).spec)   # 300 images validate
    sizes = [len(targets) for _, targets in module.val_dataloader()]
    assert sizes[0] == max(sizes) == largest and sum(sizes) == 300


def test_error_of_a_nan_loss_names_the_image(data, tmp_path):
    bad = torch.from_numpy(data[0].images[77])

    def planted_loss(logits, targets, images):
        return torch.where((images == bad).flatten(1).all(1), torch.nan, logits.sum(-1)).mean()

    message = rf"the loss is nan in epoch 1, batch \d+ \(images: {data[0].names[77]}\).*Lower the learning rate"
    with pytest.raises(CvnbError, match=message): fit(fresh(NO_BATCHNORM), *data, PLAIN, tmp_path, planted_loss)


class SpoilsLastStep(pl.Callback):
    "Destroy the weights in the last step, which is in no training loss."
    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx) -> None:
        if batch_idx + 1 == trainer.num_training_batches: module.model.net.get_classifier().bias.data[3] = torch.nan


def test_predictions_that_are_not_finite_stop_training(data, tmp_path):
    message = r"not finite after epoch 1 \(validation images: digit_300.png, .* and 92 more\)\. Lower the learning rate"
    with pytest.raises(CvnbError, match=message):
        fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=1), tmp_path, callbacks=[SpoilsLastStep()])
