"""A whole run: its files, what a second call does, and what a kill, a changed parameter or a broken image leaves."""
from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cvnb.core.files import read_json, sha256_file
from cvnb.core.stage import split_accesses
from cvnb.pipeline.runner import recorded_values, status
from cvnb.training.tracking import read_tracked

STAGES = ["audit", "train", "errors", "compress", "export", "benchmark"]
CVNB = Path(sys.executable).with_name("cvnb")


def cvnb(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True)


def papermill(*args: object, **kw) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB.with_name("papermill"), *map(str, args)], capture_output=True, text=True, **kw)


@pytest.fixture
def copy(smoke_run, tmp_path) -> Path:
    "A copy of the smoke run, to change."
    return Path(shutil.copytree(smoke_run, tmp_path/"copy"))


def states(run: Path, **changes: dict) -> dict[str, str]:
    values = recorded_values(run).add(changes, "--set")
    return {r["stage"]: r["state"] for r in status(run, values)}


def test_every_stage_left_its_files(smoke_run):
    for stage in STAGES:
        record = read_json(smoke_run/stage/"stage.json")
        assert set(record) == {"stage", "status", "key", "params", "data", "inputs", "outputs", "metrics", "seconds", "started", "cvnb",
                               "environment"}
        assert record["status"] == "done" and len(record["key"]) == 64 and record["outputs"]
        for out in record["outputs"].values():
            path = smoke_run/out["path"]
            assert path.stat().st_size == out["bytes"] and sha256_file(path) == out["sha256"]
        assert all(set(m) == {"value", "low", "high", "n"} for m in record["metrics"].values())
        notebook = json.loads((smoke_run/stage/"notebook.ipynb").read_text())
        code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        assert all(c["execution_count"] for c in code) and not any(o["output_type"] == "error" for c in code for o in c["outputs"])
        assert not [p.name for p in (smoke_run/stage).iterdir() if p.name.endswith((".tmp", ".ready")) or p.name == ".progress"]


def test_every_look_at_the_test_split_is_counted(smoke_run):
    assert split_accesses(smoke_run) == dict.fromkeys(("train", "errors", "compress", "export", "benchmark"), 1) == split_accesses(smoke_run, "test")
    assert split_accesses(smoke_run, "val") == {} and read_json(smoke_run/"run.json")["test_looks"] == split_accesses(smoke_run)


def test_executed_notebooks_show_pictures_and_no_warnings(smoke_run):
    for stage in STAGES:
        outputs = [o for c in read_json(smoke_run/stage/"notebook.ipynb")["cells"] for o in c.get("outputs", [])]
        shown = [o["data"] for o in outputs if "data" in o]
        assert not [d for d in shown if "<Figure" in "".join(d.get("text/plain", "")) and "image/png" not in d]
        assert stage == "export" or any("image/png" in d for d in shown), f"{stage} shows no picture"
        assert not [o for o in outputs if o.get("name") == "stderr"], stage


def test_the_training_was_tracked_as_the_stage_says(smoke_run):
    "The offline file of a real run, read back: parameters with what was picked, curves of steps and epochs, figures, pictures and the model."
    stage, results = read_json(smoke_run/"train/stage.json"), read_json(smoke_run/"train/metrics.json")
    tracked = read_tracked(smoke_run/stage["environment"]["wandb"]["folder"])
    assert tracked["id"] == stage["environment"]["wandb"]["id"]
    picked = {p["option"]: p["picked"] for p in stage["environment"]["picked"]}
    assert {"precision", "workers"} <= set(picked) and all(p["why"] for p in stage["environment"]["picked"])
    assert {k: tracked["config"][k] for k in stage["params"]} == stage["params"] | picked
    for name, figure in stage["metrics"].items(): assert tracked["summary"][name] == pytest.approx(figure["value"]), name
    epochs = [row for row in tracked["history"] if "epoch/val_loss" in row]
    for row, known in zip(epochs, results["history"], strict=True):
        assert all(row[f"epoch/{k}"] == pytest.approx(v) for k, v in known.items() if k != "epoch")
    steps = [row for row in tracked["history"] if "step/loss" in row]
    assert steps and all(row["step/lr"] > 0 and row["step/grad_norm"] > 0 for row in steps[1:])
    logged = {k for row in tracked["history"] for k in row}
    assert {"val/worst/captions", "val/best/captions", "val/confusion_table/path", "audit/checks/path"} <= logged
    assert tracked["artifacts"][f"model-{tracked['id']}"]["sha256"] == sha256_file(smoke_run/"train/model.safetensors")


def test_the_run_directory_is_as_designed(smoke_run):
    wanted = {"audit": ["manifest.parquet", "findings.parquet", "embeddings.npy", "audit.json", "report.html"],
              "errors": ["errors.json", "slices.parquet", "saliency"],
              "train": ["model.safetensors", "model.json", "predictions.parquet", "metrics.json"],
              "compress": ["model.safetensors", "model.json", "tradeoffs.parquet"],
              "export": [f"bundle/{f}" for f in ("model.onnx", "model_int8.onnx", "bundle.json", "labels.txt", "reference.npz")],
              "benchmark": ["benchmark.parquet", "benchmark.json", "report.html"]}
    assert not [f"{s}/{f}" for s, files in wanted.items() for f in files if not (smoke_run/s/f).exists()]
    run = read_json(smoke_run/"run.json")
    assert {"given", "params", "git", "lock", "machine", "seeds", "seconds"} <= set(run) and run["seconds"] > 0


def test_an_unchanged_run_does_nothing_and_loads_no_torch(smoke_run):
    before = {s: (smoke_run/s/"stage.json").stat().st_mtime_ns for s in STAGES}
    script = ("import sys\nfrom cvnb import cli\nsys.argv = ['cvnb', 'run', '--run', sys.argv[1], '--json']\n"
              "try: cli.main()\nexcept SystemExit as e: assert not e.code\nassert not {'torch', 'papermill', 'fiftyone'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", script, str(smoke_run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {s["state"] for s in json.loads(done.stdout)["stages"].values()} == {"fresh"}
    assert before == {s: (smoke_run/s/"stage.json").stat().st_mtime_ns for s in STAGES}


def test_a_changed_parameter_reaches_only_what_depends_on_it(smoke_run):
    assert set(states(smoke_run).values()) == {"fresh"}
    changed = states(smoke_run, errors={"n_images": 3})
    assert changed.pop("errors") == "stale" and set(changed.values()) == {"fresh"}


def test_a_lost_output_is_noticed(copy):
    (copy/"compress/tradeoffs.parquet").unlink()
    rows = {r["stage"]: r for r in status(copy, recorded_values(copy))}
    assert rows["compress"]["state"] == "stale" and "tradeoffs.parquet" in rows["compress"]["why"] and rows["train"]["state"] == "fresh"


def test_plain_papermill_runs_a_stage(copy, root, tmp_path):
    out = tmp_path/"errors.ipynb"
    done = papermill(root/"nbs/stages/errors.ipynb", out, "-p", "run", copy, "-p", "n_images", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = read_json(copy/"errors/stage.json")
    assert record["status"] == "done" and record["params"]["n_images"] == 3 and record["key"] is None
    assert states(copy)["errors"] == "stale"     # nobody knows which code made it


def test_plain_papermill_is_told_about_a_wrong_value(copy, root, tmp_path):
    done = papermill(root/"nbs/stages/errors.ipynb", tmp_path/"out.ipynb", "-p", "run", copy, "-p", "n_images", "-3")
    assert done.returncode != 0 and "errors.n_images = -3 (from the notebook): expected int" in done.stderr


def test_predict(smoke_run, tmp_path):
    image = next((Path(read_json(smoke_run/"audit/audit.json")["root"])/"7").glob("*.png"))
    done = cvnb("predict", smoke_run, image, "--json")
    answer = json.loads(done.stdout)
    assert answer["path"] == str(image) and abs(sum(answer["probabilities"].values()) - 1) < 1e-3
    assert cvnb("predict", smoke_run/"export/bundle", image, "--json").stdout == done.stdout
    (tmp_path/"words.png").write_text("words")
    for bad in tmp_path/"missing.png", tmp_path/"words.png":
        done = cvnb("predict", smoke_run, image, bad)
        assert done.returncode == 2 and str(bad) in done.stderr and len(done.stderr.splitlines()) == 1 and not done.stdout


def test_a_failing_stage_says_where_and_keeps_the_rest(copy):
    done = cvnb("run", "train", "--run", copy, "--set", "train.weights=elsewhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.weights = 'elsewhere' is neither a folder with a model nor a file of weights" in done.stderr
    assert set(states(copy).values()) == {"fresh"}, "what was trained before is still there"
    (copy/"train/stage.json").unlink()
    assert cvnb("run", "train", "--run", copy, "--set", "train.weights=elsewhere").returncode == 2
    assert read_json(copy/"train/stage.json")["status"] == "failed" and states(copy)["train"] == "failed"
