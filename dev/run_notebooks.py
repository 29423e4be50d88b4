"""Run the library's notebooks and the tutorials.

The stages and the tutorial `first_run` are left out: the tests execute them (smoke run, tests/house/test_tutorials.py).
Notebooks that the command line names are run in any case.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

import house

import cvnb  # noqa: F401   sets variables of the environment, before anything saves and restores it

ROOT = house.ROOT


def notebooks() -> list[Path]:   # the longest ones first
    "List the tutorials and the library's notebooks."
    tutorials = sorted(f for f in (ROOT/"nbs"/"tutorials").glob("[!._]*.ipynb") if f.stem != "first_run")
    return [*tutorials, ROOT/"nbs/index.ipynb", *library()]


def library() -> list[Path]:   # in the order of the package's rooms
    "List the notebooks that export a module."
    hidden = lambda file: any(p.startswith((".", "_")) for p in file.relative_to(ROOT).parts)
    found = [f for f in (ROOT/"nbs").rglob("[0-9]*.ipynb") if not hidden(f)]
    return sorted(found, key=lambda f: (house.PACKAGES.index(f.parent.name), f.name))


def run(
    file: Path,   # a notebook
) -> tuple[bool, float, str]:   # whether it passed, seconds, what it said on standard error
    "Run a notebook as `nbdev_test` does; what it changes in the environment ends with it."
    from nbdev.test import test_nb
    before, said = dict(os.environ), io.StringIO()
    with contextlib.redirect_stderr(said): passed, seconds = test_nb(file, skip_flags=["slow"], basepath=ROOT)
    os.environ.clear()
    os.environ.update(before)
    return passed, seconds, said.getvalue()


def run_and_print(
    file: Path,     # a notebook
) -> list[str]:     # a line if it failed
    "Run a notebook, and print a line about it."
    passed, seconds, said = run(file)
    line = f"{'ok' if passed else 'FAILED':<6} {seconds:6.1f} s  {os.path.relpath(file, ROOT)}"
    print(line if passed else f"{said}\n{line}", flush=True)
    if passed: return []
    last = (said.strip().splitlines() or ["no message"])[-1]
    return [f"FAILED {os.path.relpath(file, ROOT)}: {last}"]


def run_all(
    files: list[Path],   # notebooks
    n: int,              # processes
) -> list[str]:          # a line for each that failed
    "Run notebooks side by side."
    failed = []
    with ProcessPoolExecutor(n, get_context("fork")) as pool:   # each process imports torch once for many notebooks
        running = {pool.submit(run_and_print, file): file for file in files}
        for future in as_completed(running):
            try: failed += future.result()
            except Exception as e:   # a process that died takes its notebook along, and all that wait
                failed.append(f"FAILED {os.path.relpath(running[future], ROOT)}: {type(e).__name__}: {e}")
    return failed


def main() -> int:   # exit code
    "Run what the command line names."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; default: all but the stages")
    parser.add_argument("--times", type=int, default=1, help="how often")
    args = parser.parse_args()
    failed = run_all(([f.resolve() for f in args.files] or notebooks()) * args.times, min(os.cpu_count() or 1, 8))
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    import run_notebooks  # not as `__main__`, whose place notebooks take
    sys.exit(run_notebooks.main())
