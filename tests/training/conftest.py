"""Fixtures of the tests of training."""
from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from train_job import digits

from cvnb.core.stage import Stage
from cvnb.training.loaders import LabelledImages


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    "Two processes on two cores: with as many threads as processes, threads would wait for each other."
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def data() -> tuple[LabelledImages, LabelledImages]:
    "300 training and 100 validation images of handwritten digits."
    return digits()


@pytest.fixture
def wandb_defaults(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "W&B's settings of a person who has never used it; changes by a test are undone."
    for name in "WANDB_SILENT", "WANDB_DATA_DIR", "WANDB_NOTEBOOK_NAME":
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("WANDB_NOTEBOOK_NAME")
    for name in "API_KEY", "BASE_URL", "MODE", "DIR", "ENTITY", "PROJECT":
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    monkeypatch.delenv("CVNB_PROGRESS", raising=False)
    for name in "NO_PROXY", "no_proxy": monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("NETRC", str(tmp_path/"netrc"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    "A train stage with parameters."
    return Stage("train", tmp_path/"run", dict(epochs=2, lr=0.05, backbone="tiny"))
