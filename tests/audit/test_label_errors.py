"""Planted label errors of handwritten digits: which are flagged, what is suggested, and what the reason says."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_digits

from cvnb.audit.label_errors import LabelCheck, check_labels, pca_features, pick_error_threshold

FLIPPED = np.arange(5, 305, 20)   # rows whose label is the next class's


@pytest.fixture(scope="module")
def checked() -> tuple[pd.DataFrame, LabelCheck]:
    "Three classes of a hundred digits each, fifteen of them with the label of the next class."
    data = load_digits()
    rows = np.sort(np.concatenate([np.flatnonzero(data.target == c)[:102] for c in (0, 1, 4)]))[:305]
    names = np.array(["0", "1", "4"])
    truth = np.searchsorted([0, 1, 4], data.target[rows])
    given = truth.copy()
    given[FLIPPED] = (truth[FLIPPED] + 1) % 3
    paths = [f"{i:03}.png" for i in range(len(rows))]
    table = pd.DataFrame(dict(path=paths, label=names[given], truth=names[truth], ok=True, duplicate_of=""))
    return table, check_labels(table, pca_features(dict(pixels=data.data[rows].astype(np.float32)), 32))


def test_planted_label_errors_are_flagged_and_few_others(checked: tuple[pd.DataFrame, LabelCheck]) -> None:
    table, result = checked
    flagged = result.table.label_error
    assert flagged[FLIPPED].mean() >= 0.8 and flagged.drop(FLIPPED).sum() <= 5
    assert result.table.label_score[FLIPPED].median() < 0.2 < 0.8 < result.table.label_score.drop(FLIPPED).median()


def test_flagged_label_names_what_it_says_and_what_the_image_shows(checked: tuple[pd.DataFrame, LabelCheck]) -> None:
    table, result = checked
    rows = table.loc[FLIPPED][result.table.label_error[FLIPPED]]
    assert (result.table.suggested[rows.index] == rows.truth).mean() >= 0.9
    assert (result.table.suggested == table.truth).mean() > 0.95
    reasons = result.check.findings.set_index("path").reason
    said = "the label says {0.label}, the image looks like {0.truth}"
    assert np.mean([said.format(row) in reasons[row.path] for row in rows.itertuples()]) >= 0.9
    pairs = result.confused[["given", "looks_like"]].values.tolist()
    assert all(pair in (["1", "0"], ["4", "1"], ["0", "4"]) for pair in pairs)


def test_threshold_keeps_the_precision_among_the_flagged() -> None:
    "Of four sure errors and a doubtful label, 0.8 of the flagged are errors; all other labels do not count."
    wrong = np.array([0.95, 0.9, 0.9, 0.85, 0.6, *[0.05] * 95])
    assert pick_error_threshold(wrong, 0.8) == 0.6 and pick_error_threshold(wrong, 0.9) == 0.85
    assert pick_error_threshold(wrong, 0.99) > 1
