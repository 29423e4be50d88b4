"""Runs that are killed, or run out of disk or memory, keep what has finished, and the next call resumes."""
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

import psutil
import pytest
from processes import left_after
from projects import write_project

from cvnb.core.files import read_json, sha256_file
from cvnb.core.formats import RunManifest
from cvnb.core.records import write_record

STAGES = ["audit", "train", "errors", "compress", "export", "benchmark"]
pytestmark = pytest.mark.usefixtures("own_fork_server")   # a kill has to reach the kernels
CVNB = Path(sys.executable).with_name("cvnb")
SILENT = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def cvnb(*args: object, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True, **kw)


def states(end: subprocess.CompletedProcess) -> dict[str, str]:
    "Read the state of each stage from the output of `cvnb run --json`."
    return {stage: outcome["state"] for stage, outcome in json.loads(end.stdout)["stages"].items()}


def kill(process: subprocess.Popen) -> None:
    "End a call and all processes that it started, as a power cut would, except FiftyOne's database."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    for p in family:
        try:
            command = " ".join(p.cmdline())
            if not any(part in command for part in ("keep_database", "mongod")): p.kill()
        except psutil.NoSuchProcess: continue
    process.wait()


def done(run: Path) -> dict[str, str]:
    "Digest the manifests of the finished stages, after checking each of their files."
    found = {}
    for stage in STAGES:
        path = run/stage/"stage.json"
        if not path.exists() or read_json(path)["status"] != "done": continue
        for out in read_json(path)["outputs"].values(): assert sha256_file(run/out["path"]) == out["sha256"]
        json.loads((run/stage/"notebook.ipynb").read_text())
        found[stage] = sha256_file(path)
    return found


def wait(process: subprocess.Popen, what: Callable[[], bool], seconds: float = 300) -> bool:
    "Wait until a condition holds; False if the call ended before."
    deadline = time.time() + seconds
    while process.poll() is None and time.time() < deadline:
        if what(): return True
        time.sleep(0.001)
    return False


def progress(stage: Path) -> float:
    "Read the fraction of a stage that is done."
    try: return json.loads((stage/".progress").read_text())["fraction"]
    except (FileNotFoundError, json.JSONDecodeError): return 0.0


def running(run: Path, stage: str) -> bool:
    return (run/stage/"notebook.ipynb").exists() and not (run/stage/"stage.json").exists()


def writing(run: Path, stage: str) -> bool:
    "Whether a stage is writing an output under a temporary name."
    return any(p.name.endswith(".tmp") and not p.name.startswith(".notebook") for p in (run/stage).rglob(".*"))


def cut_and_finish(run: Path, cuts: list[tuple[str, Callable[[], bool]]], whole: Path) -> dict[str, str]:
    "Kill a run at each cut, let it finish, compare its files with an uninterrupted run's, and return the last states."
    call = [CVNB, "run", "--run", run, "--set", "benchmark.n_calls=20", "--set", "benchmark.rounds=3",
            "--set", "benchmark.control_seconds=0"]
    for stage, reached in cuts:
        before = done(run)
        process = subprocess.Popen(call, start_new_session=True, **SILENT)
        assert wait(process, lambda s=stage: running(run, s))
        wait(process, reached, 60)
        kill(process)
        after = done(run)
        assert before.items() <= after.items() and stage not in after, "a finished stage was lost"
    process = cvnb("run", "--run", run, "--json")
    assert process.returncode == 0, process.stderr
    for name in ("train/model.safetensors", "train/predictions.parquet", "compress/model.safetensors",
                 "compress/predictions.parquet", "export/bundle/model.onnx"):
        assert sha256_file(run/name) == sha256_file(whole/name), f"{name} differs from that of an uninterrupted run"
    assert not [p for p in run.rglob("*") if p.name.endswith((".tmp", ".ready")) or p.name == ".progress"]
    return states(process)


@pytest.mark.slow
@pytest.mark.timeout(1200)   # it may wait for the smoke run, and a machine may be busy
def test_training_and_bundle_survive_kills(smoke_run, tmp_path):
    run = Path(shutil.copytree(smoke_run, tmp_path/"run"))
    for stage in STAGES[1:]: shutil.rmtree(run/stage)   # the audit is kept: the test below kills it
    cuts = [("train", (run/"train/checkpoints/last.ckpt").exists), ("train", (run/"train/model.safetensors").exists),
            ("export", lambda: writing(run, "export"))]
    last = cut_and_finish(run, cuts, smoke_run)
    assert [s for s in STAGES if last[s] == "done"] == ["export", "benchmark"]   # the last cut and the stage after it


@pytest.mark.long
@pytest.mark.timeout(2400)
def test_every_stage_survives_kills_at_random_points(smoke_run, tmp_path):
    run, rng = tmp_path/"run", random.Random(7)
    at = {stage: 0.8 * rng.random() for stage in STAGES}
    somewhere = lambda stage: lambda: progress(run/stage) > at[stage]
    cuts = [("audit", somewhere("audit")), ("train", (run/"train/checkpoints/last.ckpt").exists),
            ("train", (run/"train/model.safetensors").exists),   # the second time all is learned
            ("errors", lambda: writing(run, "errors")), ("compress", somewhere("compress")),
            ("export", lambda: writing(run, "export")), ("benchmark", somewhere("benchmark"))]
    last = cut_and_finish(run, cuts, smoke_run)
    assert [s for s in STAGES if last[s] == "done"] == ["benchmark"]   # the last cut alone


def edit(file: Path, old: str, new: str) -> None: file.write_text(file.read_text().replace(old, new))


FIRST = 'stage.path("a.txt").write_text("a")'


def fails(where: Path, *said: str, run: Path | None = None, **kw) -> Path:
    "Check that stage two fails with exit code 1 and a message, keeps its notebook, and leaves stage one intact."
    run = run or where/"runs/x"
    end = cvnb("run", "--run", run, cwd=where, **kw)
    assert end.returncode == 1 and "Traceback" not in end.stderr, end.stderr
    for text in said: assert text in end.stderr, end.stderr
    notebook = run/"two/notebook.ipynb"
    assert str(notebook) in end.stderr and "begun" in notebook.read_text()
    assert read_json(run/"one/stage.json")["status"] == "done" and (run/"one/a.txt").read_text() == "a"
    return run


def test_failing_cell_is_named(tmp_path):
    write_project(tmp_path, one=FIRST, two="x = 1\n1 / 0")
    error = "two failed in cell [5] with ZeroDivisionError: division by zero"
    run = fails(tmp_path, error, "    1 / 0", "jupyter lab ")
    assert read_json(run/"two/stage.json")["status"] == "failed"


REFUSES = """from cvnb.core.errors import UsageError
if seed == 13: raise UsageError("13 is unlucky", "Take another.")"""


def test_refused_value_is_forgotten_and_finished_stages_stay(tmp_path):
    where = write_project(tmp_path, one=FIRST, two=REFUSES)
    run, values = where/"runs/x", lambda: read_json(where/"runs/x/run.json")["given"]
    for call in ["--set", "one.seed=5"], []:   # a new run, and one that is there
        end = cvnb("run", "--run", run, *call, "--set", "two.seed=13", cwd=where)
        assert end.returncode == 2 and "13 is unlucky" in end.stderr
        assert values()["one"] == dict(seed=5) and not values().get("two")
    end = cvnb("run", "--run", run, "--json", cwd=where)
    assert states(end) == dict(one="fresh", two="done"), end.stderr
    assert cvnb("run", "--run", run, "--set", "two.seed=4", cwd=where).returncode == 0
    elsewhere = dict(git=dict(commit="0" * 40, dirty=False), machine=dict(cores=3), updated="2026-01-01T00:00:00+00:00")
    before = read_json(run/"run.json") | elsewhere   # as if another commit on another machine had made the run
    write_record(run/"run.json", before, RunManifest)
    for force in [], ["two", "--force"]:
        assert cvnb("run", *force, "--run", run, "--set", "two.seed=13", cwd=where).returncode == 2
        assert values()["two"] == dict(seed=4)
        end = cvnb("run", "--run", run, "--json", cwd=where)
        assert states(end) == dict(one="fresh", two="fresh")
        assert sorted(p.name for p in (run/"two").iterdir()) == [".stage", "notebook.ipynb", "stage.json"]
        assert not list(run.glob(".*.before"))
    after = read_json(run/"run.json")
    assert all(before[k] == after[k] for k in ("updated", "seconds", "git", "machine")), "no stage has run"
    assert before["seconds"] > 0
    assert cvnb("run", "two", "--force", "--run", run, cwd=where).returncode == 0
    last = read_json(run/"run.json")
    assert last["seconds"] > before["seconds"] and all(last[k] != before[k] for k in ("updated", "git", "machine"))


def test_project_module_is_part_of_its_stages(tmp_path):
    where = write_project(tmp_path, one="from mine import text\nstage.path('a.txt').write_text(text)", two=FIRST)
    expected = [("a", dict(one="done", two="done")), ("b", dict(one="done", two="fresh")),
                ("b", dict(one="fresh", two="fresh"))]
    for text, after in expected:
        (where/"mine.py").write_text(f"text = {text!r}   # a comment")
        end = cvnb("run", "--run", "runs/x", "--json", cwd=where)
        assert states(end) == after, end.stderr
        assert (where/"runs/x/one/a.txt").read_text() == text


def test_half_written_files_and_folders_are_removed(tmp_path):
    where = write_project(tmp_path, one=FIRST)
    (where/"runs/x/one/.bundle.1.tmp").mkdir(parents=True)
    for name in ".bundle.1.tmp/model.onnx", ".stage": (where/"runs/x/one"/name).touch()
    assert cvnb("run", "--run", "runs/x", cwd=where).returncode == 0
    assert sorted(p.name for p in (where/"runs/x/one").iterdir()) == [".stage", "a.txt", "notebook.ipynb", "stage.json"]


def test_braces_and_long_paths_work_or_are_refused(tmp_path):
    where = write_project(tmp_path/"a {b} c", one=FIRST)
    end = cvnb("run", "--run", "runs/{seed} {x}", cwd=where)
    assert end.returncode == 0 and (where/"runs/{seed} {x}/one/notebook.ipynb").exists(), end.stderr
    for call in ["run", "--run", "x" * 300], ["status", "x" * 300]:
        end = cvnb(*call, cwd=where)
        assert end.returncode in (1, 2) and len(end.stderr.splitlines()) == 1, end.stderr
        assert "Give a shorter path" in end.stderr
    deep = tmp_path/("t" * 80)
    deep.mkdir()
    too_long_for_a_socket = os.environ | dict(TMPDIR=str(deep))
    end = cvnb("run", "--run", "runs/x", cwd=where, env=too_long_for_a_socket)
    assert end.returncode == 0 and end.stderr == "" and not list(deep.glob("cvnb-*")), end.stderr


def test_killed_kernel_is_named_and_its_stage_runs_again(tmp_path):
    write_project(tmp_path, one=FIRST, two="import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    run = fails(tmp_path, "the kernel of two died, perhaps for lack of memory")
    edit(tmp_path/"nbs/stages/two.ipynb", "os.kill(os.getpid(), signal.SIGKILL)", "pass")
    assert states(cvnb("run", "--run", run, "--json", cwd=tmp_path)) == dict(one="fresh", two="done")


def test_out_of_memory_is_named(tmp_path):
    body = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\nx = bytearray(3 << 30)"
    write_project(tmp_path, one=FIRST, two=body)
    fails(tmp_path, "two failed in cell [5] with MemoryError")


@pytest.fixture
def small_disk(tmp_path) -> Iterator[tuple[Path, dict]]:
    "A disk of 400 kB, or a limit of 400 kB on each file: the folder, and arguments for starting a process."
    folder = tmp_path/"small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=400k", "none", folder]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
    yield folder, {} if mounted else dict(preexec_fn=limit)
    if mounted: subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.parametrize("body", [
    'print("x" * 1000)\nstage.path("b.txt").write_text("b" * 10**6)',
    'print("x" * 10**6)',
], ids=["by an output", "by the notebook"])
def test_full_disk_is_named_and_the_notebook_stays_whole(tmp_path, small_disk, body):
    folder, how = small_disk
    write_project(tmp_path, one=FIRST, two=body)
    run = fails(tmp_path, "no space left on the disk", "Free some", run=folder/"run", **how)
    json.loads((run/"two/notebook.ipynb").read_text())


def test_second_call_names_the_process_that_holds_the_run(tmp_path):
    write_project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    first = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, **SILENT)
    run = tmp_path/"runs/smoke"
    assert wait(first, lambda: (run/"two/notebook.ipynb").exists())
    second = cvnb("run", cwd=tmp_path)
    assert second.returncode == 1 and len(second.stderr.splitlines()) == 1
    assert f"in use by process {first.pid}" in second.stderr
    code = "from cvnb.pipeline.params import open_stage; open_stage('one', dict(run='runs/smoke'))"
    opened = [sys.executable, "-c", code]
    by_hand = subprocess.run(opened, cwd=tmp_path, capture_output=True, text=True)
    assert f"in use by process {first.pid}" in by_hand.stderr and (run/"one/stage.json").exists()
    first.send_signal(signal.SIGKILL)
    first.wait()
    edit(tmp_path/"nbs/stages/two.ipynb", "time.sleep(60)", "time.sleep(0)")
    third = cvnb("run", "--json", cwd=tmp_path)     # the lock ends with its process
    assert third.returncode == 0, third.stderr
    assert states(third)["one"] == "fresh"


def test_kernels_end_with_the_call_that_started_them(tmp_path):
    note = f'import os\nopen({str(tmp_path/"pid")!r}, "w").write(str(os.getpid()))'
    write_project(tmp_path, one=f"{note}\nimport time\ntime.sleep(60)")
    temp = Path(tempfile.mkdtemp())   # short enough for a socket's path
    env = os.environ | dict(TMPDIR=str(temp))
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, env=env, **SILENT)
    assert wait(call, lambda: (tmp_path/"pid").exists() and (tmp_path/"pid").read_text().isdigit())
    kernel = psutil.Process(int((tmp_path/"pid").read_text()))
    assert list(temp.glob("cvnb-*"))
    os.kill(call.pid, signal.SIGKILL)
    call.wait()
    kernel.wait(10)
    end = time.time() + 20
    while list(temp.glob("cvnb-*")) and time.time() < end: time.sleep(0.05)
    assert not list(temp.glob("cvnb-*")), "folders of kernels are left"
    shutil.rmtree(temp)


def waits_as(name: str, folder: Path) -> str:
    "A stage's cell that writes its process number to a file and waits."
    return f"import os, time\nopen({str(folder/name)!r}, 'w').write(f'{{os.getpid()}} ')\ntime.sleep(600)"


def kernel_of(call: subprocess.Popen, note: Path) -> psutil.Process:
    "Wait for a cell of `waits_as`."
    assert wait(call, lambda: note.exists() and note.read_text().endswith(" "))
    return psutil.Process(int(note.read_text()))


@pytest.mark.parametrize("engine, victim", [
    ("nbclient", "kernel"), ("nbclient", "papermill"),
    pytest.param("cvnb", "papermill", marks=pytest.mark.long)])   # its fork server imports torch
def test_needed_stages_end_with_the_notebook_that_started_them(tmp_path, engine, victim):
    "Stage two runs stage one by `cvnb run`, whose fork server and kernel end with it."
    write_project(tmp_path, one=waits_as("pid", tmp_path), two="")
    command = [CVNB.with_name("papermill"), "nbs/stages/two.ipynb", "out.ipynb", "-k", "python3", "-l", "python"]
    call = subprocess.Popen([*command, "--engine", engine], cwd=tmp_path, start_new_session=True, **SILENT)
    kernel = kernel_of(call, tmp_path/"pid")
    children = psutil.Process(call.pid).children(recursive=True)
    assert kernel in children and any("run" in p.cmdline()[2:4] for p in children)
    (call if victim == "papermill" else children[0]).kill()
    left = left_after([psutil.Process(call.pid), *children])
    for p in left: p.kill()
    call.wait()
    assert not left


def test_ordinary_kernel_and_its_worker_end_with_a_killed_call(tmp_path):
    "A folder of temporary files with a long name has no room for the sockets of a fork server."
    begin = "from pathlib import Path\nfrom cvnb.core.workers import WorkerProcess"
    code = "from cvnb.core.workers import serve_requests; serve_requests(dict)"
    worker = f"worker = WorkerProcess({code!r}, Path('worker.log'), new_session=True)"
    write_project(tmp_path, one=f"{begin}\n{worker}\n{waits_as('pid', tmp_path)}")
    deep = tmp_path/("t" * 80)
    deep.mkdir()
    env = os.environ | dict(TMPDIR=str(deep))
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, env=env, **SILENT)
    kernel = kernel_of(call, tmp_path/"pid")
    family = [kernel, *kernel.children()]
    assert kernel.ppid() == call.pid and len(family) == 2, "the kernel is no fork, and has a worker"
    call.kill()
    call.wait()
    assert not left_after(family)


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


def test_kernel_closes_iopub_after_its_control_thread(tmp_path):
    "The control thread reports at the end that it is idle, here slowly; the IOPub channel has to be open as long."
    write_project(tmp_path, one=SLOW)
    end = cvnb("run", cwd=tmp_path)
    assert end.returncode == 0 and end.stderr == "", end.stderr


def test_output_to_a_pipe_names_a_stage_when_it_begins(tmp_path):
    write_project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    pipes = SILENT | dict(stdout=subprocess.PIPE, text=True)
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, **pipes)
    said = [call.stdout.readline().split()[:2] for _ in range(4)]
    kill(call)
    assert said[1:] == [["…", "one"], ["✓", "one"], ["…", "two"]]


def test_ctrl_c_ends_a_run_with_one_line(tmp_path):
    write_project(tmp_path, one=FIRST, two="import time\ntime.sleep(60)")
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)   # a shell's background jobs ignore Ctrl-C
    pipes = SILENT | dict(stderr=subprocess.PIPE, text=True)
    call = subprocess.Popen([CVNB, "run"], cwd=tmp_path, start_new_session=True, preexec_fn=heed, **pipes)
    assert wait(call, lambda: (tmp_path/"runs/smoke/two/notebook.ipynb").exists())
    time.sleep(0.5)
    call.send_signal(signal.SIGINT)
    _, said = call.communicate(timeout=30)
    assert call.returncode == 1 and "interrupted" in said and "Traceback" not in said
    shutil.rmtree(tmp_path/"runs")
