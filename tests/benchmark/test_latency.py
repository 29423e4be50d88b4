"""Latencies are kept for the files and the machine that they were measured on."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cvnb.benchmark import latency
from cvnb.benchmark.latency import time_files


@pytest.fixture
def files(tmp_path: Path, monkeypatch) -> dict[str, Path]:
    "Two files of different content, and a third that equals the first."
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    found = {}
    for name, content in dict(a=b"one", b=b"two", again=b"one").items():
        found[name] = tmp_path/f"{name}.onnx"
        found[name].write_bytes(content)
    return found


@pytest.fixture
def measured(monkeypatch) -> list[list[str]]:
    "The names of each measurement; the times are random."
    calls: list[list[str]] = []
    rng = np.random.default_rng(0)

    def measure(files: dict[str, Path], side: int, rounds: int) -> dict[str, np.ndarray]:
        calls.append(list(files))
        return {name: rng.uniform(1e-3, 2e-3, (rounds, 5)) for name in files}

    monkeypatch.setattr(latency, "_time_fresh", measure)
    return calls


def test_the_same_files_keep_their_times_and_equal_files_are_one(files, measured):
    first, second = (time_files(files, 32) for _ in range(2))
    assert len(measured) == 1 and len(measured[0]) == 2, "equal files are measured once, and nothing is measured again"
    assert all((first.seconds[name] == second.seconds[name]).all() for name in files)
    assert (first.seconds["a"] == first.seconds["again"]).all()
    assert first.speed("a", "again").value == 1


def test_other_files_sizes_and_machines_are_measured_anew(files, measured, monkeypatch):
    time_files(files, 32)
    time_files(files, 64)
    files["b"].write_bytes(b"three")
    time_files(files, 32)
    monkeypatch.setattr(latency, "machine_info", lambda: dict(cores=99))
    time_files(files, 32)
    assert len(measured) == 4


def test_damaged_times_are_measured_again(files, measured, tmp_path):
    time_files(files, 32)
    (kept,) = (tmp_path/"cache/latency").glob("*.json")
    for damage in kept.read_bytes()[:40], kept.read_bytes().replace(b"0.001", b"0.009", 1):
        kept.write_bytes(damage)
        time_files(files, 32)
    assert len(measured) == 3
