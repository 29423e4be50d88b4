"""Temperature and thresholds are kept where they help on images that they were not fitted on, and only there."""
from __future__ import annotations

import numpy as np
import pytest

from cvnb.metrics import thresholds
from cvnb.metrics.calibration import apply_temperature, fit_temperature
from cvnb.metrics.objective import Objective
from cvnb.metrics.thresholds import fit_decision, fit_thresholds

NAMES = ("ok", "defect")
BALANCED = Objective("balanced", NAMES)
COSTS = ((0.0, 1.0), (10.0, 0.0))


def rare(n: int, sharp: float = 1.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Probabilities of two classes, of which one image in ten has the second; `sharp` divides their temperature."
    rng = np.random.default_rng(seed)
    x = rng.normal(size=n) * 2 - 3.5
    defect = 1 / (1 + np.exp(-sharp * x))
    return np.stack([1 - defect, defect], 1), (rng.random(n) < 1 / (1 + np.exp(-x))).astype(int)


def test_thresholds_find_rare_defects_that_the_largest_probability_misses():
    p, labels = rare(1200)
    fit = fit_decision(p, labels, BALANCED)
    fresh, truth = rare(3000, seed=1)
    plain, chosen = (BALANCED.score(truth, answers) for answers in (fresh.argmax(1), fit.rule.decide(fresh)))
    assert chosen > plain + 0.1 and fit.gain.low > 0 and sum(fit.rule.thresholds) == pytest.approx(1)
    missed = lambda answers: ((answers == 0) & (truth == 1)).sum() / (truth == 1).sum()
    assert missed(fresh.argmax(1)) > 0.5 > 0.35 > missed(fit.rule.decide(fresh))


def test_useless_fits_are_seldom_kept():
    "Probabilities that tell nothing: thresholds that learn the validation images by heart gain nothing on others."
    kept = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        p = 0.5 + rng.normal(size=(200, 1)) * [0.01, -0.01]
        labels = rng.integers(0, 2, 200)
        by_heart = fit_thresholds(p, labels, BALANCED)
        assert BALANCED.score(labels, by_heart.decide(p)) >= BALANCED.score(labels, p.argmax(1))
        fit = fit_decision(p, labels, BALANCED)
        kept += not fit.rule.plain
        assert fit.rule.plain == ("do not help beyond chance" in fit.notes[1])
    assert kept <= 5


def test_groups_are_not_divided():
    p, labels = rare(300)
    groups = np.repeat(np.arange(60), 5)
    parts = thresholds._divide(thresholds.Units.of(groups, 300))
    assert all(len(set(parts[groups == g])) == 1 for g in range(60)) and len(set(parts)) == 5
    few = fit_decision(p, labels, BALANCED, np.arange(300) % 8)
    assert few.rule.plain and few.temperature is None and few.notes[0].endswith("in 8 groups are too few")


@pytest.mark.parametrize("sharp, low, high", [(3.0, 2.0, 4.5), (0.4, 0.25, 0.6)])
def test_temperature_calibrates_in_both_directions(sharp, low, high):
    p, labels = rare(1500, sharp)
    assert low < fit_decision(p, labels, BALANCED).temperature < high


def test_model_without_errors_is_not_called_certain():
    "A perfect validation set once gave the temperature 0.05, the lower bound, and a confidence of 1 for everything."
    labels = np.random.default_rng(0).integers(0, 2, 100)
    p = apply_temperature(np.exp(3.0 * np.eye(2)[labels]), 1)
    confidence = apply_temperature(p, fit_temperature(p, labels)).max(1)
    assert 0.98 < confidence.min() < 0.999
    found = fit_decision(p, labels, BALANCED)
    assert found.rule.plain and (found.temperature is None or found.temperature > 0.3)


def test_costs_decide_unless_validation_says_that_they_cost_more():
    p, labels = rare(1200)
    objective = Objective("cost", NAMES, costs=COSTS)
    fit = fit_decision(p, labels, objective)
    assert fit.rule.costs == COSTS and fit.gain.low > 0
    misled = np.stack([np.full(400, 0.8), np.full(400, 0.2)], 1)   # no defect is there: false alarms alone
    labels = np.zeros(400, int)
    labels[0] = 1
    kept = thresholds._fit_rule(misled, misled, labels, objective, None, np.arange(400) % 5)
    assert kept[0].plain and "costs less" in kept[2]


def test_recall_has_no_thresholds_because_they_would_always_answer_its_class():
    fit = fit_decision(*rare(1200), Objective("recall", NAMES, "defect"))
    assert fit.rule.plain and fit.gain is None and "no thresholds" in fit.notes[1]


def test_fit_does_not_depend_on_the_order_of_classes_or_on_repetition():
    p, labels = rare(600)
    first = fit_decision(p, labels, BALANCED)
    assert first == fit_decision(p, labels, BALANCED)
    turned = fit_decision(p[:, ::-1], 1 - labels, Objective("balanced", NAMES[::-1]))
    assert turned.rule.thresholds[::-1] == pytest.approx(first.rule.thresholds, abs=0.05)


def test_accuracy_has_no_thresholds_that_fit_the_shares_of_the_validation_classes():
    "The validation images have other shares than training and test: thresholds for accuracy would copy them."
    rng = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], [300, 60, 40])
    p = rng.dirichlet([1, 1, 1], 400) + 0.6 * np.eye(3)[labels]
    found = fit_decision(p / p.sum(1, keepdims=True), labels, Objective("accuracy", ("a", "b", "c")))
    assert found.rule.plain and "for accuracy the largest probability answers" in found.notes[1]
