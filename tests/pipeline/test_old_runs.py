"""Runs of older versions of cvnb can be read; their stages are stale for a stated reason; `cvnb run` repeats them."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from projects import write_project

from cvnb.core.files import read_json

CVNB = Path(sys.executable).with_name("cvnb")


@pytest.fixture
def project(tmp_path) -> Path:
    "A project with one stage."
    return write_project(tmp_path/"project", "n: int = 2", only='stage.path("n.txt").write_text("x" * n)')


def call(project: Path, *args: str) -> str:
    "Call the command line and return its output."
    done = subprocess.run([CVNB, *args], capture_output=True, text=True, cwd=project)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_run_of_older_version_is_read_and_repeated(project):
    call(project, "run", "--run", "runs/old", "--set", "only.n=3")
    path = project/"runs/old/only/stage.json"
    record = read_json(path)
    for name in "format", "digest": del record[name]   # there were none
    parts = record["environment"]["parts"]
    # Modules lay flat in the package: "core.stage.Stage" was "stage.Stage".
    parts["functions"] = {name.split(".", 1)[-1]: digest for name, digest in parts["functions"].items()}
    path.write_text(json.dumps(record))
    (row,) = json.loads(call(project, "status", "runs/old", "--json"))["stages"]
    assert row["state"] == "stale" and len(row["reasons"]) == 1
    assert row["reasons"][0].startswith("cvnb was reorganised: ")
    assert row["reasons"][0] in call(project, "run", "--run", "runs/old")
    assert read_json(path)["params"]["n"] == 3, "the run's own parameters are used again"
    assert json.loads(call(project, "status", "runs/old", "--json"))["stages"][0]["state"] == "fresh"
    record["environment"]["parts"]["modules"] = parts.pop("functions")   # a key of still older versions
    path.write_text(json.dumps(record))
    (row,) = json.loads(call(project, "status", "runs/old", "--json"))["stages"]
    assert row["state"] == "stale" and row["reasons"] == ["another version of cvnb made it"]
