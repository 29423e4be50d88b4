"""The tutorial of a first run, on a copy of the smoke run, which it would otherwise repeat."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys

from cvnb.core.files import read_json


def test_first_run_tutorial_runs_on_the_smoke_run(smoke_run, root):
    run = root/"runs/tutorial"
    shutil.rmtree(run, ignore_errors=True)   # what an earlier call changed must not answer for this one
    shutil.copytree(smoke_run, run)
    command = [sys.executable, root/"dev/run_notebooks.py", root/"nbs/tutorials/first_run.ipynb"]
    path = f"{os.path.dirname(sys.executable)}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": path})
    assert done.returncode == 0, done.stdout + done.stderr
    assert read_json(run/"errors/stage.json")["params"]["n_images"] == 6   # what the tutorial changes
