"""`cvnb run` and `cvnb status` print what a stage found; `--json` has all of it."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from projects import write_project

from cvnb.compress.error_budget import record_test
from cvnb.core.files import read_json, write_json
from cvnb.core.stage import Stage

CVNB = Path(sys.executable).with_name("cvnb")
BODY = """stage.path("page.html").write_text("x")
for i in range(n): stage.note(f"note {i}")
stage.note("leak: 12 of 600 images (limit 0)", "page.html", exceeded=True)
assert not fail, "planted"
"""


@pytest.fixture
def project(tmp_path) -> Path:
    "A project whose one stage has a limit exceeded and `n` notes."
    return write_project(tmp_path/"project", "n: int = 6\nfail: bool = False", only=BODY)


def call(project: Path, *args: str) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, *args], capture_output=True, text=True, cwd=project)


def test_notes_follow_the_stage_and_the_limit_comes_first(project):
    done = call(project, "run", "--run", "runs/a")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("✓ only"))
    assert lines[at + 1:] == ["  ! leak: 12 of 600 images (limit 0) → runs/a/only/page.html",
                              *(f"  - note {i}" for i in range(4)),
                              "  … and 2 more: `cvnb status runs/a --json` lists all"]
    again = call(project, "run", "--run", "runs/a").stdout.splitlines()
    assert again[-4].startswith("· only") and again[-3:-1] == lines[at + 1:at + 3] and "… and 5 more" in again[-1]
    status = call(project, "status", "runs/a").stdout
    assert "\nonly:\n" + "\n".join(lines[at + 1:]) in status


def test_json_has_all_notes(project):
    stage = json.loads(call(project, "run", "--run", "runs/a", "--json").stdout)["stages"]["only"]
    (row,) = json.loads(call(project, "status", "runs/a", "--json").stdout)["stages"]
    assert stage["notes"] == row["notes"] == read_json(project/"runs/a/only/stage.json")["notes"]
    assert len(row["notes"]) == 7 and sum(note["exceeded"] for note in row["notes"]) == 1


def test_run_of_an_older_version_has_no_notes_and_is_stale_for_lack_of_a_digest(project):
    call(project, "run", "--run", "runs/a")
    path = project/"runs/a/only/stage.json"
    record = read_json(path)
    for name in "notes", "format", "digest": del record[name]
    write_json(path, record)
    (row,) = json.loads(call(project, "status", "runs/a", "--json").stdout)["stages"]
    assert row["state"] == "stale" and row["notes"] == []
    assert row["reasons"] == ["its manifest has no digest, so it may have been changed"]
    assert "\nonly:" not in call(project, "status", "runs/a").stdout


def test_changed_notebook_is_said_and_runs_nothing_again(project):
    call(project, "run", "--run", "runs/a")
    notebook = project/"runs/a/only/notebook.ipynb"
    whole = notebook.read_bytes()
    said = "notebook.ipynb was changed after the stage ran"
    assert said not in call(project, "status", "runs/a").stdout
    notebook.write_bytes(whole + b"\n")
    status = json.loads(call(project, "status", "runs/a", "--json").stdout)
    (row,) = status["stages"]
    assert row["state"] == "fresh" and said in row["notes"][0]["text"] and row["notes"][0]["exceeded"]
    assert f"! {said}" in call(project, "run", "--run", "runs/a").stdout
    notebook.unlink()
    assert "! notebook.ipynb is missing" in call(project, "status", "runs/a").stdout


def test_json_status_has_test_accesses_and_the_error_budget(project):
    call(project, "run", "--run", "runs/a")
    status = json.loads(call(project, "status", "runs/a", "--json").stdout)
    assert status["verdict"] is None, "a project without an export stage has none"
    assert status["test_accesses"] == {} and status["error_budget"] == dict(total=0.05, next_level=0.025, tests=[])
    record_test(project/"runs/a", "q", "compressed", 0.025, False, 0.01, 600)
    Stage("only", project/"runs/a").log_access("test", 600)
    status = json.loads(call(project, "status", "runs/a", "--json").stdout)
    assert status["test_accesses"] == dict(only=1)
    assert status["error_budget"]["next_level"] == 0.0125
    assert status["error_budget"]["tests"][0]["claim"] == "compressed"


def test_failed_stage_shows_its_error_in_status(project):
    assert call(project, "run", "--run", "runs/a", "--set", "only.fail=true").returncode == 1
    (row,) = json.loads(call(project, "status", "runs/a", "--json").stdout)["stages"]
    assert row["state"] == "failed" and "AssertionError: planted" in row["notes"][0]["text"]
    assert "! only failed in cell [5]" in call(project, "status", "runs/a").stdout
