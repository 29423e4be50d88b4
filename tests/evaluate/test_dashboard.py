"""The errors stage and the dashboard, on a small run: what Chromium shows has to agree with pandas."""
from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from cvnb.core.errors import CvnbError
from cvnb.core.files import read_json, write_json
from cvnb.core.project import asset_folder
from cvnb.core.stage import Stage
from cvnb.evaluate.dashboard import read_results
from cvnb.data.tables import write_table
from cvnb.evaluate.voila_server import _voila, free_port
from cvnb.metrics.estimates import accuracy
from cvnb.metrics.classification import confusion

# Names of classes are names of folders, and a folder may have any name.
CLASSES = ["<img src=x onerror=document.title='owned'>", "a$b$", "cat", "dog"]
SECONDS = 60_000   # what a loaded machine may take, in ms


def answered(rows: pd.DataFrame, rng: np.random.Generator, wrong: float) -> pd.DataFrame:
    "Make up predictions, a share of them wrong."
    labels = rows.label.map(CLASSES.index).to_numpy()
    guess = np.where(rng.random(len(rows)) < wrong, (labels + rng.integers(1, 4, len(rows))) % 4, labels)
    confidence = rng.uniform(0.4, 1, len(rows)).astype(np.float32)
    proba = np.repeat((1 - confidence[:, None]) / 3, 4, axis=1)
    proba[np.arange(len(rows)), guess] = confidence
    table = rows[["path", "split", "label"]].reset_index(drop=True)
    table["predicted"], table["confidence"] = [CLASSES[i] for i in guess], confidence.astype(float)
    table["correct"], table["probabilities"] = table.label == table.predicted, list(proba)
    return table


def save_weights(folder: Path) -> None:
    "Save an untrained model."
    from cvnb.models.weights import create_model, save_model
    save_model(create_model("resnet10t", CLASSES, 16), folder)


def make_run(folder: Path, wrong: float = 0.4, weights: bool = False) -> Path:
    "Write images and the files that the audit and the training leave behind; only the stage needs weights."
    rng, rows = np.random.default_rng(0), []
    for i in range(200):
        label = CLASSES[i % 4]
        (folder/"data"/label).mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 1 + rng.integers(20, 255), (12, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder/"data"/label/f"{i:03}.png")
        rows.append(dict(path=f"{label}/{i:03}.png", label=label, split="test" if i < 140 else "val", ok=True, error="",
                         width=12, height=12, brightness=float(pixels.mean()), contrast=float(pixels.std()),
                         tags=["near_duplicate"] if i % 7 == 0 else [], label_score=float(rng.random())))
    audit = Stage("audit", folder/"run")
    write_table(audit.path("manifest.parquet"), pd.DataFrame(rows))
    write_json(audit.path("audit.json"), dict(task="classification", root=str(folder/"data"), classes=CLASSES))
    audit.finish()
    train = Stage("train", folder/"run")
    write_table(train.path("predictions.parquet"), answered(pd.DataFrame(rows), rng, wrong))
    write_json(train.path("model.json"), dict(backbone="resnet10t", classes=CLASSES))
    if weights: save_weights(train.path("model.safetensors").parent)
    train.finish()
    return folder/"run"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run with mistakes."
    return make_run(tmp_path_factory.mktemp("dashboard"))


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    "What the model answered on the test split."
    predictions = pd.read_parquet(run/"train"/"predictions.parquet")
    return predictions[predictions.split == "test"].sort_values("confidence", ascending=False)


# The stage


def run_stage(run: Path) -> str:
    "Run the errors stage with papermill and return the executed notebook's text."
    notebook = run/"errors.ipynb"
    subprocess.run([sys.executable, "-m", "papermill", "--no-progress-bar", asset_folder("stages")/"errors.ipynb", notebook, "-p", "run", run],
                   check=True, capture_output=True)
    return notebook.read_text(encoding="utf-8")


@pytest.mark.slow
def test_stage_gives_the_same_file_twice(tmp_path: Path, table: pd.DataFrame) -> None:
    run, texts = make_run(tmp_path, weights=True), []
    for _ in range(2):
        run_stage(run)
        texts.append((run/"errors"/"errors.json").read_text())
    found = json.loads(texts[0])
    assert texts[0] == texts[1] and str(run.parent) not in texts[0]
    assert found["n_mistakes"] == (~table.correct).sum() and np.trace(found["confusion"]) == table.correct.sum()
    assert [m["confidence"] for m in found["mistakes"]] == table[~table.correct].confidence.head(16).tolist()
    assert {p.name for p in (run/"errors"/"saliency").iterdir()} == {Path(m["saliency"]).name for m in found["mistakes"]}
    assert read_json(run/"errors"/"stage.json")["metrics"]["accuracy_test"]["n"] == len(table)


@pytest.mark.slow
def test_stage_without_mistakes(tmp_path: Path) -> None:
    run = make_run(tmp_path, wrong=0, weights=True)
    text = run_stage(run)
    assert "No mistakes to show." in text and "No mistakes to explain." in text
    assert read_json(run/"errors"/"stage.json")["status"] == "done"
    assert read_json(run/"errors"/"errors.json")["mistakes"] == []


def test_pictures_are_those_of_the_model_whose_answers_are_shown(tmp_path: Path) -> None:
    run = make_run(tmp_path, weights=True)
    errors = Stage("errors", run)
    errors.input("train", "model.safetensors")
    write_json(errors.path("errors.json"), dict(mistakes=[dict(path="cat/002.png", saliency="saliency/0.png")]))
    errors.finish()
    assert list(read_results(run).pictures) == ["cat/002.png"]
    record = read_json(run/"train/stage.json")
    record["outputs"]["model.safetensors"]["sha256"] = "0" * 64   # trained anew
    write_json(run/"train/stage.json", record)
    assert read_results(run).pictures == {}
    write_json(run/"train/stage.json", record | dict(status="failed"))
    with pytest.raises(CvnbError, match="no finished train stage"): read_results(run)


# The page


@dataclass
class Served:
    "A dashboard that is being served."
    url: str
    process: subprocess.Popen


def serve(run: Path) -> Served:
    "Serve a run's dashboard in a process of its own, as the command line does."
    code = "import sys; from cvnb.evaluate.voila_server import serve_dashboard; serve_dashboard(sys.argv[1], open_browser=False)"
    process = subprocess.Popen([sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True)
    line = process.stdout.readline()
    return Served(re.search(r"http://\S+", line)[0], process)


@pytest.fixture(scope="module")
def served(run: Path) -> Iterator[Served]:
    "The dashboard of the run."
    server = serve(run)
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0


@pytest.fixture
def page(served: Served, playwright_page) -> Iterator:
    "The dashboard in Chromium, drawn; afterwards: nothing came from elsewhere, and no name of a class was run."
    answered_by, began = [], time.perf_counter()
    playwright_page.on("response", lambda r: answered_by.append(r.url))
    playwright_page.goto(served.url)
    playwright_page.wait_for_selector(".cvnb-matrix .nsewdrag", timeout=SECONDS)
    print(f"dashboard drawn after {time.perf_counter() - began:.1f} s")
    yield playwright_page
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in answered_by)
    assert playwright_page.title() == "cvnb · errors"


def captions(page) -> list[tuple[str, str, str]]:   # true class, predicted class (empty if right), confidence
    read = "tiles => tiles.map(t => ['b', 'i', 'span'].map(s => t.querySelector('figcaption ' + s)?.textContent ?? ''))"
    return [tuple(c) for c in page.eval_on_selector_all(".grid figure", read)]


def agrees(page, rows: pd.DataFrame, skip: int = 0) -> bool:
    "Wait until the count is that of `rows` and the grid shows the first 36 of them, or those after `skip`."
    wanted = [(r.label, "" if r.correct else f"→ {r.predicted}", f"{r.confidence:.1%}") for r in rows.iloc[skip:skip + 36].itertuples()]
    end = time.monotonic() + 15
    while time.monotonic() < end:
        found = page.locator(".count").text_content(), captions(page)
        if found == (f"{len(rows):,}", wanted): return True
        page.wait_for_timeout(50)
    assert found == (f"{len(rows):,}", wanted)
    return False


def choose(page, name: str, value: str) -> None:
    page.locator(".widget-dropdown", has_text=name).locator("select").select_option(label=value)


@pytest.mark.browser
def test_page_agrees_with_the_run(page, table: pd.DataFrame) -> None:
    wrong, figure = table[~table.correct], accuracy(table.correct)
    assert agrees(page, wrong)
    cards = page.locator(".card").all_inner_texts()
    assert f"{figure.value:.1%}" in cards[0] and f"{figure.low:.1%} … {figure.high:.1%} · n = {len(table)}" in cards[0]
    loaded = page.eval_on_selector_all(".grid img", "images => images.map(i => i.naturalWidth)")
    assert loaded == [12] * 36
    assert page.locator(".jp-InputArea, pre").count() == 0   # no code, no traceback


@pytest.mark.browser
def test_filters_change_the_grid(page, table: pd.DataFrame) -> None:
    wrong = table[~table.correct]
    assert agrees(page, wrong)
    choose(page, "True class", CLASSES[0])
    assert agrees(page, wrong[wrong.label == CLASSES[0]])
    choose(page, "Predicted", "cat")
    assert agrees(page, wrong[(wrong.label == CLASSES[0]) & (wrong.predicted == "cat")])
    page.get_by_role("button", name="Reset").click()
    assert agrees(page, wrong)
    page.get_by_role("button", name="All", exact=True).click()
    assert agrees(page, table)
    page.get_by_role("button", name="Correct").click()
    assert agrees(page, table[table.correct])


@pytest.mark.browser
def test_confidence_and_split(page, run: Path, table: pd.DataFrame) -> None:
    handle, low = page.locator(".noUi-handle-lower"), 0.0
    while low < 0.6:
        handle.press("PageUp")
        low = int(page.locator(".widget-readout").inner_text().split("%")[0]) / 100
    rows = table[table.confidence >= low]
    assert agrees(page, rows[~rows.correct]) and len(rows) < len(table)
    assert f"{accuracy(rows.correct).value:.1%}" in page.locator(".card.chosen").first.inner_text()
    page.get_by_role("button", name="Reset").click()
    choose(page, "Split", "val")
    val = pd.read_parquet(run/"train"/"predictions.parquet").query("split == 'val' and not correct")
    assert agrees(page, val.sort_values("confidence", ascending=False))


@pytest.mark.browser
def test_click_on_the_matrix(page, table: pd.DataFrame) -> None:
    box, wrong = page.locator(".cvnb-matrix .nsewdrag").bounding_box(), table[~table.correct]
    counts = confusion(table.label, table.predicted, CLASSES).to_numpy()
    i, j = np.unravel_index((counts - counts.T).argmax(), counts.shape)   # a cell that differs from its mirror image
    x, y = box["x"] + box["width"] * (j + 0.5) / 4, box["y"] + box["height"] * (i + 0.5) / 4
    click: Callable[[], None] = lambda: page.mouse.click(x, y)
    rows = wrong[(wrong.label == CLASSES[i]) & (wrong.predicted == CLASSES[j])]
    page.mouse.move(x, y)
    page.wait_for_selector(".cvnb-matrix .hoverlayer .hovertext")
    assert f"{counts[i, j]} of {counts[i].sum()} images" in page.locator(".hovertext").first.text_content()
    click()
    assert agrees(page, rows)
    page.wait_for_selector(".cvnb-matrix .shapelayer path")   # the cell is framed
    click()
    assert agrees(page, wrong)


@pytest.mark.browser
def test_pages_of_the_grid(page, table: pd.DataFrame) -> None:
    wrong = table[~table.correct]
    page.get_by_role("button", name="Next ›").click()
    assert agrees(page, wrong, skip=36) and page.get_by_role("button", name="Next ›").is_disabled()


@pytest.mark.browser
def test_page_says_what_is_missing(playwright_page, tmp_path: Path) -> None:
    Stage("audit", tmp_path/"half").finish()
    port = free_port()
    with _voila(asset_folder("dashboards")/"errors.ipynb", port, "token", os.environ | dict(CVNB_RUN=str(tmp_path/"half"))):
        playwright_page.goto(f"http://127.0.0.1:{port}/?token=token")
        notice = playwright_page.wait_for_selector(".notice", timeout=SECONDS).inner_text()
    assert "run half has no finished train stage" in notice and "cvnb run errors --run" in notice


# Who gets to see it


def status(url: str) -> tuple[int, str]:   # code, address after redirects
    try:
        with urllib.request.urlopen(url) as answer: return answer.status, answer.url
    except urllib.error.HTTPError as e: return e.code, e.url


def test_only_with_the_token_and_only_this_notebook(served: Served) -> None:
    base, token = served.url.split("?")
    assert "/login" in status(base)[1] and "/login" in status(f"{base}?token=wrong")[1]
    for other in "voila/files/errors.ipynb", "voila/render/errors.ipynb", "errors.ipynb", "voila/files/../settings.ini":
        assert status(f"{base}{other}?{token}")[0] in (403, 404), other


def test_only_this_machine(served: Served) -> None:
    voila = psutil.Process(served.process.pid).children(recursive=True)
    listening = {c.laddr.ip for p in voila for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}
    assert not any(served.url.split("token=")[1] in " ".join(p.cmdline()) for p in voila)   # anybody can read those


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM], ids=["Ctrl-C", "kill"])
def test_ends_cleanly(run: Path, sent: signal.Signals) -> None:
    server = serve(run)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(sent)
    assert server.process.wait(60) == 0 and children
    assert psutil.wait_procs(children, timeout=10)[1] == []


@pytest.mark.parametrize("stage, said", [("", "is not a run directory"), ("audit", "has no finished train stage")])
def test_refuses_what_is_no_run(stage: str, said: str, tmp_path: Path) -> None:
    from cvnb.core.errors import CvnbError
    from cvnb.evaluate.voila_server import serve_dashboard
    if stage: Stage(stage, tmp_path).finish()
    with pytest.raises(CvnbError, match=said) as caught: serve_dashboard(tmp_path, open_browser=False)
    assert "cvnb run" in caught.value.remedy
