"""Fixtures that several files use, the order of a parallel run, and the last line of a run: what was left out."""
from __future__ import annotations

import ast
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import house
import network
import pytest
from filelock import FileLock

import cvnb  # noqa: F401   sets variables of the environment, before anything saves and restores it

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update"]
_LEFT_OUT = pytest.StashKey[str]()


def left_out(
    reasons: Counter,   # reason -> how many tests were skipped for it
    deselected: int,    # how many tests the command line left out
    marks: str = "",    # the command line's `-m`
) -> str:               # one line
    "Say what a test run left out."
    parts = [f"{n} test{'s' * (n > 1)}: {reason}" for reason, n in reasons.items()]
    if deselected: parts.append(f"{deselected} tests that the command line deselected")
    if "not long" in marks: parts.append("tests marked `long` (`make test-long` runs them)")
    return "left out: " + ("; ".join(parts) or "nothing")


def _stats(session: pytest.Session, outcome: str) -> list:
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")   # a parallel run's workers have none
    return reporter.stats.get(outcome, []) if reporter else []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    "In CI, turn a run that skipped a test into a failed one."
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in _stats(session, "skipped"))
    deselected = len(_stats(session, "deselected"))
    session.config.stash[_LEFT_OUT] = left_out(reasons, deselected, session.config.option.markexpr)
    if not (IN_CI and reasons): return
    session.config.stash[_LEFT_OUT] += " (a failure where CI is set)"
    if session.exitstatus == pytest.ExitCode.OK: session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    "Write the line below pytest's own summary."
    if _LEFT_OUT in config.stash and not hasattr(config, "workerinput"): print(config.stash[_LEFT_OUT])


# One fork server for the stages of all tests of a parallel run, which would otherwise import torch in every call.


def pytest_configure(config: pytest.Config) -> None:
    "Start the server in the process that starts the others; it ends with it."
    if hasattr(config, "workerinput") or not config.getoption("numprocesses", None): return
    from cvnb.pipeline.kernels import FORK_SERVER_VARIABLE, start_fork_server
    if address := start_fork_server(): os.environ[FORK_SERVER_VARIABLE] = address


@pytest.fixture
def own_fork_server(monkeypatch: pytest.MonkeyPatch) -> None:
    "Let each call of a test start a fork server of its own: where the server is what is tested, or runs other code."
    from cvnb.pipeline.kernels import FORK_SERVER_VARIABLE
    monkeypatch.delenv(FORK_SERVER_VARIABLE, raising=False)


# A parallel run: the tests of a file share a process, except slow ones that share no fixture of their file.


def find_independent_slow_tests(
    folder: Path,   # of the tests
) -> set[str]:      # "tests/test_x.py::test_y"
    "Find the slow tests that may run in a process of any other file."
    found = set()
    for file in folder.rglob("test_*.py"):
        nodes = ast.parse(file.read_text(encoding="utf-8")).body
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
        marks = {f.name: " ".join(map(ast.unparse, f.decorator_list)) for f in functions}
        shared = {name for name, mark in marks.items() if "fixture(scope=" in mark}
        found |= {f"{folder.name}/{file.relative_to(folder).as_posix()}::{f.name}" for f in functions
                  if "mark.slow" in marks[f.name] and not shared & {a.arg for a in f.args.args}}
    return found


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> object:
    "Distribute files, and slow tests by themselves, in the order in which they were collected."
    from xdist.scheduler import LoadFileScheduling
    if config.getvalue("dist") != "loadfile": return None
    alone = find_independent_slow_tests(ROOT/"tests")
    config.option.loadscopereorder = False

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return nodeid if nodeid.partition("[")[0] in alone else super()._split_scope(nodeid)
    return Scheduling(config, log)


# Files whose few tests take minutes.
LONG = ("test_review", "test_network", "test_dashboard", "test_tracking", "test_fiftyone_db", "test_fiftyone_keeper",
        "test_sweep", "test_audit", "test_checkpoints", "test_distributed", "test_cross_validation",
        "test_wandb_tracker", "test_tuning", "test_fit")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    "Order a parallel run: the smoke run, which many tests wait for, slow tests beside it, long files, then small ones."
    if not hasattr(config, "workerinput"): return
    alone = find_independent_slow_tests(ROOT/"tests")
    sizes = Counter(item.path for item in items)

    def order_key(item: pytest.Item) -> tuple[int, int]:
        waits = bool({"traced_run", "small_run"} & {*item.fixturenames})
        if item.path.name == "test_runner.py": return 0, 0
        if item.nodeid.partition("[")[0] in alone: return 1 + waits, 0
        return (3, LONG.index(item.path.stem)) if item.path.stem in LONG else (5 - waits, -sizes[item.path])
    items.sort(key=order_key)


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    "Restore the environment after a test: FiftyOne's address would send other tests' processes to its database."
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of Chromium; without it the test is skipped, or fails in CI."
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path: return path
    remedy = "Chromium is not installed (Debian: apt install chromium)"
    pytest.fail(remedy) if IN_CI else pytest.skip(remedy)


@pytest.fixture(scope="session")
def strace() -> str:
    "Path of strace; where it is missing or may not trace, the test is skipped, or fails in CI."
    path, remedy = shutil.which("strace"), "strace is not installed (Debian: apt install strace)"
    if path:
        done = subprocess.run([path, "-f", "--seccomp-bpf", "-qq", "-e", "trace=connect", "true"], capture_output=True)
        if not done.returncode: return path
        remedy = "strace may not trace processes here"
    pytest.fail(remedy) if IN_CI else pytest.skip(remedy)


@pytest.fixture(scope="session")
def _browser(chromium: str) -> Iterator:
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def playwright_page(_browser) -> Iterator:
    "A fresh page of headless Chromium."
    context = _browser.new_context(viewport={"width": 1400, "height": 1000})
    yield context.new_page()
    context.close()


@pytest.fixture(scope="session")
def root() -> Path:
    "The project's folder."
    return ROOT


@pytest.fixture(scope="session")
def smoke_run(traced_run) -> Path:
    "All six stages with their defaults, run once through the command line."
    return traced_run[0]


def write_small_photos(folder: Path) -> Path:
    "Write sixty real images of handwritten digits in two classes."
    from cvnb.data.dataset import locate_data
    for label in "1", "7":
        (folder/label).mkdir(parents=True)
        for path in sorted((locate_data("digits")/label).iterdir())[:30]: shutil.copy(path, folder/label)
    return folder


@pytest.fixture
def small_photos(tmp_path) -> Path:
    "Sixty real images of handwritten digits in two classes."
    return write_small_photos(tmp_path/"photos")


@pytest.fixture(scope="session")
def shared(tmp_path_factory) -> Path:
    "A folder that the processes of a parallel run share."
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def traced_run(shared) -> tuple[Path, dict[str, set[tuple[str, str]]]]:
    "The smoke run, and for each stage the functions of cvnb that it called: (module, qualified name)."
    run, seen = shared/"runs/smoke", shared/"trace"
    seen.mkdir(exist_ok=True)
    path = os.pathsep.join([str(ROOT/"tests/tracer"), str(ROOT)])
    env = os.environ | {"PYTHONPATH": path, "CVNB_TRACED": str(ROOT/"cvnb") + os.sep, "CVNB_TRACE": str(seen)}
    env.pop("CVNB_FORK_SERVER", None)   # the tracer has to be there when a server starts
    with FileLock(shared/"smoke.lock"):
        if not (shared/"smoke.done").exists():
            command = [Path(sys.executable).with_name("cvnb"), "run", "--run", run]
            done = subprocess.run(command, capture_output=True, text=True, env=env)
            assert done.returncode == 0, done.stderr[-3000:]
            (shared/"smoke.done").touch()
    called: dict[str, set[tuple[str, str]]] = {}
    for file in seen.iterdir():
        names = map(tuple, json.loads(file.read_text()))
        called.setdefault(file.name.split("-")[0], set()).update(names)
    return run, called


# A small run of all six stages.
SMALL = [arg for setting in ("train.backbone=resnet10t", "train.weights=", "train.epochs=2", "compress.epochs=1",
                             "benchmark.n_calls=20", "benchmark.rounds=3",
                             "benchmark.control_seconds=0") for arg in ("--set", setting)]


@pytest.fixture(scope="session")
def small_run(shared) -> Path:
    "All six stages on sixty images, run once with a home folder of its own, and watched where strace is installed."
    folder = shared/"watched"
    run = folder/"runs/small"
    with FileLock(shared/"small.lock"):
        if not (folder/"out").exists():
            shutil.rmtree(folder, ignore_errors=True)
            photos = write_small_photos(folder/"photos")
            command = Path(sys.executable).with_name("cvnb"), "run", "--data", photos, "--run", run, *SMALL
            (folder/"out").write_text(network.watch(folder, *command, traced=shutil.which("strace") is not None).out)
    return run


@pytest.fixture
def ray_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[object]:
    "A Ray cluster of two nodes with one processor each."
    monkeypatch.setenv("RAY_USAGE_STATS_REPORT_URL", "http://127.0.0.1:9")   # else the head reports that it does not
    from ray.cluster_utils import Cluster
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1, include_dashboard=False))
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def wheel(shared) -> Path:
    "The wheel, built from a copy of the checkout by way of the source distribution."
    with FileLock(shared/"wheel.lock"):
        if not (shared/"wheel").exists():
            for file in house.tracked():
                (copy := shared/"source"/file.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(file, copy)
            build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", shared/"wheel", shared/"source"]
            done = subprocess.run(build, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout + done.stderr
    return next((shared/"wheel").glob("*.whl"))
