"""Automatic options: what is picked, and what a trial must not do."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from fit_helpers import NO_BATCHNORM, PLAIN, Interrupts
from train_job import fresh

from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import read_json
from cvnb.training import tuning
from cvnb.training.fit import fit
from cvnb.training.loaders import LabelledImages
from cvnb.training.module import TrainingModule
from cvnb.training.tuning import autotune, find_batch_size, find_lr


def test_picked_options_are_kept_for_a_resumed_training(data, tmp_path):
    "Timings differ from call to call, and with another batch size the checkpoint would be another training's."
    options = replace(PLAIN, batch_size=0, workers=-1)
    first = autotune(options, fresh(NO_BATCHNORM), data[0], tmp_path).options
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, first, tmp_path, callbacks=[Interrupts()])
    saved = read_json(tmp_path/"checkpoints/picked.json")
    again = autotune(options, fresh(NO_BATCHNORM), data[0], tmp_path).options
    assert again == first and read_json(tmp_path/"checkpoints/picked.json") == saved


def test_picked_options_depend_on_the_weights(data, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(tuning, "_pick_options", lambda *_: calls.append(1) or [])
    other = fresh(NO_BATCHNORM)
    with torch.no_grad(): next(other.net.parameters()).add_(1)
    for model in fresh(NO_BATCHNORM), fresh(NO_BATCHNORM), other:
        autotune(replace(PLAIN, lr=0), model, data[0], tmp_path)
    assert len(calls) == 2


def test_processes_of_torchrun_need_batch_size_and_lr(data, tmp_path, monkeypatch):
    environment = dict(TORCHELASTIC_RUN_ID="1", WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    for name, value in environment.items(): monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match="would each pick a batch_size and a lr of their own. Give both"):
        autotune(replace(PLAIN, devices=2, lr=0), fresh(NO_BATCHNORM), data[0], tmp_path)
    assert not len(autotune(replace(PLAIN, devices=2), fresh(NO_BATCHNORM), data[0], tmp_path).picked)


@pytest.mark.parametrize(("bfloat16", "capability", "picked"), [
    (True, (8, 0), "bf16-mixed"), (False, (7, 5), "16-mixed"), (False, (6, 1), "32-true")])
def test_precision_is_one_that_the_gpu_supports(monkeypatch, bfloat16, capability, picked):
    "Older GPUs emulate bfloat16 in software."
    is_supported = lambda including_emulation=True: including_emulation or bfloat16
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert tuning._pick_precision(True)[0] == picked and tuning._pick_precision(False)[0] == "32-true"


def test_batch_sizes_can_be_shared_by_the_devices(data):
    table = find_batch_size(fresh(NO_BATCHNORM), data[0], replace(PLAIN, devices=3), largest=200)
    assert (table.batch_size % 3 == 0).all() and table.chosen.sum() == 1


@pytest.mark.parametrize(("limit", "tried", "chosen"), [
    (None, [16, 32, 64, 128, 256], 64), (64, [16, 32], 32), (16, [8], 8)])
def test_smallest_batch_with_nearly_the_best_speed_is_chosen(data, monkeypatch, limit, tried, chosen):
    def fake_speed(model: object, train: object, options: object, device: object) -> float:
        if limit and options.batch_size >= limit: raise torch.OutOfMemoryError("CUDA out of memory")
        return {16: 100, 32: 150, 64: 195, 128: 200, 256: 201, 512: 999}[options.batch_size]

    monkeypatch.setattr(tuning, "_training_speed", fake_speed)
    many = LabelledImages(np.zeros((12000, 1, 1, 3), np.uint8), np.zeros(12000, np.int64), ["x"] * 12000)
    table = find_batch_size(fresh(NO_BATCHNORM), many, PLAIN)
    assert table.batch_size.to_list() == tried and table.batch_size[table.chosen].to_list() == [chosen]


def test_lr_trial_halves_batches_that_do_not_fit(data, tmp_path, monkeypatch):
    tried, run_trial = [], tuning._run_lr_trial

    def hungry_trial(model, train, options, steps):
        tried.append((options.batch_size, options.accumulate))
        if options.batch_size > 25: raise torch.OutOfMemoryError("CUDA out of memory")
        return run_trial(model, train, options, steps)

    monkeypatch.setattr(tuning, "_run_lr_trial", hungry_trial)
    options = replace(PLAIN, lr=0.0, balance="weights", clip=1.0, layer_decay=0.8)
    tuned = autotune(options, fresh(NO_BATCHNORM), data[0], tmp_path)
    assert tried == [(50, 1), (25, 2)] and tuned.picked.why[0].endswith("tried without layer_decay")


def test_lr_trial_ends_where_the_loss_is_not_finite(data, monkeypatch):
    "With more batches to a step than there are, a step is an epoch."
    training_step = TrainingModule.training_step

    def spoilt_step(module, *batch):
        loss = training_step(module, *batch)
        return loss * torch.nan if module.trainer.optimizers[0].param_groups[0]["lr"] > 0.1 else loss

    monkeypatch.setattr(tuning._LrTrial, "training_step", spoilt_step)
    lr, curve = find_lr(fresh(NO_BATCHNORM), data[0], replace(PLAIN, accumulate=40), steps=60)
    assert 1e-5 < lr < 0.1 and curve.lr.max() <= 0.12 and len(curve) > 30
    nan_step = lambda module, *batch: training_step(module, *batch) * torch.nan
    monkeypatch.setattr(tuning._LrTrial, "training_step", nan_step)
    with pytest.raises(CvnbError, match="no learning rate could be picked.*Give one"):
        find_lr(fresh(NO_BATCHNORM), data[0], PLAIN, steps=60)


def test_lr_trial_does_not_validate(data, monkeypatch):
    monkeypatch.setattr(TrainingModule, "validation_step", lambda *_: pytest.fail("it validates"))
    few = data[0].take(np.arange(60))
    lr, curve = find_lr(fresh(NO_BATCHNORM), few, replace(PLAIN, batch_size=30), steps=40)
    assert 1e-6 < lr < 1 and len(curve) > 10
