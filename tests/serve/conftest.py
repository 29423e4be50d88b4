"""Bundles and servers that several files use."""
from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from servers import Server, serving, write_served_bundle


@pytest.fixture(scope="session")
def served_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle that may be shipped."
    return write_served_bundle(tmp_path_factory.mktemp("served")/"run")


@pytest.fixture(scope="module")
def server(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    "A server with the defaults, for the tests of a module."
    with serving(tmp_path_factory.mktemp("server")/"log", served_bundle) as found: yield found


@pytest.fixture
def photo() -> np.ndarray:
    "An image with three different mean colours."
    return np.random.default_rng(1).integers(0, (60, 120, 250), (20, 30, 3)).astype(np.uint8)


@pytest.fixture(scope="session")
def promtool() -> str:
    "Path of promtool; without it the test is skipped, or fails in CI."
    path = shutil.which("promtool")
    if path: return path
    remedy = "promtool is not installed (Debian: apt install prometheus)"
    pytest.fail(remedy) if os.environ.get("CI", "").lower() in ("1", "true", "yes") else pytest.skip(remedy)
