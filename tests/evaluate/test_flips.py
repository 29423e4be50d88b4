"""Answers that flip when an image moves by a pixel."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.evaluate.flips import BORDERS, MOVES, cut_border, measure_flips, move_images


def make(n: int = 60, side: int = 16) -> tuple[np.ndarray, pd.DataFrame]:
    "Draw images, half of them with a bright stripe at one place."
    images = np.random.default_rng(0).integers(0, 90, (n, side, side, 3)).astype(np.uint8)
    images[: n // 2, :, side // 2] = 255
    return images, pd.DataFrame(dict(path=[f"{i:02}.png" for i in range(n)], confidence=0.9,
                                     label=np.where(np.arange(n) < n // 2, "<b>stripe</b>", "none")))


def test_planted_flips_are_counted_and_listed() -> None:
    images, table = make()
    found = measure_flips(images, table, lambda x: (x[:, 0, 8, 0] < 255).astype(int), ["<b>stripe</b>", "none"])
    assert found.share.value == 0.5 and found.share.low < 0.5 < found.share.high and found.share_right.n == 60
    assert set(found.rows.label) == {"<b>stripe</b>"} and set(found.rows.other) == {"none"}
    assert (found.rows.n_flips >= 4).all() and found.rows.change[0] in MOVES | BORDERS
    steady = measure_flips(images, table, lambda x: (x.max((1, 2, 3)) < 200).astype(int), ["<b>stripe</b>", "none"])
    assert steady.rows.empty and steady.share.value == 0


@pytest.mark.parametrize("side", [1, 2, 3, 4])
def test_tiny_images(side: int) -> None:
    images = np.arange(2 * side * side * 3, dtype=np.uint8).reshape(2, side, side, 3)
    for by in MOVES.values(): assert move_images(images, *by).shape == images.shape
    for n in BORDERS.values(): assert cut_border(images, n).shape == images.shape


def test_one_image_and_groups() -> None:
    images, table = make(2)
    one = measure_flips(images[:1], table[:1], lambda x: np.zeros(len(x), int), ["<b>stripe</b>", "none"])
    assert one.share.n == 1 and one.share.value == 0 and one.words
    images, table = make()
    grouped = measure_flips(images, table.assign(group=np.arange(60) // 6),
                            lambda x: (x[:, 0, 8, 0] < 255).astype(int), ["<b>stripe</b>", "none"])
    assert grouped.share.high - grouped.share.low > 0.25
