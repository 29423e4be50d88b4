"""Sweeps: trials share stages and resume after kills, searches prune, and Ray restarts trials of lost workers."""
from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import nbformat as nbf
import psutil
import pytest

from cvnb.core.errors import UsageError
from cvnb.core.files import read_json
from cvnb.core.output_formats import SweepRecord
from cvnb.core.records import write_record
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.runner import RunParameters
from cvnb.pipeline.sweep import _select_curve, run_sweep
from cvnb.pipeline.sweep_trials import Sweep, Trial, make_sweep

CVNB = Path(sys.executable).with_name("cvnb")
PARAMETERS = "seed: int = 0\nlr: float = 0.01  # [0..1]\nepochs: int = 2\nwait: float = 0.0"
DATA = 'text = "x" * size\nstage.path("n.txt").write_text(text)'
TRAIN = """
size = len(stage.input("data", "n.txt").read_text())
assert size and lr < 0.5, "diverged"
saved = stage.dir/f"checkpoint-{size}.json"   # kept: a kill between its end and the stage's would cost all epochs
curve = json.loads(saved.read_text()) if saved.exists() else []
for epoch in range(len(curve), epochs):
    time.sleep(wait)
    with open("calls.txt", "a") as f: f.write(f"epoch {lr} {seed}\\n")
    curve.append((1 - abs(lr - 0.1)) * (epoch + 1) / epochs - 0.001 * (seed % 7))
    saved.with_suffix(".new").write_text(json.dumps(curve)); saved.with_suffix(".new").replace(saved)
    stage.progress((epoch + 1) / epochs, f"epoch {epoch + 1}", accuracy_val=curve)
time.sleep(wait)
stage.metric("accuracy_val", curve[-1])
stage.metric("loss_val", 1 - curve[-1])
stage.path("weights.txt").write_text(str(curve))"""


def write_stage(project: Path, name: str, parameters: str, body: str, needs: str = "") -> None:
    "Write a stage that records each of its calls."
    code, path = nbf.v4.new_code_cell, project/f"nbs/stages/{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    note = f'with open("calls.txt", "a") as f: f.write("{name} " + stage.run.name + "\\n")\n'
    nbf.write(nbf.v4.new_notebook(cells=[
        nbf.v4.new_markdown_cell(f"# {name}\n\n> A stage.\n\n- needs: [{needs}]"),
        code("import json, time\nfrom cvnb.pipeline.params import open_stage"),
        code(f'run: str = "runs/x"\n{parameters}', metadata=dict(tags=["parameters"])),
        code(f'stage = open_stage("{name}", globals())\n{note}{body}'), code("stage.finish()")]), path)


@pytest.fixture
def project(tmp_path) -> Path:
    "A project with two stages to sweep."
    folder = tmp_path/"project"
    write_stage(folder, "data", "size: int = 3  # [1..100]", DATA)
    write_stage(folder, "train", PARAMETERS, TRAIN, "data")
    return folder


def sweep(project: Path, *args: str, code: int = 0) -> subprocess.CompletedProcess:
    done = subprocess.run([CVNB, "sweep", "--out", "sweeps/x", *args], capture_output=True, text=True, cwd=project)
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done


def calls(project: Path) -> Counter:
    return Counter(line.split()[0] for line in (project/"calls.txt").read_text().splitlines())


def trials(project: Path) -> dict[str, dict]:
    "List the trials of sweep.json by their values and seed."
    found = {}
    for t in read_json(project/"sweeps/x/sweep.json")["trials"]:
        name = ",".join(f"{k}={v}" for k, v in t["values"].items())
        found[f"{name},seed={t['seed']}" if t["seed"] else name] = t
    return found


def test_grid_runs_shared_stages_once(project):
    grid = "--set", "data.size=3,5", "--set", "train.lr=0.05,0.1"
    planned = sweep(project, *grid, "--seeds", "2", "--dry-run").stdout
    assert "To run: data 2 (shared by 8 trials), train 8" in planned and not (project/"sweeps").exists()
    lines = sweep(project, *grid, "--seeds", "2", "--jobs", "2").stdout
    assert calls(project) == Counter(data=2, train=8, epoch=16)
    runs = sorted((project/"sweeps/x/trials").iterdir())
    assert len(runs) == 8 and len({(r/"data/n.txt").stat().st_ino for r in runs}) == 2, "shared stages are linked"
    assert lines.count("✓") == 8 and (project/"sweeps/x/sweep.png").stat().st_size > 5000
    best = json.loads(sweep(project, *grid, "--seeds", "2", "--json").stdout)[0]
    assert best["values"]["train.lr"] == 0.1 and best["n"] == 2 and best["figure"]["n"] == 2
    assert best["figure"]["low"] < best["figure"]["value"] < best["figure"]["high"]
    assert calls(project) == Counter(data=2, train=8, epoch=16), "nothing runs twice"
    assert "Every trial is done." in sweep(project, *grid, "--dry-run").stdout
    for run in runs[::7]:
        status = subprocess.run([CVNB, "status", run, "--json"], capture_output=True, text=True, cwd=project)
        assert [r["state"] for r in json.loads(status.stdout)["stages"]] == ["fresh", "fresh"]


def test_larger_grid_runs_only_new_trials(project):
    sweep(project, "--set", "train.lr=0.05,0.1")
    sweep(project, "--set", "train.lr=0.05,0.1,0.2")
    assert calls(project)["train"] == 3
    assert "train 3" in sweep(project, "--set", "train.lr=0.05,0.1,0.2", "--set", "data.size=9", "--dry-run").stdout
    sweep(project, "--set", "train.lr=0.05,0.1,0.2", "--set", "data.size=9")
    assert calls(project) == Counter(data=2, train=6, epoch=12)


def test_failed_trial_does_not_stop_the_others(project):
    failed = sweep(project, "--set", "train.lr=0.9,0.05,0.1", code=1)
    assert "1 of 3 trials failed" in failed.stderr and "diverged" in failed.stderr and "sweeps/x/logs" in failed.stderr
    states = {name: t["state"] for name, t in trials(project).items()}
    assert states == {"train.lr=0.9": "failed", "train.lr=0.05": "done", "train.lr=0.1": "done"}
    sweep(project, "--set", "train.lr=0.9,0.05,0.1", code=1)
    assert calls(project)["train"] == 4, "the failed one is tried again, and only that"


def test_trial_whose_stage_leaves_the_metric_out_does_not_stop_the_others(project):
    # As a benchmark does whose control is void.
    body = 'if lr < 0.5: stage.metric("speedup", lr)\nelse: stage.metric("cpu_speedup", lr)'
    write_stage(project, "train", PARAMETERS, body)
    args = "--set", "train.lr=0.9,0.05,0.1", "--metric", "train.speedup"
    for _ in range(2):   # the second call finds all runs finished
        failed = sweep(project, *args, code=1)
        assert "1 of 3 trials failed" in failed.stderr and "train has no metric 'speedup'" in failed.stderr
        trials = read_json(project/"sweeps/x/sweep.json")["trials"]
        assert [t["state"] for t in trials] == ["failed", "done", "done"]
        assert [t["figure"] and t["figure"]["value"] for t in trials] == [None, 0.05, 0.1]
    assert calls(project)["train"] == 3


def begin(project: Path, *args: str) -> subprocess.Popen:
    return subprocess.Popen([CVNB, "sweep", "--out", "sweeps/x", *args], cwd=project, start_new_session=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def survivors(project: Path) -> list[psutil.Process]:
    "List the processes that still run in the project's folder."
    found = []
    for p in psutil.process_iter(["cwd"]):
        if p.info["cwd"] == str(project) and p.status() != psutil.STATUS_ZOMBIE: found.append(p)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_killed_sweep_resumes(project, number):
    args = ("--set", "train.lr=0.02,0.05,0.1,0.2", "--set", "train.wait=0.15", "--set", "train.epochs=4", "--jobs", "2")
    rng = random.Random(int(number))
    for _ in range(2):
        process = begin(project, *args)
        try: process.wait(2 + rng.random() * 2.5)
        except subprocess.TimeoutExpired: process.send_signal(number)
        process.wait(20)
        end = time.time() + 15
        while (left := survivors(project)) and time.time() < end: time.sleep(0.1)
        assert not left, "trials, kernels and the fork server end with the sweep"
    sweep(project, *args)
    assert {t["state"] for t in trials(project).values()} == {"done"}
    counted = calls(project)
    assert counted["epoch"] <= 16 + 4, "at most the epoch that each of two trials was in is redone"
    manifests = [read_json(run/"train/stage.json") for run in (project/"sweeps/x/trials").iterdir()]
    assert len({json.dumps(m["metrics"]) for m in manifests}) == 4


def test_second_call_on_a_running_sweep_is_refused(project):
    process = begin(project, "--set", "train.lr=0.05,0.1", "--set", "train.wait=9")
    while not (project/"calls.txt").exists(): time.sleep(0.05)   # Python can lose a Ctrl-C while it imports
    second = sweep(project, "--set", "train.lr=0.05,0.1", code=1)
    assert f"in use by process {process.pid}" in second.stderr
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 1


def test_damaged_or_changed_stage_is_not_shared(project):
    sweep(project, "--set", "train.lr=0.05,0.1")
    one, two = (project/f"sweeps/x/trials/train.lr={lr}" for lr in ("0.05", "0.1"))
    call = [CVNB, "run", "--run", one, "data", "--set", "data.size=50"]
    subprocess.run(call, capture_output=True, text=True, cwd=project, check=True)
    assert (one/"data/n.txt").read_text() == "x" * 50
    assert (two/"data/n.txt").read_text() == "xxx", "the changed run writes files of its own"
    (two/"data/n.txt").unlink()
    (two/"data/n.txt").write_text("damaged")
    sweep(project, "--set", "train.lr=0.1,0.05")   # the damaged one first: the other one has another stage by now
    assert {(r/"data/n.txt").read_text() for r in (one, two)} == {"xxx"} and (one/"data/n.txt").stat().st_nlink == 2
    (one/"data/n.txt").write_text("damaged")   # both, by their link
    sweep(project, "--set", "train.lr=0.05,0.1")
    assert {(r/"data/n.txt").read_text() for r in (one, two)} == {"xxx"}


@pytest.mark.slow
def test_search_prunes_and_resumes(project):
    args = ("--set", "train.lr=0.001..0.45", "--set", "train.epochs=5", "--set", "train.wait=0.4", "--search", "random")
    sweep(project, *args, "--trials", "4", "--jobs", "2")
    first = [t["values"] for t in trials(project).values()]
    lines = sweep(project, *args, "--trials", "10", "--jobs", "2").stdout
    found = list(trials(project).values())
    assert [t["values"] for t in found[:4]] == first and len(found) == 10
    states = Counter(t["state"] for t in found)
    assert states["done"] >= 4 and states["pruned"] >= 2 and states.total() == states["done"] + states["pruned"], states
    pruned = [t for t in found if t["state"] == "pruned"]
    assert all(len(t["curve"]) < 5 and t["figure"] is None for t in pruned) and "worse than the median" in lines
    best = max(t["figure"]["value"] for t in found if t["figure"])
    assert max(t["curve"][-1] / len(t["curve"]) * 5 for t in pruned) < best, "what was stopped would not have won"
    before = calls(project)
    sweep(project, *args, "--trials", "10")
    assert calls(project) == before, "pruned trials stay pruned"
    other_recipe = "--set", "data.size=9"
    assert "pruned" not in sweep(project, *args, "--trials", "10", *other_recipe, "--dry-run").stdout
    sweep(project, *args[:-2], "--trials", "12", "--jobs", "2")   # Optuna uses the trials of the random search
    assert len(trials(project)) == 12


def test_pruning_stops_all_seeds_and_minimizes(project):
    args = ("--set", "train.lr=0.1,0.11,0.12,0.13,0.45", "--set", "train.epochs=5", "--set", "train.wait=0.2",
            "--search", "random", "--trials", "5", "--seeds", "2", "--metric", "train.loss_val", "--minimize")
    body = TRAIN.replace("accuracy_val=curve", "loss_val=[1 - c for c in curve]")
    write_stage(project, "train", PARAMETERS, body, "data")
    sweep(project, *args)
    found = trials(project)
    assert found["train.lr=0.1"]["figure"]["value"] == pytest.approx(0)
    tried = [t["values"]["train.lr"] for t in found.values() if not t["seed"]]
    assert tried.index(0.45) == 3, "after three finished ones"
    assert [found["train.lr=0.45"]["state"], found["train.lr=0.45,seed=1"]["state"]] == ["pruned", "pruned"]


def test_trial_pruned_by_another_metric_is_tried_again(project):
    args = ("--set", "train.lr=0.05,0.1")
    sweep(project, *args)
    path = project/"sweeps/x/sweep.json"
    record = read_json(path)
    record["trials"][0] |= dict(state="pruned", figure=None, curve=[0.1])
    write_record(path, record, SweepRecord)
    for run in (project/"sweeps/x/trials").glob("*/train/stage.json"): run.unlink()
    sweep(project, *args)
    assert [t["state"] for t in trials(project).values()] == ["pruned", "done"] and calls(project)["train"] == 3
    sweep(project, *args, "--metric", "train.loss_val", "--minimize")
    assert [t["state"] for t in trials(project).values()] == ["done", "done"] and calls(project)["train"] == 4


def test_waiting_call_reads_trials_of_the_other_call(project, monkeypatch):
    monkeypatch.chdir(project)
    late = make_sweep(project/"sweeps/x", ["train.lr=0.01..0.4"], search="random", n=2, known=read_contracts())
    sweep(project, "--set", "train.lr=0.01..0.4", "--search", "random", "--trials", "2")   # the other call
    before = trials(project)
    assert len(before) == 2 and run_sweep(late).trials and trials(project) == before and calls(project)["train"] == 2


TWO = "--set train.lr=0.1,0.2 "
BAD = {
    "no such stage": "--set trian.lr=1,2",
    "no such parameter": "--set train.l=0.1,0.2",
    "a wrong value among right ones": "--set train.lr=0.1,x",
    "out of range": "--set train.lr=0.1,7",
    "a range in a grid": "--set train.lr=0.1..0.2",
    "an empty range": "--set train.lr=0.2..0.1",
    "the same parameter twice": TWO + "--set train.lr=0.3",
    "a value twice": "--set train.lr=0.1,0.1",
    "trials for a grid": TWO + "--search grid --trials 3",
    "a search without end": TWO + "--search random",
    "nothing to search": "--trials 3",
    "no such search": TWO + "--search rondom",
    "no such engine": TWO + "--engine rai",
    "a metric without stage": TWO + "--metric accuracy",
    "a metric of no stage": TWO + "--metric tran.accuracy_val",
    "a metric that cannot depend on it": TWO + "--metric data.n",
    "no such stage to run": "tran " + TWO,
    "a metric that the stage does not record": TWO + "--metric train.accuracy_vall",
    "a metric without name": TWO + "--metric train.",
    "an empty value": "--set train.lr=0.1,,0.2",
    "seeds twice": "--set train.seed=1,2 --seeds 2",
    "an address without a cluster": TWO + "--engine processes --address 127.0.0.1:1",
    "no cluster there": TWO + "--address 127.0.0.1:1",
}


@pytest.mark.parametrize("args", BAD.values(), ids=BAD.keys())
def test_wrong_call_is_refused_in_one_line(project, args):
    error = sweep(project, *args.split(), code=2).stderr
    assert error.startswith("cvnb: ") and len(error.strip().splitlines()) == 1 and not (project/"sweeps").exists()


def test_other_folder_is_refused_as_sweep_folder(project):
    (project/"sweeps/x").mkdir(parents=True)
    (project/"sweeps/x/letter.txt").write_text("dear")
    assert "is not a sweep, it holds letter.txt" in sweep(project, "--set", "train.lr=0.1,0.2", code=2).stderr
    (project/"sweeps/x/letter.txt").unlink()
    sweep(project, "--set", "train.lr=0.1,0.2")
    assert "varies train.lr, and this sweep train.seed" in sweep(project, "--set", "train.seed=1,2", code=2).stderr
    status = subprocess.run([CVNB, "status", "sweeps/x"], capture_output=True, text=True, cwd=project)
    assert status.returncode == 2 and "is a sweep. Its runs are in sweeps/x/trials" in status.stderr


def test_lost_record_is_rebuilt_from_the_runs(project):
    args = ("--set", "train.lr=0.1,0.2", "--seeds", "2")
    sweep(project, *args)
    before, record = calls(project), project/"sweeps/x/sweep.json"
    for content in "{", "{}", '{"trials": [{"name": 1}]}':
        record.write_text(content)
        error = sweep(project, *args, code=2).stderr
        assert "sweep.json is damaged" in error and "Delete it" in error
    record.unlink()
    assert "varies train.lr, and this sweep data.size" in sweep(project, "--set", "data.size=4,5", code=2).stderr
    sweep(project, *args)
    assert calls(project) == before and {t["state"] for t in trials(project).values()} == {"done"}
    record.unlink()
    sweep(project, "--set", "train.lr=0.05..0.3", "--trials", "2", "--seeds", "2")
    assert calls(project) == before, "a search counts what was tried before"


def test_search_counts_only_trials_inside_its_axes(project):
    args = ("--search", "random", "--seeds", "1")
    sweep(project, "--set", "train.lr=0.001..0.4", *args, "--trials", "4")
    everything = trials(project)
    low = sorted(t["values"]["train.lr"] for t in everything.values())[1]   # two lie below, or at it
    upper = "--set", f"train.lr={low * 1.01}..0.4", *args
    rows = json.loads(sweep(project, *upper, "--trials", "2", "--json").stdout)
    assert len(rows) == 2 and all(r["values"]["train.lr"] > low for r in rows) and trials(project) == everything
    assert len(json.loads(sweep(project, *upper, "--trials", "1", "--json").stdout)) == 2
    before = calls(project)
    sweep(project, "--set", "train.lr=0.001..0.4", *args, "--trials", "4")
    assert calls(project) == before


def test_interval_of_shares_stays_between_zero_and_one():
    def share(value, low=0.1, high=0.99):
        return Trial({}, state="done", metric_estimate=dict(value=value, low=low, high=high, n=9))

    empty = Sweep(Path("x"), [], RunParameters(), [])
    two = empty.estimate([share(0.2), share(0.9)])
    assert two["low"] == 0 and two["high"] == 1
    assert empty.estimate([share(0.2, None, None), share(0.9, None, None)])["low"] < 0
    assert empty.estimate([share(0.2)])["low"] == 0.1


@pytest.mark.slow
def test_sweep_of_real_training_shares_the_audit_and_compares_validation_metrics(tmp_path, small_photos):
    args = ("--data", small_photos, "--out", tmp_path/"sweep", "--set", "train.lr=1e-3,3e-3", "--set", "train.epochs=1",
            "--set", "train.tune=full", "--set", "train.tracking=disabled", "--jobs", "2", "--json")
    done = subprocess.run([CVNB, "sweep", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    runs = [tmp_path/"sweep/trials"/r["trials"][0] for r in rows]
    assert [r["state"] for r in rows] == ["done", "done"]
    assert len({(r/"audit/embeddings.npy").stat().st_ino for r in runs}) == 1, "the audit is shared"
    n_validation = read_json(runs[0]/"train/stage.json")["metrics"]["accuracy_val"]["n"]
    assert n_validation >= 6
    for row in rows:
        estimate = row["figure"]
        assert estimate["n"] == n_validation and estimate["low"] < estimate["value"] <= estimate["high"]
        trial = next(t for t in read_json(tmp_path/"sweep/sweep.json")["trials"] if t["values"] == row["values"])
        assert trial["curve"][-1] == pytest.approx(estimate["value"], abs=1e-6), "the curve ends with the metric"


@pytest.mark.long
def test_ray_restarts_trials_of_lost_workers_and_nodes(project, ray_cluster):
    args = ("--set", "train.lr=0.02,0.05,0.1,0.2,0.3", "--set", "train.wait=0.5", "--set", "train.epochs=6",
            "--engine", "ray", "--address", ray_cluster.address)
    process = begin(project, *args)
    _wait(lambda: _halfway(project, ray_cluster.head_node), process).kill()
    doomed = next(iter(ray_cluster.worker_nodes))
    _wait(lambda: _halfway(project, doomed), process)
    ray_cluster.remove_node(doomed, allow_graceful=False)
    assert process.wait(120) == 0
    assert {t["state"] for t in trials(project).values()} == {"done"}
    counted = calls(project)
    assert counted["data"] <= 2 and counted["epoch"] <= 5 * 6 + 4, "killed trials went on from their checkpoints"
    assert counted["train"] >= 7, "two trials were begun twice"
    sweep(project, *args[:-1], "127.0.0.1:1")   # finished trials are shown without the cluster
    assert "Every trial is done." in sweep(project, *args[:6], "--dry-run").stdout, "and is the same work without Ray"


def _halfway(project: Path, node) -> psutil.Process | None:
    "The process on a node of Ray whose trial has begun and is far from its end."
    raylet, log = node.all_processes["raylet"][0].process.pid, project/"calls.txt"
    lines = log.read_text().splitlines() if log.exists() else []
    done = Counter(line.split()[1] for line in lines if line.startswith("epoch"))
    for p in psutil.process_iter(["cmdline", "ppid"]):
        title = (p.info["cmdline"] or [""])[0]
        if p.info["ppid"] != raylet or not title.startswith("ray::train.lr="): continue
        if 1 <= done.get(title.split("=")[1].split(",")[0].strip(), 0) <= 3: return p
    return None


def _wait(what, process: subprocess.Popen, seconds: float = 60):
    "Wait until `what()` is true while a process runs, and return it."
    end = time.time() + seconds
    while not (found := what()):
        assert process.poll() is None and time.time() < end
        time.sleep(0.1)
    return found


def test_sweep_goes_by_the_objective_of_the_training(tmp_path):
    sweep = make_sweep(tmp_path/"a", ["train.lr=0.001,0.002"])
    assert sweep.metric == "train.objective_val" and not sweep.minimize
    with pytest.raises(UsageError, match=r"train\.metric varies, so trials have different objectives"):
        make_sweep(tmp_path/"b", ["train.metric=accuracy,balanced"])
    named = make_sweep(tmp_path/"c", ["train.metric=accuracy,balanced"], metric="train.balanced_accuracy_val")
    assert named.metric == "train.balanced_accuracy_val"


def test_curve_of_the_objective_is_the_first_validation_metric():
    curves = dict(balanced_accuracy_val=[0.5, 0.6], accuracy_val=[0.9, 0.8], loss_val=[1.0, 0.9], lr=[0.1])
    assert _select_curve(curves, "objective_val") == [0.5, 0.6]
    assert _select_curve(curves, "accuracy_val") == [0.9, 0.8] and _select_curve({}, "objective_val") == []
