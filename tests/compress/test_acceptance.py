"""A model is accepted by the paired test, by group where images come in groups."""
from __future__ import annotations

import numpy as np
import pandas as pd

from cvnb.compress.acceptance import check_acceptance
from cvnb.metrics.classification import accuracy


def tables(n_groups: int, size: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Predictions of two models, of which the new one loses two whole groups, and the images with their groups."
    group = np.repeat(np.arange(n_groups), size)
    paths = [f"{i}.png" for i in range(len(group))]
    images = pd.DataFrame(dict(path=paths, pixel_sha256=paths, group=[f"g{i}" for i in group]))
    return images, pd.DataFrame(dict(path=paths, correct=True)), pd.DataFrame(dict(path=paths, correct=group > 1))


def test_images_of_one_group_count_as_few():
    images, reference, new = tables(60, 10)
    alone = check_acceptance(reference, new.sample(frac=1, random_state=0), 0.06)
    grouped = check_acceptance(reference, new, 0.06, images=images)
    assert alone.accepted and not grouped.accepted and grouped.low < alone.low
    assert (alone.n_groups, grouped.n_groups, grouped.n) == (0, 60, 600) and grouped.effect > 5
    expected = accuracy(new.correct, np.repeat(np.arange(60), 10))
    assert (grouped.plain_accuracy.low, grouped.plain_accuracy.n_groups) == (expected.low, 60)
    assert grouped.to_json()["accuracy"]["n_groups"] == 60


def test_four_groups_prove_nothing():
    images, reference, _ = tables(4, 200)
    result = check_acceptance(reference, reference, 0.06, images=images)
    assert not result.accepted and "4 groups of images prove nothing" in result.notes[0]
