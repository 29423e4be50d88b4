"""What the dashboard makes of odd runs: each shows a page, or says in one sentence what is wrong and what to do."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvnb.core.errors import CvnbError
from cvnb.core.files import read_json, write_json
from cvnb.core.stage import Stage
from cvnb.evaluate.comparison import compare_predictions, comparison_page
from cvnb.evaluate.dashboard import ErrorPage, build_dashboard, image_of_row
from cvnb.evaluate.dashboard_data import DashboardData, dashboard_page, read_dashboard_data
from dashboards import CLASSES, make_run


def made(n: int, n_classes: int, seed: int = 0, **columns: object) -> DashboardData:
    "Make up predictions."
    rng = np.random.default_rng(seed)
    names = [f"c{i}" for i in range(n_classes)]
    labels, predicted = (np.array(names)[rng.integers(0, n_classes, n)] for _ in range(2))
    p = rng.dirichlet(np.ones(n_classes), n).astype(np.float32)
    table = pd.DataFrame(dict(
        path=[f"{i:05}.png" for i in range(n)], split="test", label=labels, predicted=predicted, confidence=p.max(1),
        correct=labels == predicted, probabilities=list(p), tags=[[]] * n, brightness=rng.uniform(0, 255, n),
        contrast=9.0, width=8, height=8, label_score=np.nan) | columns)
    manifest = pd.DataFrame(dict(path=table.path, label=table.label, pixel_sha256=[f"{i:064x}" for i in range(n)]))
    return DashboardData("made", Path("nowhere"), names, table, manifest=manifest)


@pytest.mark.parametrize("n, n_classes", [(1, 2), (1, 10), (2, 2), (40, 2), (3000, 1000)])
def test_page_of_few_images_and_of_many_classes(n: int, n_classes: int) -> None:
    data = made(n, n_classes)
    page, block = dashboard_page(data)
    json.dumps(page, allow_nan=False)   # the browser takes no NaN
    assert len(page["summary"]["test"]["per_class"]) == n_classes and len(page["matrix"]) == min(n_classes, 100)
    assert len(page["paths"]) == n and page["width"] == min(n_classes, 50) and len(block) < 4e6
    parts, columns = comparison_page(data, replace(made(n, n_classes, 1), manifest=data.manifest))
    json.dumps(parts, allow_nan=False)
    assert len(columns["referencePredicted"]) == n


def test_class_that_is_never_predicted_has_no_precision() -> None:
    data = made(60, 3)
    table = data.table.assign(predicted="c0", correct=data.table.label == "c0")
    page, _ = dashboard_page(replace(data, table=table))
    rows = {row["label"]: row for row in page["summary"]["test"]["per_class"]}
    assert rows["c1"]["precision"] is None and rows["c1"]["recall"] == 0 and rows["c0"]["precision"] is not None


def test_missing_values_and_booleans_of_columns_are_kept() -> None:
    numbers = np.r_[np.nan, np.arange(29.0)]
    texts = [None, "a<b>"] * 15
    data = made(30, 2, meta_age=numbers, meta_note=texts, meta_wet=[True, False] * 15)
    page, block = dashboard_page(data)
    json.dumps(page, allow_nan=False)
    columns = {c["name"]: c for c in page["columns"]}
    assert (columns["age"]["low"], columns["age"]["high"]) == (0, 28)
    assert columns["note"]["values"] == ["", "a<b>"] and columns["wet"]["values"] == ["False", "True"]
    kind, offset, n = page["layout"]["column:age"]
    assert np.isnan(np.frombuffer(block, f"<{kind}", n, offset)[0])


def test_run_without_errors_stage_says_so_and_shows_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    data = read_dashboard_data(run)
    assert "errors stage has not finished" in data.notes[0] and "cvnb run errors --run" in data.notes[0]
    assert data.errors == {} and len(dashboard_page(data)[0]["paths"]) == 200


def test_half_a_run_names_the_missing_stage(tmp_path: Path) -> None:
    Stage("audit", tmp_path/"half").finish()
    page = build_dashboard(tmp_path/"half").value
    assert "no finished train stage" in page and "cvnb run errors --run" in page


def test_deleted_image_leaves_a_gap_and_no_error(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    board = ErrorPage(read_dashboard_data(run))
    (tmp_path/"data"/board.data.table.path[3]).unlink()
    sent = []
    board.send = lambda content, buffers=None: sent.append((content, buffers))
    board.receive(dict(kind="images", rows=[2, 3]), [])
    board.receive(dict(kind="detail", row=3), [])
    assert [bool(b) for b in sent[0][1]] == [True, False] and not sent[1][1][0]


def test_run_of_another_task_is_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    record = read_json(run/"audit/audit.json")
    audit = Stage("audit", run)
    (manifest := audit.path("manifest.parquet")).touch()
    write_json(audit.path("audit.json"), record | dict(task="regression"))
    audit.finish()
    with pytest.raises(CvnbError, match="task of run run is regression"): read_dashboard_data(run)
    assert manifest.exists()


def test_errors_of_an_earlier_version_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    errors = Stage("errors", run)
    write_json(errors.path("errors.json"), dict(mistakes=[], accuracy=dict(value=0.5, low=0.4, high=0.6, n=140)))
    errors.finish()
    page, _ = dashboard_page(read_dashboard_data(run))
    assert page["review_below"] is None and page["robustness"] is None and page["classes"] == CLASSES


def test_messages_of_a_browser_that_make_no_sense_change_nothing(tmp_path: Path) -> None:
    board = ErrorPage(read_dashboard_data(make_run(tmp_path)))
    sent = []
    board.send = lambda content, buffers=None: sent.append(content)
    board.receive(dict(kind="mark", rows=[0], action="relabel", label="no class"), [])
    assert "is none of the 4 classes" in sent.pop()["said"]
    board.receive(dict(kind="mark", rows=[0], action="erase"), [])
    assert "no mark 'erase'" in sent.pop()["said"]
    board.receive(dict(kind="images", rows=[-1, 10**9]), [])
    assert sent.pop()["rows"] == []
    board.receive(dict(kind="detail", row=-5), [])
    board.receive(dict(kind="measure", id=1), [memoryview(b"")])
    board.receive({}, [])
    assert not sent and not list(tmp_path.rglob("corrections/*.csv"))


def test_comparison_of_runs_without_a_common_split_is_refused() -> None:
    data = made(30, 2)
    other = replace(data, table=data.table.assign(split="val"))
    with pytest.raises(CvnbError, match="no image of the test split in common"): compare_predictions(data, other)


def test_images_of_a_table_with_absolute_paths_are_shown(tmp_path: Path) -> None:
    data = read_dashboard_data(make_run(tmp_path))
    absolute = replace(data, root=tmp_path, table=data.table.assign(path=[str(data.root/p) for p in data.table.path]))
    assert image_of_row(absolute, 3) == image_of_row(data, 3) != (b"", "")
