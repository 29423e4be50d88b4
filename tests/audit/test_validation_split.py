"""Validation that cannot stand for the test is named: drift between them, and values that the test alone has."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.audit.coverage import validation_differences

N = 600


@pytest.fixture
def split() -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    splits = rng.choice(["train", "val", "test"], N, p=[0.5, 0.25, 0.25])
    table = pd.DataFrame(dict(label=rng.choice(["a", "b"], N), split=splits,
                              path=[f"{i}.png" for i in range(N)], pixel_sha256=[f"{i:064x}" for i in range(N)],
                              brightness=rng.normal(100, 10, N), camera=rng.choice(["x", "y"], N)))
    return table, rng.normal(size=(N, 20)).astype(np.float32)


def test_random_splits_have_no_differences(split):
    table, x = split
    rng = np.random.default_rng(1)
    said = [bool(validation_differences(table.assign(split=rng.permutation(table.split)), x, i)) for i in range(10)]
    assert sum(said) <= 2


def test_drift_of_embeddings_and_brightness_is_said(split):
    table, x = split
    test = (table.split == "test").to_numpy()
    sentence, = validation_differences(table.assign(brightness=table.brightness + 20 * test), x + 2 * test[:, None])
    assert sentence.startswith("drift in ") and "brightness (" in sentence and "embedding (AUC " in sentence


def test_a_camera_and_groups_of_the_test_alone_are_said(split):
    table, x = split
    test = table.split == "test"
    said = validation_differences(table.assign(camera=np.where(test & (table.index % 2 == 0), "z", table.camera)), x)
    assert any("test images have a camera that training lacks, such as z, and 0 of" in s for s in said)
    site = np.where(test, "s9", [f"s{i % 5}" for i in range(N)])
    said = validation_differences(table.assign(group=site), x)
    assert any("have a group that training lacks, such as s9" in s for s in said)


def test_groups_that_each_split_has_for_itself_are_no_difference(split):
    table, x = split
    groups = table.split + [str(i // 4) for i in range(N)]
    assert not any("group" in s for s in validation_differences(table.assign(group=groups), x))


def test_data_without_test_or_validation_is_silent(split):
    table, x = split
    assert validation_differences(table.assign(split="train"), x) == []
    assert validation_differences(table.assign(split=np.where(table.split == "val", "train", table.split)), x) == []


def test_groups_of_close_images_are_no_drift(split):
    "Five images a group: a classifier that has seen a half of a group recognizes the other half."
    table, _ = split
    rng = np.random.default_rng(2)
    said = 0
    for i in range(10):
        groups = pd.Series([f"g{j // 5}" for j in range(N)])
        splits = pd.Series(rng.choice(["train", "val", "test"], N // 5)).repeat(5).to_numpy()
        x = rng.normal(size=(N // 5, 20)).repeat(5, 0) + 0.1 * rng.normal(size=(N, 20))
        grouped = table.assign(group=groups, split=splits, pixel_sha256=[f"{j:064x}" for j in range(N)])
        said += bool(validation_differences(grouped, x.astype(np.float32), i))
    assert said <= 2
