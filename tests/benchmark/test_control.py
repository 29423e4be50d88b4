"""The control judges a comparison by intervals, for short and long calls, in wall time and in CPU time."""
from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cvnb.benchmark.timing as timing
from cvnb.benchmark.report import benchmark_html, benchmark_summary
from cvnb.benchmark.table import Benchmark, benchmark_notes, benchmark_rows, headline_columns
from cvnb.benchmark.timing import Measurements, Timings, check_control, read_control, run_rounds
from cvnb.benchmark.workers import Candidate, RuntimeServer
from cvnb.core.files import write_json
from cvnb.core.output_formats import BenchmarkRecord
from cvnb.core.records import read_record
from cvnb.data.images import DEFAULT_DECODING, UnreadableImage
from cvnb.export.runtimes import RUNTIMES
from cvnb.metrics.classification import accuracy

RESULTS = Path(__file__).resolve().parents[2]/"nbs"/"results"/"mnist5k"/"benchmark.json"
ROUNDS = 20
CALLS = 10
SLICE = 0.004   # seconds after which a scheduler gives the processor to another program


def draw_calls(rng: np.random.Generator, seconds: float, scatter: float = 0.01, busy: bool = False) -> np.ndarray:
    "Draw wall and CPU seconds of calls (2, rounds, calls); a busy machine gives every second slice to another program."
    cpu = seconds * rng.lognormal(0, scatter, (ROUNDS, CALLS))
    begin = rng.uniform(0, SLICE, cpu.shape)   # within a slice
    return np.stack([cpu + SLICE * ((begin + cpu) // SLICE) * busy, cpu])


def check(rng: np.random.Generator, file: Path, busy: bool = False, scatter: float = 0.01) -> dict[str, Any]:
    "Check a control whose call takes 0.2 ms and whose batch takes 40 ms."
    short, long = ((draw_calls(rng, s, scatter, busy), draw_calls(rng, s, scatter, busy)) for s in (2e-4, 0.04))
    return check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), short, long)


@pytest.fixture
def rng() -> np.random.Generator: return np.random.default_rng(0)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    "A model file of some size."
    (tmp_path/"model.onnx").write_bytes(bytes(1000))
    return tmp_path/"model.onnx"


@pytest.fixture
def measured(file: Path) -> Callable[[dict[str, Any], bool], Benchmark]:
    "Make a benchmark of a slow and a fast candidate; wall time of the slow one doubles on a busy machine."
    def make(control: dict[str, Any], busy: bool) -> Benchmark:
        rng = np.random.default_rng(1)
        calls = {"torch eager": 0.02, "onnx fp32": 2e-4}
        timings = {Candidate("trained", RUNTIMES[name], str(file)):
                   Timings(*draw_calls(rng, seconds, busy=busy), np.full((3, 1), 0.04), 100.0)
                   for name, seconds in calls.items()}
        rows = benchmark_rows(timings, {c: accuracy(rng.random(50) < 0.9) for c in timings}, 32)
        return Benchmark(Measurements(timings, control, {}, (0.0, 1.5, 1.0)), rows)
    return make


def test_control_holds_on_an_idle_machine(rng, file):
    control = check(rng, file)
    assert control["clock"] == "wall" and control["wall"]["valid"] and control["cpu"]["valid"]
    assert control["rounds"] == ROUNDS and "the comparison holds" in control["verdict"]


@pytest.mark.parametrize("place", ["short", "long"])
def test_worker_slowed_in_one_process_voids_the_control(rng, file, place):
    pairs = dict(short=[draw_calls(rng, 2e-4) for _ in range(2)], long=[draw_calls(rng, 0.04) for _ in range(2)])
    pairs[place][1][:, ::2] *= 1.6   # every second round
    control = check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), *map(tuple, pairs.values()))
    assert control["clock"] == "none" and not control["wall"]["valid"] and not control["cpu"]["valid"]


def test_point_value_near_one_with_a_wide_interval_is_void(rng, file):
    long = draw_calls(rng, 0.04), draw_calls(rng, 0.04)
    first = draw_calls(rng, 2e-4)
    factor = np.tile([1.5, 1 / 1.5], ROUNDS // 2)[None, :, None]   # slower and faster in turn: 1 on average
    control = check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), (first, first * factor), long)
    short = control["wall"]["short"]
    assert 0.99 < short["value"] < 1.01 and short["high"] > 1.05 and control["clock"] == "none"


@pytest.mark.parametrize("rounds", [1, 4])
def test_ratio_without_interval_is_void(rng, file, rounds):
    pairs = [(draw_calls(rng, s)[:, :rounds], draw_calls(rng, s)[:, :rounds]) for s in (2e-4, 0.04)]
    control = check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), *pairs)
    assert np.isnan(control["wall"]["short"]["low"]) and control["clock"] == "none"
    assert "no interval" in control["verdict"]


def test_clock_too_coarse_for_a_call_is_void(rng, file):
    pairs = [[draw_calls(rng, s) for _ in range(2)] for s in (2e-4, 0.04)]
    for calls in pairs[0]: calls[1] = 0   # CPU time in steps of 10 ms
    control = check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), *map(tuple, pairs))
    assert control["clock"] == "wall" and not control["cpu"]["valid"] and np.isnan(control["cpu"]["short"]["value"])


def test_busy_machine_is_seen_though_the_control_equals_itself(rng, file, measured):
    control = check(rng, file, busy=True)
    for name in "short", "long": assert 0.95 < control["wall"][name]["low"] <= control["wall"][name]["high"] < 1.05
    assert control["wall"]["per_cpu"]["low"] > 1.8 and control["clock"] == "cpu"
    result = measured(control, True)
    fast = result.rows[1]
    assert fast["speedup"] > 150 and 95 < fast["cpu_speedup_low"] <= fast["cpu_speedup_high"] < 105   # it is 100
    found = result.metrics()
    assert found["cpu_speedup_trained_fp32"].value == fast["cpu_speedup"] and found["cpu_ms_trained_fp32"].n == 200
    assert not any(name.startswith(("speedup", "latency")) for name in found)
    (note,) = benchmark_notes(result, {})
    assert "WALL TIME IS VOID" in note["text"] and not note["exceeded"]
    assert "× torch, CPU" in str(result) and "p50 ms (void)" in str(result)


def test_void_comparison_has_no_metric_of_speed(rng, file, measured):
    control = check(rng, file, scatter=1)
    result = measured(control, False)
    assert control["clock"] == "none" and set(result.metrics()) == {
        "control_wall_short", "control_wall_long", "control_wall_per_cpu", "control_cpu_short", "control_cpu_long"}
    (note,) = benchmark_notes(result, {})
    assert "THE COMPARISON IS VOID" in note["text"] and note["exceeded"]
    assert all(title.endswith("(void)") for title in headline_columns(control))
    text = str(result)
    assert "× torch (void)" in text and "0.2" in text   # the rows stay, marked
    bundle = dict(shipped=dict(model="trained"), files={})
    summary = benchmark_summary("x", result, [np.zeros((4, 4, 3), np.uint8)], bundle)
    page = benchmark_html(summary)
    assert 'class="void"' in page and "× torch (void)" in page and "1.50 at most" in page


def test_record_of_any_control_fits_its_schema(rng, file, measured, tmp_path):
    short = draw_calls(rng, 2e-4)[:, :3]
    unknown = check_control(Candidate("trained", RUNTIMES["onnx fp32"], str(file)), (short, short), (short, short))
    bundle = dict(shipped=dict(model="trained"), files={})
    for control in check(rng, file), check(rng, file, busy=True), unknown:
        summary = benchmark_summary("x", measured(control, False), [np.zeros((4, 4, 3), np.uint8)], bundle)
        record = read_record(write_json(tmp_path/"benchmark.json", summary), BenchmarkRecord)
        assert read_control(record["control"])["clock"] == control["clock"] and record["load"] == [0.0, 1.5, 1.0]


def count_rounds(clocks: list[str], rounds: int, seconds: float, pause: float = 0) -> tuple[int, dict, list[str]]:
    "Run rounds whose control gives these clocks in turn, the last one for ever."
    answers = itertools.chain(clocks, itertools.repeat(clocks[-1]))
    numbers: list[int] = []
    texts: list[str] = []

    def measure(r: int) -> None:
        numbers.append(r)
        time.sleep(pause)

    check = lambda: dict(clock=next(answers))
    control = run_rounds(measure, check, rounds, seconds, lambda fraction, text: texts.append(text))
    assert numbers == list(range(len(numbers)))
    return len(numbers), control, texts


def test_rounds_end_as_soon_as_wall_time_is_valid():
    assert count_rounds(["wall"], 10, 60)[0] == 10
    n, control, texts = count_rounds(["none", "cpu", "wall"], 10, 60)
    assert n == 22 and control["clock"] == "wall"   # looks after 10, 15 and 22 rounds
    assert "control not valid yet" in texts[-1] and "of 60 s" in texts[-1]


def test_rounds_end_when_the_time_is_over():
    n, control, _ = count_rounds(["cpu"], 3, 0.2, pause=0.02)
    assert 3 < n < 20 and control["clock"] == "cpu"
    assert count_rounds(["none"], 3, 0)[0] == 3
    assert 100 < count_rounds(["none"], 100, 0.05, pause=0.002)[0] < 150, "the time also ends rounds before a look"


def test_looks_at_the_control_rarely_accept_a_ratio_on_the_limit():
    rng = np.random.default_rng(0)
    accepted = 0
    for _ in range(300):
        other = np.exp(rng.normal(0, 0.05, (75, 1)))
        looks = (10, 15, 22, 33, 49)
        accepted += any(timing._within_limits(timing.speed_ratio(1.05 * np.ones((n, 1)), other[:n])) for n in looks)
    assert accepted / 300 < 0.1


class LocalWorker:
    "A worker's server in this process."
    def __init__(self, images: list[np.ndarray], files: Sequence[str] = (), threads: int = 1, **options: Any):
        self.server = RuntimeServer()
        self.server.images = images
        self.server.contents = [Path(name).read_bytes() for name in files]
        self.server.decoding = DEFAULT_DECODING
        self.server.predict = lambda batch: batch.sum((1, 2)) * threads

    def call(self, method: str, **arguments: Any) -> Any: return getattr(self.server, method)(**arguments)


def test_further_rounds_measure_every_candidate(monkeypatch, tmp_path: Path):
    @contextlib.contextmanager
    def start(processes: dict, images: list, **options: Any) -> Iterator[tuple[dict, dict]]:
        yield {name: LocalWorker(images, **options) for name in processes}, dict.fromkeys(processes, 0.5)

    def check_once(candidate: Candidate, short: tuple, long: tuple) -> dict[str, Any]:
        "Call the control valid after further rounds, whatever this machine does."
        return check_control(candidate, short, long) | dict(clock="none" if short[0].shape[1] < 8 else "wall")

    monkeypatch.setattr(timing, "check_control", check_once)
    monkeypatch.setattr(timing, "start_workers", start)
    candidates = [Candidate(model, RUNTIMES["onnx fp32"], "") for model in ("trained", "compressed")]
    images = [np.zeros((30, 40, 3), np.uint8)]
    found = timing.measure_candidates(candidates, images, n_calls=10, rounds=5, batch_size=4, control_seconds=600)
    assert found.control["rounds"] == 10   # looks after 5, 7 and 10 rounds
    assert [t.seconds.shape for t in found.timings.values()] == [(10, 2)] * 2
    assert all((t.cpu_seconds > 0).all() and t.batch_seconds.shape == (3, 1) for t in found.timings.values())
    assert all(t.load_seconds == 0.5 and t.file_seconds is None for t in found.timings.values())

    file = tmp_path/"a.png"
    Image.fromarray(images[0]).save(file)
    found = timing.measure_candidates(candidates, images, n_calls=10, rounds=5, batch_size=4, control_seconds=600,
                                      files=[str(file)], all_threads=True)
    for t in found.timings.values():
        assert t.file_seconds.shape == t.file_cpu_seconds.shape == (10, 2) and (t.file_seconds > 0).all()
        assert t.all_threads.shape == (5, 2) and t.all_threads_batch.shape == (5, 1)


def test_time_from_file_to_label_includes_decoding(tmp_path: Path) -> None:
    image = np.zeros((7, 9, 3), np.uint8)
    Image.fromarray(image).save(tmp_path/"a.png")
    worker = LocalWorker([image], [str(tmp_path/"a.png")])
    shapes = []
    worker.server.predict = lambda batch: shapes.append(batch.shape) or np.zeros((1, 2))
    assert len(worker.call("time_files", n=3, warm_up=1, round_number=0)) == 3
    assert shapes == [(1, 7, 9, 3)] * 5   # every file once, one call to warm up, three timed ones
    (tmp_path/"b.png").write_bytes(b"no image")
    worker.server.contents = [(tmp_path/"b.png").read_bytes()]
    with pytest.raises(UnreadableImage): worker.call("time_files", n=1, warm_up=0, round_number=0)


def test_cpu_time_counts_all_threads_and_no_waiting():
    def wait(images: np.ndarray) -> None: time.sleep(0.02)

    server = RuntimeServer()
    server.images = [np.zeros((4, 4, 3), np.uint8)]
    server.predict = wait
    ((wall, cpu),) = server.time(n=1, batch_size=1, warm_up=0, round_number=0)
    assert wall >= 0.02 > 2 * cpu


def test_benchmark_of_an_earlier_version_is_read_and_void():
    record = read_record(RESULTS, BenchmarkRecord)
    old = dict(model="trained", runtime="onnx fp32", ratio=1.016, low=0.924, high=1.093, n=100, valid=True, verdict="")
    assert read_control(old)["clock"] == "none" and "[0.924, 1.093] is not within" in read_control(old)["verdict"]
    narrow = read_control(old | dict(low=0.99, high=1.01))
    assert narrow["clock"] == "none" and "no long call" in narrow["verdict"]
    assert read_control(dict(verdict="holds"))["clock"] == "none"
    assert record["rows"] and read_control(record["control"])["clock"] in ("wall", "cpu", "none")
