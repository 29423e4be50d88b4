"""The request log of a running service: what it holds, and what it costs when it cannot be written."""
from __future__ import annotations

import gzip
import json
import os
import resource
import signal
import stat
import tempfile
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from servers import cvnb, encode, serving, write_served_bundle

from cvnb.serve.request_log import RequestLog, read_request_log


def test_log_holds_what_was_answered(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path/"requests"
    with serving(tmp_path/"log", served_bundle, "--log", folder) as server:
        answer = server.ask("/predict", encode(photo), X_Request_Id="first").json
        raw = dict(name="images", datatype="UINT8", shape=[2, 20, 30, 3], data=[200] * 3600)
        server.infer(dict(inputs=[raw]), X_Request_Id="second")
        server.ask("/predict", b"no image")
        assert server.stop() == 0
    first, *others = read_request_log(folder)
    assert (first["id"], first["prediction"], first["model"]) == ("first", answer["label"], "pets")
    assert first["probabilities"] == pytest.approx([*answer["probabilities"].values()], abs=1e-6)
    assert (first["image"]["width"], first["image"]["height"]) == (30, 20) and first["version"] == server.version
    assert first["image"]["brightness"] == pytest.approx(photo.mean(), abs=0.01)
    assert [(r["id"], r["index"], r["image"]["contrast"]) for r in others] == [("second", 0, 0.0), ("second", 1, 0.0)]
    assert abs(time.time() - datetime.fromisoformat(first["time"]).timestamp()) < 600
    (file,) = folder.iterdir()
    assert file.name == f"requests-{first['time'][:13]}.jsonl.gz" and stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert len(gzip.decompress(file.read_bytes()).splitlines()) == 3


def test_log_holds_features_where_the_bundle_gives_them(photo: np.ndarray, tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path/"run", features=True)
    with serving(tmp_path/"log", bundle, "--log", tmp_path/"requests") as server:
        raw = np.zeros((2, 20, 30, 3), int)
        raw[1] = (10, 20, 30)
        answer = server.ask("/predict", encode(photo)).json
        tensor = dict(name="images", datatype="UINT8", shape=[2, 20, 30, 3], data=raw.ravel().tolist())
        server.infer(dict(inputs=[tensor]))
        assert server.stop() == 0
    first, second, third = read_request_log(tmp_path/"requests")
    assert first["features"] == pytest.approx(photo.mean((0, 1)), abs=0.02), "the mean colours"
    assert first["prediction"] == answer["label"] and "features" not in answer
    assert (second["features"], third["features"]) == ([0.0] * 3, pytest.approx([10, 20, 30], abs=1e-3))
    assert first["probabilities"] == pytest.approx([*answer["probabilities"].values()], abs=1e-6)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_lost_at_the_end(served_bundle: Path, photo: np.ndarray, tmp_path: Path, number: int) -> None:
    folder = tmp_path/"requests"
    with serving(tmp_path/"log", served_bundle, "--log", folder) as server, ThreadPoolExecutor(4) as pool:
        ids = [f"r{i}" for i in range(200)]
        asked = [pool.submit(server.ask, "/predict", encode(photo), X_Request_Id=name) for name in ids]
        answered = {a.result().json["id"] for a in asked}
        assert server.stop(number) == 0
    assert Counter(r["id"] for r in read_request_log(folder)) == Counter(answered) == Counter(ids)


def test_killed_service_leaves_whole_files(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path/"requests"
    with serving(tmp_path/"log", served_bundle, "--log", folder) as server:
        for _ in range(20): server.ask("/predict", encode(photo))
        deadline = time.monotonic() + 20
        while server.metric('cvnb_log_records_total{result="written"}') < 20: assert time.monotonic() < deadline
        server.ask("/predict", encode(photo))
        server.process.kill()
    (file,) = folder.iterdir()
    assert len(gzip.decompress(file.read_bytes()).splitlines()) in (20, 21)
    with serving(tmp_path/"log", served_bundle, "--log", folder) as server:
        server.ask("/predict", encode(photo))
        server.stop()
    assert len([*read_request_log(folder)]) in (21, 22)


def test_full_disk_stops_the_log_and_not_the_service(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    folder = tmp_path/"requests"
    folder.mkdir(mode=0o700)
    for i in range(2):   # this hour and the next one are on a device that is full
        hour = time.strftime("%Y-%m-%dT%H", time.gmtime(time.time() + 3600 * i))
        (folder/f"requests-{hour}.jsonl.gz").symlink_to("/dev/full")
    with serving(tmp_path/"log", served_bundle, "--log", folder) as server:
        for _ in range(5): assert server.ask("/predict", encode(photo)).status == 200
        server.wait_for("! the request log rests")
        for _ in range(5): assert server.ask("/predict", encode(photo)).status == 200
        deadline = time.monotonic() + 20
        while server.metric('cvnb_log_records_total{result="write_failed"}') < 10: assert time.monotonic() < deadline
        assert server.metric("cvnb_log_active") == 0 and "No space left" in server.text
        assert server.stop() == 0 and server.text.count("the request log rests") == 1


def test_write_that_ends_in_the_middle_is_taken_back(tmp_path: Path) -> None:
    counted = Counter()
    count = lambda result, n: counted.update({result: n})
    log = RequestLog(tmp_path/"log", count, flush_seconds=0.02, pause_seconds=0.1)
    now = time.time()
    log.add(dict(time=now, id="small"))
    while not counted["written"]: time.sleep(0.01)
    (file,) = (tmp_path/"log").iterdir()
    whole = file.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + 100, limits[1]))
        for _ in range(9): log.add(dict(time=now, id=os.urandom(400).hex()))
        while counted["write_failed"] < 9: time.sleep(0.01)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file.read_bytes() == whole
    while not log.active: time.sleep(0.01)
    log.add(dict(time=now, id="after"))
    log.close()
    assert [r["id"] for r in read_request_log(tmp_path/"log")] == ["small", "after"]


def test_images_are_kept_only_if_asked_for_and_not_for_ever(
    served_bundle: Path, photo: np.ndarray, tmp_path: Path,
) -> None:
    folder = tmp_path/"requests"
    old = folder/"images/2020-01-01T00"
    old.mkdir(parents=True)
    folder.chmod(0o700)
    content = encode(photo, "JPEG")
    with serving(tmp_path/"log", served_bundle, "--log", folder, "--log-images", "--image-days", 1) as server:
        server.ask("/predict", content, X_Request_Id="..")
        raw = dict(name="images", datatype="UINT8", shape=[1, 20, 30, 3], data=photo.ravel().tolist())
        server.infer(dict(inputs=[raw]))
        server.stop()
    first, second = read_request_log(folder)
    assert (folder/first["file"]).read_bytes() == content and first["file"].endswith(".jpg")
    assert (np.asarray(Image.open(folder/second["file"])) == photo).all()
    assert stat.S_IMODE((folder/first["file"]).stat().st_mode) == 0o600 and not old.exists()
    with serving(tmp_path/"log", served_bundle, "--log", tmp_path/"plain") as server:
        server.ask("/predict", content)
        server.stop()
    assert [p.suffix for p in (tmp_path/"plain").iterdir()] == [".gz"]
    assert all("file" not in r for r in read_request_log(tmp_path/"plain"))


def test_folder_that_others_may_write_to_is_refused(served_bundle: Path) -> None:
    with tempfile.TemporaryDirectory() as name:   # a folder above pytest's is closed to others
        Path(name).chmod(0o777)
        done = cvnb("serve", served_bundle, "--port", 0, "--log", name)
    assert done.returncode == 2 and "is not trusted" in done.stderr


def test_full_queue_loses_records_and_counts_them(tmp_path: Path) -> None:
    counted = Counter()
    log = RequestLog(tmp_path/"log", lambda result, n: counted.update({result: n}), flush_seconds=30, max_records=10)
    begin = time.monotonic()
    for i in range(1000): log.add(dict(time=time.time(), id=str(i)))
    assert time.monotonic() - begin < 5 and counted == {"queue_full": 990}
    log.close()
    assert len([*read_request_log(tmp_path/"log")]) == 10 and counted["written"] == 10
    assert json.loads(json.dumps(counted)) == dict(queue_full=990, written=10)


def test_log_keeps_up_while_requests_keep_python_busy(tmp_path: Path) -> None:
    counts: Counter = Counter()
    ends = time.monotonic() + 4

    def compute() -> None:
        while time.monotonic() < ends: sum(range(2000))

    log = RequestLog(tmp_path, lambda kind, n: counts.update({kind: n}), flush_seconds=0.5, max_records=1500)
    busy = [threading.Thread(target=compute) for _ in range(2)]
    for thread in busy: thread.start()
    n = 0
    while time.monotonic() < ends:
        for _ in range(20): log.add(dict(time=time.time(), id=str(n := n + 1), probabilities=[0.1] * 10))
        time.sleep(0.01)
    for thread in busy: thread.join()
    log.close()
    assert counts == dict(written=n), counts
    assert [r["id"] for r in read_request_log(tmp_path)] == [str(i + 1) for i in range(n)]
