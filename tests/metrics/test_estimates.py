"""Bootstrap intervals compared with resampling by hand, and estimates of few or degenerate observations."""
from __future__ import annotations

import numpy as np
import pytest

from cvnb.metrics.classification import calibration_error, f1, mean_average_precision
from cvnb.metrics.estimates import bootstrap, estimate_mean, weighted_bootstrap
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
    expected = bootstrap(np.mean, VALUES), r2(VALUES, VALUES + 1)
    monkeypatch.setattr("cvnb.metrics.estimates._BATCH", 7 * len(VALUES))
    assert (bootstrap(np.mean, VALUES), r2(VALUES, VALUES + 1)) == expected


def test_single_image_has_an_interval_without_width() -> None:
    one, label = np.array([3.0]), np.array([[True, False]])
    for found in mae(one, one + 1), rmse(one, one + 1), calibration_error([0.7], [True]), f1(label, label):
        assert found.low == found.value == found.high and found.n == 1


def test_metric_without_positive_label_is_nan() -> None:
    nothing = np.zeros((5, 2), bool)
    for found in f1(nothing, nothing), mean_average_precision(nothing, np.ones((5, 2))):
        assert np.isnan([found.value, found.low, found.high]).all() and found.n == 5


def test_weighted_interval_ignores_resamples_without_value() -> None:
    "One of ten images has the label: about a third of the resamples lack it."
    truth = np.arange(10)[:, None] == 0
    found = mean_average_precision(truth, truth.astype(float))
    assert (found.value, found.low, found.high) == (1, 1, 1)


def test_weighted_interval_is_corrected_for_bias() -> None:
    "The variance of a resample is too small on average, so that both ends move up."
    variance = lambda counts: counts @ (VALUES - counts @ VALUES / counts.sum()) ** 2 / counts.sum()
    corrected, percentile = weighted_bootstrap(variance, len(VALUES)), bootstrap(np.var, VALUES)
    assert corrected.value == pytest.approx(percentile.value)
    assert percentile.low < corrected.low < corrected.value < percentile.high < corrected.high


def test_mean_of_one_run_is_refused() -> None:
    with pytest.raises(ValueError, match="at least two runs"): estimate_mean([0.9])
