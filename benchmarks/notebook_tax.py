"""The fixed cost of running work as notebooks: papermill, nbclient, ploomber-engine and cvnb's engine, side by side.

    python benchmarks/notebook_tax.py [--notebooks 12] [--steps 30000] [--write]

Each notebook is like a stage: it imports what stages import, takes a parameter, trains a small network on real digits
in ten cells, prints, and draws a plot. It records the seconds of its own work, from reading the digits to the plot.
The rest of the wall time, imports included, is the fixed cost ("tax"). The engines take turns, each in a fresh process,
once with one notebook and once with all. cvnb's time includes the start of its fork server. ploomber-engine runs a
notebook inside the calling process, without isolation: a notebook sees what an earlier one changed.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat as nbf

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

PEER = ("ploomber-engine==0.0.33", "ploomber-core", "ploomber-extension", "debuglater", "dill", "colorama",
        "posthog", "backoff", "monotonic", "six", "distro")   # what it needs beyond what is installed
ENGINES = ("papermill", "nbclient", "ploomber-engine", "cvnb")
IMPORTS = """import json, time
import matplotlib.pyplot as plt
import pandas as pd
import pytorch_lightning as pl
import sklearn.datasets
import timm
import torch, torchvision"""
SETUP = """begin = time.perf_counter()
torch.manual_seed(seed)
torch.set_num_threads(1)
digits = sklearn.datasets.load_digits()
x, y = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16, torch.tensor(digits.target)
net = torch.nn.Sequential(torch.nn.Conv2d(1, 16, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(576, 10))
optimizer, losses = torch.optim.AdamW(net.parameters(), 1e-3), []
seconds = [time.perf_counter() - begin]"""
WORK = """begin = time.perf_counter()
for i in range(steps):
    pick = torch.randint(len(y), (64,))
    loss = torch.nn.functional.cross_entropy(net(x[pick]), y[pick])
    optimizer.zero_grad(); loss.backward(); optimizer.step()
losses.append(loss.item()); seconds.append(time.perf_counter() - begin)
print(f"loss {losses[-1]:.4f}")"""
END = """begin = time.perf_counter()
plt.plot(losses)
plt.gcf().canvas.draw()
seconds.append(time.perf_counter() - begin)
with open(out, "w") as f: json.dump(dict(seconds=sum(seconds), loss=losses[-1]), f)"""


def write(folder: Path, steps: int) -> Path:
    "Write the notebook."
    code = nbf.v4.new_code_cell
    declared = f'steps: int = {steps // 10}\nseed: int = 0\nout: str = "x.json"'
    parameters = code(declared, metadata=dict(tags=["parameters"]))
    work = [code(WORK) for _ in range(10)]
    cells = [nbf.v4.new_markdown_cell("# A stage"), code(IMPORTS), parameters, code(SETUP), *work, code(END)]
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    nbf.write(nbf.v4.new_notebook(cells=cells, metadata=kernel), folder/"stage.ipynb")
    return folder/"stage.ipynb"


def execute(engine: str, notebook: Path, n: int) -> None:
    "Run the notebook n times with one engine, in this process."
    if engine == "cvnb":
        from cvnb.pipeline.kernels import start_fork_server
        start_fork_server()   # before papermill is imported, as `cvnb run` does
    for i in range(n):
        out = notebook.parent/f"{engine}-{i}.ipynb"
        parameters = dict(seed=i, out=str(out.with_suffix(".json")))
        if engine == "papermill" or engine == "cvnb":
            import papermill
            name = None if engine == "papermill" else "cvnb"
            papermill.execute_notebook(notebook, out, parameters, name, progress_bar=False, kernel_name="python3")
        elif engine == "ploomber-engine":
            from ploomber_engine import execute_notebook
            execute_notebook(notebook, out, parameters=parameters, progress_bar=False)
        else:
            from nbclient import NotebookClient
            nb = nbf.read(notebook, 4)
            nb.cells[2].source += "\n" + "\n".join(f"{k} = {v!r}" for k, v in parameters.items())
            NotebookClient(nb, kernel_name="python3").execute()
            nbf.write(nb, out)


def measure(engine: str, notebook: Path, n: int, peers: Path) -> tuple[float, float]:   # wall seconds, seconds of work
    "Run an engine in a fresh process."
    inside = engine == "ploomber-engine"
    env = os.environ | dict(PYTHONPATH=str(peers) if inside else "", MPLBACKEND="agg" if inside else "")
    env = env | dict(PLOOMBER_STATS_ENABLED="false")
    env = {k: v for k, v in env.items() if v or k not in ("PYTHONPATH", "MPLBACKEND")}
    begin = time.perf_counter()
    command = [sys.executable, __file__, "--execute", engine, "--notebooks", str(n), "--in", notebook]
    subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wall = time.perf_counter() - begin
    return wall, sum(json.loads((notebook.parent/f"{engine}-{i}.json").read_text())["seconds"] for i in range(n))


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--notebooks", type=int, default=12, help="two at least")
    parser.add_argument("--steps", type=int, default=30000, help="training steps per notebook for wall ÷ work")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/notebook_tax.md")
    parser.add_argument("--execute", help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="notebook", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.execute: return execute(args.execute, args.notebook, args.notebooks)
    with tempfile.TemporaryDirectory() as folder:
        peers = Path(folder)/"peers"
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "pip", "install", "-q", "--target", peers, "--no-deps", *PEER], check=True)
        rows = []
        for steps, engines in ((100, ENGINES), (args.steps, ("papermill", "cvnb"))):
            notebook = write(Path(folder), steps)
            one = {engine: measure(engine, notebook, 1, peers) for engine in engines}
            found = {engine: measure(engine, notebook, args.notebooks, peers) for engine in engines}
            tax = {engine: (wall - work) / args.notebooks for engine, (wall, work) in found.items()}
            first = {engine: wall - work for engine, (wall, work) in one.items()}
            for engine, (wall, work) in found.items():
                further = (wall - work - first[engine]) / (args.notebooks - 1)
                rows.append({"steps": steps, "engine": engine, "wall s": wall, "work s": work,
                             "tax of one s": first[engine], "of each further s": further, "per notebook s": tax[engine],
                             "÷ papermill's": tax[engine] / tax["papermill"], "wall ÷ work": wall / work})
    show("notebook_tax", f"{args.notebooks} stage-like notebooks", rows, args.write)


if __name__ == "__main__": main()
