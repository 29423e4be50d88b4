"""A service under load while bundles are exchanged, and while it is killed and started again."""
from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import psutil
import pytest
from servers import TOKEN, Server, encode, serving, write_served_bundle

from cvnb.serve.request_log import read_request_log

pytestmark = [pytest.mark.long, pytest.mark.timeout(3600)]
N_CLIENTS = 4


@pytest.fixture(scope="module")
def places(served_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with two bundles of other probabilities, and a damaged one."
    folder = tmp_path_factory.mktemp("places")
    shutil.copytree(served_bundle, folder/"one")
    shutil.copytree(write_served_bundle(tmp_path_factory.mktemp("second")/"run", weight=0.5), folder/"two")
    shutil.copytree(folder/"two", folder/"damaged")
    (folder/"damaged/labels.txt").write_text("cat\n")
    return folder


def test_hundred_swaps_under_load_lose_nothing(places: Path, photo: np.ndarray, tmp_path: Path) -> None:
    arguments = places/"one", "--bundles", places, "--log", tmp_path/"requests"
    content = encode(photo)
    ended = threading.Event()
    with serving(tmp_path/"log", *arguments, token=TOKEN) as server, ThreadPoolExecutor(N_CLIENTS) as clients:

        def ask_on(client: int) -> list[tuple[str, str, str]]:
            "Ask over one connection until the end: id, version and probabilities of each answer."
            found = []
            connection = server.connect()
            while not ended.is_set():
                name = f"c{client}-{len(found)}"
                answer = server.ask("/predict", content, connection=connection, X_Request_Id=name)
                assert answer.status == 200, answer.body
                assert answer.json["id"] == name
                found.append((name, answer.json["version"], json.dumps(answer.json["probabilities"])))
            return found

        def change(name: str) -> int:
            if name == "back": return server.ask("/bundle/rollback", b"", "POST").status
            return server.ask("/bundle", json.dumps(dict(bundle=name)).encode(), "PUT").status

        asking = [clients.submit(ask_on, i) for i in range(N_CLIENTS)]
        try:
            done = Counter()
            r = random.Random(0)
            memory = 0
            while done["swapped"] < 100:
                name = r.choice(["one", "two", "back", "damaged"])
                status = change(name)
                assert status == (422 if name == "damaged" else 409 if status == 409 and name == "back" else 200)
                done["swapped" if status == 200 else "refused"] += 1
                if done["swapped"] == 20: memory = psutil.Process(server.process.pid).memory_info().rss
        finally: ended.set()
        answers = [answer for each in asking for answer in each.result()]
        grown = psutil.Process(server.process.pid).memory_info().rss - memory
        assert server.stop() == 0
    by_version = {version: {p for _, v, p in answers if v == version} for _, version, _ in answers}
    assert len(by_version) == 2 and all(len(found) == 1 for found in by_version.values()), by_version
    logged = Counter((r["id"], r["version"]) for r in read_request_log(tmp_path/"requests"))
    assert logged == Counter((name, version) for name, version, _ in answers)
    assert grown < 40e6, f"{grown:,} bytes more after 80 swaps"
    print(f"{done['swapped']} swaps and {done['refused']} refused under {len(answers):,} requests; memory {grown:+,}")


@contextlib.contextmanager
def restarted(bundle: Path, folder: Path, port: int) -> Iterator[list[subprocess.Popen]]:
    "Run a service on a port, and start it again whenever it has ended, as a supervisor does."
    command = [Path(sys.executable).with_name("cvnb"), "serve", bundle, "--port", port, "--log", folder/"requests"]
    ended = threading.Event()
    started: list[subprocess.Popen] = []

    def supervise() -> None:
        with open(folder/"log", "a") as out:
            while not ended.is_set():
                started.append(subprocess.Popen([*map(str, command)], stdout=out, stderr=out))
                started[-1].wait()

    thread = threading.Thread(target=supervise)
    thread.start()
    while not started: time.sleep(0.01)
    try: yield started
    finally:
        ended.set()
        started[-1].terminate()
        thread.join(60)


def ask_with_retry(server: Server, content: bytes, name: str) -> tuple[int, int]:
    "Send a request until it is answered: status, and how often it was sent."
    end = time.monotonic() + 120
    for n in range(1, 100_000):
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer = server.ask("/predict", content, X_Request_Id=name)
            if answer.status != 503: return answer.status, n
        assert time.monotonic() < end, f"{name} was never answered"
        time.sleep(0.02)
    raise AssertionError(name)


def test_killed_service_loses_no_request_of_a_client_that_retries(
    served_bundle: Path, photo: np.ndarray, tmp_path: Path,
) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    content = encode(photo)
    ended = threading.Event()
    with restarted(served_bundle, tmp_path, port) as started, ThreadPoolExecutor(N_CLIENTS) as clients:
        server = Server(started[0], tmp_path/"log", 0.0, port=port, address=f"http://127.0.0.1:{port}")

        def ask_on(client: int) -> list[tuple[str, int, int]]:
            found = []
            while not ended.is_set():
                name = f"c{client}-{len(found)}"
                found.append((name, *ask_with_retry(server, content, name)))
            return found

        asking = [clients.submit(ask_on, i) for i in range(N_CLIENTS)]
        try:
            for i in range(20):
                ask_with_retry(server, content, f"before-{i}")
                time.sleep(random.Random(i).uniform(0, 1.5))
                os.kill(started[-1].pid, 9)
            ask_with_retry(server, content, "after")
            time.sleep(2.5)   # the log is written every second
        finally: ended.set()
        answers = [answer for each in asking for answer in each.result()]
    assert {status for _, status, _ in answers} == {200} and len(started) == 21
    repeated = sum(n > 1 for _, _, n in answers)
    assert 0 < repeated < len(answers)
    logged = Counter(r["id"] for r in read_request_log(tmp_path/"requests"))
    known = {name for name, _, _ in answers} | {"after"} | {f"before-{i}" for i in range(20)}
    assert logged.keys() <= known and "after" in logged
    missing = len(known) - len(logged)
    print(f"20 kills, {len(answers):,} requests answered, {repeated} of them sent again, {missing} not in the log")
    assert missing < len(known) / 2   # a kill takes at most the last second of the log
    assert "Traceback" not in (tmp_path/"log").read_text()
