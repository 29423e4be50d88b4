"""What answers cost, against costs that are counted by hand."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.evaluate.costs import analyze_costs
from cvnb.metrics.decision import DecisionRule
from cvnb.metrics.objective import Objective

CLASSES = ("a", "b", "<i>c</i>")
COSTS = ((0.0, 1.0, 4.0), (2.0, 0.0, 1.0), (8.0, 3.0, 0.0))


def draw(n: int, seed: int = 0) -> pd.DataFrame:
    "Calibrated predictions, answered by the lowest expected cost."
    rng = np.random.default_rng(seed)
    p = rng.dirichlet([0.4] * 3, n)
    label = (p.cumsum(1) < rng.random((n, 1))).sum(1).clip(max=2)
    answer = DecisionRule(costs=COSTS).decide(p)
    names = np.array(CLASSES)
    return pd.DataFrame(dict(label=names[label], predicted=names[answer], probabilities=list(p)))


def test_costs_are_those_counted_by_hand() -> None:
    table = draw(3000)
    found = analyze_costs(table, Objective("cost", CLASSES, costs=COSTS))
    pay = lambda answers: np.mean([COSTS[CLASSES.index(t)][CLASSES.index(a)] for t, a in zip(table.label, answers)])
    assert found.cost.value == pytest.approx(pay(table.predicted))
    p = np.stack(list(table.probabilities))
    assert found.plain.value == pytest.approx(pay(np.array(CLASSES)[p.argmax(1)]))
    assert found.plain.value > found.cost.value
    assert found.cost.low < found.expected < found.cost.high
    expected = (p @ np.array(COSTS)).min(1)
    kept = expected <= found.look
    by_hand = pay_kept(table, kept) + (~kept).mean() * found.look
    assert found.with_looks.value == pytest.approx(by_hand) and found.looked == pytest.approx((~kept).mean())
    assert set(found.thresholds) == set(CLASSES) and "<i>c</i>" in found.words


def pay_kept(table: pd.DataFrame, kept: np.ndarray) -> float:
    "Mean over all images of the cost of those that are answered."
    own = table[kept]
    return sum(COSTS[CLASSES.index(t)][CLASSES.index(a)] for t, a in zip(own.label, own.predicted)) / len(table)


def test_without_costs_or_probabilities_there_is_nothing() -> None:
    table = draw(5)
    assert analyze_costs(table, Objective("accuracy", CLASSES)) is None
    assert analyze_costs(table[:0], Objective("cost", CLASSES, costs=COSTS)) is None
    cut = table.assign(probabilities=[p[:2] for p in table.probabilities])
    assert analyze_costs(cut, Objective("cost", CLASSES, costs=COSTS)) is None
    assert analyze_costs(table[:1], Objective("cost", CLASSES, costs=COSTS)).cost.n == 1
