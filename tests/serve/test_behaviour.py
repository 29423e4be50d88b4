"""How a service behaves: overload, limits, its end, and another bundle while it serves."""
from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import network
import numpy as np
import psutil
import pytest
from bundles import LABELS
from servers import SHIP, TOKEN, Answer, Server, cvnb, encode, serving, write_served_bundle, write_slow_bundle

from cvnb.core.files import read_json
from cvnb.core.records import write_record
from cvnb.export.bundle import Bundle
from cvnb.export.bundle_format import BundleDescription
from cvnb.serve.served_model import ModelOptions, load_served


@pytest.fixture(scope="module")
def slow_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle whose model takes some tenths of a second for an image."
    return write_slow_bundle(tmp_path_factory.mktemp("slow")/"run", 600)


@pytest.fixture
def many(photo: np.ndarray) -> Iterator[ThreadPoolExecutor]:
    "Threads that ask at the same time."
    with ThreadPoolExecutor(32) as pool: yield pool


# Start


def test_start_is_quick_and_small(server: Server) -> None:
    assert server.seconds < 10   # on a machine that others use; alone it takes less than one
    assert psutil.Process(server.process.pid).memory_info().rss < 130e6


def test_heavy_packages_are_not_imported() -> None:
    code = ("import sys, cvnb.cli.app, cvnb.serve.server, cvnb.export.bundle, onnxruntime\n"
            "print({'torch', 'pandas', 'pyarrow', 'scipy', 'sklearn', 'matplotlib'} & sys.modules.keys())")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_missing_part_is_named(served_bundle: Path, tmp_path: Path) -> None:
    (tmp_path/"uvicorn.py").write_text("raise ModuleNotFoundError('no uvicorn', name='uvicorn')")
    done = cvnb("serve", served_bundle, PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "cvnb[serve]" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("level, code", [("do not ship", 1), (None, 1), ("ship with care", 0)])
def test_bundle_that_should_not_be_shipped_is_refused(tmp_path: Path, level: str | None, code: int) -> None:
    bundle = write_served_bundle(tmp_path/"run", dict(level=level, reasons=[]) if level else None)
    if code:
        done = cvnb("serve", bundle, "--port", 0)
        assert done.returncode == code and "--allow-unverified" in done.stderr and "Traceback" not in done.stderr
        with serving(tmp_path/"log", bundle, "--allow-unverified") as server: server.wait_for("! the verdict")
    else:
        with serving(tmp_path/"log", bundle) as server: assert server.ask("/model").json["verdict"] == level


def test_damaged_bundle_is_refused(served_bundle: Path, tmp_path: Path) -> None:
    bundle = tmp_path/"bundle"
    for name in "model.onnx", "reference.npz", "model_int8.onnx":
        shutil.copytree(served_bundle, bundle)
        (bundle/name).write_bytes((bundle/name).read_bytes()[:-1] + b"x")
        done = cvnb("serve", bundle, "--port", 0)
        assert done.returncode == 1 and name in done.stderr and "Traceback" not in done.stderr
        shutil.rmtree(bundle)


def test_warning_of_a_bundle_is_one_line(tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path/"run")
    described = read_json(bundle/"bundle.json")
    write_record(bundle/"bundle.json", described | dict(checked_with=dict(onnxruntime="1.0")), BundleDescription)
    with serving(tmp_path/"log", bundle) as server:
        (line,) = [line for line in server.text.splitlines() if "was checked with onnxruntime 1.0" in line]
        assert line.startswith("! ") and ".py" not in line


def test_other_predictions_than_the_reference_are_refused(served_bundle: Path, tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path/"run", weight=-0.3)
    shutil.copy(served_bundle/"reference.npz", bundle)
    described = read_json(bundle/"bundle.json")
    described["files"]["reference.npz"] = read_json(served_bundle/"bundle.json")["files"]["reference.npz"]
    write_record(bundle/"bundle.json", described, BundleDescription)
    done = cvnb("serve", bundle, "--port", 0)
    assert done.returncode == 1 and "predicts differently" in done.stderr


def test_port_that_is_taken_is_named(server: Server, served_bundle: Path) -> None:
    done = cvnb("serve", served_bundle, "--port", server.port)
    assert done.returncode == 1 and f"port {server.port}" in done.stderr and "Traceback" not in done.stderr


def test_idle_service_uses_no_core(served_bundle: Path, tmp_path: Path, photo: np.ndarray) -> None:
    with serving(tmp_path/"log", served_bundle, "--threads", 4) as server:
        server.ask("/predict", encode(photo))
        process = psutil.Process(server.process.pid)
        before = process.cpu_times()
        time.sleep(2)
        after = process.cpu_times()
        assert after.user + after.system - before.user - before.system < 0.2


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_predictions_of_other_tasks_are_named(served_bundle: Path, precision: str) -> None:
    model = load_served(served_bundle, ModelOptions(precision=precision))
    values = np.array([0.25, 0.5, 0.75], np.float32)
    assert model.describe(values)["label"] == "owl" and model.parameters()["precision"] == precision
    model.task = "multilabel"
    assert model.describe(values)["labels"] == ["dog", "owl"] and model.output_names == ["probabilities"]
    model.bundle.description["thresholds"] = dict(dog=0.6, cat=0.2)
    assert model.describe(values)["labels"] == ["cat", "owl"]
    model.task = "regression"
    assert model.describe(values) == dict(values=dict(cat=0.25, dog=0.5, owl=0.75))


def test_service_stays_on_this_machine_and_leaves_no_file(
    served_bundle: Path, tmp_path: Path, photo: np.ndarray, strace: str,
) -> None:
    def use(process: subprocess.Popen) -> None:
        address = re.search(r"http://\S+:(\d+)", process.stdout.readline())
        server = Server(process, tmp_path/"none", 0, port=int(address[1]))
        assert server.ask("/predict", encode(photo)).status == 200

    command = Path(sys.executable).with_name("cvnb"), "serve", served_bundle, "--port", 0
    watched = network.watch(tmp_path, *command, use=use)
    assert network.attempts(watched.trace) == [] and watched.files() == []


COSTS = {true: {said: (true != said) * (1000.0 if true == "cat" else 1.0) for said in LABELS} for true in LABELS}
RULES = [dict(thresholds=dict(cat=0.01, dog=0.19, owl=0.8)), dict(costs=COSTS)]


@pytest.mark.parametrize("rule", RULES, ids=["thresholds", "costs"])
def test_class_is_that_of_the_bundles_own_rule(tmp_path: Path, rule: dict) -> None:
    folder = write_served_bundle(tmp_path/"run", weight=0.02, **rule)
    images = [np.random.default_rng(i).integers(0, 255, (9, 9, 3)).astype(np.uint8) for i in range(20)]
    predicted = Bundle.load(folder).predict(images)
    with serving(tmp_path/"log", folder) as server:
        asked = [server.ask("/predict", encode(image)).json for image in images]
        about = server.ask("/v2/models/pets").json["parameters"]
    for found, expected in zip(asked, predicted):
        assert found["label"] == expected["label"]
        assert found["confidence"] == pytest.approx(expected["confidence"], abs=1e-6)
    largest = [max(p["probabilities"], key=p["probabilities"].get) for p in predicted]
    assert largest != [p["label"] for p in predicted]   # the rule matters for these images
    assert about["decision"] and all(about[name] == value for name, value in rule.items())


# Overload and limits


def test_full_queue_is_refused_and_health_is_answered(slow_bundle: Path, many: ThreadPoolExecutor, photo: np.ndarray,
                                                      tmp_path: Path) -> None:
    content = encode(photo)
    with serving(tmp_path/"log", slow_bundle, "--queue", 1, "--threads", 64) as server:
        asked = [many.submit(server.ask, "/predict", content) for _ in range(10)]
        begin = time.monotonic()
        assert server.ask("/v2/health/ready").status == 200
        health = time.monotonic() - begin
        answers = [a.result() for a in asked]
        codes = Counter(a.status for a in answers)
        assert set(codes) == {200, 503} and codes[200] >= 2, codes
        for answer in answers:
            if answer.status == 503: assert 1 <= int(answer.headers["retry-after"]) <= 60
        assert health < 5
        assert server.metric('cvnb_errors_total{kind="queue_full"}') == codes[503]
        assert server.metric("cvnb_queue_length") == 0 and server.metric("cvnb_requests_in_memory_bytes") == 0
        assert server.ask("/predict", content).status == 200


def test_request_that_takes_too_long_is_given_up(slow_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    with serving(tmp_path/"log", slow_bundle, "--timeout", "0.1", "--max-megapixels", "50") as server:
        raw = np.zeros((64, 8, 8, 3), np.uint8)
        given = dict(name="images", datatype="UINT8", shape=list(raw.shape), data=raw.ravel().tolist())
        begin = time.monotonic()
        answer = server.infer(dict(inputs=[given]))
        assert answer.status == 503 and "within 0.1 s" in answer.json["error"] and answer.headers["retry-after"]
        assert time.monotonic() - begin < 5
        assert server.metric('cvnb_errors_total{kind="timeout"}') == 1


def test_sizes_are_limited(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, "--max-mb", "0.1", "--max-megapixels", "0.001") as server:
        assert server.ask("/predict", encode(photo)).status == 200
        large = server.ask("/predict", encode(np.zeros((40, 40, 3), np.uint8)))
        assert large.status == 413 and "megapixels" in large.json["error"]
        two = [dict(name="images", datatype="UINT8", shape=[2, 20, 30, 3], data=[0] * 3600)]
        assert server.infer(dict(inputs=two)).status == 413
        body = server.ask("/predict", bytes(3_000_000))
        assert body.status == 413 and "100000 bytes" in body.json["error"]
        chunked = server.connect()
        chunked.request("POST", "/predict", iter([bytes(90_000)] * 3), encode_chunked=True)
        assert chunked.getresponse().status == 413
        assert server.metric("cvnb_requests_in_memory_bytes") == 0


def test_decompression_bomb_is_refused_before_it_is_decoded(server: Server) -> None:
    import zlib
    rows = zlib.compress(bytes(20_000 * 3 + 1) * 200)
    chunk = lambda name, data: len(data).to_bytes(4, "big") + name + data + zlib.crc32(name + data).to_bytes(4, "big")
    head = (20_000).to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    before = psutil.Process(server.process.pid).memory_info().rss
    answer = server.ask("/predict", bomb)
    assert answer.status == 413 and "400" in answer.json["error"]
    assert psutil.Process(server.process.pid).memory_info().rss - before < 30e6


# Slow and many clients


def test_slow_clients_are_closed(served_bundle: Path, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, "--timeout", "1") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 1000\r\n\r\nabc")
            slow.settimeout(20)
            answer = slow.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 408 ") and b"connection: close" in answer.lower()
        assert server.ask("/v2/health/live").status == 200


def test_slow_head_is_closed_and_large_head_is_refused(served_bundle: Path, tmp_path: Path) -> None:
    code = ("import sys, cvnb.serve.server as s\nfrom cvnb.serve.service import Limits\n"
            "s.serve_bundle(s.ServeOptions(sys.argv[1], port=0, limits=Limits(header_seconds=0.5)))")
    process = subprocess.Popen([sys.executable, "-c", code, served_bundle], stdout=subprocess.PIPE, text=True)
    try:
        port = int(process.stdout.readline().rpartition(":")[2])
        for begun in b"", b"GET / HT":
            with socket.create_connection(("127.0.0.1", port)) as slow:
                slow.sendall(begun)
                slow.settimeout(20)
                assert slow.recv(10_000).startswith(b"HTTP/1.1 400 " if begun else b"")
        with socket.create_connection(("127.0.0.1", port)) as large:
            large.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"X: y\r\n" * 15_000)
            large.settimeout(20)
            assert large.recv(10_000).startswith(b"HTTP/1.1 400 ")
    finally:
        process.kill()
        process.wait()


def test_connections_above_the_limit_are_told_so(served_bundle: Path, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, "--max-connections", 10) as server:
        idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(10)]
        deadline = time.monotonic() + 20
        while (answer := server.ask("/v2/health/live")).status != 503: assert time.monotonic() < deadline
        assert answer.headers["retry-after"] == "1" and answer.json["error"] == "too many connections"
        for connection in idle: connection.close()
        while server.ask("/v2/health/live").status != 200: assert time.monotonic() < deadline
        assert server.metric('cvnb_errors_total{kind="connections"}') >= 1


# Its end


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_flight_finish(slow_bundle: Path, many: ThreadPoolExecutor, photo: np.ndarray, tmp_path: Path,
                                   number: int) -> None:
    with serving(tmp_path/"log", slow_bundle) as server:
        content = encode(photo)
        for _ in range(10):   # on a busy machine the first is answered before the last one comes
            asked = [many.submit(server.ask, "/predict", content) for _ in range(4)]
            while in_flight := not all(a.done() for a in asked):
                if server.metric("cvnb_requests_in_memory_bytes") == 4 * len(content): break
            if in_flight: break
        else: pytest.fail("four requests were never in flight at once")
        assert server.stop(number) == 0
        assert [a.result().status for a in asked] == [200] * 4
        assert "Traceback" not in server.text


# Another bundle


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A folder with the bundles one and two, which differ in their probabilities, and others that are refused."
    tmp_path = tmp_path_factory.mktemp("places")
    folder = tmp_path/"bundles"
    folder.mkdir()
    made = dict(one={}, two=dict(weight=0.02), unfit=dict(verdict=dict(level="do not ship", reasons=[])),
                others=dict(labels=["cat", "dog", "cow"]))
    for name, options in made.items():
        shutil.copytree(write_served_bundle(tmp_path/name, **(dict(verdict=SHIP) | options)), folder/name)
    shutil.copytree(folder/"two", folder/"damaged")
    (folder/"damaged/labels.txt").write_text("cat\n")
    return folder


def swap(server: Server, name: object) -> Answer:
    "Ask for another bundle."
    return server.ask("/bundle", json.dumps(dict(bundle=name)).encode(), "PUT")


def test_bundle_is_exchanged_and_taken_back_without_a_gap(places: Path, photo: np.ndarray, tmp_path: Path,
                                                          many: ThreadPoolExecutor) -> None:
    with serving(tmp_path/"log", places/"one", "--bundles", places, token=TOKEN) as server:
        content = encode(photo)
        first = server.ask("/predict", content).json
        ended = []

        def ask_on() -> list[Answer]:
            found = []
            connection = server.connect()
            while not ended: found.append(server.ask("/predict", content, connection=connection))
            return found

        asking = [many.submit(ask_on) for _ in range(3)]
        answer = swap(server, "two")
        assert answer.status == 200 and answer.json["version"] != server.version, answer.body
        second = server.ask("/predict", content).json
        ended.append(True)
        answers = [a for asked in asking for a in asked.result()]
        assert {a.status for a in answers} == {200} and second["version"] == answer.json["version"]
        for a in answers:   # no answer of one model under the name of the other
            assert a.json["confidence"] == (first if a.json["version"] == server.version else second)["confidence"]
        assert first["confidence"] != second["confidence"] and first["model"] == second["model"]
        assert server.ask("/model").json["previous"]["version"] == server.version
        assert server.ask("/bundle/rollback", b"").json["version"] == server.version
        assert server.ask("/predict", content).json["confidence"] == first["confidence"]
        assert server.metric('cvnb_model_swaps_total{result="done"}') == 2


def test_bundle_that_is_taken_twice_can_be_rolled_back(places: Path, photo: np.ndarray, tmp_path: Path) -> None:
    with serving(tmp_path/"log", places/"one", "--bundles", places, token=TOKEN) as server:
        versions = {swap(server, "two").json["version"] for _ in range(2)}   # as a client does that asks again
        assert len(versions) == 1 and server.version not in versions
        assert server.ask("/bundle/rollback", b"").json["version"] == server.version


def test_label_that_thresholds_choose_says_so_and_has_another_version(photo: np.ndarray, tmp_path: Path) -> None:
    bundle = write_served_bundle(tmp_path/"plain")
    with serving(tmp_path/"log", bundle) as server: plain = server.ask("/predict", encode(photo)).json
    best, second, *_ = sorted(LABELS, key=plain["probabilities"].get, reverse=True)
    odds = plain["probabilities"][second] / plain["probabilities"][best]
    bundle = write_served_bundle(tmp_path/"decided", thresholds=dict.fromkeys(LABELS, 0.9) | {second: 0.4 * odds})
    with serving(tmp_path/"log", bundle) as server: decided = server.ask("/predict", encode(photo)).json
    assert decided["probabilities"] == plain["probabilities"] and "chosen_by" not in plain
    assert (decided["label"], decided["chosen_by"], decided["most_probable"]) == (second, "thresholds", best)
    assert decided["version"] != plain["version"], "the model file is the same, the thresholds are not"


def test_bundle_that_is_refused_leaves_the_first_one(places: Path, photo: np.ndarray, tmp_path: Path) -> None:
    refused = [("unfit", 422, "do not ship"), ("damaged", 422, "labels.txt"), ("others", 422, "other labels"),
               ("absent", 404, "no bundle"), ("../bundles/two", 400, "NAME"), (".", 400, "NAME"), (7, 400, "NAME")]
    with serving(tmp_path/"log", places/"one", "--bundles", places, token=TOKEN) as server:
        for name, status, said in refused:
            answer = swap(server, name)
            assert answer.status == status and said in answer.json["error"], answer.body
            assert str(places) not in answer.json["error"]
            assert server.ask("/predict", encode(photo)).json["version"] == server.version
            assert server.ask("/bundle/rollback", b"").status == 409
        assert server.metric('cvnb_model_swaps_total{result="refused"}') == 3 + len(refused)


def test_bundle_is_not_exchanged_without_token_or_folder(places: Path, tmp_path: Path, server: Server) -> None:
    assert swap(server, "two").status == 403 and server.ask("/bundle/rollback", b"").status == 403
    with serving(tmp_path/"log", places/"one", token=TOKEN) as guarded: assert swap(guarded, "two").status == 403
    with serving(tmp_path/"log", places/"one", "--bundles", places, token=TOKEN) as guarded:
        guarded.headers = {}
        assert swap(guarded, "two").status == 401


def test_sighup_reads_the_bundle_again(places: Path, photo: np.ndarray, tmp_path: Path) -> None:
    (tmp_path/"now").symlink_to(places/"one")
    with serving(tmp_path/"log", tmp_path/"now", "--name", "animals") as server:
        assert server.model == "animals"
        for target, said in ("two", "answers now"), ("unfit", "! not taken: "):
            (tmp_path/"next").symlink_to(places/target)
            os.replace(tmp_path/"next", tmp_path/"now")
            server.process.send_signal(signal.SIGHUP)
            server.wait_for(said)
        found = server.ask("/model").json
        assert found["version"] != server.version and found["verdict"] == "ship" and found["name"] == "animals"
        assert server.ask("/predict", encode(photo)).json["version"] == found["version"]

