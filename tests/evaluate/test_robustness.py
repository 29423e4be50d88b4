"""Corruptions against the published changes of grey levels, and weak spots that are planted."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvnb.core.cache import cache_dir
from cvnb.core.errors import UsageError
from cvnb.evaluate.corruptions import CHANGES, STRENGTHS, corrupt
from cvnb.evaluate.robustness import measure_robustness

# CIFAR-10-C on the test images, strengths 1, 3 and 5 (hendrycks/robustness): mean absolute change in grey levels.
PUBLISHED = {"gaussian noise": (8, 16, 20), "defocus blur": (1.5, 5, 10), "snow": (11, 25, 51), "pixelate": (2, 4, 9)}


UNORDERED = ("elastic", "spatter")   # coarse bending and water change more grey levels than fine bending and mud


def natural_images(side: int, n: int = 60) -> np.ndarray:
    "Cut photographs into small pictures whose contrast is about that of CIFAR-10."
    from PIL import Image
    from skimage import data
    rng = np.random.default_rng(0)
    photos = [Image.fromarray(np.asarray(p)[..., :3]) for p in (data.astronaut(), data.coffee(), data.cat())]
    out = []
    for i in range(n):
        photo = photos[i % 3]
        size = min(photo.size) // 2
        left, top = rng.integers(0, photo.width - size), rng.integers(0, photo.height - size)
        out.append(np.asarray(photo.crop((left, top, left + size, top + size)).resize((side, side))))
    return np.stack(out)


def change(images: np.ndarray, name: str, strength: int) -> float:
    return float(np.abs(corrupt(images, name, strength).astype(float) - images).mean())


def test_noise_has_the_published_strength() -> None:
    images = natural_images(32)
    for strength, published in zip((1, 3, 5), PUBLISHED["gaussian noise"]):
        assert change(images, "gaussian noise", strength) == pytest.approx(published, rel=0.1)


@pytest.mark.long
@pytest.mark.parametrize("name", PUBLISHED)
def test_changes_are_of_the_published_size(name: str) -> None:
    images = cifar10()
    for strength, published in zip((1, 3, 5), PUBLISHED[name]):
        assert change(images, name, strength) == pytest.approx(published, rel=0.15, abs=0.4)


def cifar10() -> np.ndarray:
    "Test images of CIFAR-10 where they have been fetched; else the test is left out."
    from cvnb.data.images import load_images
    folder = cache_dir()/"data"/"cifar10"
    paths = sorted(p.relative_to(folder).as_posix() for p in Path(folder).rglob("*.png"))[::97][:300]
    if not paths: pytest.skip("CIFAR-10 is not in the cache (`cvnb data get cifar10`)")
    return load_images(folder, paths, 32)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("side", [32, 96])
def test_stronger_corruptions_change_more(name: str, side: int) -> None:
    images = natural_images(side, 12 if side == 32 else 3)
    found = [change(images, name, strength) for strength in STRENGTHS]
    assert found[0] > 0 and (name in UNORDERED or found[4] > found[2] > found[0] * 0.99)
    other = corrupt(images[:3], name, 2)
    assert (other == corrupt(images, name, 2)[:3]).all() and other.dtype == np.uint8   # an image alone is the same


def test_large_images_get_the_strengths_of_imagenet() -> None:
    small, large = natural_images(64, 12), natural_images(65, 12)
    assert change(large, "gaussian noise", 3) > 1.8 * change(small, "gaussian noise", 3)


def test_unknown_change_names_the_nearest() -> None:
    with pytest.raises(UsageError, match="gausian noise") as caught: corrupt(natural_images(8, 1), "gausian noise", 1)
    assert "gaussian noise" in str(caught.value)


def test_planted_weak_spot_is_found_and_chance_is_none() -> None:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 150)
    images = np.full((150, 12, 12, 3), 90, np.uint8) + (60 * labels[:, None, None, None]).astype(np.uint8)
    sure = measure_robustness(images, labels, lambda x: (x.mean((1, 2, 3)) > 120).astype(int), (1, 3, 5))
    weak = set(sure.rows.change[sure.rows.weak])
    assert "brightness" in weak and "rotation" not in weak and "weak against" in sure.words
    row = sure.rows[(sure.rows.change == "brightness") & (sure.rows.strength == 3)].iloc[0]
    assert row.loss_low <= row.loss <= row.loss_high and row.loss == pytest.approx(sure.clean.value - row.value)
    guess = (images.mean((1, 2, 3)) > 120).astype(int)
    bright = corrupt(images, "brightness", 3).mean((1, 2, 3)) > 120
    lost = sure.lost["brightness, strength 3"]
    assert lost == np.flatnonzero((guess == labels) & (bright != labels)).tolist() and len(lost)
    marked = 0
    for seed in range(10):   # wrong at random, whatever the image
        random = np.random.default_rng(seed)
        guess = lambda x, random=random: np.where(random.random(len(x)) < 0.2, 1 - labels, labels)
        marked += measure_robustness(images[:, :4, :4], labels, guess, (3,), ("JPEG", "crop", "snow")).rows.weak.any()
    assert marked <= 2


def test_groups_widen_the_intervals() -> None:
    rng = np.random.default_rng(1)
    labels = np.zeros(120, int)
    images = np.zeros((120, 4, 4, 3), np.uint8)
    groups = np.repeat(np.arange(20), 6)
    guess = (rng.random(20) < 0.3)[groups].astype(int)
    found = [measure_robustness(images, labels, lambda x: guess, (3,), ("crop",), g).rows for g in (None, groups)]
    width = [float((rows.high - rows.low).iloc[0]) for rows in found]
    assert width[1] > 1.5 * width[0] and isinstance(found[0], pd.DataFrame)


def test_attack_stays_in_its_budget_and_is_worse_than_noise() -> None:
    import torch

    from cvnb.evaluate.robustness import ATTACK, pgd_attack
    from cvnb.models.inference import predict_proba
    from cvnb.models.weights import create_model
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 96)
    images = rng.integers(60, 190, (96, 16, 16, 3)).astype(np.uint8)
    images[labels == 1, :, :, 0] += 10   # a difference that an attack can take back
    model = create_model("resnet10t", ["a", "b"], 16)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for _ in range(15):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model.train()(torch.from_numpy(images)), torch.from_numpy(labels)).backward()
        optimizer.step()
    predict = lambda x: predict_proba(model, x).argmax(1)
    for budget in 1, 4:
        attacked = pgd_attack(model, images, labels, budget)
        assert np.abs(attacked.astype(int) - images).max() <= budget
        noisy = np.clip(images + rng.choice([-budget, budget], images.shape), 0, 255).astype(np.uint8)
        assert (predict(attacked) == labels).mean() <= (predict(noisy) == labels).mean()
    found = measure_robustness(images, labels, predict, (1, 3, 5), ("crop",),
                               attack=lambda x, y, budget: pgd_attack(model, x, y, budget))
    own = found.rows[found.rows.change == ATTACK]
    assert own.budget.tolist() == [1, 2, 4] and own.value.iloc[2] <= own.value.iloc[0]
    assert "of 255 levels" in found.words
