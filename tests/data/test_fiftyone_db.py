"""Failures of FiftyOne's database: each is reported in one line, loses no dataset, and is repaired by the next call."""
from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import resource
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import bson
import psutil
import pytest

from cvnb.core.errors import CvnbError, UsageError
from cvnb.data import fiftyone_db as database

OPEN = """from cvnb.core.errors import CvnbError
from cvnb.data.fiftyone_db import import_fiftyone
try: import_fiftyone()
except CvnbError as e: print(e)"""
WRITE = """import json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd
from cvnb.data import fiftyone_db as database
from cvnb.audit.fiftyone_dataset import dataset_name, load_dataset, write_dataset
from cvnb.audit.checks import make_findings
from cvnb.core.errors import CvnbError
run = Path(sys.argv[1])
rows = [dict(path=f"{i % 2}/{i}.png", label=str(i % 2), split="train", ok=True, tags=[], suggested="",
             pixel_sha256=f"{i:064}", duplicate_of="", near_duplicate_of="", width=8, height=8,
             brightness=1.0, contrast=1.0, label_score=0.5) for i in range(100)]
manifest = pd.DataFrame(rows)
small = np.random.default_rng(0).normal(size=(100, 8))
nothing = make_findings().assign(check="")
write = lambda report=None, vectors=small: write_dataset(run, "data", manifest, vectors, nothing, report)
def failing(call):
    try: call()
    except CvnbError as e: return str(e)
def state():
    dataset = load_dataset(run)
    names = [n for n in database.import_fiftyone().list_datasets() if n.startswith(dataset_name(run))]
    return dict(n=len(dataset), persistent=dataset.persistent, labels=dataset.count_values("ground_truth.label"),
                names=names == [dataset_name(run)])
"""


def python(code: str, *args: object, **kw) -> subprocess.Popen:
    env = os.environ | kw.pop("env", {})
    pipes = dict(text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, **pipes, **kw)


def end(folder: Path) -> None:
    "Kill the database of a folder, and delete its socket's folder."
    lock = folder/"mongod.lock"
    with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError, ValueError):
        mongod = psutil.Process(int(lock.read_text()))
        mongod.kill()
        mongod.wait()
    with contextlib.suppress(CvnbError): shutil.rmtree(database._find_folders()[1])


def mounted(folder: Path, *options: str) -> bool:
    "Mount a small file system at a folder; only the superuser can."
    return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode == 0


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    "A folder for a database that only the test uses."
    folder = tmp_path/"disk/database"
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(folder))
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    yield folder
    end(folder)


KILL_AND_FILL = WRITE + """
result = {}
disk = sys.argv[2:]
def kill(fraction, text):
    if fraction == 0.8: os.kill(int((Path(database.database_folder())/"mongod.lock").read_text()), signal.SIGKILL)
write()
sample = load_dataset(run).first()
sample.ground_truth.label = "7"   # an edit of a reviewer, not accepted yet
sample.save()
result["killed"] = failing(lambda: write(kill))
result["after kill"] = state()
if disk:
    large = np.random.default_rng(0).normal(size=(100, 80000)).astype(np.float32)
    result["full"] = failing(lambda: write(vectors=large))
    subprocess.run(["mount", "-o", "remount,size=1g", disk[0]], check=True)
    result["after full"] = state()
write()
print(json.dumps(result | dict(end=state())))
"""


def test_dataset_survives_a_killed_database_and_a_full_disk(home, tmp_path):
    home.parent.mkdir()
    disk = [home.parent] if mounted(home.parent, "-o", "size=60m") else []
    try:
        out, err = python(KILL_AND_FILL, tmp_path/"run", *disk).communicate(timeout=200)
        assert out, err[-3000:]
        result = json.loads(out.splitlines()[-1])
        complete = dict(n=100, persistent=True, labels={"0": 49, "1": 50, "7": 1}, names=True)
        assert result["after kill"] == result["end"] == complete   # and no incomplete dataset is left
        assert "run could not be written (mongod has ended" in result["killed"]
        assert "An older dataset is unchanged" in result["killed"]
        if disk:
            assert result["after full"] == complete
            assert "is full). An older dataset is unchanged. Free some space" in result["full"]
        assert all(len(result[k].splitlines()) == 1 for k in ("killed", "full") if k in result)
    finally:
        end(home)
        if disk: subprocess.run(["umount", "-l", home.parent], check=True)


def test_database_that_cannot_write_is_reported_and_starts_again(home):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    out, err = python(OPEN, preexec_fn=limit).communicate(timeout=100)
    assert out.startswith("FiftyOne's database cannot be started (") and len(out.splitlines()) == 1, err
    assert python(OPEN).communicate(timeout=100) == ("", "")


@pytest.mark.slow
def test_remains_of_a_killed_audit_are_deleted(home, tmp_path):
    die = "write()\nwrite(lambda fraction, text: fraction == 0.8 and os.kill(os.getpid(), signal.SIGKILL))"
    killed = python(WRITE + die, tmp_path/"run")
    killed.communicate(timeout=150)
    assert killed.returncode == -signal.SIGKILL
    code = "print(any('-new-' in n for n in database.import_fiftyone().list_datasets()))\nprint(json.dumps(state()))"
    out, err = python(WRITE + code, tmp_path/"run").communicate(timeout=150)
    ours = lambda line: line in ("True", "False") or line.startswith("{")   # FiftyOne prints lines too
    printed = [line for line in out.splitlines() if ours(line)]
    assert printed[0] == "True", err
    assert json.loads(printed[1]) == dict(n=100, persistent=True, labels={"0": 50, "1": 50}, names=True), err


def test_database_of_another_program_is_refused_in_one_line(home):
    home.mkdir(parents=True)
    mongod = Path(importlib.util.find_spec("fiftyone").origin).parent/"db/bin/mongod"
    running = subprocess.Popen([mongod, "--dbpath", home, "--port", "0", "--nounixsocket"], stdout=subprocess.PIPE)
    try:
        assert any(b"Waiting for connections" in line for line in running.stdout)
        out, err = python(OPEN).communicate(timeout=100)
        assert f"another program, process {running.pid}, runs a database in {home}" in out, err
        assert len(out.splitlines()) == 1 and "FIFTYONE_DATABASE_DIR" in out and running.poll() is None
    finally:
        running.kill()
        running.communicate()


def test_fiftyone_that_was_loaded_without_cvnb_is_refused(home, monkeypatch):
    loaded = SimpleNamespace(config=SimpleNamespace(database_uri=None))   # FiftyOne has started a service of its own
    monkeypatch.setitem(sys.modules, "fiftyone", loaded)
    with pytest.raises(CvnbError, match="loaded FiftyOne with another database.*before `import fiftyone`"):
        database.import_fiftyone()


@pytest.mark.parametrize("kind", ["of another user", "a link"])
def test_folder_that_is_not_the_users_own_is_refused(kind, tmp_path):
    folder = tmp_path/"folder"
    if kind == "a link": folder.symlink_to(tmp_path)
    elif os.getuid() == 0:
        folder.mkdir()
        os.chown(folder, 65534, 65534)
    else: folder = Path("/usr")
    with pytest.raises(UsageError, match="can be used by other users. Name a folder of your own"):
        database._private_folder(folder)


def test_folder_of_an_older_version_is_closed_to_others(tmp_path):
    (tmp_path/"mongo").mkdir()
    (tmp_path/"mongo").chmod(0o755)
    assert database._private_folder(tmp_path/"mongo").stat().st_mode & 0o777 == 0o700


def test_folder_that_every_user_could_write_to_is_refused_and_left_as_it_is(tmp_path, monkeypatch):
    monkeypatch.setattr("cvnb.core.files._is_out_of_reach", lambda path: False)   # the folder of tests is closed
    (tmp_path/"mongo").mkdir()
    (tmp_path/"mongo").chmod(0o777)
    with pytest.raises(CvnbError, match="can be written by every user.*FIFTYONE_DATABASE_DIR"):
        database._private_folder(tmp_path/"mongo")
    assert (tmp_path/"mongo").stat().st_mode & 0o777 == 0o777


@pytest.mark.parametrize("folder", ["/proc/database", "file"])
def test_unwritable_database_folder_is_named(folder, home, tmp_path):
    (tmp_path/"file").touch()
    out, err = python(OPEN, env=dict(FIFTYONE_DATABASE_DIR=str(tmp_path/folder))).communicate(timeout=100)
    assert "cannot be written" in out and folder in out and "FIFTYONE_DATABASE_DIR" in out, err
    assert len(out.splitlines()) == 1, err


# Databases that the user runs


@contextlib.contextmanager
def server(answer) -> Iterator[int]:
    "Listen on a port and answer each message."
    with socket.create_server(("127.0.0.1", 0)) as listening:
        def serve() -> None:
            with contextlib.suppress(OSError, struct.error):
                while True:
                    connection, _ = listening.accept()
                    threading.Thread(target=talk, args=[connection], daemon=True).start()

        def talk(connection: socket.socket) -> None:
            with contextlib.suppress(OSError, struct.error), connection:
                while head := connection.recv(16): connection.sendall(answer(head, connection))

        threading.Thread(target=serve, daemon=True).start()
        yield listening.getsockname()[1]


def old_mongod(head: bytes, connection: socket.socket) -> bytes:
    "Answer a MongoDB client as version 4.4 does: `hello` and `buildInfo`."
    length, number, _, kind = struct.unpack("<iiii", head)
    body = connection.recv(length - 16)
    hello = dict(ok=1.0, ismaster=True, isWritablePrimary=True, helloOk=True, maxWireVersion=9, minWireVersion=0,
                 maxBsonObjectSize=2**24, maxMessageSizeBytes=48000000, maxWriteBatchSize=100000,
                 version="4.4.29", versionArray=[4, 4, 29, 0])
    is_query = kind == 2004   # OP_QUERY, which OP_REPLY answers; else OP_MSG
    assert is_query or len(body) > 5
    head = struct.pack("<iqii", 8, 0, 0, 1) if is_query else struct.pack("<IB", 0, 0)
    content = head + bson.encode(hello)
    return struct.pack("<iiii", 16 + len(content), 1, number, 1 if is_query else 2013) + content


def refusal(uri: str) -> str:
    "The message for a database at an address."
    out, err = python(OPEN, env=dict(FIFTYONE_DATABASE_URI=uri)).communicate(timeout=100)
    assert len(out.splitlines()) == 1 and "unset the setting" in out, err
    return out


def test_too_old_server_is_refused():
    with server(old_mongod) as port: message = refusal(f"mongodb://127.0.0.1:{port}")
    assert "MongoDB 4.4.29, and FiftyOne needs 6.0 or newer" in message


def test_server_that_is_no_mongodb_is_refused():
    with server(lambda *_: b"HTTP/1.1 400 Bad Request\r\n\r\n") as port:
        message = refusal(f"mongodb://127.0.0.1:{port}/?serverSelectionTimeoutMS=1500")
    assert f"127.0.0.1:{port}" in message and "cannot be used (" in message


@pytest.mark.parametrize("uri, reason", [("mongodb://me:secret@127.0.0.1:9/?serverSelectionTimeoutMS=300", "refused"),
                                         ("http://127.0.0.1", "Invalid URI")],
                         ids=["no server", "no address"])
def test_address_without_a_database_is_refused_without_its_password(uri, reason):
    begin = time.monotonic()
    message = refusal(uri)
    assert reason in message and "secret" not in message and time.monotonic() - begin < 30
