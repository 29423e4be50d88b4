"""Notes of a stage: recorded once, kept in the manifest, and formatted for a terminal."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from cvnb.core.files import read_json, write_json
from cvnb.core.stage import Stage, format_notes, read_notes


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    "A stage of a new run."
    return Stage("audit", tmp_path/"run")


def test_notes_are_in_the_manifest_each_once(stage):
    stage.note("leak: 12 of 600 images (limit 0)", "report.html", exceeded=True)
    stage.note("a text\nof two lines")
    stage.note("a text of two lines")
    stage.finish()
    expected = [dict(text="leak: 12 of 600 images (limit 0)", file="audit/report.html", exceeded=True),
                dict(text="a text of two lines", file="", exceeded=False)]
    assert read_json(stage.dir/"stage.json")["notes"] == read_notes(stage.run, "audit") == expected


def test_manifest_of_an_older_version_has_no_notes(stage):
    stage.finish()
    record = read_json(stage.dir/"stage.json")
    for name in "notes", "format", "digest": del record[name]
    write_json(stage.dir/"stage.json", record)
    assert read_notes(stage.run, "audit") == read_notes(stage.run, "train") == []


def test_failed_stage_shows_its_error(stage):
    write_json(stage.dir/"stage.json", dict(status="failed", environment=dict(error="two failed\n    in a cell")))
    assert read_notes(stage.run, "audit") == [dict(text="two failed", file="", exceeded=True)]
    write_json(stage.dir/"stage.json", dict(status="failed", environment={}))
    assert read_notes(stage.run, "audit") == []


def test_exceeded_limits_come_first_and_the_rest_is_counted(stage, monkeypatch):
    for i in range(7): stage.note(f"note {i}")
    stage.note("leak: 12 of 600 images (limit 0)", "report.html", exceeded=True)
    monkeypatch.chdir(stage.run.parent)
    lines = format_notes(stage.run, stage.notes)
    assert lines[0] == "! leak: 12 of 600 images (limit 0) → run/audit/report.html"
    assert lines[1:5] == [f"- note {i}" for i in range(4)]
    assert lines[5:] == ["… and 3 more: `cvnb status run --json` lists all"]
    assert len(format_notes(stage.run, stage.notes, 8)) == 8 and format_notes(stage.run, []) == []


def test_announced_note_is_in_every_report_of_progress(stage, tmp_path, monkeypatch):
    "A command line that misses a report finds the note in the next one."
    monkeypatch.setenv("CVNB_PROGRESS", str(tmp_path/"progress"))
    stage.progress(0.3, "working")
    for _ in range(2): stage.announce("begins anew")
    report = json.loads((tmp_path/"progress").read_text())
    assert report["notes"] == ["begins anew"] and report["fraction"] == 0.3 and report["text"] == "working"
    stage.progress(0.4, "still working")
    assert json.loads((tmp_path/"progress").read_text())["notes"] == ["begins anew"]
    assert [note["text"] for note in stage.notes] == ["begins anew"]
