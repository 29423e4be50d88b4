"""Run all notebooks: the stages with their defaults and then the tutorials in one process, beside it the library notebooks.

The tutorial `first_run` repeats the tests' smoke run, so tests/test_tutorials.py runs it where that run is at hand.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from multiprocessing import get_context
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def chains() -> Iterator[list[Path]]:   # the longest first
    "Group the notebooks: those of a group run one after the other."
    from cvnb.params import contracts
    stages = [ROOT/"nbs"/"stages"/f"{stage}.ipynb" for stage in contracts(ROOT/"nbs"/"stages")]   # each after what it needs
    yield stages + sorted(f for f in (ROOT/"nbs"/"tutorials").glob("[!._]*.ipynb") if f.stem != "first_run")
    for file in sorted((ROOT/"nbs").glob("[!._]*.ipynb")): yield [file]


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


def run_chain(
    files: list[Path],   # notebooks
) -> list[str]:          # a line for each that failed
    "Run notebooks one after the other, and print a line for each."
    failed = []
    for file in files:
        passed, seconds, said = run(file)
        line = f"{'ok' if passed else 'FAILED':<6} {seconds:6.1f} s  {os.path.relpath(file, ROOT)}"
        print(line if passed else f"{said}\n{line}", flush=True)
        if not passed: failed.append(f"FAILED {os.path.relpath(file, ROOT)}: {(said.strip().splitlines() or ['nothing was said'])[-1]}")
    return failed


def run_all(
    todo: list[list[Path]],   # groups of notebooks
    n: int,                   # processes
) -> list[str]:               # a line for each notebook that failed
    "Run groups of notebooks side by side."
    failed = []
    with ProcessPoolExecutor(n, get_context("fork")) as pool:   # a process that has imported torch once runs many notebooks
        running = {pool.submit(run_chain, files): files for files in todo}
        for future in as_completed(running):
            try: failed += future.result()
            except Exception as e:   # a process that died takes its notebook along, and all that wait
                failed.append(f"FAILED {', '.join(os.path.relpath(f, ROOT) for f in running[future])}: {type(e).__name__}: {e}")
    return failed


def main() -> int:   # exit code
    "Run what the command line names."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", type=Path, help="notebooks; all by default")
    parser.add_argument("--times", type=int, default=1, help="how often")
    args = parser.parse_args()
    failed = run_all(([[f.resolve()] for f in args.files] or list(chains())) * args.times, min(os.cpu_count() or 1, 8))
    print("\n".join(failed))
    return bool(failed)


if __name__ == "__main__":
    import run_notebooks  # not as `__main__`, whose place notebooks take
    sys.exit(run_notebooks.main())
