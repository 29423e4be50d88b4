"""The audit stage as a process: it repeats byte for byte, limits and corrections take effect, labels can be numbers."""
from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict

from cvnb.audit.checks import CHECKS
from cvnb.audit.embeddings import out_of_fold_view
from cvnb.audit.label_errors import check_labels, pca_features
from cvnb.audit.report import Policy
from cvnb.core.files import read_json, sha256_file
from cvnb.pipeline.params import read_contracts

CVNB = Path(sys.executable).with_name("cvnb")
FILES = ("manifest.parquet", "findings.parquet", "embeddings.npy", "audit.json", "report.html")
COUNT = """import json, sys
from cvnb.audit.fiftyone_dataset import load_dataset
dataset = load_dataset(sys.argv[1])
print(json.dumps(dict(n=len(dataset), tags=dataset.count_sample_tags(), persistent=dataset.persistent,
                      labels=dataset.count_values("ground_truth.label"), train=len(dataset.match_tags("train")))))
dataset.delete()"""


def cvnb(*args: object) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, *map(str, args)], capture_output=True, text=True)


def python(code: str, *args: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code, *map(str, args)], capture_output=True, text=True, timeout=120)


def audit(data: Path, run: Path, root: Path) -> dict[str, str]:
    "Run the stage through papermill and digest its files."
    command = [CVNB.with_name("papermill"), root/"nbs/stages/audit.ipynb", run.with_suffix(".ipynb")]
    parameters = ["-p", "data", data, "-p", "run", run]
    done = subprocess.run([*map(str, command + parameters)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: sha256_file(run/"audit"/name) for name in FILES}


@pytest.mark.slow
def test_audit_repeats_byte_for_byte_and_its_dataset_persists(small_photos, root, tmp_path):
    run, copies = tmp_path/"run", {}
    for path in sorted((small_photos/"7").iterdir())[:6]:   # nearly the same image again, as in a burst of photographs
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(copy := path.with_name(f"again-{path.name}"))
        copies[f"7/{copy.name}"] = f"7/{path.name}"
    assert audit(small_photos, run, root) == audit(small_photos, run, root)
    counted = python(COUNT, run)
    assert counted.stdout, counted.stderr
    dataset, manifest = json.loads(counted.stdout.splitlines()[-1]), pd.read_parquet(run/"audit/manifest.parquet")
    summary = read_json(run/"audit/audit.json")
    assert dataset["n"] == len(manifest) == summary["n_images"] == 66 and dataset["persistent"]
    assert dataset["labels"] == {"1": 30, "7": 36} and dataset["train"] == (manifest.split == "train").sum()
    assert dataset["tags"] == Counter([*manifest.split, *manifest.tags.explode().dropna()])
    split = manifest.set_index("path").split
    assert [split[copy] for copy in copies] == [split[path] for path in copies.values()], "the split makes leaks"
    assert summary["checks"]["near_duplicate"]["n"] >= 6 and summary["checks"]["leak"]["n"] == 0


def with_leak(photos: Path, data: Path) -> tuple[str, str]:
    "Split photos into train/ and test/, and copy a test image into training; return the paths of both."
    for label in "1", "7":
        for i, path in enumerate(sorted((photos/label).iterdir())):
            target = data/("test" if i % 5 == 0 else "train")/label/path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    original = sorted((data/"test/7").iterdir())[0]
    (data/"train/7/copy.png").write_bytes(original.read_bytes())
    return f"test/7/{original.name}", "train/7/copy.png"


@pytest.mark.slow
def test_limits_and_corrections_decide_what_is_trained_on(small_photos, tmp_path):
    data, run = tmp_path/"data", tmp_path/"run"
    original, copy = with_leak(small_photos, data)
    command = ["run", "audit", "--data", data, "--run", run]
    limits = ["--set", "audit.limits=[\"leak=0\"]"]
    failed = cvnb(*command, *limits, "--set", "audit.policy=fail")
    assert failed.returncode == 1 and "is over its limits: leak 1 of 61 (limit 0)" in failed.stderr
    assert "Traceback" not in failed.stderr and copy in (run/"audit/report.html").read_text()
    assert f"Look at {run/'audit/report.html'}" in failed.stderr
    assert "\"done\"" not in (run/"audit/stage.json").read_text()
    blind = cvnb(*command, "--set", "audit.limits=[\"label_error=1\"]", "--set", "audit.policy=fail",
                 "--set", "audit.min_recall=1")
    assert blind.returncode == 1 and "over its limits: NOT PROVEN: label_error found 0." in blind.stderr
    assert "lower audit.min_recall" in blind.stderr and "Traceback" not in blind.stderr
    refused = cvnb(*command, "--set", "audit.limits=[\"leek=0\"]")
    assert refused.returncode == 2 and "limit 'leek=0' names no check. Did you mean 'leak'?" in refused.stderr

    pixels = pd.read_parquet(run/"audit/manifest.parquet").set_index("path").pixel_sha256.to_dict()
    dropped = sorted((data/"train/1").iterdir())[0].relative_to(data).as_posix()
    (tmp_path/"mine.csv").write_text("path,pixel_sha256,copies,was,action,label,findings,when,run\n"
                                     f"{dropped},{pixels[dropped]},1,1,drop,,,,\n")
    training = {path: digest for path, digest in pixels.items() if path.startswith("train/")}
    proba = [[0.9, 0.1] if "/1/" in path else [0.1, 0.9] for path in training]
    predictions = tmp_path/"out_of_fold.parquet"
    pd.DataFrame(dict(pixel_sha256=[*training.values()], probabilities=proba)).to_parquet(predictions)
    options = ("policy=quarantine", f"corrections={tmp_path/'mine.csv'}", f"predictions={predictions}")
    done = cvnb(*command, *limits, *(word for option in options for word in ("--set", f"audit.{option}")))
    assert done.returncode == 0, done.stderr
    notes = [line.strip() for line in done.stdout.splitlines() if line.startswith("  ")]
    assert notes[0] == f"! leak: 1 of 60 images (limit 0) → {run/'audit/report.html'}"
    assert notes[1].startswith("! NOT PROVEN: leak found 0.")
    assert notes[2].startswith(f"- leak: {copy} and {original} are in different splits")
    assert notes[3].startswith("- 2 of 61 files are left out (1 ") and "1 quarantined" in notes[3]
    manifest = pd.read_parquet(run/"audit/manifest.parquet").set_index("path")
    summary = read_json(run/"audit/audit.json")
    assert manifest.error[~manifest.ok].to_dict() == {copy: "quarantined: leak", dropped: "left out by corrections"}
    assert set(summary["checks"]) == set(CHECKS), "the audit has other checks than those that can have limits"
    assert summary["n_answered"] == 48   # without the dropped image
    assert "the recall may be a little too high" in summary["checks"]["label_error"]["proof"]["note"]
    assert summary["n_images"] == 59 and manifest.split[original] == "test"


@pytest.mark.slow
def test_regression_labels_are_split_by_range_audited_and_trained_on(small_photos, tmp_path):
    "Checks that compare classes compare ranges, labels are not checked as classes, and a dropped file needs no number."
    files = sorted(small_photos.glob("*/*"))
    ink = [f"{np.asarray(Image.open(file).convert('L')).mean() // 5 * 5:.0f}" for file in files]
    assert Counter(ink).most_common(1)[0][1] > 5
    (tmp_path/"none.png").write_bytes(b"")
    table = pd.DataFrame(dict(path=[*map(str, files), str(tmp_path/"none.png")], label=[*ink, "n/a"]))
    table.to_csv(tmp_path/"ink.csv", index=False)
    (tmp_path/"ink.yaml").write_text(f"data: {tmp_path/'ink.csv'}\ntask: regression\n")
    small = dict(backbone="test_mambaout", epochs=1, image_size=16, folds=2, tta="flip")
    options = [word for name, value in small.items() for word in ("--set", f"train.{name}={value}")]
    done = cvnb("run", "train", "--config", tmp_path/"ink.yaml", "--run", tmp_path/"run", *options)
    assert done.returncode == 0, done.stderr
    manifest = pd.read_parquet(tmp_path/"run/audit/manifest.parquet")
    summary = read_json(tmp_path/"run/audit/audit.json")
    assert summary["task"] == "regression" and summary["checks"]["label_error"]["n_checked"] == 0
    numbers = manifest.label[manifest.ok].astype(float)
    for split in "train", "val", "test":
        assert 0.25 < (numbers[manifest.split == split] >= numbers.median()).mean() < 0.85, split
    pool = manifest[manifest.split.isin(["train", "val"])]
    metrics = read_json(tmp_path/"run/train/stage.json")["metrics"]
    out_of_fold = pd.read_parquet(tmp_path/"run/train/out_of_fold.parquet")
    assert set(out_of_fold.path) == set(pool.path) and sorted(out_of_fold.fold.unique()) == [0, 1]
    assert metrics["r2_folds"]["n"] == 2 and metrics["r2_folds"]["high"] <= 1
    assert metrics["mae_test_tta"]["n"] == (manifest.split == "test").sum()


def test_out_of_fold_predictions_help_to_find_label_errors():
    "On thumbnails of 2 × 2 pixels the check is nearly blind. Predictions help, and images without one lose nothing."
    digits, rng, n = load_digits(), np.random.default_rng(0), 900
    labels, wrong = digits.target[:n].copy(), rng.permutation(n)[:45]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 45)) % 10
    blind = digits.images[:n].reshape(n, 2, 4, 2, 4).mean((2, 4)).reshape(n, 4)
    views = dict(pixels=blind / np.linalg.norm(blind, axis=1, keepdims=True))
    model = LogisticRegression(max_iter=300)
    proba = cross_val_predict(model, digits.data[:n] / 16, labels, cv=3, method="predict_proba")
    paths, parts, precision = pd.Series([f"{i}.png" for i in range(n)]), (np.arange(600), np.arange(600, n)), {}
    table = pd.DataFrame(dict(path=paths, label=labels.astype(str), ok=True, duplicate_of=""))
    for n_predicted in 0, 600:
        x = pca_features(views | out_of_fold_view(dict(zip(paths[:n_predicted], proba)), paths, views))
        score = 1 - check_labels(table, x).table.label_score.to_numpy()
        precision[n_predicted] = [average_precision_score(np.isin(part, wrong), score[part]) for part in parts]
    assert precision[0][0] < 0.5 and precision[600][0] > 0.95
    assert precision[600][1] > 0.9 * precision[0][1], precision


def test_page_of_real_faults_shows_every_reviewed_fault(root):
    page = (root/"benchmarks/results/real_faults.md").read_text(encoding="utf-8")
    pictures = re.findall(r"]\((.+?\.png)\)", page)
    assert pictures and all((root/"benchmarks/results"/p).stat().st_size <= 100_000 for p in pictures)
    reviewed = pd.read_csv(root/"benchmarks/real_faults.csv", dtype=str, keep_default_na=False)
    assert set(reviewed.seen) == {"fault", "unclear", "no fault"}
    assert not reviewed.duplicated(["data", "check", "path"]).any()
    for row in reviewed[reviewed.seen == "fault"].itertuples():
        assert f"| {row.path} |" in page and f"| fault: {row.comment} |" in page, row.path
    assert not re.search(r"^\|.*\| +\|$", page, re.M), "the table has a finding that was not reviewed"


def test_importing_audit_modules_loads_no_heavy_package():
    modules = "embeddings, manifest, pictures, fiftyone_dataset, sections"
    done = python(f"import sys\nfrom cvnb.audit import {modules}\n"
                  "print({'torch', 'fiftyone', 'sklearn', 'cleanlab', 'matplotlib'} & sys.modules.keys())")
    assert done.stdout == "set()\n", done.stderr or done.stdout


def test_stage_offers_every_policy():
    params = {p.name: p for p in read_contracts()["audit"].params}
    assert params["policy"].type == Policy and params["policy"].default in get_args(Policy)
