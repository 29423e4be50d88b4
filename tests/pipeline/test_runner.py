"""A whole run: its files, a second call, changed parameters, and refused values."""
from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from wandb_file import read_wandb_file

from cvnb.core.files import read_json, sha256_file
from cvnb.core.stage import split_accesses
from cvnb.data.images import load_images
from cvnb.data.splits import IMAGE_ROLES, pixels_digest, read_splits
from cvnb.export.quantize import load_quantization_data
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.runner import read_run_parameters, stage_states
from cvnb.pipeline.sweep_trials import declared_metrics

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
    values = read_run_parameters(run).add(changes, "--set")
    return {r["stage"]: r["state"] for r in stage_states(run, values)}


def test_every_stage_writes_manifest_outputs_and_notebook(smoke_run):
    for stage in STAGES:
        record = read_json(smoke_run/stage/"stage.json")
        assert set(record) == {"stage", "status", "key", "params", "data", "inputs", "outputs", "metrics", "notes",
                               "seconds", "started", "cvnb", "environment", "format", "digest", "images",
                               "notebook"}
        assert record["status"] == "done" and len(record["key"]) == 64 and record["outputs"]
        for out in record["outputs"].values():
            path = smoke_run/out["path"]
            assert path.stat().st_size == out["bytes"] and sha256_file(path) == out["sha256"]
        assert all(set(m) == {"value", "low", "high", "n"} for m in record["metrics"].values())
        notebook = json.loads((smoke_run/stage/"notebook.ipynb").read_text())
        code = [c for c in notebook["cells"] if c["cell_type"] == "code"]
        assert all(c["execution_count"] for c in code)
        assert not any(o["output_type"] == "error" for c in code for o in c["outputs"])
        left = [p.name for p in (smoke_run/stage).iterdir()]
        assert not [name for name in left if name.endswith((".tmp", ".ready")) or name == ".progress"]


def test_every_access_to_the_test_split_is_counted(smoke_run):
    once = dict.fromkeys(("train", "errors", "compress", "export", "benchmark"), 1)
    assert split_accesses(smoke_run) == split_accesses(smoke_run, "test") == once
    assert split_accesses(smoke_run, "val") == {} and read_json(smoke_run/"run.json")["test_looks"] == once


def test_manifests_record_the_pixels_that_stages_used(smoke_run):
    "Decoded here from the files of the manifest's splits; training, calibration and test share no image."
    root, classes = (read_json(smoke_run/"audit/audit.json")[name] for name in ("root", "classes"))
    size = read_json(smoke_run/"train/model.json")["image_size"]
    rows = read_splits(smoke_run/"audit/manifest.parquet")
    pixels = {split: load_images(root, part.path, size) for split, part in rows.items()}
    contents = {split: {image.tobytes() for image in images} for split, images in pixels.items()}
    assert not contents["train"] & contents["test"] and not contents["val"] & (contents["train"] | contents["test"])
    used = {stage: read_json(smoke_run/stage/"stage.json")["images"] for stage in STAGES}
    for stage, roles in dict(train=["weights", "epoch", "report"], compress=["weights", "epoch", "acceptance"]).items():
        for role in roles:
            split = IMAGE_ROLES[role].split
            assert used[stage][role]["pixels"] == pixels_digest(pixels[split]), f"{stage}, {role}"
            assert used[stage][role]["n"] == len(rows[split]) and used[stage][role]["split"] == split
    chosen = load_quantization_data(root, rows["train"], rows["val"], classes, size, 256, 10).calibration
    assert {image.tobytes() for image in chosen} <= contents["train"]
    assert used["export"]["calibration"]["pixels"] == pixels_digest(chosen)
    assert used["errors"]["report"]["sha256"] == used["export"]["report"]["sha256"] == used["train"]["report"]["sha256"]


def test_executed_notebooks_show_images_and_no_warnings(smoke_run):
    for stage in STAGES:
        outputs = [o for c in read_json(smoke_run/stage/"notebook.ipynb")["cells"] for o in c.get("outputs", [])]
        shown = [o["data"] for o in outputs if "data" in o]
        assert not [d for d in shown if "<Figure" in "".join(d.get("text/plain", "")) and "image/png" not in d]
        assert stage == "export" or any("image/png" in d for d in shown), f"{stage} shows no image"
        assert not [o for o in outputs if o.get("name") == "stderr"], stage


def test_tracked_training_matches_stage_manifest(smoke_run):
    "The offline file holds parameters with picked values, curves of steps and epochs, metrics, images and the model."
    stage, results = read_json(smoke_run/"train/stage.json"), read_json(smoke_run/"train/metrics.json")
    tracked = read_wandb_file(smoke_run/stage["environment"]["wandb"]["folder"])
    assert tracked["id"] == stage["environment"]["wandb"]["id"]
    picked = {p["option"]: p["picked"] for p in stage["environment"]["picked"]}
    assert {"precision", "workers"} <= set(picked) and all(p["why"] for p in stage["environment"]["picked"])
    assert {k: tracked["config"][k] for k in stage["params"]} == stage["params"] | picked
    for name, metric in stage["metrics"].items():
        assert tracked["summary"][name] == pytest.approx(metric["value"]), name
    epochs = [row for row in tracked["history"] if "epoch/val_loss" in row]
    for row, known in zip(epochs, results["history"], strict=True):
        assert all(row[f"epoch/{k}"] == pytest.approx(v) for k, v in known.items() if k != "epoch")
    steps = [row for row in tracked["history"] if "step/loss" in row]
    assert steps and all(row["step/lr"] > 0 and row["step/grad_norm"] > 0 for row in steps[1:])
    logged = {k for row in tracked["history"] for k in row}
    assert {"val/worst/captions", "val/best/captions", "val/confusion_table/path", "audit/checks/path"} <= logged
    assert tracked["artifacts"][f"model-{tracked['id']}"]["sha256"] == sha256_file(smoke_run/"train/model.safetensors")


def test_files_of_a_run_have_one_mode(smoke_run):
    modes = {oct(path.stat().st_mode & 0o777) for path in smoke_run.rglob("*") if path.is_file()}
    assert len(modes) == 1


def test_run_directory_has_the_documented_files(smoke_run):
    wanted = {"audit": ["manifest.parquet", "findings.parquet", "embeddings.npy", "audit.json", "report.html"],
              "errors": ["errors.json", "slices.parquet", "saliency"],
              "train": ["model.safetensors", "model.json", "predictions.parquet", "metrics.json"],
              "compress": ["model.safetensors", "model.json", "tradeoffs.parquet"],
              "export": ["bundle/model.onnx", "bundle/model_int8.onnx", "bundle/bundle.json", "bundle/labels.txt",
                         "bundle/reference.npz"],
              "benchmark": ["benchmark.parquet", "benchmark.json", "report.html"]}
    assert not [f"{s}/{f}" for s, files in wanted.items() for f in files if not (smoke_run/s/f).exists()]
    run = read_json(smoke_run/"run.json")
    assert {"given", "params", "git", "lock", "machine", "seeds", "seconds"} <= set(run) and run["seconds"] > 0


def test_unchanged_run_executes_nothing_and_imports_no_torch(smoke_run):
    before = {s: (smoke_run/s/"stage.json").stat().st_mtime_ns for s in STAGES}
    script = ("import sys\nfrom cvnb.cli.app import main\nsys.argv = ['cvnb', 'run', '--run', sys.argv[1], '--json']\n"
              "try: main()\nexcept SystemExit as e: assert not e.code\n"
              "assert not {'torch', 'papermill', 'fiftyone'} & set(sys.modules)")
    done = subprocess.run([sys.executable, "-c", script, str(smoke_run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {s["state"] for s in json.loads(done.stdout)["stages"].values()} == {"fresh"}
    assert before == {s: (smoke_run/s/"stage.json").stat().st_mtime_ns for s in STAGES}


def test_changed_parameter_makes_only_dependent_stages_stale(smoke_run):
    assert set(states(smoke_run).values()) == {"fresh"}
    changed = states(smoke_run, errors={"n_images": 3})
    assert changed.pop("errors") == "stale" and set(changed.values()) == {"fresh"}


def test_missing_output_makes_stage_stale(copy):
    (copy/"compress/tradeoffs.parquet").unlink()
    rows = {r["stage"]: r for r in stage_states(copy, read_run_parameters(copy))}
    assert rows["compress"]["state"] == "stale" and "tradeoffs.parquet" in rows["compress"]["why"]
    assert rows["train"]["state"] == "fresh"


def test_plain_papermill_runs_a_stage(copy, root, tmp_path):
    out = tmp_path/"errors.ipynb"
    done = papermill(root/"nbs/stages/errors.ipynb", out, "-p", "run", copy, "-p", "n_images", "3", cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    record = read_json(copy/"errors/stage.json")
    assert record["status"] == "done" and record["params"]["n_images"] == 3 and record["key"] is None
    assert states(copy)["errors"] == "stale", "the code that made it is unknown"


def test_plain_papermill_refuses_wrong_value(copy, root, tmp_path):
    done = papermill(root/"nbs/stages/errors.ipynb", tmp_path/"out.ipynb", "-p", "run", copy, "-p", "n_images", "-3")
    assert done.returncode != 0 and "errors.n_images = -3 (from papermill): expected int" in done.stderr


def test_predict_classifies_images_and_reports_broken_ones(smoke_run, tmp_path):
    image = next((Path(read_json(smoke_run/"audit/audit.json")["root"])/"7").glob("*.png"))
    done = cvnb("predict", smoke_run, image, "--json")
    prediction = json.loads(done.stdout)
    assert prediction["path"] == str(image) and abs(sum(prediction["probabilities"].values()) - 1) < 1e-3
    assert cvnb("predict", smoke_run/"export/bundle", image, "--json").stdout == done.stdout
    (tmp_path/"words.png").write_text("words")
    for bad in tmp_path/"missing.png", tmp_path/"words.png":
        done = cvnb("predict", smoke_run, image, bad, "--json")
        assert done.returncode == 1 and json.loads(done.stdout) == prediction
        lines = [line for line in done.stderr.splitlines() if not line.startswith("- ")]   # how labels are chosen
        assert str(bad) in lines[0] and len(lines) == 2


def test_refused_value_keeps_earlier_result(copy):
    done = cvnb("run", "train", "--run", copy, "--set", "train.weights=elsewhere")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "train.weights = 'elsewhere' is neither a folder with a model nor a file of weights" in done.stderr
    assert set(states(copy).values()) == {"fresh"}, "the earlier training is still valid"
    (copy/"train/stage.json").unlink()
    assert cvnb("run", "train", "--run", copy, "--set", "train.weights=elsewhere").returncode == 2
    assert read_json(copy/"train/stage.json")["status"] == "failed" and states(copy)["train"] == "failed"


def test_recorded_metrics_are_those_that_the_stages_declare(smoke_run):
    for stage, contract in read_contracts().items():
        patterns = [re.escape(name).replace(r"\*", ".*") for name in declared_metrics(contract)]
        recorded = read_json(smoke_run/stage/"stage.json")["metrics"]
        assert [name for name in recorded if not any(re.fullmatch(p, name) for p in patterns)] == [], stage
