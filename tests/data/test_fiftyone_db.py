"""FiftyOne's database under strain: killed, full, in the way, old or none at all. One line says it, no dataset is lost, the next call repairs."""
from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import bson
import pytest

from cvnb.data import fiftyone_db as database

OPEN = "from cvnb.data.fiftyone_db import fiftyone\nfrom cvnb.core.errors import CvnbError\ntry: fiftyone()\nexcept CvnbError as e: print(e)"
WRITE = """import json, os, signal, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd
from cvnb import database
from cvnb.audit.fiftyone_dataset import dataset_name, load_dataset, write_dataset
from cvnb.audit.checks import findings
from cvnb.core.errors import CvnbError
run = Path(sys.argv[1])
rows = [dict(path=f"{i % 2}/{i}.png", label=str(i % 2), split="train", ok=True, tags=[], suggested="", pixel_sha256=f"{i:064}", duplicate_of="",
             near_duplicate_of="", width=8, height=8, brightness=1.0, contrast=1.0, label_score=0.5) for i in range(100)]
manifest, small = pd.DataFrame(rows), np.random.default_rng(0).normal(size=(100, 8))
nothing = findings().assign(check="")
write = lambda report=None, vectors=small: write_dataset(run, "data", manifest, vectors, nothing, report)
def failing(call):
    try: call()
    except CvnbError as e: return str(e)
def state():
    dataset = load_dataset(run)
    return dict(n=len(dataset), persistent=dataset.persistent, labels=dataset.count_values("ground_truth.label"),
                names=[n for n in database.fiftyone().list_datasets() if n.startswith(dataset_name(run))] == [dataset_name(run)])
"""


def python(code: str, *args: object, **kw) -> subprocess.Popen:
    env = os.environ | kw.pop("env", {})
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kw)


def end(folder: Path) -> None:
    "End the database of a folder, as a person would with kill -9."
    if mongod := database._mongod(str(folder)):
        mongod.kill()
        mongod.wait()


def mounted(folder: Path, *options: str) -> bool:
    "Put a small disk of its own in a folder; only the superuser may."
    return subprocess.run(["mount", "-t", "tmpfs", *options, "tmpfs", folder], capture_output=True).returncode == 0


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    "A folder for a database of the test's own."
    folder = tmp_path/"disk/database"
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(folder))
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    yield folder
    end(folder)


STRAIN = WRITE + """
told, disk = {}, sys.argv[2:]
write()
sample = load_dataset(run).first(); sample.ground_truth.label = "7"; sample.save()   # a person's edit, not accepted yet
told["killed"] = failing(lambda: write(lambda fraction, text: fraction == 0.8 and database._mongod(database.database_folder()).kill()))
told["after kill"] = state()
if disk:
    told["full"] = failing(lambda: write(vectors=np.random.default_rng(0).normal(size=(100, 80000)).astype(np.float32)))
    subprocess.run(["mount", "-o", "remount,size=1g", disk[0]], check=True)
    told["after full"] = state()
write()
print(json.dumps(told | dict(end=state())))
"""


def test_a_dataset_survives_a_killed_database_and_a_full_disk(home, tmp_path):
    home.parent.mkdir()
    disk = [home.parent] if mounted(home.parent, "-o", "size=60m") else []
    try:
        out, err = python(STRAIN, tmp_path/"run", *disk).communicate(timeout=200)
        assert out, err[-3000:]
        told = json.loads(out.splitlines()[-1])
        whole = dict(n=100, persistent=True, labels={"0": 49, "1": 50, "7": 1}, names=True)
        assert told["after kill"] == told["end"] == whole   # nothing half-written is left either
        assert "run could not be written (mongod has ended" in told["killed"] and "An older one is as it was" in told["killed"]
        if disk: assert told["after full"] == whole and "is full). An older one is as it was. Free some space" in told["full"]
        assert all(len(told[k].splitlines()) == 1 for k in ("killed", "full") if k in told)
    finally:
        end(home)
        if disk: subprocess.run(["umount", "-l", home.parent], check=True)


def test_a_database_that_may_write_no_more(home):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    out, err = python(OPEN, preexec_fn=limit).communicate(timeout=100)
    assert out.startswith("FiftyOne's database cannot be started (") and len(out.splitlines()) == 1, err
    client, _ = database._connect()
    assert client.admin.command("ping")["ok"] == 1


@pytest.mark.slow
def test_what_a_killed_audit_leaves_is_cleared(home, tmp_path):
    die = "write()\nwrite(lambda fraction, text: fraction == 0.8 and os.kill(os.getpid(), signal.SIGKILL))"
    killed = python(WRITE + die, tmp_path/"run")
    killed.communicate(timeout=150)
    assert killed.returncode == -signal.SIGKILL
    code = "print(any('-new-' in n for n in database.fiftyone().list_datasets()))\nprint(json.dumps(state()))"
    out, err = python(WRITE + code, tmp_path/"run").communicate(timeout=150)
    left, found = [line for line in out.splitlines() if line in ("True", "False") or line.startswith("{")]   # FiftyOne may say something too
    assert left == "True" and json.loads(found) == dict(n=100, persistent=True, labels={"0": 50, "1": 50}, names=True), err


def test_a_database_that_another_program_is_starting(home, monkeypatch, tmp_path):
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))   # its lock and record are not those of the other
    launched = database._launch(str(home))
    while not (mongod := database._mongod(str(home))): time.sleep(0.001)
    mongod.suspend()   # it does not listen yet
    assert not database._sockets(mongod, "LISTEN")
    call = python("from cvnb.data.fiftyone_db import _hold; _hold(); print('held')")
    while not database._keeper(): time.sleep(0.01)
    time.sleep(3)
    mongod.resume()
    out, err = call.communicate(timeout=60)
    assert out == "held\n" and launched.poll() is None and mongod.is_running(), err
    launched.stdin.close()


def test_a_database_comes_back_at_its_port_or_at_another_one(home):
    home.mkdir(parents=True)
    database._paths()[0].parent.mkdir(parents=True, exist_ok=True)
    _, port = database._connect()
    end(home)
    assert database._connect()[1] == port      # at once, before the keeper has noticed
    end(home)
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind(("127.0.0.1", port))
        other.listen()
        client, another = database._connect()
    assert another != port and client.admin.command("ping")["ok"] == 1


@pytest.mark.parametrize("where, said", [("/proc/database", "cannot be written"), ("file", "cannot be written: ")], ids=["unwritable", "a file"])
def test_a_folder_that_cannot_be_written(where, said, home, tmp_path):
    (tmp_path/"file").touch()
    out, err = python(OPEN, env=dict(FIFTYONE_DATABASE_DIR=str(tmp_path/where))).communicate(timeout=100)
    assert said in out and where in out and "FIFTYONE_DATABASE_DIR" in out and len(out.splitlines()) == 1, err


# Databases that the user names


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
    hello = dict(ok=1.0, ismaster=True, isWritablePrimary=True, helloOk=True, maxWireVersion=9, minWireVersion=0, maxBsonObjectSize=2**24,
                 maxMessageSizeBytes=48000000, maxWriteBatchSize=100000, version="4.4.29", versionArray=[4, 4, 29, 0])
    old = kind == 2004   # OP_QUERY, answered by OP_REPLY; else OP_MSG
    assert old or len(body) > 5
    content = struct.pack("<iqii", 8, 0, 0, 1) + bson.encode(hello) if old else struct.pack("<IB", 0, 0) + bson.encode(hello)
    return struct.pack("<iiii", 16 + len(content), 1, number, 1 if old else 2013) + content


def asked(uri: str) -> str:
    out, err = python(OPEN, env=dict(FIFTYONE_DATABASE_URI=uri)).communicate(timeout=100)
    assert len(out.splitlines()) == 1 and "unset the setting" in out, err
    return out


def test_a_server_that_is_too_old():
    with server(old_mongod) as port: said = asked(f"mongodb://127.0.0.1:{port}")
    assert "MongoDB 4.4.29, and FiftyOne needs 6.0 or newer" in said


def test_a_server_that_is_no_mongodb():
    with server(lambda *_: b"HTTP/1.1 400 Bad Request\r\n\r\n") as port: said = asked(f"mongodb://127.0.0.1:{port}/?serverSelectionTimeoutMS=1500")
    assert f"127.0.0.1:{port}" in said and "cannot be used (" in said


@pytest.mark.parametrize("uri, reason", [("mongodb://me:secret@127.0.0.1:9/?serverSelectionTimeoutMS=300", "refused"),
                                         ("http://127.0.0.1", "Invalid URI")],
                         ids=["nobody there", "no address"])
def test_an_address_without_a_database(uri, reason):
    began = time.monotonic()
    said = asked(uri)
    assert reason in said and "secret" not in said and time.monotonic() - began < 30
