"""Intervals cover the truth as often as they say, on simulated data; marks and lists keep their level."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from metrics.coverage_grid import ESTIMATES, POINTS, Coverage, measure_coverage
from scipy import stats

from cvnb.evaluate.errors import confused_pairs, slice_accuracy

REPEATS = dict(calibration_error=40, mean_average_precision=100)   # of the short grid; 200 of the others


def check(found: list[Coverage]) -> None:
    "Assert the coverage of an estimate over its grid, and report it with the widths."
    lines = [f"{c.covered:.3f} width {c.width:.4f} shown {c.shown}/{c.n} {c.point.name}" for c in found]
    report = f"{found[0].point.estimate}\n" + "\n".join(lines)
    print(report)
    shown = [c for c in found if c.shown >= 0.2 * c.n]
    two_sided = [c.covered for c in shown if not c.point.at_bound]
    assert min(c.covered for c in shown) >= 0.9, report
    assert np.mean([c.covered for c in shown]) >= 0.93, report
    error = np.sqrt(0.05 * 0.95 / sum(c.n for c in shown)) if shown else 0
    assert np.mean(two_sided or [0.95]) <= 0.98 + 2 * error, report


@pytest.mark.parametrize("estimate", ESTIMATES)
def test_intervals_hold_on_the_short_grid(estimate: str) -> None:
    points = [p for p in POINTS if p.estimate == estimate and p.short]
    check([measure_coverage(p, REPEATS.get(estimate, 200)) for p in points])


@pytest.mark.long
@pytest.mark.timeout(3600)   # beside other work
@pytest.mark.parametrize("estimate", ESTIMATES)
def test_intervals_hold_on_the_whole_grid(estimate: str) -> None:
    check([measure_coverage(p, 600) for p in POINTS if p.estimate == estimate])


def null_table(rng: np.random.Generator, n: int, classes: int, accuracy: float, columns: int = 4) -> pd.DataFrame:
    "Draw predictions of a model that is equally accurate everywhere, with slices that overlap."
    labels = rng.integers(0, classes, n)
    correct = rng.random(n) < accuracy
    predicted = np.where(correct, labels, (labels + 1) % classes)
    table = pd.DataFrame(dict(label=labels, predicted=predicted, correct=correct))
    light = rng.normal(0, 1, n)
    table = table.assign(brightness=light, contrast=light + rng.normal(0, 1, n), width=32, height=32, tags=[[]] * n)
    return table.assign(**{f"meta_{i}": rng.integers(0, 8, n).astype(str) for i in range(columns)})


@pytest.mark.parametrize("repeats", [60, pytest.param(400, marks=pytest.mark.long)])
def test_a_model_without_weak_slice_gets_no_mark_in_95_of_100_runs(repeats: int) -> None:
    marked = {}
    for accuracy in (0.7, 0.9, 0.98) if repeats > 60 else (0.9,):
        rng = np.random.default_rng(0)
        tables = (null_table(rng, 600, 10, accuracy) for _ in range(repeats))
        marked[accuracy] = np.mean([slice_accuracy(table).below.any() for table in tables])
    print(marked)
    assert max(marked.values()) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / repeats)


@pytest.mark.parametrize("repeats", [40, pytest.param(400, marks=pytest.mark.long)])
def test_a_model_without_weak_group_slice_gets_no_mark_where_images_come_in_groups(repeats: int) -> None:
    rng = np.random.default_rng(0)
    marked = []
    for _ in range(repeats):
        groups = np.repeat(np.arange(120), 5)
        table = null_table(rng, 600, 10, 0.9).assign(group=groups)
        correct = np.repeat(rng.random(120) < 0.9, 5)   # all images of a group are right, or none
        camera = np.repeat(rng.integers(0, 6, 120), 5).astype(str)
        marked.append(slice_accuracy(table.assign(correct=correct, meta_camera=camera)).below.any())
    assert np.mean(marked) <= 0.05 + 2 * np.sqrt(0.05 * 0.95 / repeats)


def test_a_weak_slice_is_marked() -> None:
    rng = np.random.default_rng(1)
    table = null_table(rng, 2000, 10, 0.95)
    weak = (table.meta_0 == "3").to_numpy()
    found = slice_accuracy(table.assign(correct=table.correct & ~(weak & (rng.random(2000) < 0.3))))
    assert found[found.below][["slice", "name"]].values.tolist() == [["0", "3"]] and found.p[0] < 1e-4


def test_slice_is_marked_below_five_percent_of_false_discoveries() -> None:
    rng = np.random.default_rng(3)
    doubtful = 0
    for share in np.linspace(0.05, 0.3, 6):   # of the images of one slice that become errors
        table = null_table(rng, 1500, 10, 0.95)
        weak = (table.meta_0 == "3").to_numpy() & (rng.random(1500) < share)
        slices = slice_accuracy(table.assign(correct=table.correct & ~weak))
        assert (slices.below == (slices.p < 0.05)).all()
        doubtful += ((slices.p > 0.05) & (slices.p < 0.5)).sum()
    assert doubtful, "no slice lies between the level and a coarser one"


def test_intervals_of_slices_are_as_wide_as_their_number_asks_for() -> None:
    "Bonferroni: each has the level of 95 % divided by the number of slices."
    table = null_table(np.random.default_rng(2), 600, 10, 0.9)
    slices = slice_accuracy(table)
    tail = 0.025 / len(slices)
    for row in slices.itertuples():
        k = round(row.accuracy * row.n)
        expected = stats.beta.ppf(tail, k, row.n - k + 1), stats.beta.isf(tail, k + 1, row.n - k) if k < row.n else 1.0
        assert (row.low, row.high) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("repeats", [150, pytest.param(1000, marks=pytest.mark.long)])
def test_intervals_of_the_most_confused_pairs_hold_together(repeats: int) -> None:
    "All wrong classes are equally probable, so that the first pairs are large by chance alone."
    rng = np.random.default_rng(0)
    held, first = [], []
    for _ in range(repeats):
        labels = rng.integers(0, 10, 400)
        wrong = rng.random(400) < 0.18
        predicted = np.where(wrong, (labels + rng.integers(1, 10, 400)) % 10, labels)
        pairs = confused_pairs(pd.DataFrame(dict(label=labels, predicted=predicted, correct=~wrong)), 10)
        held.append(((pairs.low <= 0.02) & (pairs.high >= 0.02)).all())
        first.append(pairs.low[0] <= 0.02)
    assert np.mean(held) >= 0.95 - 2 * np.sqrt(0.05 * 0.95 / repeats) and np.mean(first) >= 0.95


def test_figures_that_nothing_holds_for_have_no_interval() -> None:
    few = dict(accuracy=dict(correct=[True, False] * 6, groups=[0, 1, 2] * 4),
               rmse=dict(truth=np.zeros(9), predicted=np.arange(9.)),
               latency_p99=dict(seconds=np.random.default_rng(0).exponential(1, (10, 10))),
               speed_ratio=dict(reference=np.ones((3, 2)), other=np.ones((3, 2))))
    for name, arguments in few.items():
        found = ESTIMATES[name](**arguments)
        assert np.isfinite(found.value) and np.isnan([found.low, found.high]).all() and "no interval" in str(found)
