"""Distillation losses against the formulas of their papers, and the criterion that mixes them with the labels."""
from __future__ import annotations

import dataclasses
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn import functional as F

from cvnb.compress import distill as module
from cvnb.compress.distill import DISTILLATION_LOSSES, DistillationLoss, FeatureComparison
from cvnb.core.errors import CvnbError
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model
from cvnb.pipeline.params import read_contracts
from cvnb.training.loaders import LabelledImages
from cvnb.training.options import FitOptions


def make_model(seed: int = 0) -> VisionModel:
    "Make an untrained model in eval mode."
    torch.manual_seed(seed)
    return create_model("resnet10t", list("abcd"), 8).eval()


def divergence(target: np.ndarray, p: np.ndarray) -> float:
    "Compute the Kullback-Leibler divergence of one image."
    return float((target * np.log(target / p)).sum())


def mean_correlation(a: np.ndarray, b: np.ndarray) -> float:
    "Average Pearson's correlation of rows."
    return float(np.mean([np.corrcoef(x, y)[0, 1] for x, y in zip(a, b)]))


def test_losses_match_published_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 4, generator=generator)
    teacher_logits = torch.randn(6, 4, generator=generator)
    labels = torch.tensor([0, 1, 2, 3, 0, 1])
    student = logits.div(4).softmax(1).numpy()
    teacher = teacher_logits.div(4).softmax(1).numpy()

    def true(p: np.ndarray, label: int) -> np.ndarray: return np.array([p[label], 1 - p[label]])
    def others(p: np.ndarray, label: int) -> np.ndarray: return np.delete(p, label) / np.delete(p, label).sum()

    kd, dkd = [], []
    for p, target, label in zip(student, teacher, labels):
        kd.append(divergence(target, p))
        ranking = divergence(others(target, label), others(p, label))
        dkd.append(divergence(true(target, label), true(p, label)) + 8 * ranking)
    dist = 2 - mean_correlation(student, teacher) - mean_correlation(student.T, teacher.T)
    for name, expected in dict(kd=np.mean(kd), dkd=np.mean(dkd), dist=dist).items():
        loss = DISTILLATION_LOSSES[name](logits, teacher_logits, labels, 4.0)
        assert float(loss) == pytest.approx(16 * expected, rel=1e-3), name


def test_criterion_weights_labels_and_teacher() -> None:
    student, teacher = make_model(0), make_model(1)
    images = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(8) % 4
    with torch.no_grad():
        logits = student(images)
        mixed = DistillationLoss(teacher, "kd", 4.0, 0.9)(logits, labels, images)
        from_teacher = DISTILLATION_LOSSES["kd"](logits, teacher(images), labels, 4.0)
        expected = 0.1 * F.cross_entropy(logits, labels) + 0.9 * from_teacher
    assert float(mixed) == pytest.approx(float(expected), rel=1e-4)


def test_identity_depends_on_teacher_and_every_option() -> None:
    teacher = make_model()
    variants = [DistillationLoss(teacher), DistillationLoss(make_model(1)), DistillationLoss(teacher, "dkd"),
                DistillationLoss(teacher, temperature=2), DistillationLoss(teacher, teacher_weight=0.5)]
    assert len({criterion.identity for criterion in variants}) == len(variants)
    assert DistillationLoss(make_model()).identity == DistillationLoss(teacher).identity


def test_stage_offers_every_loss() -> None:
    params = {p.name: p for p in read_contracts()["compress"].params}
    assert get_args(params["loss"].type) == tuple(DISTILLATION_LOSSES)


def test_features_pull_the_student_towards_the_teacher_and_leave_no_hook() -> None:
    student, teacher = make_model(0), make_model(1)
    images = np.random.default_rng(0).integers(0, 256, (64, 8, 8, 3), dtype=np.uint8)
    compare = FeatureComparison(student, teacher, images)
    batch = torch.from_numpy(images[:16])
    with torch.no_grad(): teacher(batch)
    student(batch)
    near = compare()
    near.backward()
    assert sum(p.grad.abs().sum() for p in student.net.layer1.parameters()) > 0, "the student is trained"
    assert all(p.grad is None for p in teacher.parameters()), "the teacher's are not"
    compare.inputs[0].value = compare.inputs[0].value + 10   # features far from the teacher's
    assert float(compare()) > 2 * float(near)
    criterion = DistillationLoss(teacher, "features", compare_features=compare)
    logits = student(batch)
    labels = torch.arange(16) % 4
    with_features = float(criterion(logits, labels, batch))
    plain = float(DistillationLoss(teacher, "kd")(logits, labels, batch))
    assert with_features == pytest.approx(plain + 0.9 * float(compare()), rel=1e-4)
    compare.close()
    assert not student.net.get_classifier()._forward_pre_hooks and not teacher.net.get_classifier()._forward_pre_hooks


def test_features_need_one_linear_classifier() -> None:
    two = create_model("deit_tiny_distilled_patch16_224", list("abcd"), 32, "full")
    with pytest.raises(CvnbError, match="one linear classifier"):
        FeatureComparison(make_model(), two, np.zeros((4, 8, 8, 3), np.uint8))


@pytest.mark.parametrize("scores, late, n_rounds, ends_with", [
    ([0.5, 0.7, 0.8, 0.801, 0.9], False, 3, 3),   # the third round gains a tenth of a point
    ([0.5, 0.7, 0.6, 0.9], False, 2, 1),          # the second one loses, and is dropped
    ([0.5, 0.7, 0.8, 0.9, 0.95], False, 4, 4),    # four at most
    ([0.5, 0.7, 0.8, 0.9, 0.95], True, 1, 1)])    # there is no time for a second one
def test_rounds_end_when_one_gains_too_little(scores, late, n_rounds, ends_with, monkeypatch, tmp_path) -> None:
    seeds, found = [], iter(scores)

    def train_round(start, criterion, train, val, options, folder, progress, announce):
        seeds.append(options.seed)
        student = make_model()
        student.reached = len(seeds)
        return student, pd.DataFrame(dict(epoch=[1, 2]))
    monkeypatch.setattr(module, "_train_round", train_round)
    monkeypatch.setattr(module, "_score", lambda *_: next(found))
    monkeypatch.setattr(module, "recalibrate_batch_norm", lambda model, *_, **__: model)
    images = LabelledImages(np.zeros((2, 8, 8, 3), np.uint8), np.zeros(2, int))
    result = module.distill(make_model(), DistillationLoss(make_model()), images, images, FitOptions(seed=5), tmp_path,
                            rounds=4, is_late=lambda: late)
    assert seeds == list(range(5, 5 + n_rounds)) and result.student.reached == ends_with
    assert result.history.epoch.tolist() == list(range(1, 2 * n_rounds + 1))


def test_a_view_that_was_seen_costs_the_teacher_nothing() -> None:
    teacher = make_model()
    criterion = DistillationLoss(teacher)
    views = torch.randint(0, 256, (5, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    first = criterion.answers(views)
    with torch.no_grad(): assert torch.allclose(first, teacher(views), atol=1e-5)
    again = dataclasses.replace(criterion, compare_features=None)   # as for another candidate
    assert torch.equal(again.answers(views), first) and again.answers.n_computed == 5
    views[2, 4, 4, 1] ^= 1
    again.answers(views)
    assert again.answers.n_computed == 6, "a view that differs in one bit is another view"
