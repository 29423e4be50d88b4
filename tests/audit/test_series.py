"""Near duplicates where every image has relatives: other exposures of the same tile."""
from __future__ import annotations

from functools import cache

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter

from cvnb.audit.duplicates import (
    COPY_TRANSFORMS,
    NearDuplicates,
    PlantedCopies,
    check_duplicates,
    find_near_duplicates,
    make_thumbnails,
    mark_duplicates,
    pair_table,
    transform_image,
)
from cvnb.audit.series import describe_relatives, find_in_series

SIDE = 64   # pixels


def draw_tile(rng: np.random.Generator) -> np.ndarray:   # float (64, 64, 3), 40 … 200
    "Draw a texture of coarse and fine grain."
    coarse, fine = (gaussian_filter(rng.normal(size=(SIDE, SIDE)), sigma) for sigma in (6, 2))
    grey = coarse / coarse.std() + fine / fine.std()
    grey = (grey - grey.min()) / np.ptp(grey)
    return 40 + 160 * grey[..., None] * rng.uniform(0.8, 1, 3)


def expose(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:   # uint8
    "Photograph a tile at another exposure."
    x = (tile / 255) ** np.exp(rng.uniform(-0.7, 0.7)) * rng.uniform(0.7, 1.2) + rng.uniform(-0.1, 0.1)
    return (x * 255 + rng.normal(0, 1.5, x.shape)).clip(0, 255).round().astype(np.uint8)


def plant(images: np.ndarray, n: int, rng: np.random.Generator) -> PlantedCopies:
    "Copy images as `plant_copies` does, without files."
    source = rng.permutation(len(images))[:n]
    kinds = np.array([[*COPY_TRANSFORMS][k % 5] for k in range(n)])
    strengths = np.array([COPY_TRANSFORMS[kind][k // 5 % len(COPY_TRANSFORMS[kind])] for k, kind in enumerate(kinds)])
    copies = [transform_image(Image.fromarray(images[s]), kind, strength, rng).resize((SIDE, SIDE))
              for s, kind, strength in zip(source, kinds, strengths)]
    return PlantedCopies(np.stack(copies), source, kinds, strengths.astype(float), np.arange(n) // 20 % 2 == 0)


@cache
def find(exposures: int, with_images: bool = True) -> tuple[NearDuplicates, np.ndarray, set[tuple[int, int]]]:
    "Search 80 tiles at some exposures each, and eight hidden copies; return the series and the hidden pairs too."
    rng = np.random.default_rng(0)
    tiles = [draw_tile(rng) for _ in range(320 // exposures)]
    images = np.stack([expose(tile, rng) for tile in tiles for _ in range(exposures)])
    hidden = plant(images, 10, rng)
    copies = plant(images, 240, rng)
    series = np.arange(len(images)) // exposures
    true = {(int(s), len(images) + k) for k, s in enumerate(hidden.source)}
    series = np.append(series, series[hidden.source])
    images = np.concatenate([images, hidden.images])
    found = find_near_duplicates(make_thumbnails(images), make_thumbnails(copies.images), copies)
    if with_images: found = find_in_series(found, images)
    return found, series, true


def test_copies_are_found_among_relatives_which_thumbnails_confuse():
    blind, _, _ = find(4, with_images=False)
    assert blind.validation.recall.value < 0.5 and blind.path == "thumbnails"
    found, _, true = find(4)
    assert found.path == "exposures" and "by exposure" in found.validation.note and not found.off
    assert found.validation.recall.value >= 0.8 and found.validation.recall.n == 120
    pairs = set(zip(found.pairs.i, found.pairs.j))
    assert len(true & pairs) >= 8 and len(pairs - true) <= 2


def test_relatives_are_pairs_of_one_series_and_no_near_duplicates():
    found, series, _ = find(4)
    same = series[found.relatives.i] == series[found.relatives.j]
    assert same.mean() > 0.95 and same.sum() > 200 and set(found.relatives.kind) == {"relative"}
    assert not set(zip(found.pairs.i, found.pairs.j)) & set(zip(found.relatives.i, found.relatives.j))


def test_set_without_series_is_compared_as_thumbnails_alone():
    with_images, _, _ = find(1)
    alone, _, _ = find(1, with_images=False)
    assert with_images.path == "thumbnails" and with_images.relatives.empty
    assert "as thumbnails" in with_images.validation.note
    pd.testing.assert_frame_equal(with_images.pairs, alone.pairs)


@pytest.mark.parametrize("split", ["test", "train"])
def test_series_in_two_splits_is_a_note_and_neither_a_leak_nor_a_near_duplicate(split):
    table = pd.DataFrame(dict(path=["x.png", "y.png"], label=["a", "b"], split=[split, "train"], ok=True, width=64,
                              height=64, pixel_sha256=["1", "2"]))
    table = mark_duplicates(table)
    relatives = pair_table(pd.DataFrame(dict(i=[0], j=[1], similarity=0.9, kind="relative")), table)
    found, _, _ = find(1)
    assert not any(c.paths for c in check_duplicates(table, relatives[:0], found))
    (sentence,) = describe_relatives(relatives, 2)
    assert "x.png and y.png" in sentence and ("two splits" in sentence) == (split == "test")
