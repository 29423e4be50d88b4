"""Minutes of paced load on `cvnb serve`: latency at a share of what it can take, errors, lost records and memory.

    python benchmarks/serve_load.py [--bundle RUN|BUNDLE] [--minutes 10] [--share 0.8] [--any-core] [--write]

First a server gets requests as fast as eight connections can send them, for ten seconds: that is what it can take.
Then requests are due at fixed times, at a share of that rate. A latency counts from when a request was due, not from
when it was sent, so a service that stalls does not slow its measurement down. At the end the request log has to hold
as many records as there were answers. The requests are binary tensors (Open Inference Protocol).

The servers have one core, and the client another: on shared cores the client's own time would be part of what the
service can take, and requests would wait for the client. The bare application of serve.py, which checks and logs
nothing, takes turns with the service, each at the same share of what it can take itself. What its latencies do is due
to the client, the load and the machine.
"""
from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path

import numpy as np
import psutil

sys.path.insert(0, str(Path(__file__).parent))
from serve import CONNECTIONS, CVNB, cpu_seconds, make_bundle, make_requests, send_many, started  # noqa: E402
from table import show  # noqa: E402

WARM_SECONDS = 10
KIND = "binary tensor"


async def send_paced(
    port: int,
    request: bytes,
    rate: float,      # requests a second
    seconds: float,
) -> tuple[np.ndarray, int]:   # ms of each answer from when it was due; answers other than 200
    "Send requests at fixed times over connections that stay open; a late one is sent at once."
    times: list[float] = []
    failed = 0
    due = iter(range(int(rate * seconds)))
    begin = time.perf_counter() + 0.1

    async def send_some() -> None:
        nonlocal failed
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for i in due:
            at = begin + i / rate
            if (wait := at - time.perf_counter()) > 0: await asyncio.sleep(wait)
            writer.write(request)
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            await reader.readexactly(int(head.partition(b"\r\ncontent-length: ")[2].partition(b"\r\n")[0]))
            if not head.startswith(b"http/1.1 200"): failed += 1
            times.append(1000 * (time.perf_counter() - at))
        writer.close()

    await asyncio.gather(*(send_some() for _ in range(4 * CONNECTIONS)))
    return np.array(times), failed


@contextmanager
def on_cores(
    cores: list[int],
) -> Iterator[None]:
    "Keep this process, and what it starts, to some cores until the block ends."
    client = psutil.Process()
    before = client.cpu_affinity()
    client.cpu_affinity(cores)
    try: yield
    finally: client.cpu_affinity(before)


def most_a_second(
    port: int,
    request: bytes,
) -> tuple[int, float]:   # requests, and how many of them a second
    "Send requests as fast as eight connections can."
    begin = time.perf_counter()
    n = 0
    while time.perf_counter() < begin + WARM_SECONDS: n += len(asyncio.run(send_many(port, request, 800)))
    return n, n / (time.perf_counter() - begin)


@dataclass
class Load:
    "A server under load, and what was measured of it."
    port: int
    process: psutil.Process
    ready: float       # seconds
    n_warm: int        # requests before the paced ones
    most: float        # requests a second
    memory: float      # MB before the load
    cpu: float = 0     # seconds
    failed: int = 0    # answers other than 200
    times: list[np.ndarray] = field(default_factory=list)   # ms, of each part

    def run(self, request: bytes, share: float, seconds: float) -> None:
        "Add a part of paced requests."
        before = cpu_seconds(self.process)
        times, failed = asyncio.run(send_paced(self.port, request, share * self.most, seconds))
        self.cpu += cpu_seconds(self.process) - before
        self.failed += failed
        self.times.append(times)

    def figures(self) -> dict[str, float]:
        "Summarise the parts."
        times = np.concatenate(self.times)
        p50, p99, p999 = np.quantile(times, [0.5, 0.99, 0.999])
        parts = [np.quantile(t, 0.99) / np.quantile(t, 0.5) for t in self.times]
        return {"ready s": self.ready, "most / s": self.most, "requests": len(times), "other than 200": self.failed,
                "p50 ms": p50, "p99 ms": p99, "p99 / p50": p99 / p50,
                "p99 / p50, median of the parts": float(np.median(parts)), "p99.9 ms": p999,
                "CPU ms": 1000 * self.cpu / len(times), "memory MB": self.memory,
                "growth MB": self.process.memory_info().rss / 1e6 - self.memory}


def measure(
    bundle: Path,
    minutes: float,     # under load, of cvnb
    share: float,       # of what a server can take
    cores: tuple[list[int], list[int]],   # of the servers, of the client
) -> list[dict]:    # one row per figure
    "Measure the service under load beside the bare application: 50 seconds of the one, 10 of the other."
    from cvnb.evaluate.voila_server import find_free_port
    from cvnb.export.bundle import Bundle
    from cvnb.serve.request_log import read_request_log
    opened = Bundle.load(bundle)
    request = make_requests("bench", opened.description["input"].get("resized_to") or 32)[KIND]
    ports = find_free_port(), find_free_port()
    bare = [sys.executable, str(Path(__file__).with_name("serve.py")), "--bare", str(opened.folder/"model.onnx"),
            "--port", str(ports[1])]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/"requests"
        ours = [CVNB, "serve", str(bundle), "--allow-unverified", "--name", "bench", "--port", str(ports[0]), "--log",
                str(log)]
        with ExitStack() as stack:
            stack.enter_context(on_cores(cores[1]))
            loads = []
            for command, port in zip((ours, bare), ports):
                begin = time.monotonic()
                with on_cores(cores[0]): server = stack.enter_context(started(command, port))
                ready = time.monotonic() - begin
                loads.append(Load(port, server, ready, *most_a_second(port, request), server.memory_info().rss / 1e6))
            for i in range(ceil(60 * minutes / 50)):
                loads[0].run(request, share, min(50, 60 * minutes - 50 * i))
                loads[1].run(request, share, 10)
            figures = [load.figures() for load in loads]
        lost = loads[0].n_warm + figures[0]["requests"] - sum(1 for _ in read_request_log(log))
    rows = [{"figure": name, "cvnb serve": value, "bare ASGI": figures[1][name],
             "ratio": value / figures[1][name] if figures[1][name] else ""} for name, value in figures[0].items()]
    return [*rows, {"figure": "lost records", "cvnb serve": lost, "bare ASGI": "", "ratio": ""}]


def main() -> None:
    "Run the benchmark."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="run or bundle; by default a small model is made")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--share", type=float, default=0.8, help="of what the service can take")
    parser.add_argument("--any-core", action="store_true", help="let servers and client share all cores")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    if (os.cpu_count() or 1) < 2 and not args.any_core: parser.error("one core is not enough: give --any-core")
    with tempfile.TemporaryDirectory() as folder:
        everything = list(range(os.cpu_count() or 1))
        cores = (everything, everything) if args.any_core else ([0], [1])
        rows = measure(args.bundle or make_bundle(Path(folder)), args.minutes, args.share, cores)
    place = "servers and client share all cores" if args.any_core else "servers and client have a core each"
    title = f"`cvnb serve` under {args.share:.0%} of what it can take, {args.minutes:g} minutes; {place}"
    show("serve_load", title, rows, args.write)


if __name__ == "__main__": main()
