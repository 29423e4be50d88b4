"""CPU time and latency of `cvnb serve` beside a bare ASGI application and other servers, in one run.

    python benchmarks/serve.py [--bundle RUN|BUNDLE] [--requests 400] [--rounds 5] [--peers PEER …] [--write]

Without --bundle a small model at 32 × 32 pixels is made, untrained: what it predicts does not count here. Servers take
turns (ours, bare, ours again, the peers, and the other way round), each with one thread inside the model. A process of
its own sends requests over eight connections that stay open. A round's figure is the CPU time that the threads of the
server and of its child processes used, per request; rows are medians over rounds, ratios with a 95 % interval of their
median (bootstrap over rounds). The control is the same server started twice: where its interval leaves 0.95 … 1.05, the
ratio beside it is void. The bare application checks nothing: no token, no limit, no queue, no metrics, no id, no log.

Peers (fastapi, litserve, mlserver, kserve) do not fit beside the lock: uv makes an environment for each, under --envs.
Their servers are in benchmarks/serve_peers/, as their documentation has them; with them the JSON tensor alone is
measured, which all of them take, and the table is serve_peers.md. A peer that does not install or does not answer is
left out and named.
"""
from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

CONNECTIONS = 8
PEERS = {   # -> packages of its environment
    "fastapi": ("fastapi", "uvicorn[standard]"), "litserve": ("litserve==0.2.19",),
    "mlserver": ("mlserver==1.7.1",), "kserve": ("kserve==0.21.0",)}
HERE = Path(__file__).resolve().parent
KINDS = ("JSON tensor", "binary tensor", "PNG to /predict")
CVNB = str(Path(sys.executable).with_name("cvnb"))


def make_bundle(
    folder: Path,   # gets a run with one bundle
) -> Path:          # the bundle
    "Export an untrained model of 32 × 32 pixels."
    import torch

    from cvnb.export.bundle import write_bundle
    from cvnb.export.onnx import export_onnx
    from cvnb.models.weights import create_model
    torch.manual_seed(0)
    model = create_model("test_resnet", [f"class {i}" for i in range(10)], 32).eval()
    (folder/"export").mkdir()
    for name in "trained.onnx", "trained_int8.onnx": export_onnx(model, folder/"export"/name)
    images = [np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)]
    details = dict(run="bench", shipped={}, metrics={}, verdict=dict(level="ship", reasons=[]))
    return write_bundle(folder/"bundle", folder, "trained", model.spec, images, details)


# The bare application


def run_bare(
    file: str,   # an ONNX file
    port: int,
) -> None:
    "Serve a model with nothing around it."
    import onnxruntime as ort
    import uvicorn
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])

    def read_images(path: str, body: bytes, header: bytes) -> np.ndarray:
        if path == "/predict": return np.asarray(Image.open(io.BytesIO(body)).convert("RGB"))[None]
        size = int(header or len(body))
        tensor = json.loads(body[:size])["inputs"][0]
        if header: return np.frombuffer(body[size:], np.uint8).reshape(tensor["shape"])
        return np.array(tensor["data"], np.uint8).reshape(tensor["shape"])

    async def app(scope: dict, receive: object, send: object) -> None:
        body = b""
        more = True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body")
        header = dict(scope["headers"]).get(b"inference-header-content-length", b"")
        (found,) = session.run(None, {"images": read_images(scope["path"], body, header)})[:1]
        output = dict(name="probabilities", datatype="FP32", shape=list(found.shape))
        if header:
            text = json.dumps(dict(outputs=[output | dict(parameters=dict(binary_data_size=found.nbytes))])).encode()
            answer = text + found.tobytes()
        else: answer = json.dumps(dict(outputs=[output | dict(data=found.ravel().tolist())])).encode()
        headers = [(b"content-length", str(len(answer)).encode()), (b"content-type", b"application/json")]
        await send(dict(type="http.response.start", status=200, headers=headers))
        await send(dict(type="http.response.body", body=answer))

    uvicorn.run(app, port=port, http="httptools", loop="uvloop", lifespan="off", access_log=False, log_level="error")


# Requests


def make_requests(
    model: str,   # name of the model
    side: int,    # pixels
) -> dict[str, bytes]:   # kind -> a whole HTTP request
    "Write a request of each kind."
    pixels = np.random.default_rng(1).integers(0, 256, (side, side, 3), dtype=np.uint8)
    tensor = dict(name="images", datatype="UINT8", shape=[1, side, side, 3])
    text = json.dumps(dict(inputs=[tensor | dict(data=pixels.ravel().tolist())])).encode()
    wanted = [dict(name="probabilities", parameters=dict(binary_data=True))]
    given = tensor | dict(parameters=dict(binary_data_size=pixels.nbytes))
    head = json.dumps(dict(inputs=[given], outputs=wanted)).encode()
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    bodies = {"JSON tensor": (text, "Content-Type: application/json\r\n"), "PNG to /predict": (stream.getvalue(), ""),
              "binary tensor": (head + pixels.tobytes(), f"Inference-Header-Content-Length: {len(head)}\r\n")}
    found = {}
    for kind, (body, extra) in bodies.items():
        path = "/predict" if "predict" in kind else f"/v2/models/{model}/infer"
        lines = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n{extra}Content-Length: {len(body)}\r\n\r\n"
        found[kind] = lines.encode() + body
    return found


async def send_many(
    port: int,
    request: bytes,
    n: int,                 # requests, over all connections
) -> list[float]:           # ms of each
    "Send a request again and again over connections that stay open."
    times = []

    async def send_some() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for _ in range(n // CONNECTIONS):
            begin = time.perf_counter()
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            assert head.startswith(b"http/1.1 200"), head
            await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))
            times.append(1000 * (time.perf_counter() - begin))
        writer.close()

    await asyncio.gather(*(send_some() for _ in range(CONNECTIONS)))
    return times


def family(
    process: psutil.Process,   # a server
) -> list[psutil.Process]:
    "List a server's processes."
    return [process, *process.children(recursive=True)]


def cpu_seconds(
    process: psutil.Process,   # a server
) -> float:
    "Add up the CPU time of a server's processes, to the nanosecond, with that of threads that have ended."
    total = 0.0
    for p in family(process):
        with contextlib.suppress(OSError): total += time.clock_gettime((~p.pid << 3) | 2)   # Linux: its CPU clock
    return total


def measure(
    process: psutil.Process,   # the server
    port: int,
    request: bytes,
    n: int,
) -> dict[str, float]:         # cpu_ms per request, p50_ms, p99_ms
    "Measure one round."
    before = cpu_seconds(process)
    times = sorted(asyncio.run(send_many(port, request, n)))
    cpu = cpu_seconds(process) - before
    return dict(cpu_ms=1000 * cpu / len(times), p50_ms=statistics.median(times), p99_ms=times[int(0.99 * len(times))])


@contextlib.contextmanager
def started(
    command: list[str],
    port: int,
    **variables: str,   # added to the environment
) -> Iterator[psutil.Process]:
    "Run a server until the block ends; its child processes end with it."
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=os.environ | variables)
    processes = [psutil.Process(server.pid)]
    try:
        deadline = time.monotonic() + 120
        while True:
            if server.poll() is not None or time.monotonic() > deadline: raise RuntimeError(f"did not start: {command}")
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1): break
            time.sleep(0.05)
        processes = family(processes[0])
        yield processes[0]
    finally:
        server.terminate()
        _, alive = psutil.wait_procs(processes, 15)
        for process in alive:
            with contextlib.suppress(psutil.NoSuchProcess): process.kill()


# Peers


def make_environment(
    peer: str,      # of `PEERS`
    folder: Path,   # of all environments; one that is there is used as it is
) -> Path:          # its Python
    "Make the environment of a peer."
    import onnxruntime
    python = folder/peer/"bin/python"
    if python.exists(): return python
    uv = str(Path(sys.executable).with_name("uv"))
    subprocess.run([uv, "venv", "--quiet", "--python", sys.executable, str(folder/peer)], check=True)
    packages = *PEERS[peer], "numpy", f"onnxruntime=={onnxruntime.__version__}"
    subprocess.run([uv, "pip", "install", "--quiet", "--python", str(python), *packages], check=True)
    return python


def peer_command(
    peer: str,       # of `PEERS`
    python: Path,    # of its environment
    port: int,
    folder: Path,    # for its settings
) -> list[str]:
    "Say how a peer is started."
    if peer != "mlserver": return [str(python), str(HERE/f"serve_peers/{peer}_server.py")]
    from cvnb.evaluate.voila_server import find_free_port
    settings = dict(host="127.0.0.1", http_port=port, grpc_port=find_free_port(), metrics_port=find_free_port(),
                    parallel_workers=0, debug=False)
    (folder/"mlserver").mkdir()
    (folder/"mlserver/settings.json").write_text(json.dumps(settings))
    model = dict(name="bench", implementation="mlserver_model.Bench")
    (folder/"mlserver/model-settings.json").write_text(json.dumps(model))
    return [str(python.with_name("mlserver")), "start", str(folder/"mlserver")]


@contextlib.contextmanager
def started_peer(
    peer: str,      # of `PEERS`
    model: Path,    # an ONNX file
    request: bytes,
    envs: Path,     # folder of the environments
) -> Iterator[tuple[psutil.Process, int]]:   # the server and its port
    "Run a peer until the block ends; raise an error if it does not answer."
    from cvnb.evaluate.voila_server import find_free_port
    port = find_free_port()
    variables = dict(PEER_MODEL=str(model), PEER_PORT=str(port), PYTHONPATH=str(HERE/"serve_peers"),
                     ORT_DISABLE_TELEMETRY="1")
    with tempfile.TemporaryDirectory() as folder:
        command = peer_command(peer, make_environment(peer, envs), port, Path(folder))
        with started(command, port, **variables) as server:
            for i in range(20):   # some listen before their model is ready
                try: measure(server, port, request, CONNECTIONS)
                except (AssertionError, OSError, asyncio.IncompleteReadError):
                    if i == 19: raise
                    time.sleep(1)
                else: break
            yield server, port


def compare(
    bundle: Path,
    n: int,         # requests of a round
    rounds: int,
    peers: list[str],   # of `PEERS`
    envs: Path,         # folder of their environments
) -> list[dict]:    # rows of the table
    "Measure all servers in turns."
    from cvnb.evaluate.voila_server import find_free_port
    from cvnb.export.bundle import Bundle
    opened = Bundle.load(bundle)
    side = opened.description["input"].get("resized_to") or 32
    requests = make_requests("bench", side)
    ports = {name: find_free_port() for name in ("ours", "bare", "ours again")}
    ours = [CVNB, "serve", str(bundle), "--allow-unverified", "--name", "bench", "--port"]
    bare = [sys.executable, __file__, "--bare", str(opened.folder/"model.onnx"), "--port", str(ports["bare"])]
    commands = {"ours": [*ours, str(ports["ours"])], "bare": bare, "ours again": [*ours, str(ports["ours again"])]}
    kinds = KINDS[:1] if peers else KINDS
    found: dict[tuple[str, str], list[dict]] = {}
    with contextlib.ExitStack() as stack:
        servers = {name: stack.enter_context(started(command, ports[name])) for name, command in commands.items()}
        for peer in peers:
            try:
                server, port = stack.enter_context(
                    started_peer(peer, opened.folder/"model.onnx", requests[KINDS[0]], envs))
                servers[peer], ports[peer] = server, port
            except Exception as e: print(f"! {peer} is left out: {str(e)[:300]}", file=sys.stderr)
        for name, server in servers.items():
            for kind in kinds: measure(server, ports[name], requests[kind], 10 * CONNECTIONS)   # warm
        for i in range(rounds):
            for kind in kinds:
                for name in list(servers)[::1 if i % 2 else -1]:
                    found.setdefault((kind, name), []).append(measure(servers[name], ports[name], requests[kind], n))
        memory = {name: sum(p.memory_info().rss for p in family(server)) / 1e6 for name, server in servers.items()}
    return [summarise(kind, name, found, memory[name]) for kind in kinds for name in servers]


def interval(
    ratios: list[float],      # of the rounds
) -> tuple[float, float]:     # of their median, 95 %
    "Resample the rounds."
    rng = np.random.default_rng(0)
    medians = np.median(rng.choice(ratios, (4000, len(ratios))), axis=1)
    return float(np.quantile(medians, 0.025)), float(np.quantile(medians, 0.975))


def summarise(
    kind: str,      # of the request
    name: str,      # of the server
    found: dict[tuple[str, str], list[dict]],
    memory: float,  # MB
) -> dict:          # of the table
    "Summarise the rounds of a server."
    rounds = found[kind, name]
    ratios = [a["cpu_ms"] / b["cpu_ms"] for a, b in zip(rounds, found[kind, "bare" if name == "ours" else "ours"])]
    control = [a["cpu_ms"] / b["cpu_ms"] for a, b in zip(found[kind, "ours again"], found[kind, "ours"])]
    void = not (0.95 <= interval(control)[0] and interval(control)[1] <= 1.05)
    middle = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
    over = {"ours": "÷ bare", "ours again": "÷ ours (control)"}.get(name, "÷ ours")
    low, high = interval(ratios)
    span = f"{statistics.median(ratios):.2f} [{low:.2f}, {high:.2f}] {over}" + ", void" * void
    return {"request": kind, "server": name, "CPU ms per request": middle["cpu_ms"], "CPU ratio": span,
            "p50 ms": middle["p50_ms"], "p99 ms": middle["p99_ms"], "memory MB": memory}


def main() -> None:
    "Run the benchmark."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, help="run or bundle; by default a small model is made")
    parser.add_argument("--requests", type=int, default=400, help="of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peers", nargs="*", choices=[*PEERS], default=[], help="servers to compare with")
    parser.add_argument("--envs", type=Path, help="folder for their environments; by default they are made anew")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    parser.add_argument("--bare", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.bare: return run_bare(args.bare, args.port)
    with tempfile.TemporaryDirectory() as folder:
        bundle = args.bundle or make_bundle(Path(folder))
        rows = compare(bundle, args.requests, args.rounds, args.peers, args.envs or Path(folder)/"envs")
    title = f"Serving, {CONNECTIONS} connections, {args.requests} requests a round, {args.rounds} rounds"
    show("serve_peers" if args.peers else "serve", title, rows, args.write)


if __name__ == "__main__": main()
