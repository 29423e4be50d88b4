"""Run every check of the project, one after the other, and say at the end what was left out: `make test`."""
from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SUMMARY = re.compile(r"^(\x1b\[\d+m)*=+ .* in [\d.]+s.* =+(\x1b\[\d+m)*$", re.M)
LEFT_OUT = re.compile(r"^left out: .*", re.M)


def call(
    *command: str | Path,   # program and arguments
    keep: bool = False,     # whether to return what it prints, besides showing it
    **variables: str,       # added to the environment
) -> tuple[bool, str]:      # whether it ended well, and what it printed
    "Run a command in the project's folder, its output shown as it comes."
    env = os.environ | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"} | variables
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


def libraries() -> bool:
    "Run the library notebooks and the index, as many at a time as there are cores."
    # One thread each: as many workers with as many threads would wait for each other.
    return call(BIN/"nbdev_test", "--path", "nbs", "--skip_folder_re", "^[_.]|^stages$|^tutorials$", "--timing",
                OMP_NUM_THREADS="1")[0]


def stages() -> bool:
    "Run the stages with their defaults, each after what it needs, then the tutorials; one process loads torch once."
    return call(sys.executable, __file__, "--notebooks")[0]


def notebooks() -> bool:
    "Run the stage notebooks in the order of their graph, then the tutorials, in this process."
    from nbdev.test import test_nb

    from cvnb.params import contracts
    files = [ROOT/"nbs"/"stages"/f"{stage}.ipynb" for stage in contracts(ROOT/"nbs"/"stages")]
    files += sorted((ROOT/"nbs"/"tutorials").glob("[!._]*.ipynb"))
    passed = True
    for file in files:
        ok, seconds = test_nb(file, skip_flags=["slow"], basepath=ROOT)
        print(f"{'ok' if ok else 'FAILED':<6} {seconds:6.1f} s  {file.relative_to(ROOT)}", flush=True)
        passed = passed and ok
    return passed


def pytest() -> tuple[bool, str]:
    "Run pytest and return its last words too."
    color = "yes" if sys.stdout.isatty() else "no"
    ok, text = call(sys.executable, "-m", "pytest", "--durations=8", f"--color={color}", keep=True)
    words = [m[-1].group() for m in (list(SUMMARY.finditer(text)), list(LEFT_OUT.finditer(text))) if m]
    return ok, "\n".join(words or ["pytest did not come to an end"])


STEPS: dict[str, tuple[Callable, bool]] = {   # step -> (what it runs, whether `make lint` runs it too)
    "cvnb/ and README.md match their notebooks": (generated, True),
    "ruff": (style, True),
    "library notebooks": (libraries, False),
    "stage notebooks and tutorials": (stages, False),
    "pytest": (pytest, False),
}


def run(
    only_lint: bool,   # only what takes seconds
) -> bool:             # whether everything passed
    "Run the steps, all of them even if one fails, and show a table of them."
    steps = {name: step for name, (step, lint) in STEPS.items() if lint or not only_lint}
    table, last, passed = [], "", True
    for i, (name, step) in enumerate(steps.items(), 1):
        print(f"\n── {i}/{len(steps)} {name}", flush=True)
        begin = time.perf_counter()
        result = step()
        ok, last = result if isinstance(result, tuple) else (result, last)
        table.append(f"{'ok' if ok else 'FAILED':<6} {time.perf_counter() - begin:6.1f} s  {name}")
        print(table[-1], flush=True)
        passed = passed and ok
    print("\n" + "\n".join(["──", *table, *([last] if last else [])]))
    return passed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=["lint"], help="only the checks that take seconds")
    parser.add_argument("--notebooks", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sys.exit(not (notebooks() if args.notebooks else run(args.only == "lint")))
