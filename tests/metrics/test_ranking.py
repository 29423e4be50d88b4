"""The area under the ROC curve and F1 per class: values against other code, coverage of their intervals."""
from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import norm
from sklearn.metrics import roc_auc_score

from cvnb.metrics.classification import per_class_metrics
from cvnb.metrics.ranking import auroc, top_k_accuracy


def test_area_equals_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    for shift in 0.0, 0.5, 3.0:
        truth = rng.random(300) < 0.2
        scores = np.round(rng.normal(size=300) + shift * truth, 1)   # with ties
        assert auroc(truth, scores).value == pytest.approx(roc_auc_score(truth, scores))
    labels = rng.integers(0, 4, 300)
    p = rng.dirichlet(np.ones(4), 300)
    own = labels[:, None] == np.arange(4)
    assert auroc(own, p).value == pytest.approx(roc_auc_score(own, p, average="macro"))


@pytest.mark.parametrize("shift", [0.7, 2.0, 3.5])
@pytest.mark.parametrize("n_own, n_others", [(15, 100), (60, 60), (150, 450)])
def test_interval_of_the_area_covers_the_truth(shift: float, n_own: int, n_others: int) -> None:
    rng = np.random.default_rng(1)
    true = norm.cdf(shift / np.sqrt(2))
    truth = np.arange(n_own + n_others) < n_own
    found = [auroc(truth, rng.normal(size=len(truth)) + shift * truth) for _ in range(300)]
    assert np.mean([e.low <= true <= e.high for e in found]) >= 0.92


def test_interval_of_the_area_covers_the_truth_where_images_come_in_groups() -> None:
    rng = np.random.default_rng(2)
    groups = np.repeat(np.arange(60), 8)
    truth = np.arange(480) < 160
    covered = {True: [], False: []}
    for _ in range(300):
        scores = rng.normal(size=60)[groups] + 0.3 * rng.normal(size=480) + 1.5 * truth
        for grouped in covered:
            e = auroc(truth, scores, groups if grouped else None)
            covered[grouped].append(e.low <= norm.cdf(1.5 / np.sqrt(2 * 1.09)) <= e.high)
    assert np.mean(covered[True]) >= 0.92 and np.mean(covered[False]) < 0.85   # without groups it would be too narrow


@pytest.mark.parametrize("n, wrong", [(60, 0.3), (400, 0.1), (400, 0.5)])
def test_intervals_of_f1_per_class_cover_the_truth(n: int, wrong: float) -> None:
    rng = np.random.default_rng(3)
    names = ["a", "b", "c"]
    share = np.array([0.2, 0.3, 0.5])
    turned = share[[2, 0, 1]]   # of the class whose wrong answers are this one
    true = 2 * share * (1 - wrong) / (share + share * (1 - wrong) + turned * wrong)
    covered = []
    for _ in range(300):
        labels = rng.choice(3, n, p=share)
        predicted = np.where(rng.random(n) < wrong, (labels + 1) % 3, labels)
        rows = per_class_metrics(np.array(names)[labels], np.array(names)[predicted], names)
        covered.append((rows.f1_low <= true) & (true <= rows.f1_high))
    assert (np.mean(covered, 0) >= 0.92).all()


def test_class_that_is_never_there_and_never_predicted_has_no_f1() -> None:
    rows = per_class_metrics(["a", "b"], ["a", "a"], ["a", "b", "c"]).set_index("label")
    assert np.isnan(rows.f1["c"]) and np.isnan(rows.f1_low["c"]) and rows.f1["b"] == 0 and rows.f1_high["b"] > 0.5


def test_top_k_counts_the_true_class_among_the_likeliest() -> None:
    rng = np.random.default_rng(4)
    p = rng.dirichlet(np.ones(6), 200)
    labels = rng.integers(0, 6, 200)
    for k in 1, 3, 5:
        assert top_k_accuracy(p, labels, k).value == np.mean([c in np.argsort(-row)[:k] for row, c in zip(p, labels)])
