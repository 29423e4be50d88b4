"""FiftyOne's App on an audit, in Chromium: it agrees with the manifest, and a reviewer's edits become corrections."""
from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote, urlsplit

import numpy as np
import pandas as pd
import psutil
import pytest

from cvnb.audit.checks import make_findings
from cvnb.audit.duplicates import mark_duplicates
from cvnb.audit.fiftyone_dataset import _make_sample, dataset_name, load_dataset, write_dataset
from cvnb.audit.review import (
    TokenMiddleware,
    accept_corrections,
    apply_corrections,
    bind_port,
    read_corrections,
    serve_app,
    write_corrections,
)
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.data.dataset import locate_data, scan_dataset
from cvnb.data.fiftyone_db import import_fiftyone
from cvnb.data.images import inspect_images
from cvnb.data.splits import assign_splits
from cvnb.data.tables import write_table

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")   # of FiftyOne
CVNB = Path(sys.executable).with_name("cvnb")
TIMEOUT_MS = 60_000   # on a loaded machine


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Path]:
    "A run whose audit has finished, on sixty digits with nine suspects, and its FiftyOne dataset."
    folder, before = tmp_path_factory.mktemp("review"), dict(os.environ)
    for label in "17":
        (folder/"digits"/label).mkdir(parents=True)
        for path in sorted((locate_data("digits")/label).iterdir())[:30]: shutil.copy(path, folder/"digits"/label)
    table = mark_duplicates(assign_splits(inspect_images(folder/"digits", scan_dataset(folder/"digits"))))
    tags = [["label_error"] if i % 7 == 0 else [] for i in range(60)]
    manifest = table.assign(label_score=np.nan, suggested="", near_duplicate_of="", tags=tags)
    stage = Stage("audit", folder/"runs/first")
    write_table(stage.path("manifest.parquet"), manifest)
    data = str(folder/"digits")
    write_json(stage.path("audit.json"), dict(data=data, root=data, classes=["1", "7"]))
    stage.finish()
    write_json(stage.run/"run.json", dict(run="first"))
    suspects = make_findings(manifest.path[::7], [1.0] * 9, ["like the other class"] * 9).assign(check="label_error")
    write_dataset(stage.run, folder/"digits", manifest, np.random.default_rng(0).normal(size=(60, 4)), suspects)
    os.environ.clear()   # other tests start databases of their own
    os.environ.update(before)
    yield stage.run
    import_fiftyone().delete_dataset(dataset_name(stage.run))


@pytest.fixture(scope="module")
def served(run: Path, tmp_path_factory) -> Iterator[tuple[str, str, subprocess.Popen]]:
    "The App in a process: its first line, its address, the process. Afterwards Ctrl-C ends it without a message."
    tmp_path = tmp_path_factory.mktemp("browser")
    browser, pipe = tmp_path/"browser", subprocess.PIPE
    browser.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 600 > /dev/null 2>&1\n")
    browser.chmod(0o700)   # it stays in the foreground, and the App has to answer all the same
    process = subprocess.Popen([CVNB, "browse", run], stdout=pipe, stderr=pipe, text=True,
                               env=os.environ | dict(BROWSER=f"{browser} %s"))
    lines = [process.stdout.readline() for _ in range(3)]
    yield lines[0], re.search(r"http://\S+", lines[1])[0], process
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    os.kill(int((tmp_path/"pid").read_text()), signal.SIGKILL)
    assert process.returncode == 0 and not out and not err, err


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=60) as answer: return answer.status
    except urllib.error.HTTPError as e: return e.code


def sign_in(address: str) -> Callable[..., tuple[int, bytes]]:
    "Open the App's address, and return a function that sends requests with its cookie."
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    opener.open(address, timeout=60).close()

    def ask(path: str, data: object = None, method: str = "", kind: str = "json", **headers) -> tuple[int, bytes]:
        body = None if data is None else json.dumps(data).encode()
        url = "{0.scheme}://{0.netloc}".format(urlsplit(address)) + path
        headers["Content-Type"] = f"application/{kind}"
        request = urllib.request.Request(url, body, headers, method=method or None)
        try:
            with opener.open(request, timeout=60) as answer: return answer.status, answer.read()
        except urllib.error.HTTPError as e: return e.code, e.read()
    return ask


def test_app_serves_the_images_that_the_audit_has_read_and_no_other_file(run, served, tmp_path):
    ask = sign_in(served[1])
    media = lambda path: ask(f"/media?filepath={quote(str(path))}")
    folder = run.parent.parent/"digits"
    first, second = sorted((folder/"7").iterdir())[:2]
    assert media(first) == (200, first.read_bytes())
    (folder/"7/link.png").symlink_to("/etc/passwd")
    for other in "/etc/passwd", run/"run.json", folder/"7/../../runs/first/run.json", folder/"7/link.png", folder/"7":
        code, reason = media(other)
        assert code == 403 and b"no image of the data set" in reason, other
    (folder/"7/link.png").unlink()
    second.rename(tmp_path/"kept")
    second.symlink_to("/etc/passwd")   # in place of an image that the audit has read
    code, reason = media(second)
    (tmp_path/"kept").replace(second)
    assert code == 403 and b"has changed since the audit" in reason and media(second)[0] == 200


def test_app_runs_no_code_that_a_request_names(run, served, tmp_path):
    ask, name, mark = sign_in(served[1]), dataset_name(run), tmp_path/"mark"
    touch = dict(_cls="subprocess.Popen", kwargs=[["args", ["touch", str(mark)]]])
    asked = "query($d: String!, $v: BSONArray!) { samples(dataset: $d, view: $v) { __typename } }"
    variables = dict(d=name, v=[touch])
    answers = [ask("/values", dict(dataset=name, path="split", view=[touch])),
               ask("/values", dict(dataset=name, path="split", extended={"subprocess.Popen": dict(touch["kwargs"])})),
               ask("/aggregate", dict(dataset=name, filters={}, aggregations=[touch])),
               ask("/graphql", dict(query=asked, variables=variables))]
    reads = dict(_cls="fiftyone.core.stages.Mongo", kwargs=[["pipeline", [{"$out": "elsewhere"}]]])
    answers.append(ask("/values", dict(dataset=name, path="split", view=[reads])))
    time.sleep(0.5)   # for a process that was started to end
    assert not mark.exists() and all(b"is closed: the review does not need it" in text for _, text in answers), answers
    assert ask("/values", dict(dataset=name, path="split", view=[]))[0] == 200

    files = dict(operator_uri="@voxel51/operators/list_files", dataset_name=name, params=dict(path="/etc"))
    assert ask("/operators/execute", files)[0] == 403
    views = dict(operator_uri="@voxel51/operators/list_saved_views", dataset_name=name, params={})
    code, text = ask("/operators/execute", views)
    assert code == 200 and b"my corrections" in text
    dataset = load_dataset(run)
    sample = f"/dataset/{dataset._doc.id}/sample/{dataset.first().id}"
    to_secret = [dict(op="replace", path="/filepath", value="/etc/passwd")]
    changed = ask(sample, to_secret, "PATCH", "json-patch+json", **{"If-Match": "0"})
    assert changed[0] == 403 and b"filepath: the review changes ground_truth and tags alone" in changed[1]
    for path in f"{sample}/commit-mask", "/screenshot/x.html?proxy=", "/plugins/x/index.js", "/event":
        assert ask(path, {}, "POST") == (403, f"{path.split('?')[0]} is closed: the review does not need it.".encode())


def ask_middleware(query: str = "", kind: str = "http", **headers: str) -> list[dict]:
    "Send a request through the middleware, whose application answers with code 200: all messages of the answer."
    async def app(scope: dict, receive, send) -> None:
        await send({"type": f"{kind}.response.start", "status": 200, "headers": []})

    async def send(message: dict) -> None: sent.append(message)

    sent: list[dict] = []
    given = dict(host="127.0.0.1:5151") | headers
    scope = dict(type=kind, path="/datasets/a", query_string=query.encode(), scheme="http", extensions={},
                 headers=[(k.encode(), v.encode()) for k, v in given.items()], method="GET", server=("127.0.0.1", 5151))
    asyncio.run(TokenMiddleware(app, "token", 5151)(scope, None, send))
    return sent


@pytest.mark.parametrize("kind", ["http", "websocket"])
@pytest.mark.parametrize("forged", [dict(host="evil.example:5151"), dict(host=""), dict(origin="http://127.0.0.1:1")])
def test_app_refuses_forged_host_and_foreign_pages(forged: dict[str, str], kind: str) -> None:
    assert ask_middleware(cookie="cvnb-5151=token")[0]["status"] == 200
    answer = ask_middleware("token=token", kind, cookie="cvnb-5151=token", **forged)
    assert answer[0].get("status", answer[0].get("code")) != 200
    assert "websocket" in answer[0]["type"] or answer[0]["status"] == 403


def test_app_exchanges_the_token_for_a_strict_cookie() -> None:
    start, body = ask_middleware("view=mine&token=token")
    cookie = next(value.decode().lower() for name, value in start["headers"] if name == b"set-cookie")
    assert start["status"] == 200 and {"httponly", "samesite=strict"} <= {*cookie.split("; ")}
    assert b'url=/datasets/a?view=mine"' in body["body"] and b"token" not in body["body"]


def read_labels(page, n: int) -> list[str]:
    "Read the labels of the images in the App's grid, once it has drawn `n` of them."
    drawn = "n => [...document.querySelectorAll('[data-cy=looker]')].filter(e => e.innerText.trim()).length == n"
    page.wait_for_function(drawn, arg=n, timeout=TIMEOUT_MS)
    return [text.strip() for text in page.locator("[data-cy=looker]").all_inner_texts()]


def test_app_gets_no_user_id(served):
    address = served[1]
    opener = urllib.request.build_opener(urllib.request.HTTPCookieProcessor())
    opener.open(address, timeout=60).close()
    asked = urllib.request.Request(address.split("/datasets")[0] + "/graphql", b'{"query": "{ uid doNotTrack }"}',
                                   {"Content-Type": "application/json"})
    assert json.loads(opener.open(asked, timeout=60).read()) == {"data": {"uid": "", "doNotTrack": True}}


@pytest.mark.browser
def test_reviewer_corrects_images_in_the_app(run, served, playwright_page, tmp_path, monkeypatch):
    printed, address, process = served
    manifest = pd.read_parquet(run/"audit/manifest.parquet")
    suspects = manifest[manifest.tags.map(len) > 0]
    assert printed == f"60 images. label error {len(suspects)} · my corrections 0\n"
    base, token = address.split("?token=")
    from_elsewhere = base.split("/datasets")[0] + f"/media?filepath={run/'run.json'}"
    assert status(base) == status(f"{base}?token=wrong") == status(from_elsewhere) == 403
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    assert len(family) > 1 and not any(token in " ".join(p.cmdline()) for p in family)
    connections = psutil.Process(process.pid).net_connections("tcp")
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}

    page, responses, failed = playwright_page, [], []
    page.on("response", lambda r: responses.append(r.url))
    page.on("requestfailed", lambda r: failed.append(r.url))
    began = time.perf_counter()
    page.goto(f"{base}?view=label-error&token={token}")
    shown = read_labels(page, len(suspects))
    assert sorted(shown) == sorted(suspects.label) and token not in page.url
    print(f"App drawn after {time.perf_counter() - began:.1f} s")
    page.get_by_text(f"{len(suspects)} samples").wait_for(timeout=TIMEOUT_MS)
    page.screenshot(path=tmp_path/"app.png")

    page.get_by_text("Dismiss", exact=True).click()
    page.locator("[data-cy=looker]").nth(1).hover()
    page.locator("[data-cy=looker-checkbox-input-]").nth(1).dispatch_event("click")
    page.locator("[data-cy=action-tag-sample-labels]").click()
    page.locator("[data-cy=sample-tag-input]").fill("drop")
    page.keyboard.press("Enter")
    with page.expect_response(lambda r: r.url.endswith("/tag"), timeout=TIMEOUT_MS) as tagged:
        page.get_by_text("Apply", exact=True).click()
    assert tagged.value.ok
    page.keyboard.press("Escape")

    page.locator("[data-cy=looker]").nth(3).click()
    page.get_by_text("Annotate", exact=True).first.click()
    page.locator("[data-cy^=annotate-label-]").click()
    other = "7" if shown[3] == "1" else "1"
    with page.expect_response(lambda r: r.request.method == "PATCH", timeout=TIMEOUT_MS) as patched:
        page.get_by_role("radio", name=other, exact=True).check()
    assert patched.value.ok
    page.screenshot(path=tmp_path/"annotated.png")
    here = base.split("/datasets")[0]
    assert all(url.startswith((here, "data:", "blob:")) for url in responses)
    blocked = {urlsplit(url).hostname for url in failed if not url.startswith(here)}
    assert blocked <= {"fonts.googleapis.com"}   # by the page's content security policy

    monkeypatch.chdir(tmp_path)
    done = subprocess.run([CVNB, "audit", "accept", run], capture_output=True, text=True)
    assert done.returncode == 0 and "2 of 2 are new." in done.stdout, done.stderr
    rows = read_corrections(tmp_path/"corrections/digits.csv").set_index("action")
    assert sorted(rows.index) == ["drop", "relabel"]
    assert rows.label["relabel"] == other and rows.was["relabel"] == shown[3]
    inspected = inspect_images(run.parent.parent/"digits", scan_dataset(run.parent.parent/"digits"))
    table, applied = apply_corrections(inspected, rows.reset_index())
    assert (applied.state == "applied").all()
    assert table.label.value_counts()[other] == 31 and table.excluded.sum() == 1
    assert not done.stderr
    user_run = dict(FIFTYONE_DATABASE_URI=import_fiftyone().config.database_uri.partition("?")[0])
    again = subprocess.run([CVNB, "audit", "accept", run], capture_output=True, text=True, env=os.environ | user_run)
    assert again.returncode == 0 and "0 of 2 are new, nothing was written." in again.stdout
    assert "asks for no password: whoever reaches it can change the labels" in again.stderr


def error_line(*args: object) -> tuple[int, str]:
    done = subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True)
    assert len(done.stderr.splitlines()) == 1 and not done.stdout, done.stderr
    return done.returncode, done.stderr


def test_app_is_refused_without_audit_port_dataset_or_view(run, tmp_path, monkeypatch):
    (tmp_path/"new").mkdir()
    write_json(tmp_path/"new/run.json", {})
    code, message = error_line("browse", tmp_path/"new")
    assert code == 1 and "run new has no finished audit" in message and "cvnb run audit --run" in message
    code, message = error_line("audit", "accept", tmp_path/"new")
    assert code == 1 and "run new has no finished audit" in message
    with bind_port() as taken:
        code, message = error_line("browse", run, "--port", taken.getsockname()[1])
        assert code == 1 and "cannot be used (Address already in use)" in message and "--port 0" in message
    monkeypatch.delenv("FIFTYONE_SERVER", raising=False)
    copy = shutil.copytree(run, tmp_path/"copy")   # elsewhere, and so without a dataset
    with pytest.raises(CvnbError, match="FiftyOne has no dataset 'copy-") as missing: serve_app(copy)
    assert "cvnb run audit --run" in missing.value.remedy and missing.value.exit_code == 1
    with pytest.raises(UsageError, match="no view 'label eror'. Did you mean 'label error'?"):
        serve_app(run, view="label eror")


def test_dataset_under_a_temporary_name_is_recovered_after_a_kill(run):
    name, no_process = dataset_name(run), 2**22 + 1   # more than any process number
    for temporary in f"{name}-old", f"{name}-new-{no_process}":
        load_dataset(run).name = temporary
        assert len(load_dataset(run)) == 60 and load_dataset(run).name == name
    incomplete = load_dataset(run).clone(f"{name}-new-{no_process}")
    assert not incomplete.persistent and len(load_dataset(run)) == 60
    assert not [n for n in import_fiftyone().list_datasets() if n.startswith(f"{name}-new-")]


def test_edits_are_stale_when_the_pixels_have_changed(run, tmp_path):
    write_corrections(tmp_path/"c.csv", read_corrections(""))
    dataset = load_dataset(run)
    sample = dataset.last()
    label, sample.ground_truth.label = sample.given, "1"
    sample.save()
    shown = lambda pixels: dataset._sample_collection.update_one(
        dict(path=sample.path), {"$set": dict(pixel_sha256=pixels)})   # the field is read-only in FiftyOne
    shown("0" * 64)
    with pytest.raises(UsageError, match="c.png is named otherwise. Give --out FILE.csv"):
        accept_corrections(run, tmp_path/"c.png")
    _, accepted = accept_corrections(run, tmp_path/"c.csv")
    assert accepted.set_index("path").state[sample.path] == "stale"
    assert sample.path not in set(read_corrections(tmp_path/"c.csv").path)
    shown(sample.pixel_sha256)
    sample.ground_truth.label = label
    sample.save()


@pytest.mark.parametrize("name", ["photo", "photo.jfif", "photo.dat"])
def test_image_of_any_ending_is_an_image_for_fiftyone(name, tmp_path):
    fiftyone = import_fiftyone()
    row = SimpleNamespace(path=name, suggested="", split="train", tags=[], label="a", pixel_sha256="0", duplicate_of="",
                          near_duplicate_of="", width=8, height=8, brightness=1.0, contrast=1.0)
    assert _make_sample(fiftyone, tmp_path, row, {}).media_type == "image"
