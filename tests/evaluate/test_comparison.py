"""Two runs on the same images: the command, the notebook, and what the paired interval promises."""
from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from cvnb.core.errors import CvnbError
from cvnb.core.files import write_json
from cvnb.core.project import asset_folder
from cvnb.core.stage import Stage
from cvnb.data.tables import write_table
from cvnb.evaluate.comparison import compare_predictions, compare_runs
from cvnb.evaluate.dashboard_data import read_dashboard_data
from dashboards import CLASSES, SECONDS, agrees, choose, make_predictions, make_run, read_table, serve


def add_run(run: Path, name: str, seed: int = 1, wrong: float = 0.2) -> Path:
    "Write another run of the same audit, with other predictions."
    import shutil
    other = run.parent/name
    shutil.copytree(run/"audit", other/"audit")
    shutil.copytree(run/"train", other/"train")
    train = Stage("train", other)
    manifest = pd.read_parquet(run/"audit/manifest.parquet")
    write_table(train.path("predictions.parquet"), make_predictions(manifest, np.random.default_rng(seed), wrong))
    for file in "model.json", "metrics.json": train.path(file)
    train.finish()
    for folder in run, other: write_json(folder/"run.json", {})
    return other


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    "A run and a better one."
    run = make_run(tmp_path_factory.mktemp("compared"))
    return run, add_run(run, "better")


def test_counts_are_those_of_the_common_images(runs: tuple[Path, Path]) -> None:
    run, better = runs
    found = compare_runs(better, run)
    now, then = (read_table(folder, "test").set_index("path").sort_index() for folder in (better, run))
    assert found.better.sum() == (now.correct & ~then.correct).sum() > 0
    assert found.worse.sum() == (~now.correct & then.correct).sum() > 0
    assert found.difference.value == pytest.approx(now.correct.mean() - then.correct.mean())
    assert found.difference.low < found.difference.value < found.difference.high
    back = compare_runs(run, better)
    assert back.difference.value == pytest.approx(-found.difference.value)
    for row in found.classes.itertuples():
        own = now.label == row[2]
        assert row.gain == pytest.approx(now.correct[own].mean() - then.correct[own].mean())


def test_equal_runs_show_no_difference_and_chance_alone_marks_nothing(runs: tuple[Path, Path]) -> None:
    data = read_dashboard_data(runs[0])
    same = compare_predictions(data, data)
    assert same.difference.value == 0 and "no difference beyond chance" in same.lines[0]
    marked = 0
    for seed in range(40):   # two models that are wrong at random, equally often
        rng = np.random.default_rng(seed)
        tables = []
        for _ in range(2):
            wrong = rng.random(len(data.table)) < 0.3
            other = np.where(data.table.label == CLASSES[2], CLASSES[3], CLASSES[2])
            predicted = np.where(wrong, other, data.table.label)
            tables.append(data.table.assign(predicted=predicted, correct=predicted == data.table.label))
        found = compare_predictions(*(replace(data, table=table) for table in tables))
        marked += bool(((found.slices.low > 0) | (found.slices.high < 0)).any())
        marked += bool(((found.classes.low > 0) | (found.classes.high < 0)).any())
    assert marked <= 8   # of 80 families, 5 % each


def test_planted_loss_of_a_class_is_named(runs: tuple[Path, Path]) -> None:
    data = read_dashboard_data(runs[0])
    right = data.table.assign(predicted=data.table.label, correct=True)
    lost = right.assign(predicted=right.predicted.mask(right.label == "dog", "cat"), correct=right.label != "dog")
    found = compare_predictions(replace(data, table=lost), replace(data, table=right))
    assert any("Classes that are worse beyond chance: dog" in line for line in found.lines)
    assert "worse beyond chance" in found.lines[0]


def test_runs_without_common_images_are_refused(runs: tuple[Path, Path], tmp_path: Path) -> None:
    data = read_dashboard_data(runs[0])
    foreign = replace(data, manifest=data.manifest.assign(pixel_sha256="f" * 64))
    with pytest.raises(CvnbError, match="no image of the test split in common"): compare_predictions(data, foreign)
    moved = replace(data, table=data.table.assign(path="moved/" + data.table.path),
                    manifest=data.manifest.assign(path="moved/" + data.manifest.path))
    assert len(compare_predictions(data, moved).table) == (data.table.split == "test").sum()   # by their pixels


def test_command_prints_the_comparison(runs: tuple[Path, Path], tmp_path: Path) -> None:
    run, better = runs
    command = [Path(sys.executable).with_name("cvnb"), "compare", better, "--reference", run]
    found = compare_runs(better, run)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.lines[0] in done.stdout and "--reference" in done.stdout
    record = json.loads(subprocess.run([*command, "--json"], capture_output=True, text=True, check=True).stdout)
    assert record["difference"]["value"] == pytest.approx(found.difference.value) and record["n"] == 140


@pytest.mark.slow
def test_comparison_notebook_runs_with_its_parameters(runs: tuple[Path, Path], tmp_path: Path) -> None:
    notebook = asset_folder("dashboards")/"compare.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", notebook, tmp_path/"out.ipynb",
               "-p", "run", runs[1], "-p", "reference", runs[0]]
    subprocess.run(command, check=True, capture_output=True)
    assert "images are right now and were wrong" in (tmp_path/"out.ipynb").read_text()


@pytest.mark.browser
def test_page_shows_two_runs_side_by_side(runs: tuple[Path, Path], playwright_page) -> None:
    page = playwright_page
    server = serve(runs[1], reference=runs[0])
    try:
        page.goto(server.url)
        page.wait_for_selector(".cvnb .matrix svg", timeout=SECONDS)
        now = read_table(runs[1], "test")
        then = read_table(runs[0], "test").set_index("path").predicted[now.path].to_numpy()
        worse = now[~now.correct & (then == now.label)]
        page.locator(".comparison button", has_text="worse").click()
        assert agrees(page, worse)
        table = page.locator(".classes")
        assert table.evaluate("box => box.scrollWidth <= box.clientWidth"), "a column is cut off"
        shown = page.locator(".tile .reference .name").all_inner_texts()
        assert set(shown) <= set(CLASSES) and len(shown) == page.locator(".tile").count()
        assert compare_runs(runs[1], runs[0]).lines[0] in page.locator(".comparison").first.inner_text()
        choose(page, "Reference", "differ")
        choose(page, "Show", "all")
        assert agrees(page, now[then != now.predicted])
    finally:
        server.process.terminate()
        server.process.wait(60)
