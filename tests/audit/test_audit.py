"""What the audit's notebook cannot show: repeats, fresh processes, and a database under strain."""
from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_predict

from cvnb.data import fiftyone_db as database
from cvnb.audit.embeddings import answers
from cvnb.core.files import read_json, sha256_file
from cvnb.audit.label_errors import check_labels, reduce
from cvnb.audit.report import CHECKS

FILES = ("manifest.parquet", "findings.parquet", "embeddings.npy", "audit.json", "report.html")
COUNT = """import json, sys
from cvnb.audit.fiftyone_dataset import load_dataset
dataset = load_dataset(sys.argv[1])
print(json.dumps(dict(n=len(dataset), tags=dataset.count_sample_tags(), persistent=dataset.persistent,
                      labels=dataset.count_values("ground_truth.label"), tagged=len(dataset.match_tags("train")))))
dataset.delete()"""
OPEN = "from cvnb.data.fiftyone_db import fiftyone; fo = fiftyone(); fo.list_datasets()"


def python(code: str, *args: object, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=os.environ | env, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def audit(data: Path, run: Path, root: Path) -> dict[str, str]:
    "Run the stage through papermill and digest what it wrote."
    command = [Path(sys.executable).with_name("papermill"), root/"nbs/stages/audit.ipynb", run.with_suffix(".ipynb")]
    done = subprocess.run([*map(str, command), "-p", "data", str(data), "-p", "run", str(run)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: sha256_file(run/"audit"/name) for name in FILES}


@pytest.mark.slow
def test_an_audit_repeats_byte_for_byte_and_its_dataset_stays(small_photos, root, tmp_path):
    run, close = tmp_path/"run", {}
    for path in sorted((small_photos/"7").iterdir())[:6]:      # nearly the same image again, as a burst of photographs gives it
        pixels = np.asarray(Image.open(path)).copy()
        pixels[0, 0] ^= 1
        Image.fromarray(pixels).save(copy := path.with_name(f"again-{path.name}"))
        close[f"7/{copy.name}"] = f"7/{path.name}"
    assert audit(small_photos, run, root) == audit(small_photos, run, root)
    out, err = python(COUNT, run).communicate(timeout=120)
    assert out, err
    seen, manifest = json.loads(out.splitlines()[-1]), pd.read_parquet(run/"audit/manifest.parquet")
    assert seen["n"] == len(manifest) == read_json(run/"audit/audit.json")["n_images"] == 66 and seen["persistent"]
    assert seen["labels"] == {"1": 30, "7": 36} and seen["tagged"] == (manifest.split == "train").sum()
    assert seen["tags"] == Counter([*manifest.split, *manifest.tags.explode().dropna()])
    split, checks = manifest.set_index("path").split, read_json(run/"audit/audit.json")["checks"]
    assert {(copy, split[copy]) for copy in close} == {(copy, split[path]) for copy, path in close.items()}, "no leak of our own making"
    assert checks["near_duplicate"]["n"] >= 6 and checks["leak"]["n"] == 0


@pytest.mark.slow
def test_limits_and_corrections_decide_what_is_trained_on(small_photos, tmp_path):
    for label in "1", "7":     # as many people's folders come: split already, with a copy on both sides
        for i, path in enumerate(sorted((small_photos/label).iterdir())):
            target = tmp_path/"data"/("test" if i % 5 == 0 else "train")/label/path.name
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    seen, copy = sorted((tmp_path/"data/test/7").iterdir())[0], tmp_path/"data/train/7/copy.png"
    copy.write_bytes(seen.read_bytes())
    command = [Path(sys.executable).with_name("cvnb"), "run", "audit", "--data", tmp_path/"data", "--run", tmp_path/"run"]
    run = lambda *args: subprocess.run([*command, *args], capture_output=True, text=True)
    failed = run("--set", "audit.policy=fail", "--set", "audit.limits=[\"leak=0\"]")
    assert failed.returncode == 1 and "is over its limits: leak 1 of 61 (limit 0)" in failed.stderr and "Traceback" not in failed.stderr
    assert "train/7/copy.png" in (tmp_path/"run/audit/report.html").read_text() and not (tmp_path/"run/audit/stage.json").read_text().count('"done"')
    refused = run("--set", "audit.limits=[\"leek=0\"]")
    assert refused.returncode == 2 and "limit 'leek=0' is for no check. Did you mean 'leak'?" in refused.stderr

    pixels = pd.read_parquet(tmp_path/"run/audit/manifest.parquet").set_index("path").pixel_sha256.to_dict()
    other = sorted((tmp_path/"data/train/1").iterdir())[0].relative_to(tmp_path/"data").as_posix()
    (tmp_path/"mine.csv").write_text(f"path,pixel_sha256,copies,was,action,label,findings,when,run\n{other},{pixels[other]},1,1,drop,,,,\n")
    trained = {digest: [0.9, 0.1] if "/1/" in path else [0.1, 0.9] for path, digest in pixels.items() if path.startswith("train/")}
    pd.DataFrame(dict(pixel_sha256=[*trained], probabilities=[*trained.values()])).to_parquet(tmp_path/"out_of_fold.parquet")
    done = run("--set", "audit.policy=quarantine", "--set", "audit.limits=[\"leak=0\"]", "--set", f"audit.corrections={tmp_path/'mine.csv'}",
               "--set", f"audit.predictions={tmp_path/'out_of_fold.parquet'}")
    assert done.returncode == 0, done.stderr
    manifest = pd.read_parquet(tmp_path/"run/audit/manifest.parquet").set_index("path")
    assert manifest.error[~manifest.ok].to_dict() == {"train/7/copy.png": "quarantined: leak", other: "left out by corrections"}
    assert set(read_json(tmp_path/"run/audit/audit.json")["checks"]) == set(CHECKS), "what a limit can be set for is what is checked"
    assert read_json(tmp_path/"run/audit/audit.json")["n_answered"] == 48   # without what was dropped
    assert "the recall may be a little too high" in (tmp_path/"run/audit/audit.json").read_text()
    assert read_json(tmp_path/"run/audit/audit.json")["n_images"] == 59 and manifest.split["test/7/" + seen.name] == "test"


@pytest.mark.slow
def test_numbers_are_split_over_their_range_audited_and_learned(small_photos, tmp_path):
    "What compares classes compares ranges, and numbers are not checked as if they were classes; what a person dropped needs no number."
    files = sorted(small_photos.glob("*/*"))
    ink = [f"{np.asarray(Image.open(file).convert('L')).mean() // 5 * 5:.0f}" for file in files]
    assert Counter(ink).most_common(1)[0][1] > 5
    (tmp_path/"none.png").write_bytes(b"")
    pd.DataFrame(dict(path=[*map(str, files), str(tmp_path/"none.png")], label=[*ink, "n/a"])).to_csv(tmp_path/"ink.csv", index=False)
    (tmp_path/"ink.yaml").write_text(f"data: {tmp_path/'ink.csv'}\ntask: regression\n")
    small = dict(backbone="test_mambaout", epochs=1, image_size=16, folds=2, tta="flip")
    command = [Path(sys.executable).with_name("cvnb"), "run", "train", "--config", tmp_path/"ink.yaml", "--run", tmp_path/"run",
               *(word for name, value in small.items() for word in ("--set", f"train.{name}={value}"))]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest, audit = pd.read_parquet(tmp_path/"run/audit/manifest.parquet"), read_json(tmp_path/"run/audit/audit.json")
    assert audit["task"] == "regression" and audit["checks"]["label_error"]["n_checked"] == 0
    middle = manifest.label[manifest.ok].astype(float).median()
    for split in "train", "val", "test": assert 0.25 < (manifest.label[manifest.split == split].astype(float) >= middle).mean() < 0.85, split
    pool, figures = manifest[manifest.split.isin(["train", "val"])], read_json(tmp_path/"run/train/stage.json")["metrics"]
    crossed = pd.read_parquet(tmp_path/"run/train/out_of_fold.parquet")
    assert set(crossed.path) == set(pool.path) and sorted(crossed.fold.unique()) == [0, 1]
    assert figures["r2_folds"]["n"] == 2 and figures["r2_folds"]["high"] <= 1 and figures["mae_test_tta"]["n"] == (manifest.split == "test").sum()


def test_wrong_labels_are_found_with_networks_answers():
    "On thumbnails of 2 × 2 pixels the check is nearly blind, and what saw all pixels helps it; images that it was not asked about lose nothing."
    digits, rng = load_digits(), np.random.default_rng(0)
    n, labels = 900, digits.target[:900].copy()
    wrong = rng.permutation(n)[:45]
    labels[wrong] = (labels[wrong] + rng.integers(1, 10, 45)) % 10
    blind = digits.images[:n].reshape(n, 2, 4, 2, 4).mean((2, 4)).reshape(n, 4)
    seen = dict(pixels=blind / np.linalg.norm(blind, axis=1, keepdims=True))
    proba = cross_val_predict(LogisticRegression(max_iter=300), digits.data[:n] / 16, labels, cv=3, method="predict_proba")
    paths, parts, precision = pd.Series([f"{i}.png" for i in range(n)]), (np.arange(600), np.arange(600, n)), {}
    table = pd.DataFrame(dict(path=paths, label=labels.astype(str), ok=True, duplicate_of=""))
    for told in 0, 600:
        x = reduce(seen | answers(dict(zip(paths[:told], proba)), paths, seen))
        score = 1 - check_labels(table, x).table.label_score.to_numpy()
        precision[told] = [average_precision_score(np.isin(part, wrong), score[part]) for part in parts]
    assert precision[0][0] < 0.5 and precision[600][0] > 0.95 and precision[600][1] > 0.9 * precision[0][1], precision


def test_the_page_of_real_faults_shows_what_somebody_saw(root):
    page = (root/"benchmarks/results/real_faults.md").read_text(encoding="utf-8")
    pictures = re.findall(r"]\((.+?\.png)\)", page)
    assert pictures and all((root/"benchmarks/results"/p).stat().st_size <= 100_000 for p in pictures)
    seen = pd.read_csv(root/"benchmarks/real_faults.csv", dtype=str, keep_default_na=False)
    assert set(seen.seen) == {"fault", "unclear", "no fault"} and not seen.duplicated(["data", "check", "path"]).any()
    for row in seen[seen.seen == "fault"].itertuples(): assert f"| {row.path} |" in page and f"| fault: {row.comment} |" in page, row.path
    assert not re.search(r"^\|.*\| +\|$", page, re.M), "a finding that nobody looked at stands in the table"


def test_importing_the_audit_loads_nothing_heavy():
    out, err = python("import sys, cvnb.audit.embeddings, cvnb.audit.manifest, cvnb.audit.pictures, cvnb.audit.fiftyone_dataset; print({'torch', 'fiftyone', 'sklearn', 'cleanlab'} & sys.modules.keys())").communicate()
    assert out == "set()\n", err


def test_processes_that_start_at_once_share_the_database():
    processes = [python(OPEN) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err


def wait_for(what, timeout: float = 60):
    "Wait until `what()` is true, and return it."
    deadline = time.time() + timeout
    while not (found := what()) and time.time() < deadline: time.sleep(0.1)
    assert found, f"nothing came within {timeout} s"
    return found


def test_a_database_left_behind_is_used(tmp_path):
    folder, mongod = tmp_path/"database", Path(importlib.util.find_spec("fiftyone").origin).parent/"db/bin/mongod"
    folder.mkdir()
    log = (tmp_path/"log").open("w+")
    left = subprocess.Popen([mongod, "--dbpath", folder, "--port", "0", "--nounixsocket"], stdout=log)
    try:
        wait_for(lambda: "Waiting for connections" in (tmp_path/"log").read_text())
        process = python(OPEN + "; fo.Dataset('here', persistent=True); print(fo.config.database_uri)", FIFTYONE_DATABASE_DIR=str(folder))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.startswith("mongodb://127.0.0.1:"), err
    finally:
        left.terminate()
        left.wait()


def test_a_service_that_waits_for_itself_is_replaced(tmp_path):
    # FiftyOne's service takes two locks in two orders, so it can stop for ever when its last client goes; here it is stopped by hand
    folder = str(tmp_path/"database")
    launched = database._launch(folder)
    service = psutil.Process(launched.pid)
    try:
        database._wait_for_port(folder, launched)
        service.suspend()
        process = python(OPEN + "; print(len(fo.list_datasets()))", FIFTYONE_DATABASE_DIR=folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == "0", err
        assert launched.wait(10) == -signal.SIGKILL
    finally:
        launched.kill()
        if mongod := database._mongod(folder): mongod.kill()


def test_the_database_ends_when_nobody_is_connected(tmp_path):
    env = {"FIFTYONE_DATABASE_DIR": str(tmp_path/"database")}
    code = ("from cvnb.data import fiftyone_db as database\ndatabase._connect()\nprint(database._keeper()['port'], flush=True)\n"
            "import psutil; print(database._mongod(database.database_folder()).pid, flush=True)")
    process = python(f"import cvnb.data.fiftyone_db as d; d._paths()[0].parent.mkdir(parents=True, exist_ok=True)\n{code}", **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    mongod = int(out.split()[1])
    wait_for(lambda: not psutil.pid_exists(mongod), 60)
