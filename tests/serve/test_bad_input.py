"""Random requests: each gets an answer that is defined, and the service goes on."""
from __future__ import annotations

import base64
import http.client
import json
import random
import shutil
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from servers import TOKEN, Server, encode, mutate_bytes, serving

DEFINED = {200, 400, 401, 403, 404, 405, 408, 413, 415, 503}
ODD = [None, True, False, 0, -1, 1, 2**31, 2**63, 10**400, 0.5, 1e308, "", "a", "\ud800", "\0", "é" * 50, [], {}, [[]],
       [None], {"a": 1}, "UINT8", "BYTES", "FP32", [1, 1, 1, 3], [0, 0, 0, 3], [-1] * 4, [2**40] * 4]
KEYS = ["parameters", "data", "outputs", "id", "binary_data_size"]
NAMES = ["images", "probabilities", "label", "", "x" * 300, "\n", "../../x"]


def mutate_json(value: Any, r: random.Random) -> Any:
    "Change a value somewhere."
    if r.random() < 0.15: return r.choice(ODD)
    if isinstance(value, dict) and value:
        key = r.choice([*value])
        changed = dict(value)
        action = r.random()
        if action < 0.1: del changed[key]
        elif action < 0.2: changed[r.choice([*value, *KEYS])] = r.choice(ODD)
        else: changed[key] = mutate_json(value[key], r)
        return changed
    if isinstance(value, list) and value:
        changed = list(value)
        i = r.randrange(len(value))
        action = r.random()
        if action < 0.1: del changed[i]
        elif action < 0.25: changed.insert(i, r.choice([*ODD, value[i]]))
        else: changed[i] = mutate_json(value[i], r)
        return changed
    if isinstance(value, str) and r.random() < 0.5: return r.choice(NAMES)
    return r.choice(ODD)


def seeds() -> tuple[list[bytes], list[dict]]:
    "Whole images, and whole requests."
    pixels = np.random.default_rng(3).integers(0, 255, (12, 17, 3)).astype(np.uint8)
    deep = np.random.default_rng(3).integers(0, 65_535, (9, 9)).astype(np.uint16)
    images = [encode(pixels), encode(pixels, "JPEG"), encode(pixels, "JPEG", progressive=True), encode(pixels, "WEBP"),
              encode(pixels, "WEBP", lossless=True), encode(deep), encode(pixels[..., 0]), encode(pixels, "GIF"),
              encode(pixels, "TIFF"), encode(np.dstack([pixels, pixels[..., :1]]))]
    raw = dict(name="images", datatype="UINT8", shape=[1, 2, 2, 3], data=list(range(12)))
    texts = [base64.b64encode(image).decode() for image in images[:3]]
    requests = [dict(id="a", inputs=[raw], outputs=[dict(name="label")]),
                dict(inputs=[raw | dict(data=[[[[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [4, 5, 6]]]])]),
                dict(inputs=[dict(name="images", datatype="BYTES", shape=[3], data=texts)], parameters={}),
                dict(inputs=[raw], outputs=[dict(name="probabilities", parameters=dict(binary_data=True))])]
    return images, requests


def make_request(r: random.Random, model: str) -> tuple[str, str, bytes, dict[str, str]]:
    "Make a random request: method, path, body and headers."
    images, requests = seeds()
    infer = f"/v2/models/{model}/infer"
    kind = r.randrange(6)
    if kind == 0: return "POST", "/predict", mutate_bytes(r.choice(images), r), {}
    if kind == 1:
        head = b'--x\r\nContent-Disposition: form-data; name="a"; filename="a"\r\n\r\n'
        types = ["multipart/form-data; boundary=x", "multipart/form-data", "multipart/x; boundary="]
        body = mutate_bytes(head + r.choice(images) + b"\r\n--x--\r\n", r)
        return "POST", "/predict", body, {"Content-Type": r.choice(types)}
    if kind == 2:
        value = r.choice(requests)
        for _ in range(r.randint(1, 4)): value = mutate_json(value, r)
        return "POST", infer, json.dumps(value).encode("utf-8", "surrogatepass"), {}
    if kind == 3: return "POST", infer, mutate_bytes(json.dumps(r.choice(requests)).encode(), r), {}
    if kind == 4:
        contents = [mutate_bytes(r.choice(images), r) if r.random() < 0.7 else r.choice(images) for _ in range(2)]
        blob = b"".join(struct.pack("<I", len(c)) + c for c in contents)
        given = dict(name="images", datatype="BYTES", shape=[2], parameters=dict(binary_data_size=len(blob)))
        head = json.dumps(dict(inputs=[given])).encode()
        body = mutate_bytes(head + blob, r) if r.random() < 0.5 else head + blob
        return "POST", infer, body, {"Inference-Header-Content-Length": str(len(head) + r.choice([0, 0, 0, 1, -1]))}
    paths = ["/", "/v2", "/metrics", "/predict", infer, "/bundle", "/model", f"/v2/models/{model}/versions/1/infer",
             "/v2//", "/%ff%00", "/v2/models/" + "a" * 3000, "/openapi.json?" + "x=1&" * 100, "/..%2f..",
             "/bundle/rollback"]
    names = ["Content-Type", "Accept", "X-Request-Id", "Content-Encoding", "Origin", "Expect"]
    values = ["", "a/b", "gzip", "../x", "null", "x" * 2000, "100-continue", "multipart/form-data; boundary=\""]
    methods = ["GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH", "TRACE", "BREW"]
    body = r.randbytes(r.randrange(200))
    return r.choice(methods), r.choice(paths), body, {r.choice(names): r.choice(values)}


def send(server: Server, request: tuple) -> int:    # status
    "Send a request on a connection of its own or a shared one; check what every answer has."
    method, path, body, headers = request
    connection = server.connect()
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
    finally: connection.close()
    if answer.status >= 400 and method != "HEAD" and "json" in answer.headers.get("Content-Type", ""):
        assert json.loads(content)["error"], request
    if answer.status == 503: assert answer.headers["Retry-After"], request
    return answer.status


def send_garbage(server: Server, r: random.Random) -> None:
    "Send bytes that are no HTTP, or only begin to be."
    whole = (b"POST /predict HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n"
             b"5\r\nhello\r\n0\r\n\r\n")
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.settimeout(10)
        connection.sendall(mutate_bytes(whole, r))
        if r.random() < 0.5: connection.shutdown(socket.SHUT_WR)
        if r.random() < 0.3:
            try: answer = connection.recv(100)
            except (TimeoutError, ConnectionError): return
            if answer: assert answer.startswith(b"HTTP/1.1 ") and answer[9:10] in b"24", answer


def fuzz(server: Server, n: int, seed: int, garbage: Callable[[int], bool] = lambda i: i % 20 == 0) -> Counter:
    "Send random requests, and count the answers."
    r = random.Random(seed)
    codes: Counter = Counter()
    for i in range(n):
        if garbage(i): send_garbage(server, r)
        request = make_request(r, server.model)
        try: codes[send(server, request)] += 1
        except (http.client.HTTPException, ConnectionError) as e:
            raise AssertionError(f"no answer to request {i} of seed {seed}: {request}") from e
        assert {*codes} <= DEFINED, request
    return codes


def check_alive(server: Server, photo: np.ndarray) -> None:
    "Check that a server answers as on its first day."
    assert server.process.poll() is None and "Traceback" not in server.text, server.text[-3000:]
    assert len(server.text.splitlines()) == 2, server.text[-3000:]   # clients do not fill the log
    assert server.ask("/predict", encode(photo)).json["label"] == "owl"
    assert server.metric("cvnb_requests_in_memory_bytes") == 0 and server.metric("cvnb_queue_length") == 0


def test_random_requests_get_defined_answers(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, "--log", tmp_path/"requests", "--timeout", 5) as server:
        codes = fuzz(server, 400, seed=0)
        assert {200, 400, 404, 405, 415} <= codes.keys(), codes
        assert server.metric('cvnb_errors_total{kind="invalid_http"}') > 0
        check_alive(server, photo)


@pytest.mark.long
@pytest.mark.timeout(7200)
def test_hundred_thousand_random_requests(served_bundle: Path, photo: np.ndarray, tmp_path: Path) -> None:
    with serving(tmp_path/"log", served_bundle, "--log", tmp_path/"requests", "--timeout", 5) as server:
        process = psutil.Process(server.process.pid)
        codes: Counter = Counter()
        memory = []
        with ThreadPoolExecutor(8) as pool:   # some requests end by the service's limit of time
            for half in range(2):
                codes.update(sum(pool.map(lambda i: fuzz(server, 2500, seed=1 + i), range(20 * half, 20 * half + 20)),
                                 Counter()))
                memory.append(process.memory_info().rss / 1e6)
        print(f"{codes.total():,} requests: {dict(sorted(codes.items()))}; {memory[0]:.0f} MB after half of them, "
              f"{memory[1]:.0f} MB at the end")
        assert memory[1] - memory[0] < 20 and process.num_threads() < 20, codes
        assert process.num_fds() < 60
        check_alive(server, photo)


# schemathesis makes requests from /openapi.json. It needs hypothesis, whose licence the lock does not take, so it
# has an environment of its own.


@pytest.fixture(scope="module")
def schemathesis(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "schemathesis in an environment of its own."
    folder = tmp_path_factory.mktemp("schemathesis")
    uv = Path(sys.executable).with_name("uv")
    for arguments in (["venv", "--python", sys.executable, folder],
                      ["pip", "install", "--python", folder/"bin/python", "schemathesis==4.32.5"]):
        subprocess.run([uv, *arguments, "--quiet"], check=True)
    return folder/"bin/schemathesis"


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_schemathesis_finds_no_answer_outside_of_the_description(
    schemathesis: Path, served_bundle: Path, photo: np.ndarray, tmp_path: Path,
) -> None:
    shutil.copytree(served_bundle, tmp_path/"bundles/one")
    arguments = served_bundle, "--bundles", tmp_path/"bundles", "--timeout", 5
    with serving(tmp_path/"log", *arguments, token=TOKEN) as server:
        (tmp_path/"openapi.json").write_bytes(server.ask("/openapi.json").body)
        # A request may keep to the schema and hold no image, so not all that are valid by it are taken.
        command = [schemathesis, "run", tmp_path/"openapi.json", "--url", server.address, "--max-examples", "100",
                   "--seed", "1", "--header", f"Authorization: Bearer {TOKEN}", "--exclude-checks",
                   "positive_data_acceptance", "--no-color"]
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, cwd=tmp_path)
        print(done.stdout[-1500:])
        assert done.returncode == 0, done.stdout[-6000:] + done.stderr
        assert server.process.poll() is None and "Traceback" not in server.text
        assert server.ask("/predict", encode(photo)).json["label"] == "owl"
