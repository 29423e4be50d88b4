"""What the notebook of duplicates cannot show: fresh processes, and other numbers of threads."""
from __future__ import annotations

import os
import subprocess
import sys

FIND = """from cvnb.data.tables import locate, scan
from cvnb.audit.duplicates import near_duplicates, plant, thumbnails
from cvnb.data.images import load_images
root = locate("digits")
paths = scan(root).path[::5]
copies, hidden = plant(root, paths, n=200), plant(root, paths, n=20, seed=1)
import numpy as np
thumbs = np.concatenate([thumbnails(load_images(root, paths, 64)), thumbnails(hidden.images)])
result = near_duplicates(thumbs, thumbnails(copies.images), copies)
print(result.pairs.to_csv(), result.threshold, result.proof)"""


def python(code: str, **env: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_same_pairs_on_any_number_of_threads():
    one, two = (python(FIND, OMP_NUM_THREADS=n) for n in "12")
    assert one == two and len(one.splitlines()) > 10


def test_importing_it_loads_nothing_heavy():
    assert python("import sys, cvnb.audit.duplicates; print({'torch', 'faiss', 'sklearn', 'matplotlib'} & sys.modules.keys())") == "set()\n"
