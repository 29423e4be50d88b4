"""FiftyOne's App on an audit, in Chromium: what it shows has to agree with the manifest, and what a person corrects there comes back."""
from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pandas as pd
import psutil
import pytest

from cvnb.audit.fiftyone_dataset import dataset_name, load_dataset, write_dataset
from cvnb.audit.checks import findings
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.data.tables import locate, scan, write_table
from cvnb.data.splits import assign_splits
from cvnb.data.fiftyone_db import fiftyone
from cvnb.audit.duplicates import mark_duplicates
from cvnb.data.images import inspect
from cvnb.audit.review import accept, apply_corrections, browse, listen, read_corrections, write_corrections

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")   # FiftyOne's own
CVNB = Path(sys.executable).with_name("cvnb")
SECONDS = 60_000   # what a loaded machine may take, in ms


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    "A run whose audit has finished, on sixty digits with nine suspects, and its FiftyOne dataset."
    folder, before = tmp_path_factory.mktemp("review"), dict(os.environ)
    for label in "17":
        (folder/"digits"/label).mkdir(parents=True)
        for path in sorted((locate("digits")/label).iterdir())[:30]: shutil.copy(path, folder/"digits"/label)
    table = mark_duplicates(assign_splits(inspect(folder/"digits", scan(folder/"digits"))))
    manifest = table.assign(label_score=np.nan, suggested="", near_duplicate_of="", tags=[["label_error"] * (i % 7 == 0) for i in range(60)])
    stage = Stage("audit", folder/"runs/first")
    write_table(stage.path("manifest.parquet"), manifest)
    write_json(stage.path("audit.json"), dict(data=str(folder/"digits"), root=str(folder/"digits"), classes=["1", "7"]))
    stage.finish()
    write_json(stage.run/"run.json", dict(run="first"))
    suspects = findings(manifest.path[::7], [1.0] * 9, ["like the other class"] * 9).assign(check="label_error")
    write_dataset(stage.run, folder/"digits", manifest, np.random.default_rng(0).normal(size=(60, 4)), suspects)
    os.environ.clear(); os.environ.update(before)   # other tests start databases of their own
    yield stage.run
    fiftyone().delete_dataset(dataset_name(stage.run))


@pytest.fixture
def served(run: Path) -> Iterator[tuple[str, str, subprocess.Popen]]:
    "The App in a process of its own: what it printed, its address, the process; afterwards it ends on Ctrl-C without a word."
    process = subprocess.Popen([CVNB, "browse", run, "--no-open"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    said = [process.stdout.readline() for _ in range(3)]
    yield said[0], re.search(r"http://\S+", said[1])[0], process
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0 and not out and not err, err


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer: return answer.status
    except urllib.error.HTTPError as e: return e.code


def labels(page, n: int) -> list[str]:
    "Read the labels of the images in the App's grid, once it has drawn `n` of them."
    drawn = "n => [...document.querySelectorAll('[data-cy=looker]')].filter(e => e.innerText.trim()).length == n"
    page.wait_for_function(drawn, arg=n, timeout=SECONDS)
    return [text.strip() for text in page.locator("[data-cy=looker]").all_inner_texts()]


@pytest.mark.browser
def test_a_person_corrects_images_in_the_app(run, served, playwright_page, tmp_path, monkeypatch):
    printed, address, process = served
    manifest = pd.read_parquet(run/"audit/manifest.parquet")
    suspects = manifest[manifest.tags.map(len) > 0]
    assert printed == f"60 images. label error {len(suspects)} · my corrections 0\n"
    base, token = address.split("?token=")
    from_elsewhere = base.split("/datasets")[0] + f"/media?filepath={run/'run.json'}"
    assert status(base) == status(f"{base}?token=wrong") == status(from_elsewhere) == 403
    assert {c.laddr.ip for c in psutil.Process(process.pid).net_connections("tcp") if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}

    page, answered_by, missed = playwright_page, [], []
    page.on("response", lambda r: answered_by.append(r.url))
    page.on("requestfailed", lambda r: missed.append(r.url))
    began = time.perf_counter()
    page.goto(f"{base}?view=label-error&token={token}")
    shown = labels(page, len(suspects))
    assert sorted(shown) == sorted(suspects.label) and token not in page.url
    print(f"App drawn after {time.perf_counter() - began:.1f} s")
    page.get_by_text(f"{len(suspects)} samples").wait_for(timeout=SECONDS)
    page.screenshot(path=tmp_path/"app.png")

    page.get_by_text("Dismiss", exact=True).click()
    page.locator("[data-cy=looker]").nth(1).hover()
    page.locator("[data-cy=looker-checkbox-input-]").nth(1).dispatch_event("click")
    page.locator("[data-cy=action-tag-sample-labels]").click()
    page.locator("[data-cy=sample-tag-input]").fill("drop")
    page.keyboard.press("Enter")
    with page.expect_response(lambda r: r.url.endswith("/tag"), timeout=SECONDS) as tagged: page.get_by_text("Apply", exact=True).click()
    assert tagged.value.ok
    page.keyboard.press("Escape")

    page.locator("[data-cy=looker]").nth(3).click()
    page.get_by_text("Annotate", exact=True).first.click()
    page.locator("[data-cy^=annotate-label-]").click()
    other = "7" if shown[3] == "1" else "1"
    with page.expect_response(lambda r: r.request.method == "PATCH", timeout=SECONDS) as patched:
        page.get_by_role("radio", name=other, exact=True).check()
    assert patched.value.ok
    page.screenshot(path=tmp_path/"annotated.png")
    here = base.split("/datasets")[0]
    assert all(url.startswith((here, "data:", "blob:")) for url in answered_by)
    assert {urlsplit(url).hostname for url in missed if not url.startswith(here)} <= {"fonts.googleapis.com"}   # refused by the page's policy

    monkeypatch.chdir(tmp_path)
    told = subprocess.run([CVNB, "audit", "accept", run], capture_output=True, text=True)
    assert told.returncode == 0 and "2 of 2 are new." in told.stdout, told.stderr
    rows = read_corrections(tmp_path/"corrections/digits.csv").set_index("action")
    assert sorted(rows.index) == ["drop", "relabel"] and rows.label["relabel"] == other and rows.was["relabel"] == shown[3]
    inspected = inspect(run.parent.parent/"digits", scan(run.parent.parent/"digits"))
    table, applied = apply_corrections(inspected, rows.reset_index())
    assert (applied.state == "applied").all() and table.label.value_counts()[other] == 31 and table.excluded.sum() == 1
    again = subprocess.run([CVNB, "audit", "accept", run], capture_output=True, text=True)
    assert again.returncode == 0 and "0 of 2 are new, nothing was written." in again.stdout


def one_line(*args: object) -> tuple[int, str]:
    done = subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
    return done.returncode, done.stderr


def test_what_cannot_be_browsed(run, tmp_path, monkeypatch):
    (tmp_path/"new").mkdir()
    write_json(tmp_path/"new/run.json", {})
    code, said = one_line("browse", tmp_path/"new")
    assert code == 1 and "run new has no finished audit" in said and "cvnb run audit --run" in said
    code, said = one_line("audit", "accept", tmp_path/"new")
    assert code == 1 and "run new has no finished audit" in said
    with listen() as taken:
        code, said = one_line("browse", run, "--port", taken.getsockname()[1])
        assert code == 1 and "cannot be used (Address already in use)" in said and "--port 0" in said
    monkeypatch.delenv("FIFTYONE_SERVER", raising=False)
    copy = shutil.copytree(run, tmp_path/"copy")   # elsewhere, and so without a dataset
    with pytest.raises(CvnbError, match="FiftyOne has no dataset 'copy-") as missing: browse(copy)
    assert "cvnb run audit --run" in missing.value.remedy and missing.value.exit_code == 1
    with pytest.raises(UsageError, match="no view 'label eror'. Did you mean 'label error'?"): browse(run, view="label eror")


def test_a_dataset_that_a_kill_left_under_another_name_is_found(run):
    name, nobody = dataset_name(run), 2**22 + 1   # more than any process number
    for left in f"{name}-old", f"{name}-new-{nobody}":
        load_dataset(run).name = left
        assert len(load_dataset(run)) == 60 and load_dataset(run).name == name
    half = load_dataset(run).clone(f"{name}-new-{nobody}")
    assert not half.persistent
    assert len(load_dataset(run)) == 60 and not any("-new-" in n for n in fiftyone().list_datasets() if n.startswith(name))


def test_edits_of_an_image_that_was_changed_meanwhile_are_stale(run, tmp_path):
    write_corrections(tmp_path/"c.csv", read_corrections(""))
    dataset, manifest = load_dataset(run), pd.read_parquet(run/"audit/manifest.parquet")
    before = manifest.copy()
    sample = dataset.last()
    label, sample.ground_truth.label = sample.given, "1"
    sample.save()
    manifest.loc[manifest.path == sample.path, "pixel_sha256"] = "0" * 64
    write_table(run/"audit/manifest.parquet", manifest)
    _, told = accept(run, tmp_path/"c.csv")
    assert told.set_index("path").state[sample.path] == "stale" and sample.path not in set(read_corrections(tmp_path/"c.csv").path)
    write_table(run/"audit/manifest.parquet", before)
    sample.ground_truth.label = label
    sample.save()
