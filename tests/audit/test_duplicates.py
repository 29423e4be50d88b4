"""Duplicates in fresh processes: numbers of threads, and what an import loads."""
from __future__ import annotations

import os
import subprocess
import sys

import pandas as pd
import pytest

from cvnb.audit.duplicates import find_leaks, mark_duplicates

FIND = """from cvnb.data.dataset import locate_data, scan_dataset
from cvnb.audit.duplicates import find_near_duplicates, make_thumbnails, plant_copies
from cvnb.data.images import load_images
root = locate_data("digits")
paths = scan_dataset(root).path[::5]
copies, hidden = plant_copies(root, paths, n=200), plant_copies(root, paths, n=20, seed=1)
import numpy as np
thumbs = np.concatenate([make_thumbnails(load_images(root, paths, 64)), make_thumbnails(hidden.images)])
result = find_near_duplicates(thumbs, make_thumbnails(copies.images), copies)
print(result.pairs.to_csv(), result.threshold, result.validation)"""


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_near_duplicates_do_not_depend_on_number_of_threads():
    one, two = (python(FIND, OMP_NUM_THREADS=n) for n in "12")
    assert one == two and len(one.splitlines()) > 10


PAIR = dict(path="a", other="x", label="1", other_label="1", split="train", other_split="test", similarity=0.9,
            kind="cropped")


@pytest.mark.parametrize("turned", [False, True], ids=["training image first", "test image first"])
def test_leak_between_training_and_test_is_found_in_both_directions(turned):
    rows = pd.DataFrame(dict(path=list("abxy"), label="1", split=["train", "val", "test", "test"], ok=True,
                             pixel_sha256=list("1234"), width=8, height=8))
    near = pd.DataFrame([PAIR | (dict(path="x", other="a", split="test", other_split="train") if turned else {})])
    leaks = find_leaks(mark_duplicates(rows), near)
    assert leaks[["path", "other", "other_split"]].values.tolist() == [["a", "x", "test"]]
    copied = mark_duplicates(rows.assign(pixel_sha256=list("1332")))   # x is a copy of b
    assert find_leaks(copied, near[:0])[["path", "other"]].values.tolist() == [["b", "x"]]


def test_import_loads_no_heavy_package():
    code = "import sys, cvnb.audit.duplicates; print({'torch', 'faiss', 'sklearn', 'matplotlib'} & sys.modules.keys())"
    assert python(code) == "set()\n"
