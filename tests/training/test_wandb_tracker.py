"""No server can stop or slow a training, and the tracker does not touch the caller's own W&B runs."""
from __future__ import annotations

import json
import re
import shlex
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import psutil
import pytest
import pytorch_lightning as pl
import wandb
from tracking_helpers import FixedHistory, read_run, run_folder, train_adder
from wandb.sdk import wandb_setup
from wandb_file import read_wandb_file

from cvnb.core.errors import UsageError
from cvnb.core.stage import Stage
from cvnb.training import wandb_tracker
from cvnb.training.tracking import StepTracker, close_tracker, log_model, open_tracker
from cvnb.training.wandb_tracker import sync_command

pytestmark = pytest.mark.usefixtures("wandb_defaults")
QUERY = re.compile(r"(?:query|mutation)\s+(\w+)")


class Server(BaseHTTPRequestHandler):
    "A W&B server that supports just the start of a run."
    protocol_version = "HTTP/1.1"
    silent = threading.Event()

    def log_message(self, *_: object) -> None: pass

    def respond(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.silent.is_set(): time.sleep(0.1)
        out = json.dumps(self.reply(body) if self.path.endswith("/graphql") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    do_GET = respond
    do_POST = respond
    do_PUT = respond

    def reply(self, body: bytes) -> dict:
        request = json.loads(body)
        name, variables = QUERY.findall(request["query"])[0], request.get("variables") or {}
        project = dict(id="UA==", name="cvnb", entity=dict(id="RQ==", name="me"))
        bucket = dict(id="UQ==", name=variables.get("name"), displayName="x", config="{}", historyLineCount=0,
                      project=project)
        url = f"http://127.0.0.1:{self.server.server_port}/file"
        files = [dict(name=file, uploadUrl=url) for file in variables.get("files", [])]
        created = dict(runID="UQ==", uploadHeaders=[], files=files)
        replies = dict(UpsertBucket=dict(upsertBucket=dict(bucket=bucket, inserted=True)),
                       CreateRunFiles=dict(createRunFiles=created))
        return dict(data=replies.get(name, {}))


class QuietServer(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: pass   # the client has disconnected


class StrangeServer(Server):
    "Not a W&B server but, for example, the sign-in page of a hotel."
    def reply(self, body: bytes) -> dict: return {} if b"CreateRunFiles" in body else super().reply(body)


class HesitantServer(Server):
    "A server that takes longer for a model than for a request."
    def reply(self, body: bytes) -> dict:
        if b"mutation CreateArtifact" in body:
            time.sleep(3)
            return dict(errors=[dict(message="there is no room for it")])
        viewer = dict(id="Vg==", entity="me", username="me", email="", flags="{}", teams=dict(edges=[]))
        if b"query Viewer" in body: return dict(data=dict(viewer=viewer))
        return dict(data=dict(project=None)) if b"query ArtifactType" in body else super().reply(body)


def point_to(port: int, monkeypatch: pytest.MonkeyPatch, key: str = "0" * 40) -> None:
    "Set W&B's address and key."
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", key)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], QuietServer]]:
    servers = []

    def start(kind: type = Server) -> QuietServer:
        servers.append(QuietServer(("127.0.0.1", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        point_to(servers[-1].server_port, monkeypatch)
        return servers[-1]

    yield start
    Server.silent.clear()
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("kind", ["nothing listens", "accepts and never answers", "no key"])
def test_unreachable_server_makes_the_run_offline(
        kind: str, stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if kind == "accepts and never answers": s.listen(50)
        point_to(s.getsockname()[1], monkeypatch, key="" if kind == "no key" else "0" * 40)
        begin = time.perf_counter()
        tracker = open_tracker(stage, "online", timeout=1)
        seconds_to_open = time.perf_counter() - begin
        train_adder(tracker, StepTracker(every=5, share=1), FixedHistory())
        begin = time.perf_counter()
        name = close_tracker(tracker, dict(answer=42))
    assert seconds_to_open < 10 and time.perf_counter() - begin < 4
    record, printed = stage.environment["wandb"], capfd.readouterr()
    assert record | dict(id=name, asked="online", mode="offline") == record and record["why"]
    assert (printed.out + printed.err).count("W&B") == 1
    assert f"`{sync_command(stage)}` uploads it" in printed.out and f"{stage.dir}/wandb/offline-run-" in printed.out
    assert [note["text"] for note in stage.notes] == [printed.out.strip()]
    assert read_run(stage)["summary"]["answer"] == 42 and len(read_run(stage)["history"]) == 6


def test_command_to_sync_can_be_pasted_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "It names the one folder of this training, beside those of earlier ones, also in a path with blanks."
    for _ in range(2):
        stage = Stage("train", tmp_path/"my run")
        close_tracker(open_tracker(stage, "offline"))
        time.sleep(1.1)   # W&B names folders by the second
    monkeypatch.chdir("/")
    program, verb, folder = shlex.split(sync_command(stage))
    assert (program, verb) == ("wandb", "sync") and Path(folder).is_absolute()
    assert list(Path(folder).glob(f"run-{stage.environment['wandb']['id']}.wandb"))
    assert len(list(Path(folder).parent.glob("offline-run-*"))) == 2 and not stage.notes
    assert sync_command(Stage("train", tmp_path/"untracked")) == ""


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["answers", "ends", "falls silent"])
def test_server_lost_during_training_costs_seconds_at_the_end(
        fate: str, stage: Stage, serve: Callable[[], QuietServer], capfd: pytest.CaptureFixture) -> None:
    server = serve()
    tracker = open_tracker(stage, "online", timeout=2)
    assert stage.environment["wandb"]["mode"] == "online"
    if fate == "ends":
        server.shutdown()
        server.server_close()
    if fate == "falls silent": Server.silent.set()
    begin = time.perf_counter()
    for i in range(500): tracker.log_metrics(dict(x=i), step=i)
    seconds_to_log = time.perf_counter() - begin
    close_tracker(tracker, dict(answer=42))
    assert seconds_to_log < 5 and time.perf_counter() - begin < 20
    lost = fate != "answers"
    assert ("has not taken everything in time" in stage.environment["wandb"]["why"]) == lost
    assert ("wandb sync" in capfd.readouterr().out) == lost
    run = read_run(stage)
    assert [row["x"] for row in run["history"]] == list(range(500)) and run["summary"]["answer"] == 42


def wandb_process() -> psutil.Process:
    "Find W&B's newest process; one whose server fell silent may still run."
    found = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    return max(found, key=psutil.Process.create_time)


class KillsWandb(pl.Callback):
    "Kill W&B's process in the second epoch."
    def on_train_batch_start(self, trainer: pl.Trainer, module: object, batch: object, batch_idx: int) -> None:
        if trainer.current_epoch != 1 or batch_idx != 2: return
        process = wandb_process()
        process.kill()
        process.wait(20)
        time.sleep(1)   # until the connection is closed


def test_process_that_ends_as_a_run_opens_is_replaced(
        stage: Stage, serve: Callable[[], QuietServer], monkeypatch: pytest.MonkeyPatch) -> None:
    serve()
    open_online = wandb_tracker._open_online

    def open_and_kill(arguments: dict) -> tuple[object, str]:
        opened = open_online(arguments)
        process = wandb_process()
        process.kill()
        process.wait(20)
        time.sleep(1)   # until the connection is closed
        return opened

    monkeypatch.setattr(wandb_tracker, "_open_online", open_and_kill)
    close_tracker(open_tracker(stage, "online", timeout=2), dict(answer=42))
    record = stage.environment["wandb"]
    assert record["mode"] == "offline" and "its process has ended" in record["why"] and len(record["earlier"]) == 1
    assert read_run(stage)["summary"]["answer"] == 42


def test_training_continues_after_wandb_was_killed(stage: Stage, capfd: pytest.CaptureFixture) -> None:
    tracker = open_tracker(stage)
    first = stage.environment["wandb"]["id"]
    train_adder(tracker, StepTracker(every=5, share=1), FixedHistory(), KillsWandb())
    name = close_tracker(tracker, dict(answer=42))
    run = read_run(stage)
    assert stage.environment["wandb"]["earlier"] == [first] and name != first and run["id"] == name
    assert run["summary"]["answer"] == 42 and run["config"]["epochs"] == 2
    losses = [row["epoch/val_loss"] for row in run["history"] if "epoch/val_loss" in row]
    assert losses == [1, 0.5]   # the replacement has the epoch before too
    assert capfd.readouterr().out.count("W&B: its process has ended") == 1


def silence_wandb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_own_run_of_the_caller_continues(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    silence_wandb(monkeypatch)
    own = wandb.init(mode="offline", dir=tmp_path, project="theirs")
    open_tracker(stage)              # of a cell that was interrupted and is run again
    tracker, ids = open_tracker(stage), []

    def fail_once(run: object) -> None:
        ids.append(run.id)
        if len(ids) == 1: raise TypeError("an error that is not W&B's")

    tracker.attempt(fail_once)
    close_tracker(tracker, dict(accuracy=0.9))
    assert ids[0] != ids[1] == stage.environment["wandb"]["id"]
    assert wandb_setup.singleton().most_recent_active_run is own
    own.log(dict(after=1.0))
    folder = Path(own.dir).parent
    own.finish()
    wandb.teardown()
    assert {"after": 1.0}.items() <= read_wandb_file(folder)["history"][-1].items()
    assert read_run(stage)["summary"]["accuracy"] == 0.9


@pytest.mark.parametrize(("variables", "why"), [
    (dict(WANDB_MODE="offline"), "W&B is set to offline, by WANDB_MODE"), ({}, "no key is known")])
def test_reason_for_an_offline_run_is_recorded(
        stage: Stage, monkeypatch: pytest.MonkeyPatch, variables: dict, why: str) -> None:
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    wandb.teardown()   # so that it reads them
    close_tracker(open_tracker(stage, "online", 2.0))
    record = stage.environment["wandb"]
    assert why in record["why"] and read_run(stage)["id"] == record["id"]


def test_no_key_is_asked_for_beside_an_offline_run(
        stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "`wandb.login` returns nothing then, and `wandb.init` would ask."
    silence_wandb(monkeypatch)
    own = wandb.init(mode="offline", dir=tmp_path, project="theirs")
    close_tracker(open_tracker(stage, "online", 2.0))
    assert "no key is known" in stage.environment["wandb"]["why"] and wandb.run is own
    assert not wandb_tracker._has_api_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert wandb_tracker._has_api_key()
    own.finish()
    wandb.teardown()


def test_own_run_of_the_caller_changes_neither_mode_nor_server(
        stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "W&B would open ours online although it is set to offline, and ask for a key of its server."
    silence_wandb(monkeypatch)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path/"netrc").write_text(f"machine theirs.example login user password {'k' * 40}\n")
    wandb.teardown()
    own = wandb.init(dir=tmp_path, project="theirs", settings=wandb.Settings(base_url="https://theirs.example"))
    close_tracker(open_tracker(stage, "online", 2.0))
    assert "W&B is set to offline" in stage.environment["wandb"]["why"] and wandb.run is own
    assert not wandb_tracker._has_api_key(), "the key is of another server"
    own.finish()
    wandb.teardown()


def test_settings_that_wandb_refuses_are_explained(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.ai")
    wandb.teardown()
    message = r"W&B refuses its settings \(.*https://wandb.ai is not a valid server address.*use tracking=disabled"
    with pytest.raises(UsageError, match=message): open_tracker(stage, "online", 2.0)
    monkeypatch.delenv("WANDB_BASE_URL")
    wandb.teardown()
    assert close_tracker(open_tracker(stage))


def test_run_that_cannot_finish_keeps_its_record(stage: Stage, capfd: pytest.CaptureFixture) -> None:
    tracker = open_tracker(stage)
    tracker.log_metrics(dict(x=1.0))
    time.sleep(1)   # W&B writes to the disk in the background
    wandb_process().send_signal(signal.SIGKILL)
    first = stage.environment["wandb"]["id"]
    tracker.finish()
    assert stage.environment["wandb"]["id"] == first
    assert "its process has ended" in stage.environment["wandb"]["why"]
    assert f"wandb sync {stage.dir}/wandb/offline-run-" in capfd.readouterr().out
    assert list(run_folder(stage).glob("*.wandb"))


@pytest.mark.slow
def test_upload_of_a_model_is_waited_for(stage: Stage, serve: Callable[[type], QuietServer]) -> None:
    serve(HesitantServer)
    for name in "model.safetensors", "model.json": (stage.dir/name).write_text(name)
    tracker = open_tracker(stage, "online", timeout=2)
    log_model(tracker, stage.dir)
    begin = time.perf_counter()
    close_tracker(tracker, dict(answer=42))
    assert time.perf_counter() - begin > 2.5
    assert stage.environment["wandb"]["mode"] == "online" and not stage.environment["wandb"]["earlier"]
    assert read_run(stage)["summary"]["answer"] == 42


@pytest.mark.slow
def test_training_continues_with_unexpected_answers(stage: Stage, serve: Callable[[type], QuietServer]) -> None:
    serve(StrangeServer)
    tracker = open_tracker(stage, "online", timeout=2)
    end = time.monotonic() + 60
    while stage.environment["wandb"]["mode"] == "online" and time.monotonic() < end:
        tracker.log_metrics(dict(x=1.0))
        time.sleep(0.1)
    close_tracker(tracker, dict(answer=42))
    assert stage.environment["wandb"]["mode"] == "offline" and read_run(stage)["summary"]["answer"] == 42
