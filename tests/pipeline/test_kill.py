"""Runs that are killed, run out of disk or memory, or lose their kernel: nothing that finished is lost, and the next call goes on."""
from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import nbformat as nbf
import psutil
import pytest

from cvnb.core.files import read_json, sha256_file

STAGES = ["audit", "train", "errors", "compress", "export", "benchmark"]
CVNB = Path(sys.executable).with_name("cvnb")
SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cvnb(*args: object, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True, **kw)


def kill(process: subprocess.Popen) -> None:
    "End a call and everything it started, as a power cut would; FiftyOne's database has a session of its own and stays."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for p in family:
        try:
            if "keep_database" not in " ".join(p.cmdline()) and "mongod" not in p.name() and "--51-service" not in p.cmdline(): p.kill()
        except psutil.NoSuchProcess: continue
    process.wait()


def done(run: Path) -> dict[str, str]:
    "Digest the manifests of the stages that have finished; every file of theirs has to be whole."
    found = {}
    for stage in STAGES:
        path = run/stage/"stage.json"
        if not path.exists() or read_json(path)["status"] != "done": continue
        for out in read_json(path)["outputs"].values(): assert sha256_file(run/out["path"]) == out["sha256"]
        json.loads((run/stage/"notebook.ipynb").read_text())
        found[stage] = sha256_file(path)
    return found


def wait(process: subprocess.Popen, what: Callable[[], bool], seconds: float = 300) -> bool:
    "Wait until something is so; False if the call ended before."
    deadline = time.time() + seconds
    while process.poll() is None and time.time() < deadline:
        if what(): return True
        time.sleep(0.001)
    return False


def progress(stage: Path) -> float:
    "Read how far a stage is."
    try: return json.loads((stage/".progress").read_text())["fraction"]
    except (FileNotFoundError, json.JSONDecodeError): return 0.0


@pytest.mark.slow
@pytest.mark.timeout(1200)   # it may wait for the smoke run, and a machine may be busy
def test_kills_at_random_points_of_every_stage(smoke_run, tmp_path):
    run, rng = tmp_path/"run", random.Random(7)
    call = [CVNB, "run", "--run", run, "--set", "benchmark.n_calls=20", "--set", "benchmark.rounds=3"]
    at = {stage: 0.8 * rng.random() for stage in STAGES}
    somewhere = lambda stage: lambda: progress(run/stage) > at[stage]
    writing = lambda stage: lambda: any(p.name.endswith(".tmp") and not p.name.startswith(".notebook") for p in (run/stage).rglob(".*"))
    cuts = dict(audit=[somewhere("audit")], errors=[writing("errors")], compress=[somewhere("compress")], export=[writing("export")],
                train=[(run/"train/checkpoints/last.ckpt").exists, (run/"train/model.safetensors").exists],   # the second time all is learned
                benchmark=[somewhere("benchmark")])
    for stage, reached in [(s, reached) for s in STAGES for reached in cuts[s]]:
        before = done(run)
        process = subprocess.Popen(call, start_new_session=True, **SILENT)
        assert wait(process, lambda s=stage: (run/s/"notebook.ipynb").exists() and not (run/s/"stage.json").exists())
        wait(process, reached, 60)
        kill(process)
        after = done(run)
        assert before.items() <= after.items() and stage not in after, "a finished stage was lost"
    process = cvnb("run", "--run", run, "--json")
    assert process.returncode == 0, process.stderr
    states = {s: o["state"] for s, o in json.loads(process.stdout)["stages"].items()}
    assert [s for s in STAGES if states[s] == "done"] == ["benchmark"]     # what was cut last, and nothing else
    for name in ("train/model.safetensors", "train/predictions.parquet", "compress/model.safetensors", "compress/predictions.parquet",
                 "export/bundle/model.onnx"):
        assert sha256_file(run/name) == sha256_file(smoke_run/name), f"{name} is not what an uninterrupted run makes"
    assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".ready")) or p.name == ".progress"]


def project(folder: Path, **bodies: str) -> Path:
    "A project whose stages run in a moment: each body is a cell, and each stage needs the one before."
    before = ""
    (folder/"nbs/stages").mkdir(parents=True)
    for name, body in bodies.items():
        code = [nbf.v4.new_code_cell("from cvnb.pipeline.params import open_stage"),
                nbf.v4.new_code_cell('seed: int = 0\nrun: str = "runs/x"', metadata=dict(tags=["parameters"])),   # alone, `run` is an IPython magic
                nbf.v4.new_code_cell(f'stage = open_stage("{name}", globals())\nprint("begun")'),
                nbf.v4.new_code_cell(body), nbf.v4.new_code_cell("stage.finish()")]
        head = nbf.v4.new_markdown_cell(f"# {name}\n\n> A stage.\n\n- needs: [{before}]")
        nbf.write(nbf.v4.new_notebook(cells=[head, *code]), folder/f"nbs/stages/{name}.ipynb")
        before = name
    return folder


FIRST = 'stage.path("a.txt").write_text("a")'


def fails(where: Path, *said: str, run: Path | None = None, **kw) -> Path:
    "See a run's second stage fail with exit code 1 and a message, its notebook kept and the first stage intact."
    run = run or where/"runs/x"
    end = cvnb("run", "--run", run, cwd=where, **kw)
    assert end.returncode == 1 and "Traceback" not in end.stderr, end.stderr
    for text in said: assert text in end.stderr, end.stderr
    notebook = run/"two/notebook.ipynb"
    assert str(notebook) in end.stderr and "begun" in notebook.read_text()
    assert read_json(run/"one/stage.json")["status"] == "done" and (run/"one/a.txt").read_text() == "a"
    return run


def test_a_failing_cell_is_shown(tmp_path):
    project(tmp_path, one=FIRST, two="x = 1\n1 / 0")
    run = fails(tmp_path, "two failed in cell [5] with ZeroDivisionError: division by zero", "    1 / 0", "jupyter lab ")
    assert read_json(run/"two/stage.json")["status"] == "failed"


def test_a_value_that_a_late_stage_refuses(tmp_path):
    "It is forgotten, and what the stage before it was given is not: the next call begins where this one stopped."
    where = project(tmp_path, one=FIRST, two='from cvnb.core.errors import UsageError\nif seed == 13: raise UsageError("13 is unlucky", "Take another.")')
    run, values = where/"runs/x", lambda: read_json(where/"runs/x/run.json")["given"]
    for call in ["--set", "one.seed=5"], []:   # a new run, and one that is there
        end = cvnb("run", "--run", run, *call, "--set", "two.seed=13", cwd=where)
        assert end.returncode == 2 and "13 is unlucky" in end.stderr and values()["one"] == dict(seed=5) and not values().get("two")
    end = cvnb("run", "--run", run, "--json", cwd=where)
    assert {s: o["state"] for s, o in json.loads(end.stdout)["stages"].items()} == dict(one="fresh", two="done"), end.stderr
    assert cvnb("run", "--run", run, "--set", "two.seed=4", cwd=where).returncode == 0
    before = read_json(run/"run.json") | dict(git=dict(commit="0" * 40, dirty=False), machine=dict(cores=3), updated="2026-01-01T00:00:00+00:00")
    (run/"run.json").write_text(json.dumps(before))   # another commit, elsewhere, made what is there
    for force in [], ["two", "--force"]:   # what had finished stays
        assert cvnb("run", *force, "--run", run, "--set", "two.seed=13", cwd=where).returncode == 2 and values()["two"] == dict(seed=4)
        end = cvnb("run", "--run", run, "--json", cwd=where)
        assert {s: o["state"] for s, o in json.loads(end.stdout)["stages"].items()} == dict(one="fresh", two="fresh")
        assert sorted(p.name for p in (run/"two").iterdir()) == [".stage", "notebook.ipynb", "stage.json"] and not list(run.glob(".*.before"))
    after = read_json(run/"run.json")
    assert all(before[k] == after[k] for k in ("updated", "seconds", "git", "machine")) and before["seconds"] > 0, "no stage has run"
    assert cvnb("run", "two", "--force", "--run", run, cwd=where).returncode == 0
    last = read_json(run/"run.json")
    assert last["seconds"] > before["seconds"] and all(last[k] != before[k] for k in ("updated", "git", "machine"))


def test_a_module_of_the_project_is_part_of_its_stages(tmp_path):
    where = project(tmp_path, one="from mine import text\nstage.path('a.txt').write_text(text)", two=FIRST)
    for text, states in ("a", dict(one="done", two="done")), ("b", dict(one="done", two="fresh")), ("b", dict(one="fresh", two="fresh")):
        (where/"mine.py").write_text(f"text = {text!r}   # nobody reads this")
        end = cvnb("run", "--run", "runs/x", "--json", cwd=where)
        assert {s: o["state"] for s, o in json.loads(end.stdout)["stages"].items()} == states, end.stderr
        assert (where/"runs/x/one/a.txt").read_text() == text


def test_what_was_half_written_is_cleared_even_a_folder(tmp_path):
    where = project(tmp_path, one=FIRST)
    (where/"runs/x/one/.bundle.1.tmp").mkdir(parents=True)
    for name in ".bundle.1.tmp/model.onnx", ".stage": (where/"runs/x/one"/name).touch()
    assert cvnb("run", "--run", "runs/x", cwd=where).returncode == 0
    assert sorted(p.name for p in (where/"runs/x/one").iterdir()) == [".stage", "a.txt", "notebook.ipynb", "stage.json"]


def test_odd_paths(tmp_path):
    where = project(tmp_path/"a {b} c", one=FIRST)
    end = cvnb("run", "--run", "runs/{seed} {x}", cwd=where)
    assert end.returncode == 0 and (where/"runs/{seed} {x}/one/notebook.ipynb").exists(), end.stderr
    for call in ["run", "--run", "x" * 300], ["status", "x" * 300]:
        end = cvnb(*call, cwd=where)
        assert end.returncode in (1, 2) and len(end.stderr.splitlines()) == 1 and "Give a shorter path" in end.stderr, end.stderr
    deep = tmp_path/("t" * 80)
    deep.mkdir()
    end = cvnb("run", "--run", "runs/x", cwd=where, env=os.environ | dict(TMPDIR=str(deep)))   # too long for a socket's path
    assert end.returncode == 0 and end.stderr == "" and not list(deep.glob("cvnb-*")), end.stderr


def test_a_kernel_that_dies(tmp_path):
    project(tmp_path, one=FIRST, two="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    run = fails(tmp_path, "the kernel of two died, perhaps for lack of memory")
    project_again = (tmp_path/"nbs/stages/two.ipynb").read_text().replace("os.kill(os.getpid(), signal.SIGKILL)", "pass")
    (tmp_path/"nbs/stages/two.ipynb").write_text(project_again)
    end = cvnb("run", "--run", run, "--json", cwd=tmp_path)
    assert {s: o["state"] for s, o in json.loads(end.stdout)["stages"].items()} == dict(one="fresh", two="done")


def test_out_of_memory(tmp_path):
    project(tmp_path, one=FIRST, two="import resource\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nx = bytearray(3 << 30)")
    fails(tmp_path, "two failed in cell [5] with MemoryError")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, dict]]:
    "A disk of 400 kB where this user may mount one, else a limit of 400 kB on each file; gives the folder and what to start a process with."
    folder = tmp_path/"small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder], capture_output=True).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    yield folder, {} if mounted else dict(preexec_fn=limit)
    if mounted: subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("body", ['print("x" * 1000)\nstage.path("b.txt").write_text("b" * 10**6)', 'print("x" * 10**6)'],
                         ids=["by an output", "by the notebook"])
def test_a_full_disk(tmp_path, small_disk, body):
    folder, how = small_disk
    project(tmp_path, one=FIRST, two=body)
    run = fails(tmp_path, "no space left on the disk", "Free some", run=folder/"run", **how)
    json.loads((run/"two/notebook.ipynb").read_text())     # the notebook is whole, as far as it was saved


def test_a_second_call_is_told_who_holds_the_run(tmp_path):
    project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    first = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, **SILENT)
    run = tmp_path/"runs/smoke"
    assert wait(first, lambda: (run/"two/notebook.ipynb").exists())
    second = cvnb("run", cwd=tmp_path)
    assert second.returncode == 1 and f"in use by process {first.pid}" in second.stderr and len(second.stderr.splitlines()) == 1
    opened = [sys.executable, "-c", "from cvnb.pipeline.params import open_stage; open_stage('one', dict(run='runs/smoke'))"]
    by_hand = subprocess.run(opened, cwd=tmp_path, capture_output=True, text=True)
    assert f"in use by process {first.pid}" in by_hand.stderr and (run/"one/stage.json").exists()
    first.send_signal(signal.SIGKILL)
    first.wait()
    (tmp_path/"nbs/stages/two.ipynb").write_text((tmp_path/"nbs/stages/two.ipynb").read_text().replace("time.sleep(60)", "time.sleep(0)"))
    third = cvnb("run", "--json", cwd=tmp_path)     # the lock went with its owner
    assert third.returncode == 0, third.stderr
    assert json.loads(third.stdout)["stages"]["one"]["state"] == "fresh"


def test_kernels_end_with_the_call_that_started_them(tmp_path):
    project(tmp_path, one=f'import os\nopen({str(tmp_path/"pid")!r}, "w").write(str(os.getpid()))\nimport time\ntime.sleep(60)')
    temp = Path(tempfile.mkdtemp())   # short enough for a socket's path
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, env=os.environ | dict(TMPDIR=str(temp)), **SILENT)
    assert wait(call, lambda: (tmp_path/"pid").exists() and (tmp_path/"pid").read_text().isdigit())
    kernel = psutil.Process(int((tmp_path/"pid").read_text()))
    assert list(temp.glob("cvnb-*"))
    os.kill(call.pid, signal.SIGKILL)
    call.wait()
    kernel.wait(10)
    end = time.time() + 20
    while list(temp.glob("cvnb-*")) and time.time() < end: time.sleep(0.05)
    assert not list(temp.glob("cvnb-*")), "their folders too"
    shutil.rmtree(temp)


SLOW = """
def plant(iopub, control, current, sleep):
    class Slow(type(iopub._events)):
        def append(self, event):
            super().append(event)
            if current() is control: sleep(0.3)
    iopub._events = Slow(iopub._events)
import threading, time
kernel = get_ipython().kernel
plant(kernel.iopub_thread, kernel.control_thread, threading.current_thread, time.sleep)"""


def test_a_kernel_ends_in_order(tmp_path):
    "Its control thread says at the end that it is idle, here slowly; what says it has to be open as long."
    project(tmp_path, one=SLOW)
    end = cvnb("run", cwd=tmp_path)
    assert end.returncode == 0 and end.stderr == "", end.stderr


def test_a_pipe_is_told_at_once_which_stage_begins(tmp_path):
    project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    said = [call.stdout.readline().split()[:2] for _ in range(4)]
    kill(call)
    assert said[1:] == [["…", "one"], ["✓", "one"], ["…", "two"]]


def test_interrupted_by_hand(tmp_path):
    project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # what a shell starts in the background is told to ignore Ctrl-C
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, preexec_fn=heed, stdout=subprocess.DEVNULL,
                            stderr=subprocess.PIPE, text=True)
    assert wait(call, lambda: (tmp_path/"runs/smoke/two/notebook.ipynb").exists())
    time.sleep(0.5)
    call.send_signal(signal.SIGINT)
    _, said = call.communicate(timeout=30)
    assert call.returncode == 1 and "interrupted" in said and "Traceback" not in said
    shutil.rmtree(tmp_path/"runs")
