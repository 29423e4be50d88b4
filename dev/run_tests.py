"""Run every check of the project, one after the other, and say at the end what was left out: `make test`."""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SUMMARY = re.compile(r"^(\x1b\[\d+m)*=+ .* in [\d.]+s.* =+(\x1b\[\d+m)*$", re.M)
# One thread for each process: there are as many processes as cores. Tests compare bits, which a GPU does not repeat.
PLAIN = dict(OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
LEFT_OUT = re.compile(r"^left out: .*", re.M)
FAILED_NOTEBOOK = re.compile(r"^FAILED \S+\.ipynb.*", re.M)
FAILED_TEST = re.compile(r"^(?:\x1b\[\d+m)*(?:FAILED|ERROR)(?:\x1b\[\d+m)* .*", re.M)


def call(
    *command: str | Path,   # program and arguments
    keep: bool = False,     # whether to return what it prints, besides showing it
    **variables: str,       # added to the environment
) -> tuple[bool, str]:      # whether it ended well, and what it printed
    "Run a command in the project's folder, its output shown as it comes."
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"} | variables
    env.pop("PYTHONDONTWRITEBYTECODE", None)   # hundreds of processes would compile cvnb anew
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace") if keep else {}
    with subprocess.Popen([str(c) for c in command], cwd=ROOT, env=env, **pipe) as process:
        lines = []
        for line in process.stdout or []:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode == 0, "".join(lines)


def generated() -> bool:
    "Check that cvnb/ and README.md are what the notebooks generate."
    package = call(sys.executable, "dev/check_export.py")[0]
    return call(sys.executable, "dev/readme.py", "--check")[0] and package


def style() -> bool:
    "Check Python files and notebooks with ruff."
    wanted = [p for p in ("cvnb", "tests", "dev", "setup.py", "nbs", "benchmarks", "dashboards") if (ROOT/p).exists()]
    return call(BIN/"ruff", "check", "--quiet", "--output-format", "concise", *wanted)[0]


def notebooks() -> tuple[bool, str]:
    "Run every notebook, as many at a time as there are cores, and return a line for each that failed."
    ok, text = call(sys.executable, "dev/run_notebooks.py", keep=True, **PLAIN)
    failed = "\n".join(dict.fromkeys(FAILED_NOTEBOOK.findall(text)))
    return ok, failed or ("" if ok else "the notebooks did not finish")


def pytest(
    marks: str = "not long",   # which tests, as `pytest -m` takes it
) -> tuple[bool, str]:         # whether it passed, and what it said
    "Run pytest, processes of one thread each; return the failed tests and pytest's last line."
    color = "yes" if sys.stdout.isatty() else "no"
    n = min(3, 1 + (os.cpu_count() or 1))   # one more than two cores: tests wait a quarter of their time
    options = ("-m", marks, "-n", str(n), "--dist", "loadfile", "--durations=8", f"--color={color}")
    ok, text = call(sys.executable, "-m", "pytest", *options, keep=True, **PLAIN)
    words = [m[-1].group() for m in (list(SUMMARY.finditer(text)), list(LEFT_OUT.finditer(text))) if m]
    return ok, "\n".join([*FAILED_TEST.findall(text), *(words or ["pytest did not finish"])])


STEPS: dict[str, tuple[Callable, tuple[str, ...]]] = {   # step -> (what it runs, which calls run it)
    "cvnb/ and README.md match their notebooks": (generated, ("test", "lint")),
    "ruff": (style, ("test", "lint")),
    "notebooks": (notebooks, ("test",)),
    "pytest": (pytest, ("test",)),
    "pytest, long": (partial(pytest, "long"), ("long",)),
}


def run(
    kind: str,   # "test", "lint" (what takes seconds) or "long" (what `test` leaves out)
) -> bool:       # whether everything passed
    "Run the steps of a kind, all of them even if one fails; print a table of their results, and below it their output."
    steps = {name: step for name, (step, kinds) in STEPS.items() if kind in kinds}
    table, words, passed = [], [], True
    for i, (name, step) in enumerate(steps.items(), 1):
        print(f"\n── {i}/{len(steps)} {name}", flush=True)
        begin = time.perf_counter()
        result = step()
        ok, said = result if isinstance(result, tuple) else (result, "")
        table.append(f"{'ok' if ok else 'FAILED':<6} {time.perf_counter() - begin:6.1f} s  {name}")
        print(table[-1], flush=True)
        words += said.splitlines()
        passed = passed and ok
    print("\n" + "\n".join(["──", *table, *words]))
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["lint", "long"],
                        help="lint: the checks that take seconds; long: the tests marked `long`")
    sys.exit(not run(parser.parse_args().only or "test"))
