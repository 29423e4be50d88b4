"""Fixtures of the tests of data."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "An empty cache, which does not exist yet."
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path/"cache"


@pytest.fixture
def write_classes() -> Callable[..., Path]:
    "A function that writes a folder of classes with random images: write_classes(folder, cat=2, dog=2)."
    rng = np.random.default_rng(0)

    def write(folder: Path, **n: int) -> Path:
        for i, (label, count) in enumerate(n.items()):
            (folder/label).mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder/label/f"{i}-{k}.png")
        return folder
    return write
