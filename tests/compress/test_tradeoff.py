"""Pruning stops where a step is beyond repair, the step before goes on, and the advice names a stop that holds."""
from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from cvnb.compress import tradeoff
from cvnb.compress.acceptance import check_acceptance, compression_advice
from cvnb.compress.distill import DistillationResult
from cvnb.compress.prune import recalibrate_batch_norm
from cvnb.compress.tradeoff import choose_model, prune_in_steps
from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model
from cvnb.training.loaders import LabelledImages


@pytest.fixture(scope="module")
def sure() -> tuple[VisionModel, LabelledImages]:
    "A network, and images whose labels are its own answers: it is always right, and pruning costs accuracy at once."
    torch.manual_seed(0)
    model = create_model("resnet10t", list("abcdefghij"), 16, "full").eval()
    light = np.linspace(0.2, 1, 200)[:, None, None, None]
    images = (np.random.default_rng(0).integers(0, 256, (200, 16, 16, 3)) * light).astype(np.uint8)
    recalibrate_batch_norm(model, images)
    model.net.fc.bias.data -= torch.from_numpy(predict_logits(model, images).mean(0))   # no class is preferred
    return model, LabelledImages(images, predict_logits(model, images).argmax(1))


def test_network_stays_whole_if_its_first_step_is_beyond_repair(sure):
    model, val = sure
    found = prune_in_steps(model, 0.02, val, val, margin=0.0, repair=0.0)
    [step] = found.tradeoffs.step[2:]
    assert found.step == "trained" and step.startswith("pruned to 27%")
    assert sum(p.numel() for p in found.model.parameters()) == sum(p.numel() for p in model.parameters())
    assert len(found.notes) == 1 and "beyond repair" in found.notes[0] and "the network stays whole" in found.notes[0]
    last = found.tradeoffs.iloc[-1]
    assert last.difference == pytest.approx(last.accuracy - 1) and last.difference_high < 0
    student = DistillationResult(copy.deepcopy(found.model), copy.deepcopy(found.model), pd.DataFrame())
    choice = choose_model(found, student, val)
    pruned = choice.tradeoffs.step.str.startswith("pruned")
    assert choice.step == "distilled" and not choice.tradeoffs.chosen[pruned].any()


@pytest.mark.parametrize("better", ["old", "new"])
def test_statistics_that_validate_better_are_kept(better, sure, monkeypatch):
    "Planted: the statistics of one kind make every answer wrong."
    model, val = sure
    renewed = []

    def recalibrate(pruned, *_, **__):
        renewed.append(pruned)
        return pruned
    measured = lambda step, model, val, *_, **__: dict(
        step=step, macs=1, objective=float(step == "trained" or (model in renewed) == (better == "new")),
        difference=0.0, difference_high=0.0)
    monkeypatch.setattr(tradeoff, "recalibrate_batch_norm", recalibrate)
    monkeypatch.setattr(tradeoff, "measure_tradeoff", measured)
    found = prune_in_steps(model, 0.5, val, val)
    assert (found.model in renewed) == (better == "new")
    assert found.step == ("pruned to 50%" if better == "new" else "pruned to 50%, old statistics")
    other = found.tradeoffs.set_index("step").objective[f"pruned, {dict(old='new', new='old')[better]} statistics"]
    assert other == 0 and found.tradeoffs.objective.iloc[-1] == 1


def tables(n: int, lost: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Predictions of a model that is always right, and of one that is wrong for the first images."
    right = pd.DataFrame(dict(path=[f"{i:04}" for i in range(n)], correct=True))
    return right, right.assign(correct=np.arange(n) >= lost)


STOPS = pd.DataFrame(dict(
    step=["trained", "pruned to 79%", "pruned to 63%", "pruned to 50%", "distilled"], macs=[1000, 793, 630, 500, 500],
    difference=[0, -0.002, -0.1, -0.6, -0.54], difference_low=[0, -0.01, -0.15, -0.7, -0.6],
    difference_high=[0, 0.01, -0.05, -0.5, -0.5], chosen=[False, False, False, False, True]))


def test_advice_for_a_large_loss_is_a_stop_and_not_more_images():
    rejected = check_acceptance(*tables(600, 324), margin=0.02)
    advice = compression_advice(rejected, STOPS)
    assert advice.startswith("stop at 79% of the MACs (compress.macs_fraction=0.793)") and "images" not in advice
    shown = replace(rejected, advice=advice)
    assert advice in shown.notes[0] and advice in shown._repr_markdown_() and "more test images" not in shown.notes[0]


def test_advice_for_a_small_loss_is_more_images():
    unproven = check_acceptance(*tables(100, 1), margin=0.02)
    assert not unproven.accepted
    assert compression_advice(unproven, STOPS).startswith("more test images (at least 189)")
    enough = check_acceptance(*tables(269, 4), margin=0.02)
    assert not enough.accepted and compression_advice(enough, STOPS).startswith("more test images or a longer")


def test_advice_names_no_stop_where_none_holds():
    rejected = check_acceptance(*tables(600, 324), margin=0.02)
    assert "pruning less cannot: already 79%" in compression_advice(rejected, STOPS.assign(difference_low=-0.5))
    assert "less pruning" in compression_advice(rejected, STOPS[STOPS.step.isin(["trained", "distilled"])])
