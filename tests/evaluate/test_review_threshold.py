"""The confidence below which a person should look: chosen on validation images, kept on others."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.evaluate.review_threshold import fit_review_threshold, measure_review_threshold
from cvnb.metrics.paired import images_needed


def made(n: int, seed: int, groups: int = 0) -> pd.DataFrame:
    "Make up predictions whose confidence is calibrated."
    rng = np.random.default_rng(seed)
    confidence = rng.beta(5, 1, n)
    table = pd.DataFrame(dict(path=[f"{seed}/{i}" for i in range(n)], confidence=confidence,
                              correct=rng.random(n) < confidence))
    if groups: table["group"] = rng.integers(0, groups, n)
    return table


@pytest.mark.parametrize("n, target", [(400, 0.05), (1500, 0.05), (1500, 0.1)])
def test_share_of_errors_stays_below_the_target(n: int, target: float) -> None:
    true = made(300_000, 999)
    exceeded = found = 0
    for seed in range(150):
        threshold = fit_review_threshold(made(n, seed), target)
        if threshold is None: continue
        found += 1
        exceeded += 1 - true.correct[true.confidence >= threshold].mean() > target
    assert exceeded <= 9 and (found > 100 or n < 1000)


def test_threshold_is_measured_on_other_images_only() -> None:
    validation = made(1000, 0)
    assert measure_review_threshold(validation, validation, 0.1).risk is None
    table = made(1000, 1)
    review = measure_review_threshold(validation, table, 0.1)
    own = table[table.confidence >= review.threshold]
    assert review.risk.value == pytest.approx(1 - own.correct.mean())
    assert review.coverage.value == pytest.approx(len(own) / 1000)
    assert f"below a confidence of {review.threshold:.3f}" in review.words


def test_too_few_images_prove_nothing_and_the_sentence_says_how_many_it_takes() -> None:
    few = made(images_needed(0.02) - 5, 0).assign(correct=True)
    review = measure_review_threshold(few, made(100, 1), 0.02)
    assert review.threshold is None and f"it takes {images_needed(0.02):,}" in review.words
    enough = made(images_needed(0.02) + 5, 0).assign(correct=True)
    assert measure_review_threshold(enough, made(100, 1), 0.02).threshold == 0
    assert fit_review_threshold(few.iloc[:0], 0.02) is None


def test_groups_ask_for_more_than_their_images() -> None:
    table = made(1500, 5, groups=12)
    wrong = table.group < 2   # whole groups are wrong
    table = table.assign(correct=~wrong, confidence=np.where(wrong, 0.5, table.confidence))
    alone = table.drop(columns="group")
    with_groups = fit_review_threshold(table, 0.05)
    assert fit_review_threshold(alone, 0.05) is not None
    assert with_groups is None or with_groups >= fit_review_threshold(alone, 0.05)
