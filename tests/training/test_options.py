"""Every option of a training does something, and what it says: results are held against what can be computed without `fit`."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
from test_train import BATCHNORM, NO_BATCHNORM, PLAIN, Interrupts, Spoils, same
from torch.nn import functional as F
from train_job import digits, fresh

from cvnb.training import tuning
from cvnb.training import cross_validation as folds
from cvnb.training.augment import augmentation
from cvnb.compress.distill import LOSSES, distillation_criterion
from cvnb.training.loaders import Labelled, TrainLoader
from cvnb.metrics.estimates import mean
from cvnb.models.inference import predict_logits
from cvnb.training.optim import SCHEDULES, averaging, make_optimizer, schedule
from cvnb.training.module import Classifier, batches_of_step
from cvnb.training.callbacks import Average
from cvnb.training.fit import answer, fit


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def data() -> tuple[Labelled, Labelled]: return digits()


@pytest.fixture(scope="module")
def plain(data: tuple[Labelled, Labelled], tmp_path_factory: pytest.TempPathFactory) -> object:
    "The weights of a training with few options."
    model = fresh(NO_BATCHNORM)
    fit(model, *data, PLAIN, tmp_path_factory.mktemp("plain"))
    return model


class Watches(pl.Callback):
    "Note the side at which each batch is seen, and the weights after each step."
    def __init__(self) -> None: self.sides, self.weights = [], []

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.sides.append(("train", module.model.preprocess.size))
        self.weights.append({k: v.clone() for k, v in module.model.named_parameters()})

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: object) -> None:
        self.sides.append(("val", module.model.preprocess.size))


@pytest.mark.parametrize("change", [
    dict(ema=0.9), dict(clip=0.1), dict(mixup=0.4), dict(cutmix=1.0), dict(erasing=1.0), dict(flip=True), dict(shift=2), dict(augment="light"),
    dict(augment="trivial"), dict(balance="sampling"), dict(label_smoothing=0.1), dict(resolution=0.5), dict(layer_decay=0.5), dict(weight_decay=0.5),
    dict(schedule="constant"), dict(schedule="linear"), dict(warmup=0.6), dict(seed=1), dict(accumulate=2), dict(optimizer="muon"),
    dict(optimizer="sgd")], ids=str)
def test_an_option_makes_another_training(data, plain, tmp_path, change):
    model = fresh(NO_BATCHNORM)
    fit(model, *data, replace(PLAIN, **change), tmp_path)
    assert not same(model, plain)


def test_small_images_are_for_training_alone(data, tmp_path):
    watch = Watches()
    fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, resolution=0.5), tmp_path, callbacks=[watch])
    assert list(dict.fromkeys(watch.sides)) == [("train", 8), ("val", 16), ("train", 16)]


STEP = replace(PLAIN, epochs=1, batch_size=300, optimizer="sgd", momentum=0.0, schedule="constant", warmup=0.0, weight_decay=0.0, lr=0.1)


def test_a_clipped_step_is_as_long_as_was_asked_for(data, tmp_path):
    model = fresh(NO_BATCHNORM)
    fit(model, *data, replace(STEP, clip=0.1), tmp_path)
    moved = [(a - b).square().sum() for a, b in zip(model.parameters(), fresh(NO_BATCHNORM).parameters())]
    assert float(torch.stack(moved).detach().sum().sqrt()) == pytest.approx(0.1 * 0.1, rel=1e-3)


def test_the_training_loss_is_that_of_the_images(data, tmp_path):
    history = fit(fresh(NO_BATCHNORM), *data, replace(STEP, lr=0.0, batch_size=100), tmp_path)
    logits = torch.tensor(predict_logits(fresh(NO_BATCHNORM), data[0].images))
    assert history.train_loss[0] == pytest.approx(float(F.cross_entropy(logits, torch.tensor(data[0].labels))), rel=1e-4)


def test_the_rate_follows_its_schedule_over_the_optimizers_steps(data, tmp_path):
    "Six batches, four of which make a step: two steps an epoch, the second of what is left."
    history = fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, epochs=3, accumulate=4), tmp_path)
    share = schedule("one-cycle", 6, PLAIN.warmup)
    assert history.lr.to_list() == pytest.approx([PLAIN.lr * share(step) for step in (2, 4, 6)])
    left = SimpleNamespace(num_training_batches=10, accumulate_grad_batches=4)
    assert [batches_of_step(left, i) for i in range(10)] == [4] * 8 + [2] * 2


def test_an_average_is_what_its_decay_says(data, tmp_path):
    "With a decay that is reached, which the first steps' cautious average hides."
    average = [torch.zeros(2)]
    averaging(0.99)(average, [torch.ones(2)], 10**6)
    assert torch.allclose(average[0], torch.tensor(0.01))
    watch, model = Watches(), fresh(NO_BATCHNORM)
    fit(model, *data, replace(PLAIN, ema=0.3), tmp_path, callbacks=[watch])
    expected = watch.weights[0]
    for n, weights in enumerate(watch.weights[1:], 1):
        decay = min(0.3, (1 + n) / (10 + n))
        expected = {k: decay * v + (1 - decay) * weights[k] for k, v in expected.items()}
    for name, value in model.named_parameters(): assert torch.allclose(value, expected[name], atol=1e-5), name


def test_the_average_lies_where_the_model_will(data):
    "Lightning asks the model, which is still on the CPU then."
    trainer = SimpleNamespace(strategy=SimpleNamespace(root_device=torch.device("meta")))
    average = Average(multi_avg_fn=averaging(0.9))
    average.setup(trainer, Classifier(fresh(NO_BATCHNORM), PLAIN), "fit")
    assert {p.device.type for p in average._average_model.parameters()} == {"meta"}


def test_the_best_average_is_what_was_judged(data, tmp_path):
    model = fresh(NO_BATCHNORM)
    history = fit(model, *data, replace(PLAIN, epochs=3, ema=0.3, keep="best"), tmp_path)
    loss = F.cross_entropy(torch.tensor(predict_logits(model, data[1].images)), torch.tensor(data[1].labels))
    assert float(loss) == pytest.approx(history.val_loss[history.val_accuracy.idxmax()], rel=1e-4)


def test_a_training_that_goes_on_remembers_its_best_epoch(data, tmp_path, monkeypatch):
    monkeypatch.setenv("CVNB_SAVE_EVERY", "0")
    options = replace(PLAIN, epochs=3, keep="best")
    with pytest.raises(SystemExit): fit(fresh(BATCHNORM), *data, options, tmp_path, callbacks=[Interrupts(2)])
    model = fresh(BATCHNORM)
    history = fit(model, *data, options, tmp_path, callbacks=[Spoils()])
    right = (predict_logits(model, data[1].images).argmax(1) == data[1].labels).mean()
    assert right == pytest.approx(history.val_accuracy.max()) and right > history.val_accuracy.iloc[-1] + 0.1


def test_batch_norm_stays_as_it_is_after_the_head_was_fitted(data, tmp_path):
    model = fresh(BATCHNORM)
    fit(model, *data, replace(PLAIN, tune="head_first"), tmp_path)
    before = fresh(BATCHNORM).state_dict()
    running = [k for k in before if "running_" in k]
    assert running and all(torch.equal(model.state_dict()[k], before[k]) for k in running)


def test_other_images_or_another_teacher_are_another_training(data, tmp_path):
    train, val = data
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), train, val, PLAIN, tmp_path, callbacks=[Interrupts()])
    images, seen = train.images.copy(), []
    images[7, 3, 3] ^= 1
    fit(fresh(NO_BATCHNORM), replace(train, images=images), val, PLAIN, tmp_path, progress=lambda done, *_, **__: seen.append(done))
    assert min(seen) < 0.5
    identity = lambda backbone=NO_BATCHNORM, **how: distillation_criterion(fresh(backbone), **how).identity
    assert len({identity(), identity(BATCHNORM), identity(loss="dkd"), identity(temperature=2), identity(soft=0.5)}) == 5 and identity() == identity()


# Cross-validation

def test_no_image_has_a_say_in_the_model_that_answers_it(data, tmp_path, monkeypatch):
    "Neither by being learned from nor by choosing the epoch; equal pixels are one image."
    train, told = data[0], []
    rows = pd.DataFrame(dict(path=train.names, split="train", label=[str(n) for n in train.labels], pixel_sha256=train.names))
    rows.loc[1, ["label", "pixel_sha256"]] = rows.loc[0, ["label", "pixel_sha256"]]

    def watched(model, learned, judges, *args, **kw):
        told.append((set(learned.names), set(judges.names)))
        return fit(model, learned, judges, *args, **kw)
    monkeypatch.setattr(folds, "fit", watched)
    labels = train.labels.copy()
    labels[1] = labels[0]
    crossed = folds.cross_validate(lambda: fresh(NO_BATCHNORM), rows, replace(train, labels=labels), replace(PLAIN, keep="best"), tmp_path, 3)
    assert len(told) == 3
    for i, (learned, judges) in enumerate(told):
        answered = set(crossed.predictions.path[crossed.predictions.fold == i])
        assert answered and judges and not learned & judges and not answered & (learned | judges) and len(learned | judges | answered) == 300
    assert crossed.predictions.fold[0] == crossed.predictions.fold[1]
    assert crossed.figures["accuracy"] == mean(crossed.table.accuracy.to_list(), 1 / 2, (0, 1)) != mean(crossed.table.accuracy.to_list(), 0, (0, 1))


# What `auto` picks, and parts

@pytest.mark.parametrize(("limit", "tried", "chosen"), [(None, [16, 32, 64, 128, 256], 64), (64, [16, 32], 32), (16, [8], 8)])
def test_the_smallest_batch_that_is_nearly_as_fast_is_picked(data, monkeypatch, limit, tried, chosen):
    def speed(model: object, train: object, options: object, device: object) -> float:
        if limit and options.batch_size >= limit: raise torch.OutOfMemoryError("CUDA out of memory")
        return {16: 100, 32: 150, 64: 195, 128: 200, 256: 201, 512: 999}[options.batch_size]
    monkeypatch.setattr(tuning, "_speed", speed)
    many = Labelled(np.zeros((12000, 1, 1, 3), np.uint8), np.zeros(12000, np.int64), ["x"] * 12000, "")
    table = tuning.find_batch_size(fresh(NO_BATCHNORM), many, PLAIN)
    assert table.batch_size.to_list() == tried and table.batch_size[table.chosen].to_list() == [chosen]


def test_what_was_picked_is_for_the_same_weights(data, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(tuning, "_pick", lambda *_: asked.append(1) or [])
    other = fresh(NO_BATCHNORM)
    with torch.no_grad(): next(other.net.parameters()).add_(1)
    for model in fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), other: tuning.settle(replace(PLAIN, lr=0), model, data[0], tmp_path)
    assert len(asked) == 2


def test_a_trial_of_rates_answers_nothing(data, monkeypatch):
    monkeypatch.setattr(Classifier, "validation_step", lambda *_: pytest.fail("it validates"))
    lr, curve = tuning.find_lr(fresh(NO_BATCHNORM), data[0].take(np.arange(60)), replace(PLAIN, batch_size=30), steps=40)
    assert 1e-6 < lr < 1 and len(curve) > 10


def test_folds_take_their_images_once(data, tmp_path, monkeypatch):
    taken, take = [], Labelled.take
    monkeypatch.setattr(Labelled, "take", lambda self, index: taken.append(len(index)) or take(self, index))
    rows = pd.DataFrame(dict(path=data[0].names, split="train", label=[str(n) for n in data[0].labels], pixel_sha256=data[0].names))
    folds.cross_validate(lambda: fresh(NO_BATCHNORM), rows, data[0], replace(PLAIN, epochs=1), tmp_path, 3)
    assert len(taken) == 6 and sum(taken) == 900


def test_a_single_step_is_no_warm_up():
    for name in SCHEDULES: assert schedule(name, 1, 0.25)(0) == 1 and schedule(name, 2, 0.5)(0) < 1


def test_the_optimizers_options_reach_it():
    net = fresh(NO_BATCHNORM).net
    decays = {(p.ndim > 1, g["weight_decay"]) for g in make_optimizer(net, "adamw", weight_decay=0.3).param_groups for p in g["params"]}
    assert decays == {(True, 0.3), (False, 0.0)} and make_optimizer(net, "sgd", momentum=0.7).param_groups[0]["momentum"] == 0.7
    curved = pytest.approx((1 + np.cos(np.pi / 4)) / 2)
    assert schedule("linear", 100, 0)(25) == pytest.approx(0.75) and schedule("cosine", 100, 0)(25) == curved
    assert schedule("one-cycle", 100, 0)(25) == curved and schedule("one-cycle", 100, 0.25)(25) == 1


def test_each_process_changes_its_images_in_its_own_way(data):
    train = replace(data[0], images=data[0].images[:1].repeat(300, 0))
    one, two = (next(iter(TrainLoader(train, 20, augmentation("light"), rank=rank, world=2)))[0] for rank in (0, 1))
    assert len(one) == len(two) == 10 and not torch.equal(one, two)


def test_the_losses_of_a_student():
    "Against their papers' formulas, image by image."
    g = torch.Generator().manual_seed(0)
    student, teacher, labels = torch.randn(6, 4, generator=g), torch.randn(6, 4, generator=g), torch.tensor([0, 1, 2, 3, 0, 1])
    p, q = (x.div(4).softmax(1).numpy() for x in (student, teacher))
    kl = lambda t, s: float((t * np.log(t / s)).sum())
    assert float(LOSSES["kd"](student, teacher, labels, 4.0)) == pytest.approx(16 * np.mean([kl(t, s) for t, s in zip(q, p)]), rel=1e-4)
    right = lambda x, i: np.array([x[i, labels[i]], 1 - x[i, labels[i]]])
    others = lambda x, i: np.delete(x[i], labels[i]) / np.delete(x[i], labels[i]).sum()
    apart = [kl(right(q, i), right(p, i)) + 8 * kl(others(q, i), others(p, i)) for i in range(6)]
    assert float(LOSSES["dkd"](student, teacher, labels, 4.0)) == pytest.approx(16 * np.mean(apart), rel=1e-3)
    correlated = lambda a, b: np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)])
    assert float(LOSSES["dist"](student, teacher, labels, 4.0)) == pytest.approx(16 * (2 - correlated(p, q) - correlated(p.T, q.T)), rel=1e-3)


def test_a_criterion_mixes_labels_and_teacher_in_the_shares_asked_for(data):
    student, teacher, images = fresh(NO_BATCHNORM).eval(), fresh(BATCHNORM).eval(), torch.tensor(data[0].images[:8])
    labels = torch.tensor(data[0].labels[:8])
    with torch.no_grad():
        logits, told = student(images), teacher(images)
        mixed = distillation_criterion(teacher, "kd", 4.0, 0.9)(logits, labels, images)
        assert float(mixed) == pytest.approx(float(0.1 * F.cross_entropy(logits, labels) + 0.9 * LOSSES["kd"](logits, told, labels, 4.0)), rel=1e-4)


def test_mirrored_images_are_averaged_with_the_images(data):
    model, val = fresh(NO_BATCHNORM), data[1]
    ask = lambda images: predict_logits(model, np.ascontiguousarray(images))
    np.testing.assert_allclose(answer(model, val, "flip", "cpu"), (ask(val.images) + ask(val.images[:, :, ::-1])) / 2, atol=1e-5)
    assert not np.allclose(answer(model, val, "flip", "cpu"), ask(val.images), atol=1e-3)
