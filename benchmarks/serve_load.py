"""Minutes of paced load on `cvnb serve`: latency at a share of what it can take, errors, lost records and memory.

    python benchmarks/serve_load.py [--bundle RUN|BUNDLE] [--minutes 10] [--share 0.8] [--write]

First the service gets requests as fast as eight connections can send them, for ten seconds: that is what it can take.
Then requests are due at fixed times, at a share of that rate. A latency counts from when a request was due, not from
when it was sent, so a service that stalls does not slow its measurement down. At the end the request log has to hold
as many records as there were answers. The requests are binary tensors (Open Inference Protocol).
"""
from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
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
def serving(
    bundle: Path,
    log: Path,    # folder of the request log
) -> Iterator[tuple[psutil.Process, int, float]]:   # the server, its port, seconds from its start to ready
    "Run `cvnb serve` until the block ends."
    from cvnb.evaluate.voila_server import find_free_port
    port = find_free_port()
    command = [CVNB, "serve", str(bundle), "--allow-unverified", "--name", "bench", "--port", str(port), "--log",
               str(log)]
    begin = time.monotonic()
    with started(command, port) as server: yield server, port, time.monotonic() - begin


def measure(
    bundle: Path,
    minutes: float,
    share: float,   # of what the service can take
) -> list[dict]:    # one row
    "Measure a service under load."
    from cvnb.export.bundle import Bundle
    from cvnb.serve.request_log import read_request_log
    side = Bundle.load(bundle).description["input"].get("resized_to") or 32
    request = make_requests("bench", side)[KIND]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder)/"requests"
        with serving(bundle, log) as (server, port, ready):
            begin = time.perf_counter()
            n_warm = 0
            while time.perf_counter() < begin + WARM_SECONDS: n_warm += len(asyncio.run(send_many(port, request, 800)))
            most = n_warm / (time.perf_counter() - begin)
            memory = server.memory_info().rss / 1e6
            cpu = cpu_seconds(server)
            times, failed = asyncio.run(send_paced(port, request, share * most, 60 * minutes))
            cpu = cpu_seconds(server) - cpu
            growth = server.memory_info().rss / 1e6 - memory
        records = sum(1 for _ in read_request_log(log))
    p50, p99, p999 = np.quantile(times, [0.5, 0.99, 0.999])
    return [{"minutes": minutes, "ready s": ready, "most / s": round(most), "sent / s": round(share * most),
             "requests": len(times), "other than 200": failed, "lost records": n_warm + len(times) - records,
             "p50 ms": p50, "p99 ms": p99, "p99 / p50": p99 / p50, "p99.9 ms": p999, "CPU ms": 1000 * cpu / len(times),
             "memory MB": memory, "growth MB": growth}]


def main() -> None:
    "Run the benchmark."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="run or bundle; by default a small model is made")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--share", type=float, default=0.8, help="of what the service can take")
    parser.add_argument("--write", action="store_true", help="write the table to benchmarks/results/")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(args.bundle or make_bundle(Path(folder)), args.minutes, args.share)
    table = [dict(figure=name, value=value) for name, value in rows[0].items()]
    show("serve_load", f"`cvnb serve` under {args.share:.0%} of what it can take", table, args.write)


if __name__ == "__main__": main()
