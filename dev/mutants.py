"""Plant faults one at a time, and list those that no test finds: python dev/mutants.py [--only NAME] [--write].

Each mutant of `mutant_table.py` changes one line in a copy of the project. A module is generated from a notebook, so
the same line changes in both: a notebook that is run as a test uses its own cells. The tests named in the table run in
the copy. A mutant is killed if one of them fails or does not end in time. One that survives needs a reason in the
table. The tests run without a mutant first, and have to pass.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import house
from mutant_table import MUTANTS, Mutant

ROOT = house.ROOT
TABLE = ROOT/"dev"/"MUTANTS.md"


@dataclass(frozen=True)
class Outcome:
    "What the tests said about a mutant."
    mutant: Mutant
    killed: bool
    by: str          # the first test that failed, or "time"; empty for a survivor
    seconds: float


def source_notebook(file: str, root: Path = ROOT) -> str:   # path in the project; empty for a file that has none
    "Find the notebook that a module is generated from."
    found = re.search(r"File to edit: (?:\.\./)*(nbs/\S+\.ipynb)", (root/file).read_text(encoding="utf-8")[:2000])
    return found[1] if found and file.endswith(".py") else ""


def _patched(file: Path, old: str, new: str) -> str:
    "Replace an excerpt of one line, which has to occur once; of a notebook, in its exported or other code cells."
    text = file.read_text(encoding="utf-8")
    if file.suffix != ".ipynb":
        if text.count(old) != 1: raise ValueError(f"{file.name} has the line {text.count(old)} times: {old}")
        return text.replace(old, new)
    notebook = json.loads(text)
    cells = [c for c in notebook["cells"] if c["cell_type"] == "code" and old in "".join(c["source"])]
    if len(exported := [c for c in cells if "".join(c["source"]).startswith("#| export")]): cells = exported
    n = sum("".join(c["source"]).count(old) for c in cells)
    if n != 1: raise ValueError(f"{file.name} has the line {n} times: {old}")
    cells[0]["source"] = "".join(cells[0]["source"]).replace(old, new)
    return json.dumps(notebook)


def patches(mutant: Mutant, root: Path = ROOT) -> dict[Path, str]:   # file -> its changed text
    "Compute the changed files of a mutant; raise `ValueError` for a line that does not occur exactly once."
    if "\n" in mutant.old or mutant.old == mutant.new: raise ValueError(f"{mutant.name}: one line has to change")
    files = [mutant.file, *filter(None, [source_notebook(mutant.file, root)])]
    found = {root/file: _patched(root/file, mutant.old, mutant.new) for file in files}
    for path, text in found.items():
        if path.suffix == ".py": compile(text, path, "exec")
    return found


def faults(mutants: tuple[Mutant, ...] = MUTANTS, root: Path = ROOT) -> list[str]:
    "Find mutants that cannot be planted any more, or whose tests are gone; one line each."
    names = [m.name for m in mutants]
    found = [f"{name}: two mutants have this name" for name in sorted({n for n in names if names.count(n) > 1})]
    for mutant in mutants:
        try: patches(mutant, root)
        except (OSError, ValueError, SyntaxError) as e: found.append(f"{mutant.name}: {e}")
        if not mutant.tests: found.append(f"{mutant.name}: it names no test")
        for test in mutant.tests:
            file, _, name = test.partition("::")
            text = (root/file).read_text(encoding="utf-8") if (root/file).is_file() else ""
            known = f"def {name.partition('[')[0]}(" in text if name else bool(text)
            if not known: found.append(f"{mutant.name}: there is no test {test}")
    return found


def copy_project(folder: Path) -> Path:   # the copy
    "Copy the files that git has or would take."
    for path in house.tracked(ROOT):
        target = folder/path.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target)
    return folder


_running: set[int] = set()   # process groups of tests
_stopped = threading.Event()


def stop(*_: object) -> None:
    "End the tests that run, so that the copies are deleted and nothing is left."
    _stopped.set()
    for group in list(_running): os.killpg(group, signal.SIGKILL)


def environment(copy: Path, scratch: Path) -> dict[str, str]:
    "Make the environment in which the copy's cvnb is imported, with caches of its own."
    return os.environ | dict(PYTHONPATH=str(copy), PYTHONDONTWRITEBYTECODE="1", CVNB_CACHE=str(scratch/"cache"),
                             OMP_NUM_THREADS="1", TMPDIR=str(scratch), CI="")


def run(
    command: list[str],   # program and arguments
    copy: Path,           # of the project, where it runs
    seconds: float,       # after which it is ended
) -> tuple[int | None, str]:   # exit code, None where the time was too short; what it said
    "Run a command in a copy, and end all of its processes after a time."
    if _stopped.is_set(): raise RuntimeError("interrupted")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as scratch:
        process = subprocess.Popen(command, cwd=copy, env=environment(copy, Path(scratch)), text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
        _running.add(process.pid)
        try:
            output, _ = process.communicate(timeout=seconds)
            return process.returncode, output
        except subprocess.TimeoutExpired: return None, ""
        finally:
            _running.discard(process.pid)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()


def check_copy(copy: Path) -> None:
    "Raise `RuntimeError` if the tests of a copy would import another cvnb."
    code = "import cvnb, cvnb.export.bundle as b; print(cvnb.__file__, b.__file__, sep='\\n')"
    _, output = run([sys.executable, "-c", code], copy, 120)
    if not all(Path(line).is_relative_to(copy) for line in output.split()):
        raise RuntimeError(f"the tests of {copy} would import {output}")


def commands(tests: tuple[str, ...]) -> list[list[str]]:
    "Make the commands for tests and notebooks."
    pages = [t for t in tests if t.endswith(".ipynb")]
    cases = [t for t in tests if t not in pages]
    pytest = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-m", "not long", *cases]
    return [pytest] * bool(cases) + [[sys.executable, "dev/run_notebooks.py", *pages]] * bool(pages)


def failed_test(command: list[str], code: int | None, output: str) -> str:   # empty if all passed
    "Name the test that failed; raise `RuntimeError` if they could not be run."
    if code == 0: return ""
    if code is None: return "time"
    found = re.search(r"^(?:FAILED|ERROR) (.+?)(?: - |: |$)", output, re.M)
    if not found or (command[2] == "pytest" and code not in (1, 2)):
        raise RuntimeError(f"{' '.join(command[1:])} ended with {code}:\n{output[-3000:]}")
    return found[1]


def first_failure(tests: tuple[str, ...], copy: Path, seconds: float) -> str:   # empty if all passed
    "Run tests until one fails."
    for command in commands(tests):
        if found := failed_test(command, *run(command, copy, seconds)): return found
    return ""


def try_mutant(mutant: Mutant, copy: Path, seconds: float) -> Outcome:
    "Plant a mutant in a copy, run its tests, and restore the copy."
    changed = patches(mutant, copy)
    before = {path: path.read_bytes() for path in changed}
    begin = time.monotonic()
    try:
        for path, text in changed.items(): path.write_text(text, encoding="utf-8")
        by = first_failure(mutant.tests, copy, seconds)
    finally:
        for path, content in before.items(): path.write_bytes(content)
    return Outcome(mutant, bool(by), by, time.monotonic() - begin)


def try_all(mutants: list[Mutant], jobs: int, seconds: float) -> list[Outcome]:
    "Check the tests without a mutant, then try all mutants in several copies."
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        copies = [copy_project(Path(folder)/str(i)) for i in range(jobs)]
        check_copy(copies[0])
        tests = tuple(dict.fromkeys(t for m in mutants for t in m.tests))
        by = first_failure(tests, copies[0], 60 * len(tests) + 600)
        if by: raise RuntimeError(f"without a mutant, {by} fails")
        print(f"{len(tests)} tests pass without a mutant", flush=True)
        free: queue.Queue[Path] = queue.Queue()
        for copy in copies: free.put(copy)

        def attempt(mutant: Mutant) -> Outcome:
            copy = free.get()
            try: outcome = try_mutant(mutant, copy, seconds)
            finally: free.put(copy)
            print(f"{'killed' if outcome.killed else 'SURVIVED':<9}{outcome.seconds:6.0f} s  {mutant.name}", flush=True)
            return outcome

        with ThreadPoolExecutor(jobs) as pool: return list(pool.map(attempt, mutants))


def as_markdown(outcomes: list[Outcome]) -> str:
    "Format the outcomes as a table with totals."
    n = sum(o.killed for o in outcomes)
    left = [o for o in outcomes if not o.killed]
    unexplained = sum(not o.mutant.reason for o in left)
    cell = lambda text: text.replace("|", "\\|")
    said = lambda o: f"killed by `{o.by}`" if o.killed else f"**survived**: {o.mutant.reason or 'no reason yet'}"
    rows = [f"| {o.mutant.stage} | {cell(o.mutant.name)} | `{o.mutant.file}` | {cell(said(o))} |" for o in outcomes]
    totals = f"{n} of {len(outcomes)} mutants are killed, {len(left)} survive, {unexplained} of them without a reason."
    return "\n".join([totals, "", "| stage | fault | file | outcome |", "|---|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", default=[], metavar="TEXT", help="part of a name or stage")
    parser.add_argument("--list", action="store_true", help="print the table, and run nothing")
    parser.add_argument("--jobs", type=int, default=1, help="copies in which tests run at a time")
    parser.add_argument("--seconds", type=float, default=600, help="time for the tests of one mutant")
    parser.add_argument("--write", action="store_true", help=f"write the table to {TABLE.relative_to(ROOT)}")
    args = parser.parse_args()
    chosen = [m for m in MUTANTS if not args.only or any(text in f"{m.stage} {m.name}" for text in args.only)]
    if found := faults(tuple(chosen)): sys.exit("\n".join(found))
    if args.list:
        for m in chosen: print(f"{m.stage:<12}{m.name}\n            {m.file}: {m.old}\n            → {m.new}")
        return 0
    for number in signal.SIGINT, signal.SIGTERM: signal.signal(number, stop)
    outcomes = try_all(chosen, args.jobs, args.seconds)
    table = as_markdown(outcomes)
    print(table)
    if args.write:
        head = f"# Mutants\n\n`python dev/mutants.py --write` on {datetime.date.today()}, {os.cpu_count()} cores."
        TABLE.write_text(f"{head} {table}\n", encoding="utf-8")
    return int(any(not o.killed and not o.mutant.reason for o in outcomes))


if __name__ == "__main__": sys.exit(main())
