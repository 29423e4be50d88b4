"""Fixtures for a browser, and the last line of every test run: what was left out and how to get it."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IN_CI = os.environ.get("CI", "").lower() in ("1", "true", "yes")
CHROMIUM_FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
                  "--disable-background-networking", "--disable-component-update"]
_LEFT_OUT = pytest.StashKey[str]()


def left_out(
    reasons: Counter,   # reason -> how many tests were skipped for it
    deselected: int,    # how many tests the command line left out
) -> str:               # one line
    "Say what a test run left out."
    parts = [f"{n} test{'s' * (n > 1)}: {reason}" for reason, n in reasons.items()]
    if deselected: parts.append(f"{deselected} tests that the command line deselected")
    return "left out: " + ("; ".join(parts) or "nothing")


def _stats(session: pytest.Session, outcome: str) -> list:
    return session.config.pluginmanager.get_plugin("terminalreporter").stats.get(outcome, [])


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    "In CI, turn a run that skipped a test into a failed one."
    reasons = Counter(r.longrepr[2].removeprefix("Skipped: ") for r in _stats(session, "skipped"))
    session.config.stash[_LEFT_OUT] = left_out(reasons, len(_stats(session, "deselected")))
    if not (IN_CI and reasons): return
    session.config.stash[_LEFT_OUT] += " (a failure where CI is set)"
    if session.exitstatus == pytest.ExitCode.OK: session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_unconfigure(config: pytest.Config) -> None:
    "Write the line below pytest's own summary."
    if _LEFT_OUT in config.stash: print(config.stash[_LEFT_OUT])


@pytest.fixture(scope="session")
def chromium() -> str:
    "Path of Chromium; without it the test is skipped, or fails in CI."
    path = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if path: return path
    remedy = "Chromium is not installed (Debian: apt install chromium)"
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


@pytest.fixture
def small_photos(tmp_path) -> Path:
    "Sixty real images of handwritten digits in two classes."
    from cvnb.data import locate
    folder = tmp_path/"photos"
    for label in "1", "7":
        (folder/label).mkdir(parents=True)
        for path in sorted((locate("digits")/label).iterdir())[:30]: shutil.copy(path, folder/label)
    return folder


@pytest.fixture(scope="session")
def traced_run(tmp_path_factory) -> tuple[Path, dict[str, set[tuple[str, str]]]]:
    "The smoke run, and for each stage the functions of cvnb that it called: (module, qualified name)."
    run, seen = tmp_path_factory.mktemp("runs")/"smoke", tmp_path_factory.mktemp("trace")
    env = os.environ | {"PYTHONPATH": str(ROOT/"tests/tracer"), "CVNB_TRACED": str(ROOT/"cvnb") + os.sep, "CVNB_TRACE": str(seen)}
    done = subprocess.run([Path(sys.executable).with_name("cvnb"), "run", "--run", run], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    called: dict[str, set[tuple[str, str]]] = {}
    for file in seen.iterdir(): called.setdefault(file.name.split("-")[0], set()).update(map(tuple, json.loads(file.read_text())))
    return run, called
