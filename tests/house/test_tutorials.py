"""The tutorial of a first run, on a copy of the smoke run, which it would otherwise repeat."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys

from cvnb.core.files import read_json


def test_first_run(smoke_run, root):
    run = root/"runs/tutorial"
    shutil.rmtree(run, ignore_errors=True)   # what an earlier call changed must not answer for this one
    shutil.copytree(smoke_run, run)
    done = subprocess.run([sys.executable, root/"dev/run_notebooks.py", root/"nbs/tutorials/first_run.ipynb"], capture_output=True, text=True,
                          env=os.environ | {"PATH": f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(run/"errors/stage.json")["params"]["n_images"] == 6   # what the tutorial changes
