"""Check what has changed since the last commit, in under three minutes: `make check`.

Lint and house rules come first, then the changed notebooks, then the quick tests of their packages. Without uncommitted
changes the last commit is checked. Steps that do not finish in time are named at the end; `make test` runs everything.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import house
import run_tests

ROOT = house.ROOT
SECONDS = 170   # for all steps together


def changed(root: Path = ROOT) -> list[str]:   # paths relative to the project
    "List the files that differ from the last commit, deleted ones too, or those of the last commit if none does."
    def git(*args: str) -> list[str]:
        return subprocess.run(["git", *args], cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")

    uncommitted = git("diff", "--name-only", "-z", "HEAD") + git("ls-files", "-z", "--others", "--exclude-standard")
    names = [n for n in uncommitted if n] or [n for n in git("show", "--name-only", "--format=", "-z", "HEAD") if n]
    return sorted({n.strip() for n in names})


def notebooks(
    files: list[str],    # from `changed`
    root: Path = ROOT,   # the project
) -> list[str]:          # those that run without a run directory
    "Pick the changed library notebooks that still exist."
    library = [f for f in files if f.startswith("nbs/") and f.endswith(".ipynb") and Path(f).name[0].isdigit()]
    return [f for f in library if (root/f).is_file()]


def test_folders(
    files: list[str],     # from `changed`
    root: Path = ROOT,    # the project
) -> list[str]:           # such as tests/audit
    "Find the tests of the packages that changed: their notebooks, their modules or the tests themselves."
    rooms = {parts[1] for f in files if len(parts := Path(f).parts) > 2 and parts[0] in ("nbs", "cvnb", "tests")}
    if any(f.startswith("nbs/stages/") for f in files): rooms.add("pipeline")
    return [f"tests/{room}" for room in sorted(rooms - {"house", "tracer"}) if (root/"tests"/room).is_dir()]


def steps(
    files: list[str],   # from `changed`
) -> list[tuple[str, list[str | Path]]]:   # what it is, and its command
    "List what has to be run, the quickest first."
    parallel = ["-n", str(os.cpu_count() or 1), "--dist", "loadfile"]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "not slow and not long", *parallel]
    found = [("lint", [sys.executable, "dev/run_tests.py", "--only", "lint"]),
             ("house rules", [*pytest, "tests/house/test_house.py"])]
    if pages := notebooks(files): found.append((" ".join(pages), [sys.executable, "dev/run_notebooks.py", *pages]))
    if folders := test_folders(files): found.append((" ".join(folders), [*pytest, *folders]))
    return found


def run(
    what: list[tuple[str, list[str | Path]]],   # from `steps`
    seconds: float = SECONDS,                   # for all of them together
) -> tuple[list[str], list[str]]:               # what failed, and what did not finish
    "Run the steps one after the other until the time is over."
    end, failed, unfinished = time.monotonic() + seconds, [], []
    env = os.environ | run_tests.PLAIN | {"PATH": f"{run_tests.BIN}{os.pathsep}{os.environ['PATH']}"}
    for name, command in what:
        print(f"── {name}", flush=True)
        try: done = subprocess.run([str(c) for c in command], cwd=ROOT, env=env, timeout=max(1, end - time.monotonic()))
        except subprocess.TimeoutExpired: unfinished.append(name)
        else: failed += [name] if done.returncode not in (0, 5) else []   # 5: there are no quick tests
    return failed, unfinished


def main() -> int:   # exit code
    "Check, and say what failed and what did not finish."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    begin = time.monotonic()
    failed, unfinished = run(steps(changed()))
    print(f"── {time.monotonic() - begin:.0f} s")
    for name in failed: print(f"FAILED {name}")
    for name in unfinished: print(f"not finished within {SECONDS} s: {name}. `make test` runs it.")
    return bool(failed)


if __name__ == "__main__": sys.exit(main())
