"""Bootstrap intervals compared with resampling by hand, groups, and estimates of few or degenerate observations."""
from __future__ import annotations

import numpy as np
import pytest

from cvnb.core.stage import format_metric
from cvnb.metrics.classification import accuracy, balanced_accuracy, calibration_error, f1, mean_average_precision
from cvnb.metrics.estimates import MIN_GROUPS, Estimate, bootstrap, estimate_mean, score_interval
from cvnb.metrics.regression import mae, r2, rmse

VALUES = np.random.default_rng(0).normal(5, 2, 60)


def resample(values: np.ndarray, n_resamples: int) -> np.ndarray:
    "Draw resamples (n_resamples, N) with the seed of `bootstrap`."
    rng = np.random.default_rng(0)
    return np.array([values[rng.integers(0, len(values), len(values))] for _ in range(n_resamples)])


@pytest.mark.parametrize("statistic", [np.median, lambda x: float(np.median(x))], ids=["with axis", "without axis"])
def test_percentile_interval_equals_resampling_by_hand(statistic) -> None:
    found = bootstrap(statistic, VALUES, n_resamples=100)
    expected = np.percentile(np.median(resample(VALUES, 100), 1), [2.5, 97.5])
    assert found.value == np.median(VALUES) and found.n == 60
    assert (found.low, found.high) == pytest.approx(expected)


def test_basic_interval_mirrors_the_percentile_interval() -> None:
    percentile, basic = (bootstrap(np.median, VALUES, method=method) for method in ("percentile", "basic"))
    assert basic.low == pytest.approx(2 * percentile.value - percentile.high)
    assert basic.high == pytest.approx(2 * percentile.value - percentile.low)


def test_resampling_keeps_columns_together() -> None:
    found = bootstrap(lambda a, b: np.abs(a - b).max(), VALUES, VALUES + 1)
    assert (found.low, found.high) == pytest.approx((1, 1))


def test_memory_limit_does_not_change_the_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = bootstrap(np.mean, VALUES)
    monkeypatch.setattr("cvnb.metrics.estimates._BATCH", 7 * len(VALUES))
    assert bootstrap(np.mean, VALUES) == expected


def test_single_image_has_no_interval() -> None:
    one, label = np.array([3.0]), np.array([[True, False]])
    for found in mae(one, one + 1), rmse(one, one + 1), calibration_error([0.7], [True]), f1(label, label):
        assert np.isnan([found.low, found.high]).all() and found.n == 1


def test_right_answers_do_not_prove_a_figure_of_1() -> None:
    truth = np.random.default_rng(0).random((30, 5)) < 0.4
    for found in f1(truth, truth), f1(truth, truth, "macro"), mean_average_precision(truth, truth.astype(float)):
        assert found.value == found.high == 1 and 0.7 < found.low < 0.97


def test_metric_without_positive_label_is_nan() -> None:
    nothing = np.zeros((5, 2), bool)
    for found in f1(nothing, nothing), mean_average_precision(nothing, np.ones((5, 2))):
        assert np.isnan([found.value, found.low, found.high]).all() and found.n == 5


def test_label_of_few_images_has_no_interval() -> None:
    truth = np.arange(10)[:, None] == 0
    found = mean_average_precision(truth, truth.astype(float))
    assert found.value == 1 and np.isnan(found.low)


def test_exact_limits_only_widen_the_score_interval() -> None:
    from scipy.stats import binomtest
    for n in (5, 30, 100, 1000):
        for k in (0, 1, 2, 3, 4, n // 2, n - 3, n - 1, n):
            low, high = score_interval(k / n, n)
            wilson = binomtest(k, n).proportion_ci(method="wilson")
            assert low <= wilson.low + 1e-12 and high >= wilson.high - 1e-12
            if 4 <= k <= n - 4: assert (low, high) == pytest.approx((wilson.low, wilson.high))


GROUPS = np.repeat(np.arange(30), 6)


@pytest.mark.parametrize("name", ["accuracy", "balanced_accuracy", "f1", "calibration_error", "mae", "rmse", "r2"])
def test_copies_in_groups_do_not_narrow_an_interval(name: str) -> None:
    "Six equal images per group tell as much as one image per group."
    rng = np.random.default_rng(1)
    right, label, sure = rng.random(30) < 0.8, np.arange(30) % 3, rng.uniform(0.6, 1, 30)
    truth, errors = rng.normal(0, 2, 30), rng.normal(0, 1, 30)
    labels = rng.random((30, 4)) < 0.4
    flipped = labels ^ (rng.random((30, 4)) < 0.1)
    arguments = dict(accuracy=(right,), balanced_accuracy=(label, right), f1=(labels, flipped),
                     calibration_error=(sure, right), mae=(truth, truth + errors), rmse=(truth, truth + errors),
                     r2=(truth, truth + errors))[name]
    estimate = dict(accuracy=accuracy, balanced_accuracy=balanced_accuracy, f1=f1, calibration_error=calibration_error,
                    mae=mae, rmse=rmse, r2=r2)[name]
    copies = [np.repeat(a, 6, axis=0) for a in arguments]
    width = lambda e: e.high - e.low
    once, wrong, by_group = estimate(*arguments), estimate(*copies), estimate(*copies, groups=GROUPS)
    assert by_group.n_groups == 30 and by_group.n == 180 and once.n_groups == wrong.n_groups == 0
    assert width(wrong) < 0.6 * width(once) and 0.85 * width(once) < width(by_group) < 1.6 * width(once)


def test_few_groups_give_no_interval_and_say_so() -> None:
    found = accuracy(np.arange(40) % 3 > 0, np.arange(40) % (MIN_GROUPS - 1))
    assert str(found) == f"{found.value:.4f} (no interval, n=40, 4 groups)"
    recorded = dict(value=found.value, low=None, high=None, n=40, n_groups=4)
    assert format_metric(recorded) == "0.65 (no interval, n=40, 4 groups)"
    assert Estimate(**recorded).n_groups == 4 and format_metric(dict(value=7, low=None, high=None, n=None)) == "7"


def test_mean_of_one_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two runs"): estimate_mean([0.9])
