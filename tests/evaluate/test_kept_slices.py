"""A kept slice is a test of later runs: what is refused, and that chance is no fall."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from typer.testing import CliRunner

from cvnb.cli.errors import errors_app
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.evaluate.kept_slices import KEPT_FILE, keep_slice, measure_kept_slices, read_kept_slices

SLICE = dict(name="dog, camera <b>D</b>", n=120, accuracy=0.8, low=0.7, high=0.88, words="",
             rule=dict(label="dog", column="camera", value="<b>D</b>"))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A run whose errors stage found a slice."
    stage = Stage("errors", tmp_path/"run")
    write_json(stage.path("errors.json"), dict(
        format=1, split="test", mistakes=[], found_slices=[SLICE],
        per_class=[dict(label="cat", recall=0.9, n=50), dict(label="never", recall=None, n=0)]))
    stage.finish()
    write_json(tmp_path/"run"/"run.json", {})
    return tmp_path/"run"


def draw(n: int, share: float, seed: int = 0) -> pd.DataFrame:
    "Predictions of dogs, half of them in the slice."
    rng = np.random.default_rng(seed)
    return pd.DataFrame(dict(path=[f"{i}.png" for i in range(n)], label="dog", width=9, height=9,
                             meta_camera=np.where(np.arange(n) % 2, "<b>D</b>", "A"), correct=rng.random(n) < share))


def test_kept_slice_is_measured_on_other_images(run: Path, tmp_path: Path) -> None:
    file, name, _ = keep_slice(run, "1", root=tmp_path)
    assert name == SLICE["name"] and json.loads(file.read_text())[name]["rule"] == SLICE["rule"]
    same, worse = (measure_kept_slices(read_kept_slices(file), draw(400, share), None) for share in (0.8, 0.5))
    assert not same.rows.fell[0] and worse.rows.fell[0] and worse.rows.n[0] == 200 and "fell from 80.0%" in worse.words
    other = measure_kept_slices(read_kept_slices(file), draw(400, 0.8).drop(columns="meta_camera"), None)
    assert "column camera" in other.rows.fault[0] and not other.rows.fell[0]


def test_chance_is_no_fall() -> None:
    rng = np.random.default_rng(0)
    fell = [measure_kept_slices({"s": SLICE | dict(run="r", accuracy=float((rng.random(120) < 0.8).mean()))},
                                draw(240, 0.8, seed), None).rows.fell[0] for seed in range(300)]
    assert np.mean(fell) <= 0.03


def test_command_keeps_and_refuses(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(errors_app, ["keep", str(run), SLICE["name"], "--name", "dogs", "--json"])
    assert done.exit_code == 0 and json.loads(done.output)["name"] == "dogs"
    assert CliRunner().invoke(errors_app, ["keep", str(run), "class/cat"]).exit_code == 0
    assert set(read_kept_slices(tmp_path/KEPT_FILE)) == {"dogs", "class/cat"}
    for wanted, text in (("2", "no slice '2'"), ("class/cta", "class/cat"), ("class/never", "no slice")):
        with pytest.raises(UsageError, match=text): keep_slice(run, wanted, root=tmp_path)
    with pytest.raises(UsageError, match="has a slice 'dogs'"): keep_slice(run, "1", "dogs", tmp_path)
    with pytest.raises(CvnbError): keep_slice(tmp_path/"other", "1", root=tmp_path)   # no errors stage


@pytest.mark.parametrize("content", ["[1]", "{", '{"a": 1}',
                                     '{"a": {"rule": {"x": 1}, "accuracy": 1, "n": 3, "run": ""}}',
                                     '{"a": {"rule": {}, "accuracy": 7, "n": 3, "run": ""}}'])
def test_damaged_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path/KEPT_FILE).write_text(content)
    with pytest.raises(CvnbError, match=KEPT_FILE): read_kept_slices(tmp_path/KEPT_FILE)
