"""Bundles that are served, and `cvnb serve` in a process of its own."""
from __future__ import annotations

import contextlib
import http.client
import io
import json
import os
import random
import re
import signal
import ssl
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import bundles
import numpy as np
from PIL import Image

from cvnb.export.bundle import write_bundle
from cvnb.export.features import add_features
from cvnb.models.vision_model import ModelSpec

TOKEN = "a-token-of-24-characters"
SHIP = dict(level="ship", reasons=[])


def write_served_bundle(
    folder: Path,                    # gets the run and the bundle
    verdict: dict | None = SHIP,
    weight: float = 0.25,            # of the model; other weights, other probabilities
    labels: list[str] = bundles.LABELS,
    run: str = "pets",
    thresholds: dict[str, float] | None = None,
    costs: dict[str, dict[str, float]] | None = None,
    features: bool = False,          # whether the files return what the classifier gets: the mean colours
) -> Path:                           # the bundle
    "Write a bundle whose model looks at mean colours."
    matrix = np.linspace(-weight, weight, 9, dtype=np.float32).reshape(3, 3)
    end = lambda: [bundles.helper.make_node("MatMul", ["means", "other"], ["found"]),
                   bundles.helper.make_node("Softmax", ["found"], ["probabilities"], axis=1)]
    for name in "trained.onnx", "trained_int8.onnx":
        bundles.write_graph(folder/"export"/name, end, weights=dict(other=matrix), labels=labels)
    spec = ModelSpec("mean_colour", labels, 6, [0.5] * 3, [0.5] * 3, thresholds=thresholds, costs=costs)
    details = dict(run=run, shipped=dict(model="trained"), metrics={}) | (dict(verdict=verdict) if verdict else {})
    if features: details["features"] = [add_features(path) for path in sorted((folder/"export").glob("*.onnx"))][0]
    return write_bundle(folder/"bundle", folder, "trained", spec, bundles.IMAGES, details)


def write_slow_bundle(
    folder: Path,         # gets the run and the bundle
    n_products: int,      # of 1024 × 1024 values, one after the other
) -> Path:                # the bundle
    "Write a bundle whose model takes its time for an image, and that sees the mean of its colours only."
    size = 1024
    spread = np.zeros((3, size), np.float32)
    spread[:, :3] = np.eye(3)
    chain = ["means", "wide0"]
    nodes = [bundles.helper.make_node("MatMul", ["means", "spread"], ["wide0"])]
    for i in range(n_products):
        nodes.append(bundles.helper.make_node("MatMul", [chain[-1], "same"], [f"wide{i + 1}"]))
        chain.append(f"wide{i + 1}")
    nodes += [bundles.helper.make_node("MatMul", [chain[-1], "gather"], ["found"]),
              bundles.helper.make_node("Softmax", ["found"], ["probabilities"], axis=1)]
    weights = dict(spread=spread, same=np.eye(size, dtype=np.float32), gather=spread.T.copy() * np.float32(0.01))
    for name in "trained.onnx", "trained_int8.onnx":
        bundles.write_graph(folder/"export"/name, lambda: nodes, weights=weights)
    spec = ModelSpec("mean_colour", bundles.LABELS, 6, [0.5] * 3, [0.5] * 3)
    details = dict(run="slow", shipped=dict(model="trained"), metrics={}, verdict=SHIP)
    return write_bundle(folder/"bundle", folder, "trained", spec, bundles.IMAGES[:1], details)


def encode(pixels: np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    "Encode an image."
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, kind, **options)
    return stream.getvalue()


@dataclass
class Answer:
    "An answer of the server."
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any: return json.loads(self.body)


@dataclass
class Server:
    "A running `cvnb serve`."
    process: subprocess.Popen
    log: Path                    # what it prints
    seconds: float               # from its start until it answered
    address: str = ""
    port: int = 0
    model: str = ""
    version: str = ""
    headers: dict[str, str] = field(default_factory=dict)    # of every request

    @property
    def text(self) -> str: return self.log.read_text(errors="replace")

    def connect(self, timeout: float = 30) -> http.client.HTTPConnection:
        "Open a connection."
        if not self.address.startswith("https"): return http.client.HTTPConnection("127.0.0.1", self.port, timeout)
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=timeout, context=context)

    def ask(self, path: str, body: bytes | None = None, method: str = "", connection: Any = None,
            **headers: str) -> Answer:
        "Send a request: GET, or POST if it has a body."
        own = connection or self.connect()
        named = self.headers | {k.replace("_", "-"): v for k, v in headers.items()}
        try:
            own.request(method or ("GET" if body is None else "POST"), path, body, named)
            answer = own.getresponse()
            return Answer(answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read())
        finally:
            if not connection: own.close()

    def infer(self, request: dict, **headers: str) -> Answer:
        "Send an inference request as JSON."
        body = json.dumps(request).encode()
        return self.ask(f"/v2/models/{self.model}/infer", body, **{"Content-Type": "application/json"} | headers)

    def metric(self, line: str) -> float:
        "Read a value of the metrics; 0 where there is none."
        for found in self.ask("/metrics").body.decode().splitlines():
            if found.startswith(line + " "): return float(found.rpartition(" ")[2])
        return 0.0

    def wait_for(self, text: str, seconds: float = 20) -> None:
        "Wait until the server has printed a text."
        end = time.monotonic() + seconds
        while text not in self.text:
            assert time.monotonic() < end, self.text
            time.sleep(0.02)

    def stop(self, number: int = signal.SIGTERM) -> int:    # its exit code
        "End the server."
        self.process.send_signal(number)
        return self.process.wait(30)


@contextlib.contextmanager
def serving(
    log: Path,                # gets what the server prints
    *arguments: object,       # of `cvnb serve`
    token: str = "",
    **variables: str,         # added to the environment
) -> Iterator[Server]:
    "Run `cvnb serve` on a free port as long as the block lasts."
    command = [str(Path(sys.executable).with_name("cvnb")), "serve", *map(str, arguments), "--port", "0"]
    begin = time.monotonic()
    env = os.environ | variables | (dict(CVNB_SERVE_TOKEN=token) if token else {})
    with open(log, "w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=env)
    server = Server(process, log, 0.0, headers={"Authorization": f"Bearer {token}"} if token else {})
    try:
        while not (found := re.search(r"^(\S+) version (\w+): (https?://\S+:(\d+))$", server.text, re.M)):
            assert process.poll() is None and time.monotonic() < begin + 60, server.text
            time.sleep(0.01)
        server.seconds = time.monotonic() - begin
        server.model, server.version, server.address = found[1], found[2], found[3]
        server.port = int(found[4])
        yield server
    finally:
        if process.poll() is None: process.kill()
        process.wait()


def cvnb(*arguments: object, **variables: str) -> subprocess.CompletedProcess:
    "Run cvnb until it ends."
    command = [str(Path(sys.executable).with_name("cvnb")), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=os.environ | variables)


def mutate_bytes(content: bytes, r: random.Random) -> bytes:
    "Change, cut, repeat or insert bytes."
    changed = bytearray(content)
    for _ in range(r.randint(1, 8)):
        if not changed: return bytes(changed)
        i = r.randrange(len(changed))
        action = r.randrange(5)
        if action == 0: changed[i] = r.randrange(256)
        elif action == 1: del changed[i:i + r.randint(1, 40)]
        elif action == 2: changed[i:i] = r.randbytes(r.randint(1, 20))
        elif action == 3: changed[i:i + 4] = struct.pack("<I", r.choice([0, 1, 2**31, 2**32 - 1, len(changed)]))
        else: changed = changed[:r.randint(0, len(changed))]
    return bytes(changed)
