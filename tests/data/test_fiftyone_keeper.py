"""The process that keeps FiftyOne's database: nobody else can reach it, processes share it, it ends when unused."""
from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cvnb.data import fiftyone_db as database

OPEN = "from cvnb.data.fiftyone_db import import_fiftyone; fo = import_fiftyone()"
OBEY = f"""{OPEN}
print(fo.config.database_uri, flush=True)
for line in iter(input, "end"): print(eval(line), flush=True)"""
CONNECT = "import os, socket, sys; os.setuid(65534); socket.socket(socket.AF_UNIX).connect(sys.argv[1])"


def python(code: str, *args: object) -> subprocess.Popen:
    pipes = dict(text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    return subprocess.Popen([sys.executable, "-c", code, *map(str, args)], **pipes)


def ask(process: subprocess.Popen, expression: str) -> str:
    "Let a process that obeys compute an expression."
    process.stdin.write(expression + "\n")
    process.stdin.flush()
    return process.stdout.readline().strip()


def find_family(process: subprocess.Popen) -> tuple[list[psutil.Process], psutil.Process, psutil.Process]:
    "The processes of a family; among them the keeper and the database."
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    keeper = next(p for p in family if "keep_database" in " ".join(p.cmdline()))
    return family, keeper, next(p for p in family if p.name() == "mongod")


@pytest.fixture
def home(tmp_path, monkeypatch) -> Iterator[Path]:
    "A folder for a database that only the test uses."
    monkeypatch.setenv("FIFTYONE_DATABASE_DIR", str(tmp_path/"database"))
    monkeypatch.delenv("FIFTYONE_DATABASE_URI", raising=False)
    yield tmp_path/"database"
    shutil.rmtree(database._find_folders()[1])


def test_database_has_no_port_and_no_service_and_its_folder_is_closed(home):
    process = python(OBEY)
    uri = process.stdout.readline()
    family, keeper, mongod = find_family(process)
    open_ports = [c for p in family for c in p.net_connections("inet")]
    assert not open_ports and not [p for p in family if "--51-service" in p.cmdline()]
    folders = database._find_folders()
    assert folders[0] == home and all(folder.stat().st_mode & 0o777 == 0o700 for folder in folders)
    path = folders[1]/"mongodb.sock"
    assert uri.startswith(f"mongodb://{str(path).replace('/', '%2F')}/?")
    if os.getuid() == 0:   # only the superuser can act as another user
        refused = subprocess.run([sys.executable, "-S", "-c", CONNECT, path], capture_output=True, text=True)
        assert "PermissionError" in refused.stderr
    for p in process, keeper, mongod: p.kill()
    process.communicate()


def test_processes_that_start_together_share_the_database(home):
    code = """from cvnb.data import fiftyone_db as database
database._wait_for_database()
print((database._find_folders()[0]/"mongod.lock").read_text().strip(), flush=True)
input()"""
    processes = [python(code) for _ in range(3)]
    (number,) = {int(process.stdout.readline()) for process in processes}
    mongod = psutil.Process(number)
    for process in processes: assert process.communicate("\n", timeout=60)[1] == ""
    end = python("from cvnb.data.fiftyone_db import keep_database; keep_database(0.5)")
    assert end.wait(60) == 0, end.stderr.read()   # it has taken the database over
    mongod.wait(30)


def test_database_survives_its_keeper_returns_when_killed_and_ends_when_unused(home):
    process = python(OBEY)
    uri = process.stdout.readline().strip()
    _, keeper, mongod = find_family(process)
    keeper.kill()
    assert ask(process, "fo.Dataset('here', persistent=True).name") == "here" and mongod.is_running()

    mongod.kill()   # the keeper's child, which nobody has waited for
    assert ask(process, "import_fiftyone().list_datasets(), fo.config.database_uri") == str((["here"], uri))
    _, keeper, mongod = find_family(process)
    keeper.kill()
    second = python("from cvnb.data.fiftyone_db import keep_database; keep_database(0.5)")
    with pytest.raises(subprocess.TimeoutExpired): second.wait(3)   # it has taken the used database over
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert second.wait(60) == 0
    mongod.wait(10)
