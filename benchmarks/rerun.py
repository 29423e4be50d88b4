"""What a second call costs: cvnb, papermill once per stage, and `dvc repro`, side by side on the same six notebooks.

    python benchmarks/rerun.py [--write]

Every tool runs the six stages with their defaults once. Then three second calls are timed: nothing changed; a word
of prose in the train notebook; one function that only the errors stage uses. papermill keeps no record of calls, so
its second call costs what its first did. In dvc.yaml each stage depends on its notebook, on the package and on the
folders of the stages it needs.
"""
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from cvnb.pipeline.params import read_contracts

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

ROOT, BIN = Path(__file__).resolve().parent.parent, Path(sys.executable).parent
PEER = "dvc==3.67.1"


def call(*command: object, **kw) -> float:   # wall seconds
    "Run a command and time it."
    begin = time.perf_counter()
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **kw)
    if done.returncode: raise SystemExit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}")
    return time.perf_counter() - begin


def project(folder: Path) -> Path:
    "A copy of the stages and the package, to change."
    for part in "nbs/stages", "cvnb", "configs", "dashboards":
        shutil.copytree(ROOT/part, folder/part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT/"requirements.lock", folder)
    (folder/"runs").mkdir()   # papermill does not
    return folder


def dvc_yaml(folder: Path) -> None:
    "Tell dvc what depends on what."
    stages = {}
    for name, c in read_contracts(folder/"nbs/stages").items():
        command = f"{BIN/'papermill'} nbs/stages/{name}.ipynb runs/{name}.ipynb -p run runs/x --no-progress-bar"
        needs = [f"nbs/stages/{name}.ipynb", "cvnb", "requirements.lock", *(f"runs/x/{n}" for n in c.needs)]
        stages[name] = dict(cmd=command, deps=needs, outs=[f"runs/x/{name}"])
    (folder/"dvc.yaml").write_text(yaml.safe_dump(dict(stages=stages), sort_keys=False))
    (folder/".dvcignore").write_text("__pycache__\n")   # or Python's own files would make every stage stale


def prose(folder: Path) -> None:
    "Change a word in the train notebook."
    path = folder/"nbs/stages/train.ipynb"
    path.write_text(re.sub(r'("# Train)', r"\1ing", path.read_text(), count=1))


def function(folder: Path) -> None:
    "Change a function that only the errors stage uses."
    with (folder/"cvnb/evaluate/errors.py").open("a") as f: f.write("\n")
    path = folder/"cvnb/evaluate/errors.py"
    text = path.read_text()
    i = re.search(r"^def most_confident_errors\(.*?^    \"[^\n]*\n", text, re.M | re.S).end()
    path.write_text(text[:i] + "    mutant = 1   # noqa\n" + text[i:])


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/rerun.md")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temp:
        temp = Path(temp)
        call(BIN/"uv", "venv", "-q", "--python", sys.executable, temp/"peer")
        call(BIN/"uv", "pip", "install", "-q", "--python", temp/"peer/bin/python", PEER)
        places = {tool: project(temp/tool) for tool in ("cvnb", "papermill", "dvc")}
        env = {tool: os.environ | dict(PYTHONPATH=str(places[tool])) for tool in places}
        order = list(read_contracts(ROOT/"nbs/stages"))

        def papermill() -> float:
            options = ("-p", "run", "runs/x", "--no-progress-bar")
            where = dict(cwd=places["papermill"], env=env["papermill"])
            files = [(f"nbs/stages/{s}.ipynb", f"runs/{s}.ipynb") for s in order]
            return sum(call(BIN/"papermill", *pair, *options, **where) for pair in files)

        dvc_yaml(places["dvc"])
        for setup in (["git", "init", "-q"], [temp/"peer/bin/dvc", "init", "-q"]): call(*setup, cwd=places["dvc"])
        tools: dict[str, Callable[[], float]] = {
            "cvnb run": lambda: call(BIN/"cvnb", "run", "--run", "runs/x", cwd=places["cvnb"], env=env["cvnb"]),
            "papermill × 6": papermill,
            "dvc repro": lambda: call(temp/"peer/bin/dvc", "repro", "-q", cwd=places["dvc"], env=env["dvc"])}
        first, rows = {name: tool() for name, tool in tools.items()}, []
        changes = {"nothing": lambda folder: None, "a word of prose": prose, "one function of errors": function}
        for change, apply in changes.items():
            for folder in places.values(): apply(folder)
            seconds = {name: tool() if tool is not papermill else first[name] for name, tool in tools.items()}
            for name, s in seconds.items():
                rows.append({"changed": change, "tool": name, "first call s": first[name], "second call s": s,
                             "÷ cvnb": s / seconds["cvnb run"]})
    show("rerun", "A second call of six stages", rows, args.write)


if __name__ == "__main__": main()
