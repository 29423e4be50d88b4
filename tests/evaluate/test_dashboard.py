"""The errors stage and the dashboard, on a small run: what Chromium shows has to agree with pandas."""
from __future__ import annotations

import contextlib
import http.client
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
from pathlib import Path
from urllib.parse import quote, urlsplit

import numpy as np
import pandas as pd
import psutil
import pytest
from processes import left_after

from cvnb.audit.review import apply_corrections, read_corrections
from cvnb.core.errors import CvnbError
from cvnb.core.files import read_json, write_json
from cvnb.core.formats import StageManifest
from cvnb.core.project import asset_folder
from cvnb.core.records import write_record
from cvnb.core.stage import Stage
from cvnb.data.tables import write_table
from cvnb.evaluate import voila_server
from cvnb.evaluate.dashboard_data import read_dashboard_data
from cvnb.evaluate.voila_server import _run_voila, find_free_port, serve_dashboard, voila_config
from cvnb.metrics.classification import accuracy, confusion_matrix, per_class_metrics
from dashboards import CLASSES, SECONDS, Served, agrees, captions, choose, make_predictions, make_run, read_table, serve

LOST = [0, 7, 30]   # images that a corruption costs, of those that were tried


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run whose model makes errors; of its errors stage, robustness and flips."
    made = make_run(tmp_path_factory.mktemp("dashboard"))
    paths = read_table(made, "test").path.tolist()
    figure = dict(value=0.5, low=0.4, high=0.6, n=40)
    tried = figure | dict(change="JPEG", strength=3, loss=0.1, loss_low=0.02, loss_high=0.2, proven=True, weak=True,
                          budget=0)
    robustness = dict(words="weak against JPEG", clean=figure, rows=[tried], paths=paths[:40],
                      lost={"JPEG, strength 3": LOST})
    flips = dict(words="3 answers flip", share=figure, share_right=figure, rows=[dict(path=p) for p in paths[20:23]])
    errors = Stage("errors", made)
    write_json(errors.path("errors.json"), dict(format=1, split="test", mistakes=[], robustness=robustness, flips=flips,
                                                accuracy=figure | dict(n=140)))
    errors.finish()
    return made


@pytest.fixture(scope="module")
def table(run: Path) -> pd.DataFrame:
    "The predictions on the test split."
    return read_table(run, "test")


# The stage


def run_stage(run: Path) -> str:
    "Run the errors stage with papermill and return the executed notebook's text."
    notebook = run/"errors.ipynb"
    stage = asset_folder("stages")/"errors.ipynb"
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", stage, notebook, "-p", "run", run]
    subprocess.run(command, check=True, capture_output=True)
    return notebook.read_text(encoding="utf-8")


@pytest.mark.slow
def test_errors_stage_is_reproducible(tmp_path: Path, table: pd.DataFrame) -> None:
    run = make_run(tmp_path, weights=True)
    texts = []
    for _ in range(2):
        run_stage(run)
        texts.append((run/"errors"/"errors.json").read_text())
    found = json.loads(texts[0])
    assert texts[0] == texts[1] and str(run.parent) not in texts[0]
    assert found["n_mistakes"] == (~table.correct).sum() and np.trace(found["confusion"]) == table.correct.sum()
    assert [row["confidence"] for row in found["mistakes"]] == table[~table.correct].confidence.head(16).tolist()
    pictures = {p.name for p in (run/"errors"/"saliency").iterdir()}
    assert pictures == {Path(row["saliency"]).name for row in found["mistakes"]}
    assert read_json(run/"errors"/"stage.json")["metrics"]["accuracy_test"]["n"] == len(table)


@pytest.mark.slow
def test_errors_stage_runs_on_model_without_errors(tmp_path: Path) -> None:
    run = make_run(tmp_path, wrong=0, weights=True)
    text = run_stage(run)
    assert "No errors to show." in text and "No errors to explain." in text
    assert read_json(run/"errors"/"stage.json")["status"] == "done"
    assert read_json(run/"errors"/"errors.json")["mistakes"] == []


def test_saliency_pictures_must_belong_to_the_trained_model(tmp_path: Path) -> None:
    run = make_run(tmp_path, weights=True)
    errors = Stage("errors", run)
    errors.input("train", "model.safetensors")
    write_json(errors.path("errors.json"), dict(mistakes=[dict(path="cat/002.png", saliency="saliency/0.png")]))
    errors.finish()
    assert list(read_dashboard_data(run).saliency) == ["cat/002.png"]
    record = read_json(run/"train/stage.json")
    record["outputs"]["model.safetensors"]["sha256"] = "0" * 64   # another training
    write_record(run/"train/stage.json", record, StageManifest)
    assert read_dashboard_data(run).saliency == {}
    write_record(run/"train/stage.json", record | dict(status="failed"), StageManifest)
    with pytest.raises(CvnbError, match="no finished train stage"): read_dashboard_data(run)


# The page


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    "The dashboard of the run. Its file for the browser is gone afterwards."
    server = serve(run, tmp_path_factory.mktemp("browser"))
    yield server
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
    if server.browser.is_running(): server.browser.kill()
    assert not Path(server.opened.removeprefix("file://")).parent.exists()


@pytest.fixture
def page(served: Served, playwright_page) -> Iterator:
    "The dashboard in Chromium, drawn. Afterwards: no other server was contacted, and no class name ran as code."
    urls = []
    began = time.perf_counter()
    playwright_page.on("response", lambda response: urls.append(response.url))
    playwright_page.goto(served.url)
    playwright_page.wait_for_selector(".cvnb .matrix svg", timeout=SECONDS)
    print(f"dashboard drawn after {time.perf_counter() - began:.1f} s")
    yield playwright_page
    assert all(url.startswith(("http://127.0.0.1:", "data:", "blob:")) for url in urls)
    assert playwright_page.title() == "cvnb · errors"


@pytest.mark.browser
def test_page_shows_predictions_of_the_run(page, table: pd.DataFrame) -> None:
    figure = accuracy(table.correct)
    assert agrees(page, table[~table.correct])
    cards = page.locator(".card").all_inner_texts()
    assert f"{100 * figure.value:.1f} %" in cards[0]
    assert f"{100 * figure.low:.1f} % … {100 * figure.high:.1f} % · n = {len(table)}" in cards[0]
    page.wait_for_selector(".tile img")
    page.wait_for_function("document.querySelectorAll('.tile img').length == document.querySelectorAll('.tile').length")
    loaded = page.eval_on_selector_all(".tile img", "images => images.map(i => i.naturalWidth)")
    assert set(loaded) == {12}
    assert page.locator(".jp-InputArea, pre").count() == 0   # no code, no traceback


@pytest.mark.browser
def test_both_class_names_are_readable_in_tiles(page) -> None:
    shown = page.eval_on_selector_all(".tile .name", """names => names.map(n => [n.textContent, n.parentElement.title,
        n.clientWidth, n.scrollWidth,
        n.getBoundingClientRect().bottom <= n.closest('.tile').getBoundingClientRect().bottom])""")
    assert len(shown) == 2 * page.locator(".tile").count()
    for text, title, width, needed, inside in shown:
        assert inside and title.endswith(text)   # the tooltip has a long name whole
        assert needed <= width or text == CLASSES[0]


@pytest.mark.browser
def test_class_and_show_filters_select_grid_rows(page, table: pd.DataFrame) -> None:
    wrong = table[~table.correct]
    assert agrees(page, wrong)
    choose(page, "True class", CLASSES[0])
    assert agrees(page, wrong[wrong.label == CLASSES[0]])
    choose(page, "Predicted", "cat")
    assert agrees(page, wrong[(wrong.label == CLASSES[0]) & (wrong.predicted == "cat")])
    page.get_by_role("button", name="Reset").click()
    assert agrees(page, wrong)
    choose(page, "Show", "all")
    assert agrees(page, table)
    choose(page, "Show", "correct")
    assert agrees(page, table[table.correct])


@pytest.mark.browser
def test_finding_column_and_slice_filters_select_grid_rows(page, run: Path, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    choose(page, "Audit finding", "near_duplicate")
    assert agrees(page, table[table.tags.map(len) > 0])
    page.get_by_role("button", name="Reset").click()
    choose(page, "Show", "all")
    choose(page, "Column", "camera")
    page.get_by_label("value of the column").select_option("new")
    assert agrees(page, table[table.meta_camera == "new"])
    choose(page, "Column", "brightness")
    page.get_by_label("range of the column").fill("20 … 40")
    page.keyboard.press("Enter")
    assert agrees(page, table[table.brightness.between(20, 40)])
    page.get_by_role("button", name="Reset").click()
    page.locator('.slice[data-slice="test/camera/old"]').click()
    assert agrees(page, table[table.meta_camera == "old"])
    choose(page, "Slice", "test/tag/near_duplicate")
    assert agrees(page, table[table.tags.map(len) > 0])


@pytest.mark.browser
def test_robustness_and_flips_select_their_images(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    page.locator('circle[data-slice="test/robustness/JPEG, strength 3"]').click()
    assert agrees(page, table.iloc[LOST])
    page.locator('circle[data-slice="test/robustness/JPEG, strength 3"]').click()
    assert agrees(page, table[~table.correct])   # as the page begins
    assert page.locator('.slice[data-slice*="robustness"]').count() == 0   # its own panel has it
    page.locator('.slice[data-slice^="test/flips/"]').click()
    assert agrees(page, table.iloc[20:23])
    assert "3 answers flip" in page.inner_text(".panels")


@pytest.mark.browser
def test_slices_of_a_kind_are_one_group_of_the_menu(page) -> None:
    groups = page.eval_on_selector_all("select[aria-label=Slice] optgroup", """groups => groups.map(
        g => [g.label, [...g.children].map(o => o.value)])""")
    assert len(dict(groups)) == len(groups) > 2   # each kind once
    assert "test/camera/old" in dict(groups)["test · camera"]
    assert "test/tag/near_duplicate" in dict(groups)["test · tag"]


@pytest.mark.browser
def test_limits_of_confidence_are_put_in_order(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    low, high = page.get_by_label("lowest confidence"), page.get_by_label("highest confidence")
    high.fill("60")
    high.press("Enter")
    low.fill("80")
    low.press("Enter")
    assert (low.input_value(), high.input_value()) == ("60", "80")
    assert agrees(page, table[table.confidence.between(0.6, 0.8)])
    page.evaluate("location.hash = '#show=all&low=0.8&high=0.6'")
    page.wait_for_timeout(300)
    assert agrees(page, table[table.confidence.between(0.6, 0.8)])


@pytest.mark.browser
def test_title_counts_selected_images_outside_of_the_filters(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    page.locator(".tile .check").first.click()
    right = bool(table.correct.iloc[0])
    assert page.inner_text(".gallery .title").endswith("· 1 selected")
    choose(page, "Show", "wrong" if right else "correct")
    assert "1 selected, 1 of them outside of these filters" in page.inner_text(".gallery .title")
    page.locator(".grid").focus()
    page.keyboard.press("Escape")
    assert "selected" not in page.inner_text(".gallery .title")


IN_VIEW = """selector => { const box = document.querySelector(selector).getBoundingClientRect();
  return box.top < innerHeight / 2 && box.bottom > innerHeight / 2 }"""


@pytest.mark.browser
def test_gallery_and_dialogs_are_in_view_beside_the_last_panel(page, table: pd.DataFrame) -> None:
    page.set_viewport_size(dict(width=1300, height=500))
    page.locator('circle[data-slice="test/robustness/JPEG, strength 3"]').click()
    assert agrees(page, table.iloc[LOST])
    assert page.evaluate("document.querySelector('.panels').getBoundingClientRect().top") < -500   # far down
    assert page.evaluate(IN_VIEW, ".gallery") and page.locator(".grid .tile").first.is_visible()
    page.locator(".grid").focus()
    page.keyboard.press("Enter")
    page.wait_for_selector(".detail .sheet-card", timeout=SECONDS)
    box = page.locator(".detail .sheet-card").first.bounding_box()
    assert 0 <= box["y"] and box["y"] + box["height"] <= 500 and page.evaluate(IN_VIEW, ".detail")
    page.keyboard.press("Escape")
    page.keyboard.press("?")
    assert page.evaluate(IN_VIEW, ".detail.help .sheet-card")


@pytest.mark.browser
def test_image_of_the_address_is_the_one_that_keys_act_on(page, served: Served, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    third, fourth = table.path.iloc[2], table.path.iloc[3]
    page.evaluate("hash => { location.hash = hash }", f"#show=all&open={quote(third)}")
    page.wait_for_selector(f'.detail [aria-label="{third}"]', timeout=SECONDS)
    page.wait_for_selector(".detail >> text=No saliency: the errors stage makes it", timeout=SECONDS)
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(f'.detail [aria-label="{fourth}"]', timeout=SECONDS)
    page.keyboard.press("m")
    assert page.locator(".marking .sheet-card").count() == 0   # the dialog has what marks its own image
    page.keyboard.press("Escape")
    page.keyboard.press("m")
    assert fourth in page.inner_text(".marking .sheet-card")


@pytest.mark.browser
def test_opened_image_leaves_the_grid_where_it_is(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    page.set_viewport_size(dict(width=1300, height=600))
    page.evaluate("document.querySelector('.grid').scrollTop = 600")
    page.wait_for_timeout(200)
    page.evaluate("""() => { const top = document.querySelector('.grid').getBoundingClientRect().top;
      const seen = [...document.querySelectorAll('.grid .tile')].find(t => t.getBoundingClientRect().top > top);
      seen.querySelector('.picture').click() }""")
    page.wait_for_selector(".detail .sheet-card", timeout=SECONDS)
    page.keyboard.press("Escape")
    assert page.evaluate("document.querySelector('.grid').scrollTop") == 600


@pytest.mark.browser
def test_keys_work_after_a_click_on_a_button_and_odd_ranges_are_named(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    page.locator(".classes tbody button, .classes tbody a").first.click()
    page.keyboard.press("r")
    assert agrees(page, table[~table.correct])
    choose(page, "Show", "all")
    choose(page, "Column", "brightness")
    field = page.get_by_label("range of the column")
    for text in "20-40", "20 to 40":
        field.fill(text)
        page.keyboard.press("Enter")
        assert agrees(page, table[table.brightness.between(20, 40)])
    field.fill("bright")
    page.keyboard.press("Enter")
    page.wait_for_selector(".said:has-text('is no range')", timeout=SECONDS)
    assert agrees(page, table[table.brightness.between(20, 40)])


@pytest.mark.browser
def test_confidence_and_split_filters_select_grid_rows(page, run: Path, table: pd.DataFrame) -> None:
    page.get_by_label("lowest confidence").fill("60")
    page.keyboard.press("Enter")
    rows = table[table.confidence >= 0.6]
    assert agrees(page, rows[~rows.correct]) and len(rows) < len(table)
    figure = accuracy(rows.correct)
    interval = f"{100 * figure.low:.1f} % … {100 * figure.high:.1f} %"
    page.wait_for_function("text => document.querySelector('.card.chosen').innerText.includes(text)", arg=interval)
    assert f"{100 * figure.value:.1f} %" in page.locator(".card.chosen").first.inner_text()
    page.get_by_role("button", name="Reset").click()
    choose(page, "Split", "val")
    val = read_table(run, "val")
    assert agrees(page, val[~val.correct])


@pytest.mark.browser
def test_click_on_histogram_selects_confidences(page, table: pd.DataFrame) -> None:
    box = page.locator(".histogram svg").bounding_box()
    page.mouse.click(box["x"] + box["width"] * 0.82, box["y"] + 40)
    rows = table[~table.correct & table.confidence.between(0.8, 0.84)]
    assert agrees(page, rows) and len(rows)
    page.mouse.move(box["x"] + box["width"] * 0.61, box["y"] + 40)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] * 0.79, box["y"] + 40)
    page.mouse.up()
    assert agrees(page, table[~table.correct & table.confidence.between(0.6, 0.8)])


@pytest.mark.browser
def test_click_on_matrix_cell_selects_its_images(page, table: pd.DataFrame) -> None:
    wrong = table[~table.correct]
    counts = confusion_matrix(table.label, table.predicted, CLASSES).to_numpy()
    i, j = np.unravel_index((counts - counts.T).argmax(), counts.shape)   # a cell that differs from its mirror image
    box = page.locator(".matrix .hit").bounding_box()
    x = box["x"] + box["width"] * (j + 0.5) / 4
    y = box["y"] + box["height"] * (i + 0.5) / 4
    page.mouse.move(x, y)
    assert f"{counts[i, j]} of {counts[i].sum()} images" in page.locator(".matrix .hit title").text_content()
    page.mouse.click(x, y)
    assert agrees(page, wrong[(wrong.label == CLASSES[i]) & (wrong.predicted == CLASSES[j])])
    page.wait_for_selector(".matrix rect.chosen", state="attached")   # the cell is outlined
    page.mouse.click(x, y)
    assert agrees(page, wrong)


@pytest.mark.browser
def test_grid_scrolls_through_all_images(page, table: pd.DataFrame) -> None:
    choose(page, "Show", "all")
    assert agrees(page, table)
    page.locator(".grid").evaluate("grid => { grid.scrollTop = grid.scrollHeight }")
    page.wait_for_function("row => document.querySelector(`[data-row='${row}'] img`)", arg=int(table.row.iloc[-1]))
    shown = captions(page)
    assert [c[0] for c in shown] == table.row.tolist()[-len(shown):] and len(shown) < len(table)   # those in view


@pytest.mark.browser
def test_class_table_sorts(page, table: pd.DataFrame) -> None:
    metrics = per_class_metrics(table.label, table.predicted, CLASSES)
    names = lambda: page.locator(".classes tbody .name").all_inner_texts()
    assert names() == metrics.sort_values("recall", kind="stable").label.tolist()
    for column, heading in dict(precision="precision", n="images").items():
        page.locator(".classes th button", has_text=heading).click()
        assert names() == metrics.sort_values(column, kind="stable").label.tolist()
    page.locator(".classes th button", has_text="images").click()
    assert names() == metrics.sort_values("n", kind="stable", ascending=False).label.tolist()
    page.locator(".classes tbody button", has_text="dog").click()
    assert agrees(page, table[~table.correct & (table.label == "dog")])


@pytest.mark.browser
def test_keys_open_an_image_with_its_probabilities_and_metadata(page, table: pd.DataFrame) -> None:
    wrong = table[~table.correct].reset_index(drop=True)
    page.wait_for_selector(".tile")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    row = wrong.iloc[1]
    card = page.get_by_role("dialog")
    assert card.get_attribute("aria-label") == row.path
    page.wait_for_function("document.querySelector('.large img')?.naturalWidth == 12")
    shown = card.locator(".probability .number").all_inner_texts()
    assert shown == [f"{100 * p:.1f} %" for p in sorted(row.probabilities, reverse=True)]
    read = "bars => bars.map(b => b.clientWidth / b.parentElement.clientWidth)"
    bars = card.locator(".probability .track i").evaluate_all(read)
    assert np.allclose(bars, sorted(row.probabilities, reverse=True), atol=0.02)
    facts = card.locator(".facts").inner_text()
    assert row.path in facts and row.meta_camera in facts and f"{row.label_score:.3f}" in facts
    page.keyboard.press("ArrowRight")
    assert card.get_attribute("aria-label") == wrong.iloc[2].path
    page.keyboard.press("Escape")
    card.wait_for(state="detached")
    page.keyboard.press("?")
    assert "move in the grid" in page.locator(".help").inner_text()
    page.keyboard.press("Escape")
    assert not page.locator(".help").count()
    page.keyboard.press("c")
    assert agrees(page, table[table.correct])


@pytest.mark.browser
def test_threshold_counts_errors_and_costs(page, table: pd.DataFrame) -> None:
    slider = page.get_by_label("threshold", exact=True)
    slider.evaluate("s => { s.value = 0.8; s.dispatchEvent(new Event('input')) }")
    kept = table[table.confidence >= 0.8]
    panel = page.locator("div.threshold")
    left = len(table) - len(kept)
    share = 100 * len(kept) / len(table)
    assert f"answers {share:.1f} % of {len(table)} images and a person {left}" in panel.inner_text()
    assert f"{(~kept.correct).sum()} errors are left" in panel.inner_text()
    cost = ((~kept.correct).sum() + 0.1 * left) / len(table)
    assert f"Cost of an image {cost:.3g}" in panel.inner_text()
    interval = f"{100 * accuracy(kept.correct).low:.1f} % …"
    page.wait_for_function("text => document.querySelector('.answered').innerText.includes(text)", arg=interval)
    choose(page, "Rule", "cat")   # answered cat wherever its probability is at least 0.8
    cat = np.stack(table.probabilities)[:, CLASSES.index("cat")] >= 0.8
    hits = (table.label[cat] == "cat").sum()
    assert f"{cat.sum()} images are answered cat: precision {100 * hits / cat.sum():.1f} %" in panel.inner_text()


@pytest.mark.browser
def test_click_on_the_cost_plot_shows_the_images_below_the_threshold(page, table: pd.DataFrame) -> None:
    plot = page.locator(".threshold svg")
    plot.click(position=dict(x=(36 + 0.7 * 552) / 600 * plot.bounding_box()["width"], y=30))
    assert agrees(page, table[table.confidence <= 0.7])
    left = table[table.confidence >= 0.7]
    text = page.inner_text(".threshold")
    assert f"a person {len(table) - len(left)}; {int((~left.correct).sum())} errors are left" in text


@pytest.mark.browser
def test_address_holds_the_state(page, served: Served, table: pd.DataFrame) -> None:
    choose(page, "True class", CLASSES[0])
    page.get_by_label("lowest confidence").fill("50")
    page.keyboard.press("Enter")
    rows = table[~table.correct & (table.label == CLASSES[0]) & (table.confidence >= 0.5)]
    assert agrees(page, rows)
    page.locator(".tile").first.click()
    page.wait_for_selector(".large img")
    fragment = page.url.split("#")[1]
    page.goto("about:blank")
    page.goto(f"{served.url}#{fragment}")   # with the token, as to a colleague
    page.wait_for_selector(".large img", timeout=SECONDS)
    assert agrees(page, rows) and page.get_by_role("dialog").get_attribute("aria-label") == rows.path.iloc[0]
    page.goto(f"{page.url.split('#')[0]}#label=%3Cb%3E&low=nonsense&show=maybe&open=../../etc/passwd")
    page.reload()   # values that are not known are left out
    page.wait_for_selector(".tile", timeout=SECONDS)
    assert agrees(page, table[~table.correct])


@pytest.mark.browser
def test_export_holds_the_selection(page, table: pd.DataFrame, tmp_path: Path) -> None:
    choose(page, "True class", CLASSES[0])
    rows = table[~table.correct & (table.label == CLASSES[0])]
    assert agrees(page, rows)
    with page.expect_download() as download: page.get_by_role("button", name="Export CSV").click()
    download.value.save_as(tmp_path/"all.csv")
    found = pd.read_csv(tmp_path/"all.csv", keep_default_na=False)
    for name in "path", "split", "label", "predicted", "correct": assert found[name].tolist() == rows[name].tolist()
    assert np.allclose(found.confidence, rows.confidence) and found.camera.tolist() == rows.meta_camera.tolist()
    page.locator(".tile").nth(1).hover()
    page.locator(".tile .check").nth(1).click()
    with page.expect_download() as download: page.keyboard.press("e")
    download.value.save_as(tmp_path/"one.csv")
    assert pd.read_csv(tmp_path/"one.csv").path.tolist() == [rows.path.iloc[1]]


@pytest.mark.browser
def test_marked_label_error_is_a_correction_that_the_audit_applies(page, run: Path, table: pd.DataFrame) -> None:
    row = table[~table.correct].iloc[0]
    page.wait_for_selector(".tile")
    page.keyboard.press("Enter")
    page.get_by_role("button", name="Mark as label error", exact=True).click()
    page.wait_for_selector(".badge", state="attached")
    assert "audit.corrections=corrections/data.csv" in page.locator(".said").inner_text()
    corrections = read_corrections(run.parent/"corrections/data.csv")
    found = corrections[["path", "was", "action", "label"]].values.tolist()
    assert found == [[row.path, row.label, "relabel", row.predicted]]
    manifest = pd.read_parquet(run/"audit/manifest.parquet")
    changed, states = apply_corrections(manifest, corrections)
    assert states.state.tolist() == ["applied"] and changed.set_index("path").label[row.path] == row.predicted
    page.reload()
    page.wait_for_selector(".badge", state="attached", timeout=SECONDS)   # it stands in the file
    page.get_by_role("button", name="Take back").click()
    page.wait_for_selector(".badge", state="detached")
    assert read_corrections(run.parent/"corrections/data.csv").empty


@pytest.mark.browser
def test_page_is_dark_where_the_system_is_and_turns(page) -> None:
    ground = lambda: page.locator(".cvnb").evaluate("e => getComputedStyle(e).backgroundColor")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert dark != light
    page.locator("button.theme").click()
    assert ground() == light and "theme=light" in page.url


def test_page_notices_a_stage_that_ran_again(tmp_path: Path) -> None:
    from cvnb.evaluate.dashboard import ErrorPage
    run = make_run(tmp_path)
    board = ErrorPage(read_dashboard_data(run))   # as a kernel that was started in advance
    before = board.page["summary"]["test"]
    make_predictions_again(run, wrong=0.9)
    board.receive(dict(kind="hello"), [])
    assert board.page["summary"]["test"] != before


def test_predictions_of_other_images_are_refused(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    make_predictions_again(run, 0.4, lambda table: table.assign(path="other/" + table.path))
    with pytest.raises(CvnbError, match="200 of 200 predictions .* does not list"): read_dashboard_data(run)
    make_predictions_again(run, 0.4, lambda table: table.assign(predicted="bird"))
    with pytest.raises(CvnbError, match="name 'bird', which is none of its classes"): read_dashboard_data(run)


def make_predictions_again(run: Path, wrong: float, change: Callable = lambda table: table) -> None:
    "Write other predictions, as another training would."
    train = Stage("train", run)
    manifest = pd.read_parquet(run/"audit/manifest.parquet")
    write_table(train.path("predictions.parquet"), change(make_predictions(manifest, np.random.default_rng(1), wrong)))
    for name in "model.json", "metrics.json": train.path(name)
    train.finish()


@pytest.mark.browser
def test_page_names_missing_stage(playwright_page, tmp_path: Path) -> None:
    Stage("audit", tmp_path/"half").finish()
    port = find_free_port()
    env = os.environ | dict(CVNB_RUN=str(tmp_path/"half"))
    with _run_voila(asset_folder("dashboards")/"errors.ipynb", port, "token", env):
        playwright_page.goto(f"http://127.0.0.1:{port}/?token=token")
        notice = playwright_page.wait_for_selector(".notice", timeout=SECONDS).inner_text()
    assert "run half has no finished train stage" in notice and "cvnb run errors --run" in notice


# Access


def request(url: str, method: str = "GET", **headers: str) -> tuple[int, list[str], str]:
    "Send a request without following redirects: code, cookies, text."
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.netloc, timeout=60)
    connection.request(method, f"{parts.path}?{parts.query}".rstrip("?"), headers=headers)
    answer = connection.getresponse()
    return answer.status, answer.headers.get_all("Set-Cookie", []), answer.read().decode(errors="replace")


def log_in(url: str, **headers: str) -> str:
    "Exchange the address with the token for cookies."
    return "; ".join(cookie.split(";")[0] for cookie in request(url, **headers)[1])


def get_status(url: str) -> tuple[int, str]:   # code, address after redirects
    "Request an address."
    try:
        with urllib.request.urlopen(url) as answer: return answer.status, answer.url
    except urllib.error.HTTPError as e: return e.code, e.url


def test_server_requires_token_and_serves_one_notebook(served: Served) -> None:
    base, token = served.url.split("?")
    assert "/login" in get_status(base)[1]
    assert "/login" in get_status(f"{base}?token=wrong")[1]
    for other in "voila/files/errors.ipynb", "voila/render/errors.ipynb", "errors.ipynb", "voila/files/../settings.ini":
        assert get_status(f"{base}{other}?{token}")[0] in (403, 404), other


KERNEL = "01234567-89ab-cdef-0123-456789abcdef"
WEBSOCKET = {"Connection": "Upgrade", "Upgrade": "websocket", "Sec-WebSocket-Key": "AAAAAAAAAAAAAAAAAAAAAA==",
             "Sec-WebSocket-Version": "13"}


@pytest.mark.parametrize("path", ["", "login", "voila/static/voila.js", "nothing", f"api/kernels/{KERNEL}",
                                  f"api/kernels/{KERNEL}/channels"])
def test_server_refuses_forged_host_and_foreign_pages(path: str, served: Served) -> None:
    base = served.url.split("?")[0]
    port = urlsplit(base).port
    upgrade = WEBSOCKET if path.endswith("channels") else {}
    for forged in (dict(Host=f"evil.example:{port}"), dict(Host="evil.example"), dict(Host=f"127.0.0.1.evil:{port}"),
                   dict(Origin="http://127.0.0.1:1"), dict(Origin="https://evil.example"), dict(Origin="null")):
        status, _, text = request(base + path, Cookie=log_in(served.url), **upgrade, **forged)
        assert status == 403 and "127.0.0.1, localhost and [::1] only" in text, forged
    if not path: return   # the page would start a kernel
    tunnel = dict(Host="localhost:1", Origin="http://localhost:1")   # an SSH tunnel leads from any port
    assert request(base + path, Cookie=log_in(served.url, **tunnel), **upgrade, **tunnel)[0] in (200, 302, 404)


def test_cookie_is_strict_and_changes_need_the_xsrf_token(served: Served) -> None:
    status, cookies, text = request(served.url)
    assert status == 200 and "url=/" in text and "token" not in text   # the page starts its kernel without the token
    assert len(cookies) == 2 and all("samesite=strict" in cookie.lower() for cookie in cookies)
    [login] = [cookie for cookie in cookies if "httponly" in cookie.lower()]
    [xsrf] = {*cookies} - {login}   # the page has to read this one
    end_kernel = f"{served.url.split('?')[0]}voila/api/shutdown/{KERNEL}"
    login, xsrf = login.split(";")[0], xsrf.split(";")[0]
    assert request(end_kernel, "POST", Cookie=login)[0] == 403
    assert request(end_kernel, "POST", Cookie=f"{login}; {xsrf}", **{"X-XSRFToken": xsrf.split("=")[1]})[0] == 404


def test_server_listens_on_loopback_only(served: Served) -> None:
    voila = psutil.Process(served.process.pid).children(recursive=True)
    listening = {c.laddr.ip for p in voila for c in p.net_connections("tcp") if c.status == psutil.CONN_LISTEN}
    assert listening == {"127.0.0.1"}


def test_token_stands_in_no_command_line_and_no_environment(served: Served) -> None:
    token = served.url.split("token=")[1]
    assert request(served.url.split("?")[0], Cookie=log_in(served.url))[0] == 200   # starts a kernel
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert any("ipykernel" in " ".join(p.cmdline()) for p in family) and served.browser in family
    with_token = [file for p in family for file in ("cmdline", "environ")
                  if token in Path(f"/proc/{p.pid}/{file}").read_bytes().decode(errors="replace")]
    assert with_token == []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError): assert token.encode() not in file.read_bytes()   # a process may have ended


@pytest.mark.browser
def test_closed_page_ends_its_kernel_at_once(served: Served, playwright_page) -> None:
    children = lambda: [p for p in psutil.Process(served.process.pid).children(recursive=True) if p != served.browser]
    before = children()
    playwright_page.goto(served.url)
    playwright_page.wait_for_selector(".cvnb .matrix svg", timeout=SECONDS)
    wait_until(lambda: len(children()) > len(before))   # the page took a kernel, and the next one has started
    time.sleep(2)
    n = len(children())
    playwright_page.goto("about:blank")   # `beforeunload` posts with the XSRF token
    wait_until(lambda: len(children()) == n - 1)


@pytest.mark.browser
def test_redirect_file_is_private_and_leads_to_the_page(served: Served, playwright_page) -> None:
    file = Path(served.opened.removeprefix("file://"))
    assert [oct(p.stat().st_mode & 0o777) for p in (file, file.parent)] == ["0o600", "0o700"]
    playwright_page.goto(served.opened)
    playwright_page.wait_for_selector(".cvnb .matrix svg", timeout=SECONDS)   # a strict cookie came along
    base, token = served.url.split("?token=")
    assert playwright_page.url == base and token not in playwright_page.content()
    cookies = {c["name"]: c for c in playwright_page.context.cookies()}
    assert {c["sameSite"] for c in cookies.values()} == {"Strict"}
    assert [name for name, c in cookies.items() if not c["httpOnly"]] == ["_xsrf"]   # the page has to read that one


def test_browser_in_the_foreground_neither_blocks_nor_ends_the_server(served: Served) -> None:
    assert served.browser.is_running() and get_status(served.url)[0] == 200
    served.browser.kill()
    psutil.wait_procs([served.browser], timeout=10)
    time.sleep(0.5)
    assert get_status(served.url)[0] == 200 and served.process.poll() is None


@pytest.fixture
def plain_notebook(tmp_path: Path) -> Path:
    "A notebook whose kernel starts quickly."
    notebook = tmp_path/"plain.ipynb"
    kernel = dict(display_name="python3", language="python", name="python3")
    cells = [dict(cell_type="code", source="1 + 1", metadata={}, execution_count=None, outputs=[], id="a")]
    write_json(notebook, dict(cells=cells, metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5))
    return notebook


@pytest.mark.long
def test_kernel_without_a_page_ends_and_an_open_page_keeps_its_kernel(
    plain_notebook: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    from websockets.sync.client import connect
    monkeypatch.setattr(voila_server, "IDLE_SECONDS", 20)   # a kernel has to start within this time
    port = find_free_port()
    page = f"http://127.0.0.1:{port}/"
    config = voila_config
    monkeypatch.setattr(voila_server, "voila_config", lambda *given: config(*given) | dict(VoilaConfiguration={}))
    with _run_voila(plain_notebook, port, "token", dict(os.environ)) as voila:
        cookie = log_in(f"{page}?token=token")
        children = psutil.Process(voila.pid).children
        kernel_id = re.search(r'"kernelId": "([0-9a-f-]{36})"', request(page, Cookie=cookie)[2])[1]
        [kept] = children()
        with connect(f"ws{page.removeprefix('http')}api/kernels/{kernel_id}/channels",
                     additional_headers=dict(Cookie=cookie)):   # an open page, which nobody touches
            request(page, Cookie=cookie)   # a page that never connects; its kernel is the younger one
            assert len(children()) == 2
            wait_until(lambda: len(children()) < 2)
            time.sleep(2)
            assert children() == [kept] and kept.status() != psutil.STATUS_ZOMBIE
        wait_until(lambda: not children())   # the page was closed


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    "Wait until a condition holds."
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=["Ctrl-C", "kill", "kill -9"])
def test_signals_end_server_and_kernels(run: Path, number: signal.Signals) -> None:
    server = serve(run)
    children = psutil.Process(server.process.pid).children(recursive=True)
    server.process.send_signal(number)
    assert server.process.wait(60) == (-number if number == signal.SIGKILL else 0) and children
    assert left_after(children) == []


@pytest.mark.parametrize("stage, message", [("", "is not a run directory"), ("audit", "has no finished train stage")])
def test_serve_refuses_unfinished_run(stage: str, message: str, tmp_path: Path) -> None:
    if stage: Stage(stage, tmp_path).finish()
    with pytest.raises(CvnbError, match=message) as caught: serve_dashboard(tmp_path, open_browser=False)
    assert "cvnb run" in caught.value.remedy


@pytest.mark.long
@pytest.mark.browser
def test_same_notebook_runs_in_jupyterlab(run: Path, table: pd.DataFrame, playwright_page, tmp_path: Path) -> None:
    notebook = tmp_path/"errors.ipynb"
    notebook.write_bytes((asset_folder("dashboards")/"errors.ipynb").read_bytes())
    port = find_free_port()
    options = [f"--ServerApp.port={port}", "--IdentityProvider.token=token", f"--ServerApp.root_dir={tmp_path}",
               "--no-browser", "--allow-root", "--ServerApp.port_retries=0"]
    env = os.environ | dict(CVNB_RUN=str(run), JUPYTER_CONFIG_DIR=str(tmp_path), JUPYTERLAB_SETTINGS_DIR=str(tmp_path))
    lab = subprocess.Popen([sys.executable, "-m", "jupyterlab", *options], env=env, cwd=tmp_path,
                           stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    page = playwright_page
    try:
        def answers() -> bool:
            with contextlib.suppress(OSError): return get_status(f"http://127.0.0.1:{port}/api")[0] == 200
            return False

        wait_until(answers, 120)
        page.goto(f"http://127.0.0.1:{port}/lab/tree/errors.ipynb?token=token")
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").first.click(timeout=2 * SECONDS)
        page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]', state="attached", timeout=SECONDS)
        page.keyboard.press("Shift+Enter")
        page.wait_for_selector(".cvnb .tile img", timeout=2 * SECONDS)
        assert "false" not in page.locator(".cvnb").inner_text()
        assert agrees(page, table[~table.correct])
        address = page.url
        page.locator(".cvnb .tile").first.click()
        page.keyboard.press("ArrowRight")   # moves in the page, not in the notebook
        wrong = table[~table.correct]
        page.wait_for_function("path => document.querySelector('.cvnb [role=dialog]')?.ariaLabel == path",
                               arg=wrong.path.iloc[1])
        assert page.url == address   # it belongs to the Lab
    finally:
        lab.terminate()
        lab.wait(60)
