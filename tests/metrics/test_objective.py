"""The figure that is optimised: what it is, what it refuses, and whether its paired test keeps its level."""
from __future__ import annotations

import numpy as np
import pytest
from sklearn import metrics as sk

from cvnb.core.errors import CvnbError, UsageError
from cvnb.metrics.decision import DecisionRule, read_rule, rule_to_json
from cvnb.metrics.objective import Objective, choose_objective, estimate_objective, read_objective
from cvnb.metrics.paired import noninferiority
from cvnb.metrics.paired_objective import objective_difference, objective_noninferiority, smallest_objective_margin

NAMES = ("a", "b", "c")
COSTS = ((0.0, 1.0, 5.0), (2.0, 0.0, 1.0), (1.0, 1.0, 0.0))
ALL = [Objective("accuracy", NAMES), Objective("balanced", NAMES), Objective("f1", NAMES), Objective("f1", NAMES, "b"),
       Objective("recall", NAMES, "c"), Objective("cost", NAMES, costs=COSTS)]


def answers(seed: int = 0, n: int = 300) -> tuple[np.ndarray, np.ndarray]:
    "Targets of three classes of different sizes, and answers of which four in five are right."
    rng = np.random.default_rng(seed)
    targets = rng.choice(3, n, p=[0.7, 0.2, 0.1])
    return targets, np.where(rng.random(n) < 0.8, targets, rng.integers(0, 3, n))


def test_objectives_are_those_of_scikit_learn():
    targets, found = answers()
    expected = [sk.accuracy_score(targets, found), sk.balanced_accuracy_score(targets, found),
                sk.f1_score(targets, found, average="macro"), sk.f1_score(targets == 1, found == 1),
                sk.recall_score(targets == 2, found == 2), 1 - np.array(COSTS)[targets, found].mean() / 5]
    assert np.allclose([o.score(targets, found) for o in ALL], expected)
    assert np.allclose([estimate_objective(o, targets, found).value for o in ALL], expected)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.words)
def test_groups_widen_the_interval_and_few_groups_have_none(objective):
    targets, found = answers()
    plain = estimate_objective(objective, targets, found)
    grouped = estimate_objective(objective, np.repeat(targets, 4), np.repeat(found, 4), np.repeat(np.arange(300), 4))
    assert grouped.high - grouped.low > 0.8 * (plain.high - plain.low)
    assert np.isnan(estimate_objective(objective, targets, found, np.arange(300) % 4).low)


def test_largest_class_decides_what_auto_is():
    choose = lambda a, b: choose_objective("auto", ["a", "b"], dict(train=dict(a=a, b=b)))
    assert choose(75, 25).name == "accuracy" and choose(76, 24).name == "balanced"
    assert choose(76, 24).why == ("the largest class, a, has 76% of the training images, and 1.5 times its even share "
                                  "is 75%")


@pytest.mark.parametrize("given, message", [
    (dict(label="d"), "metric_class=d: no class has this name"),
    (dict(label="c"), "metric_class=c: no image in the split val has this class"),
    (dict(metric="cost"), "metric=cost needs a cost matrix"),
    (dict(metric="balanced", label="a"), "metric_class and train.metric=balanced contradict"),
    (dict(metric="f1", costs=COSTS), "train.costs and train.metric=f1 contradict"),
    (dict(label="a", costs=COSTS), "metric_class and train.costs contradict"),
    (dict(metric="balanced", task="regression", main_metric="r2"), "metric=balanced is for classification"),
    (dict(label="a", task="multilabel", main_metric="f1"), "metric_class is for classification"),
    (dict(costs="costs.yaml", task="multilabel", main_metric="f1"), "train.costs is for classification"),
    (dict(metric="balance"), "no metric 'balance'")])
def test_objectives_that_make_no_sense_are_refused_with_a_reason(given, message):
    counts = dict(train=dict(a=8, b=8, c=8), val=dict(a=4, b=4))
    usual = dict(metric="auto", classes=NAMES, counts=counts)
    with pytest.raises(UsageError, match=message): choose_objective(**usual | given)


def test_other_tasks_keep_their_main_metric():
    for task, main in (("multilabel", "f1"), ("regression", "r2")):
        found = choose_objective("auto", ["a"], {}, task=task, main_metric=main)
        assert (found.key, found.classes) == (main, ())
    assert choose_objective("f1", ["a"], {}, task="multilabel", main_metric="f1").key == "f1"


def test_runs_of_earlier_versions_went_by_accuracy():
    assert read_objective(None, NAMES).key == "accuracy"
    for o in ALL: assert read_objective(o.to_json()) == o


def test_accuracy_is_tested_as_before():
    targets, found = answers()
    _, other = answers(1)
    test = objective_noninferiority(ALL[0], targets, other, found, 0.05)
    assert test == noninferiority(other == targets, found == targets, 0.05)


def test_model_that_loses_a_rare_class_passes_by_accuracy_and_fails_by_the_objective():
    targets = np.repeat([0, 1, 2], [1800, 150, 50])
    loses = np.where((targets == 2) & (np.arange(2000) % 2 == 0), 0, targets)
    accepted = {o.words: objective_noninferiority(o, targets, targets, loses, 0.03).accepted for o in ALL}
    assert accepted.pop("accuracy") and not accepted["balanced accuracy"] and not accepted["recall of c"]
    assert not accepted["mean F1"] and accepted["F1 of b"], "class b loses nothing"


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.words)
def test_models_that_never_differ_are_accepted_from_the_smallest_margin_on(objective):
    targets, found = answers(n=2000)
    least = smallest_objective_margin(objective, targets)
    accepts = lambda margin: objective_noninferiority(objective, targets, found, found, margin).accepted
    assert accepts(least) and not accepts(0.9 * least)


@pytest.mark.parametrize("objective", ALL, ids=lambda o: o.words)
def test_four_groups_prove_nothing(objective):
    targets, found = answers()
    d = objective_difference(objective, targets, found, found, groups=np.arange(300) % 4)
    assert d.low < -0.2 and d.high > 0.2 and d.n_groups == 4


@pytest.mark.parametrize("grouped", [False, True])
def test_balanced_test_keeps_its_level(grouped):
    "The rare class loses twice the margin, so that balanced accuracy loses the margin."
    rng = np.random.default_rng(0)
    objective = Objective("balanced", ("ok", "defect"))
    targets = np.repeat([0, 1], [400, 100] if grouped else [600, 40])
    groups = np.repeat(np.arange(250), 2) if grouped else None
    accepted = 0
    for _ in range(400):
        u = np.repeat(rng.random(len(targets) // 2), 2) if grouped else rng.random(len(targets))
        new = np.where(u < np.where(targets == 1, 0.13, 0.03), 1 - targets, targets)
        reference = np.where(u > 0.97, 1 - targets, targets)
        accepted += objective_noninferiority(objective, targets, reference, new, 0.05, groups=groups).accepted
    assert accepted / 400 < 0.045, "0.025 and three standard errors"


def test_rule_of_other_classes_is_refused():
    rule = DecisionRule((0.2, 0.3, 0.5), COSTS)
    assert read_rule(NAMES, **rule_to_json(rule, NAMES)) == rule
    assert read_rule(("c", "a", "b"), **rule_to_json(rule, NAMES)).thresholds == (0.5, 0.2, 0.3)
    for other in (("a", "b"), ("a", "b", "d")):
        with pytest.raises(CvnbError, match="the thresholds (name|lack) '[cd]'"):
            read_rule(other, **rule_to_json(rule, NAMES))


@pytest.mark.parametrize("rule", [DecisionRule(), DecisionRule((0.5, 0.3, 0.2)), DecisionRule(costs=COSTS)])
def test_answers_change_only_where_a_probability_changes_by_the_least_difference(rule):
    rng = np.random.default_rng(0)
    for p in rng.dirichlet(np.ones(3), 200):
        best = rule.decide(p[None])
        for c in range(3):
            least = rule.least_difference(p[None], np.array([c]))
            smaller = p + rng.uniform(-0.99, 0.99, (50, 3)) * least
            assert (rule.decide(smaller) != c).all() or c == best[0]
