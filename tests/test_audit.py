"""What the audit's notebook cannot show: repeats, fresh processes, and a database under strain."""
from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import psutil
import pytest

from cvnb import database
from cvnb.core import read_json, sha256_file

FILES = ("manifest.parquet", "embeddings.npy", "audit.json")
COUNT = """import json, sys
from cvnb.audit import load_dataset
dataset = load_dataset(sys.argv[1])
print(json.dumps(dict(n=len(dataset), tags=dataset.count_sample_tags(), persistent=dataset.persistent,
                      labels=dataset.count_values("ground_truth.label"), tagged=len(dataset.match_tags("train")))))
dataset.delete()"""
OPEN = "from cvnb.database import fiftyone; fo = fiftyone(); fo.list_datasets()"


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
    run = tmp_path/"run"
    assert audit(small_photos, run, root) == audit(small_photos, run, root)
    out, err = python(COUNT, run).communicate(timeout=120)
    assert out, err
    seen, manifest = json.loads(out.splitlines()[-1]), pd.read_parquet(run/"audit/manifest.parquet")
    assert seen["n"] == len(manifest) == read_json(run/"audit/audit.json")["n_images"] == 60 and seen["persistent"]
    assert seen["labels"] == {"1": 30, "7": 30} and seen["tagged"] == (manifest.split == "train").sum()
    assert seen["tags"] == Counter([*manifest.split, *manifest.tags.explode().dropna()])


def test_importing_the_audit_loads_nothing_heavy():
    out, err = python("import sys, cvnb.audit; print({'torch', 'fiftyone', 'sklearn', 'cleanlab'} & sys.modules.keys())").communicate()
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
    code = ("from cvnb import database\ndatabase._connect()\nprint(database._keeper()['port'], flush=True)\n"
            "import psutil; print(database._mongod(database.database_folder()).pid, flush=True)")
    process = python(f"import cvnb.database as d; d._paths()[0].parent.mkdir(parents=True, exist_ok=True)\n{code}", **env)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    mongod = int(out.split()[1])
    wait_for(lambda: not psutil.pid_exists(mongod), 60)


def test_a_database_that_does_not_answer_is_one_line():
    code = "from cvnb.database import fiftyone\nfrom cvnb.core import CvnbError\ntry: fiftyone()\nexcept CvnbError as e: print(e)"
    out, err = python(code, FIFTYONE_DATABASE_URI="mongodb://127.0.0.1:9/?serverSelectionTimeoutMS=300").communicate(timeout=120)
    assert out.startswith("FiftyOne's database cannot be started (") and len(out.splitlines()) == 1 and "end a mongod" in out, err
