"""Metrics by class, compared with scikit-learn's where classes are predicted unequally often."""
from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from cvnb.metrics.classification import per_class_metrics
from cvnb.metrics.estimates import estimate_proportion


def test_recall_precision_and_f1_of_classes_have_their_own_denominators() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(list("abc"), 200, p=[0.7, 0.2, 0.1])
    predicted = np.where(rng.random(200) < 0.6, labels, "b")   # "b" is predicted far more often than it occurs
    found = per_class_metrics(labels, predicted, list("abc"))
    precision, recall, f1, n = precision_recall_fscore_support(labels, predicted, labels=list("abc"))
    assert found.n.tolist() == n.tolist() and (found.n != found.n_predicted).all()
    for name, expected in dict(precision=precision, recall=recall, f1=f1).items():
        assert found[name].tolist() == pytest.approx(expected.tolist()), name
    for row in found.itertuples():
        of_true = estimate_proportion(round(row.recall * row.n), row.n)
        of_predicted = estimate_proportion(round(row.precision * row.n_predicted), row.n_predicted)
        assert (row.recall_low, row.recall_high) == pytest.approx((of_true.low, of_true.high))
        assert (row.precision_low, row.precision_high) == pytest.approx((of_predicted.low, of_predicted.high))
