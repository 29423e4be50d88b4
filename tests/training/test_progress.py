"""What a notebook and a terminal show while a training runs."""
from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
import papermill
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.usefixtures("wandb_defaults")
ROOT = Path(__file__).parents[2]
CELL = """
import gc, time
from cvnb.core.stage import Stage
from cvnb.training.progress import live_progress
from cvnb.training.tracking import close_tracker, open_tracker
stage = Stage("train", "run")
tracker = open_tracker(stage)
progress = live_progress(stage.progress)
for step in range(1, 201):
    epochs = [1 / (e + 1) for e in range(step // 50)]
    curves = dict(loss_train=epochs, loss_val=epochs, accuracy_val=epochs)
    progress(step / 200, f"epoch {1 + step // 50}/4 · 900 images/s", **curves)
    time.sleep(0.01)
progress(1, "epoch 4/4", **curves)
notebooks = [o for o in gc.get_objects() if type(o).__module__ == "wandb.jupyter" and type(o).__name__ == "Notebook"]
kept = [notebook.outputs for notebook in notebooks]
held = len(kept), "progress" in str(kept)
name = close_tracker(tracker)
"""


def execute_cell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str = "") -> tuple[list[dict], list[str]]:
    "Execute the cell; return its outputs, and the types of the messages that its kernel sent."
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL + check)])
    client = NotebookClient(notebook, timeout=120, resources=dict(metadata=dict(path=str(tmp_path))))
    kinds, process = [], client.process_message
    client.process_message = lambda message, *rest: (kinds.append(message["msg_type"]), process(message, *rest))[1]
    client.execute()
    return client.nb.cells[0].outputs, kinds


@pytest.mark.slow
def test_notebook_shows_one_output_with_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path/"jupyter").mkdir()
    # W&B recognises Jupyter by the name of the kernel's file
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"jupyter"))
    check = 'assert held == (1, False), "W&B keeps each update in memory"'
    outputs, kinds = execute_cell(tmp_path, monkeypatch, check)
    assert len(outputs) == 1 and kinds.count("display_data") == 1
    shown = outputs[0]["data"]
    assert shown["text/plain"].startswith("100% · epoch 5/4 · 900 images/s · in 0:0")
    assert 'value="1.000"' in shown["text/html"]
    assert shown["text/html"].count("<img") == 1 and len(shown["text/html"]) < 60_000
    assert 5 <= kinds.count("update_display_data") <= 30   # 200 steps in some seconds


@pytest.mark.slow
def test_notebook_is_updated_rarely_under_cvnb_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVNB_PROGRESS", str(tmp_path/"progress"))
    outputs, kinds = execute_cell(tmp_path, monkeypatch)
    assert len(outputs) == 1 and kinds.count("update_display_data") <= 5
    assert "<img" in outputs[0]["data"]["text/html"]
    assert json.loads((tmp_path/"progress").read_text())["curves"]["loss_val"] == [1, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.slow
def test_papermill_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    kernel = dict(kernelspec=dict(name="python3", display_name="p"))
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=kernel)
    nbformat.write(notebook, tmp_path/"in.ipynb")
    papermill.execute_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", cwd=tmp_path, progress_bar=False)
    outputs = nbformat.read(tmp_path/"out.ipynb", 4).cells[0].outputs
    shown = outputs[0]["data"]
    assert len(outputs) == 1 and shown["text/plain"].startswith("100%") and "<img" in shown["text/html"]


SCRIPT = """
import time
from cvnb.training.progress import live_progress
progress = live_progress()
for step in range(1, 51):
    progress(step / 50, f"epoch 1/1 · {step} images/s" + " and so on" * 20)
    time.sleep(0.01)
progress(1, "epoch 1/1")
"""


def run_in_terminal(**environment: str) -> str:
    "Run the script in a terminal, and return what the terminal receives."
    outer, inner = pty.openpty()
    inherited = {k: v for k, v in os.environ.items() if k not in ("CVNB_PROGRESS", "COLUMNS")}
    env = inherited | dict(PYTHONPATH=str(ROOT)) | environment
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], stdout=inner, stderr=inner, cwd=ROOT, env=env)
    os.close(inner)
    received = b""
    while True:
        try: chunk = os.read(outer, 4096)
        except OSError: break   # the other end is closed
        if not chunk: break
        received += chunk
    os.close(outer)
    assert process.wait() == 0
    return received.decode()


@pytest.mark.slow
def test_terminal_shows_one_line() -> None:
    received = run_in_terminal(COLUMNS="60")
    frames = received.removesuffix("\r\n").split("\r")
    assert frames[0] == "" and received.endswith("\r\n") and received.count("\n") == 1
    assert 2 <= len(frames[1:]) <= 15 and all(len(frame) == 59 for frame in frames[1:])
    assert "100% · epoch 1/1 · 50 images/s" in frames[-1]


@pytest.mark.slow
def test_nothing_is_shown_under_cvnb_run_or_in_a_file(tmp_path: Path) -> None:
    assert run_in_terminal(CVNB_PROGRESS=str(tmp_path/"progress")) == ""
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
