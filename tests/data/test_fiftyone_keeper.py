"""The service that keeps FiftyOne's database: shared by processes, replaced when it hangs, ended when unused."""
from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cvnb.data import fiftyone_db as database

OPEN = "from cvnb.data.fiftyone_db import import_fiftyone; fo = import_fiftyone(); fo.list_datasets()"


def python(code: str, **env: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", code], env=os.environ | env, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE)


def wait_for(condition: Callable[[], Any], timeout: float = 60) -> Any:
    "Wait until `condition()` is true, and return it."
    deadline = time.time() + timeout
    while not (value := condition()) and time.time() < deadline: time.sleep(0.1)
    assert value, f"not true within {timeout} s"
    return value


def test_processes_that_start_together_share_the_database():
    processes = [python(OPEN) for _ in range(3)]
    for process in processes:
        _, err = process.communicate(timeout=150)
        assert process.returncode == 0, err


def test_running_mongod_is_used(tmp_path):
    folder, mongod = tmp_path/"database", Path(importlib.util.find_spec("fiftyone").origin).parent/"db/bin/mongod"
    folder.mkdir()
    log = (tmp_path/"log").open("w+")
    running = subprocess.Popen([mongod, "--dbpath", folder, "--port", "0", "--nounixsocket"], stdout=log)
    try:
        wait_for(lambda: "Waiting for connections" in (tmp_path/"log").read_text())
        code = f"{OPEN}; fo.Dataset('here', persistent=True); print(fo.config.database_uri)"
        process = python(code, FIFTYONE_DATABASE_DIR=str(folder))
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.startswith("mongodb://127.0.0.1:"), err
    finally:
        running.terminate()
        running.wait()


def test_hanging_service_is_replaced(tmp_path):
    # FiftyOne's service takes two locks in two orders and can deadlock when its last client ends; here it is suspended
    folder = str(tmp_path/"database")
    launched = database._launch_service(folder)
    service = psutil.Process(launched.pid)
    try:
        database._wait_for_port(folder, launched)
        service.suspend()
        process = python(f"{OPEN}; print(len(fo.list_datasets()))", FIFTYONE_DATABASE_DIR=folder)
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0 and out.strip() == "0", err
        assert launched.wait(10) == -signal.SIGKILL
    finally:
        launched.kill()
        if mongod := database._find_mongod(folder): mongod.kill()


def test_database_ends_when_no_process_is_connected(tmp_path):
    code = """from cvnb.data import fiftyone_db as database
database._keeper_files()[0].parent.mkdir(parents=True, exist_ok=True)
database._connect()
print(database._running_keeper()["port"], flush=True)
print(database._find_mongod(database.database_folder()).pid, flush=True)"""
    process = python(code, FIFTYONE_DATABASE_DIR=str(tmp_path/"database"))
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    mongod = int(out.split()[1])
    wait_for(lambda: not psutil.pid_exists(mongod))
