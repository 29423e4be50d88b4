"""What W&B keeps of a run, that no server can stop or slow one, and what a notebook and a terminal show while it runs."""
from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import psutil
import pytest
import pytorch_lightning as pl
import torch
import wandb
from nbclient import NotebookClient
from wandb.sdk import wandb_setup

from cvnb.training import tracking
from cvnb.core.errors import UsageError
from cvnb.core.files import read_json, sha256_file
from cvnb.core.stage import Stage, read_stage_manifest
from cvnb.metrics.estimates import accuracy
from cvnb.training.tracking import TrackSteps, close_tracker, log_audit, log_confusion, log_model, log_predictions
from cvnb.training.tracking import open_tracker, rank_answers, read_tracked
from cvnb.training.callbacks import History

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    "W&B's settings of a person who never used it; what a test changes in them is taken back."
    for name in "WANDB_SILENT", "WANDB_ERROR_REPORTING", "WANDB_DATA_DIR", "WANDB_NOTEBOOK_NAME": monkeypatch.setenv(name, "")
    monkeypatch.delenv("WANDB_NOTEBOOK_NAME")
    for name in "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_MODE", "WANDB_DIR", "WANDB_ENTITY", "WANDB_PROJECT", "CVNB_PROGRESS":
        monkeypatch.delenv(name, raising=False)
    for name in "NO_PROXY", "no_proxy": monkeypatch.setenv(name, "127.0.0.1")
    monkeypatch.setenv("NETRC", str(tmp_path/"netrc"))


@pytest.fixture
def stage(tmp_path: Path) -> Stage: return Stage("train", tmp_path/"run", dict(epochs=2, lr=0.05, backbone="tiny"))


def tracked(stage: Stage) -> dict: return read_tracked(stage.run/stage.environment["wandb"]["folder"])


# A small training


class Tiny(pl.LightningModule):
    "Learns to add four numbers."
    def __init__(self, pause: float = 0.0):
        super().__init__()
        self.layer, self.pause = torch.nn.Linear(4, 1), pause

    def training_step(self, batch: list[torch.Tensor], number: int) -> dict:
        time.sleep(self.pause)
        return dict(loss=self.layer(batch[0]).sub(batch[1]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer: return torch.optim.SGD(self.parameters(), lr=0.05)


class Rows(History):
    "A history of a module that keeps none of the figures that a `Classifier` does."
    def __init__(self) -> None: self.rows = []

    def setup(self, *_: object, **__: object) -> None: pass

    def on_train_start(self, *_: object) -> None: pass

    def on_train_epoch_start(self, *_: object) -> None: pass

    def on_train_batch_end(self, *_: object) -> None: pass

    def on_fit_end(self, *_: object) -> None: pass

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self.rows.append(dict(epoch=trainer.current_epoch + 1, val_loss=1 / (trainer.current_epoch + 1), images_per_s=100.0))


def train(logger: object, *callbacks: pl.Callback, steps: int = 10, pause: float = 0.0, **options: object) -> Tiny:
    torch.manual_seed(0)
    x = torch.randn(4 * steps, 4)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)), batch_size=4)
    model = Tiny(pause)
    trainer = pl.Trainer(max_epochs=2, accelerator="cpu", logger=logger, callbacks=list(callbacks), enable_progress_bar=False,
                         enable_checkpointing=False, enable_model_summary=False, **options)
    trainer.fit(model, loader)
    return model


# Everything is in the file


AUDIT = dict(n_images=60, checks={name: dict(about=f"What is {name}.", n=n, n_checked=60, share=dict(value=n / 60, low=0.0, high=0.2, n=60))
                                  for name, n in dict(near_duplicates=3, label_errors=5).items()})


def answers(n: int = 60) -> tuple[pd.DataFrame, np.ndarray]:
    rng = np.random.default_rng(0)
    table = pd.DataFrame(dict(path=[f"a/{i}.png" for i in range(n)], split="val", label=rng.choice(["cat", "dog", "$5"], n),
                              predicted=rng.choice(["cat", "dog", "$5"], n), confidence=rng.uniform(0.4, 1, n)))
    return table.assign(correct=table.label == table.predicted), rng.integers(0, 256, (n, 8, 8, 3), dtype=np.uint8)


def test_the_offline_file_holds_every_figure_curve_image_and_digest(stage: Stage) -> None:
    table, images = answers()
    stage.metric("accuracy_val", accuracy(table.correct))
    stage.metric("params", 5)
    for name in "model.safetensors", "model.json": (stage.dir/name).write_text(name)
    logger = open_tracker(stage)
    log_audit(logger, AUDIT)
    train(logger, TrackSteps(every=4, share=1), Rows())
    log_predictions(logger, table, images, n=5)
    log_confusion(logger, table)
    log_model(logger, stage.dir)
    name = close_tracker(logger, stage.metrics)
    stage.finish()
    assert read_stage_manifest(stage.run, "train")["environment"]["wandb"]["id"] == name

    run = tracked(stage)
    assert run["id"] == name and {k: run["config"][k] for k in stage.params} == stage.params
    flagged = {"audit/near_duplicates": 3, "audit/label_errors": 5, "audit/n_images": 60}
    assert {k: run["summary"][k] for k in flagged} == flagged
    for part, value in stage.metrics["accuracy_val"].items():
        assert run["summary"]["accuracy_val" + ("" if part == "value" else f"_{part}")] == value
    assert run["summary"]["params"] == 5
    assert run["artifacts"][f"model-{name}"]["sha256"] == sha256_file(stage.dir/"model.safetensors")

    curves = pd.DataFrame(run["history"])
    steps, epochs = curves.dropna(subset="step/loss"), curves.dropna(subset="epoch")
    assert steps["trainer/global_step"].tolist() == [0, 4, 8, 12, 16]
    assert (steps["step/lr"] == 0.05).all() and (steps["step/grad_norm"] > 0).all()
    assert epochs["epoch/val_loss"].tolist() == [1, 0.5] and epochs["epoch/images_per_s"].tolist() == [100, 100]

    logged = {k: v for row in run["history"] for k, v in row.items()}
    order = rank_answers(table)
    for end, positions in dict(worst=order[:5], best=order[::-1][:5]).items():
        assert [c.split(":")[0] for c in logged[f"val/{end}/captions"]] == table.path.iloc[positions].tolist()
        for file, i in zip(logged[f"val/{end}/filenames"], positions):
            assert file in run["files"] and (pixels(folder(stage)/"files"/file) == images[i]).all()
    matrix = read_json(folder(stage)/"files"/logged["val/confusion_table/path"])
    assert {(t, p): n for t, p, n in matrix["data"]} == table.groupby(["label", "predicted"]).size().to_dict()
    assert [row[:3] for row in read_json(folder(stage)/"files"/logged["audit/checks/path"])["data"]] == [
        ["near_duplicates", 3, 60], ["label_errors", 5, 60]]


def folder(stage: Stage) -> Path: return stage.run/stage.environment["wandb"]["folder"]


def pixels(path: Path) -> np.ndarray:
    from PIL import Image
    return np.asarray(Image.open(path))


def test_nothing_is_collected_beside(stage: Stage) -> None:
    close_tracker(open_tracker(stage))
    names = {p.name for p in folder(stage).rglob("*") if p.is_file()}
    assert not names & {"requirements.txt", "output.log"} and not [n for n in names if n.endswith((".py", ".ipynb"))]


def test_the_gradients_norm_is_that_of_all_gradients_before_clipping(stage: Stage) -> None:
    norms = []

    class Norm(pl.Callback):
        def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
            norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm()))

    logger = open_tracker(stage)
    train(logger, TrackSteps(every=1, share=1), Norm(), gradient_clip_val=1e-3)
    close_tracker(logger)
    rows = pd.DataFrame(tracked(stage)["history"]).dropna(subset="step/loss")
    assert rows["step/grad_norm"].to_numpy() == pytest.approx(norms, rel=1e-5) and len(norms) == 20 and min(norms) > 1e-3


# What it costs


class Slow(pl.loggers.CSVLogger):
    "A logger that takes twenty milliseconds for what it is told."
    told = 0

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.told += 1
        time.sleep(0.02)


def test_tracking_takes_its_share_and_no_more(tmp_path: Path) -> None:
    greedy, modest = Slow(tmp_path), Slow(tmp_path)
    train(greedy, TrackSteps(every=1, share=1), steps=100)
    begin, callback = time.perf_counter(), TrackSteps(every=1, share=0.1)
    train(modest, callback, steps=100, pause=0.005)
    took = time.perf_counter() - begin
    assert greedy.told == 200 and 1 <= modest.told < 60
    assert callback.spent <= 0.1 * took + 0.1   # the last one may begin just before the share is used up


def test_steps_in_between_are_left_alone_and_the_weights_are_the_same(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, asked, norm = train(False), [], torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: asked.append(1) or norm(grads))
    logger = open_tracker(stage)
    seen = train(logger, TrackSteps(every=7, share=1))
    close_tracker(logger)
    assert len(asked) == 3 and all(torch.equal(a, b) for a, b in zip(plain.parameters(), seen.parameters()))


# Servers


QUERY = re.compile(r"(?:query|mutation)\s+(\w+)")


class Server(BaseHTTPRequestHandler):
    "A W&B server that knows just enough for a run to begin."
    protocol_version = "HTTP/1.1"
    silent = threading.Event()

    def log_message(self, *_: object) -> None: pass

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        while self.silent.is_set(): time.sleep(0.1)
        out = json.dumps(self.reply(body) if self.path.endswith("/graphql") else {}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(out)))
        self.end_headers()
        self.wfile.write(out)

    do_GET = do_POST = do_PUT = answer

    def reply(self, body: bytes) -> dict:
        asked = json.loads(body)
        name, variables = QUERY.findall(asked["query"])[0], asked.get("variables") or {}
        bucket = dict(id="UQ==", name=variables.get("name"), displayName="x", config="{}", historyLineCount=0,
                      project=dict(id="UA==", name="cvnb", entity=dict(id="RQ==", name="me")))
        files = [dict(name=f, uploadUrl=f"http://127.0.0.1:{self.server.server_port}/file") for f in variables.get("files", [])]
        return dict(data=dict(UpsertBucket=dict(upsertBucket=dict(bucket=bucket, inserted=True)),
                              CreateRunFiles=dict(createRunFiles=dict(runID="UQ==", uploadHeaders=[], files=files))).get(name, {}))


class Quiet(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None: pass   # whoever asked has gone


class Strange(Server):
    "What answers is no W&B server but, say, the sign-in page of a hotel."
    def reply(self, body: bytes) -> dict: return {} if b"CreateRunFiles" in body else super().reply(body)


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[type], Quiet]]:
    servers = []

    def start(kind: type = Server) -> Quiet:
        servers.append(Quiet(("127.0.0.1", 0), kind))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        point_to(servers[-1].server_port, monkeypatch)
        return servers[-1]

    yield start
    Server.silent.clear()
    for server in servers: server.shutdown(); server.server_close()


def point_to(port: int, monkeypatch: pytest.MonkeyPatch, key: str = "0" * 40) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("WANDB_API_KEY", key)


@pytest.mark.parametrize("kind", ["nothing listens", "accepts and never answers", "no key"])
def test_a_server_that_cannot_be_reached_makes_the_run_an_offline_one(
        kind: str, stage: Stage, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        if kind == "accepts and never answers": s.listen(50)
        point_to(s.getsockname()[1], monkeypatch, key="" if kind == "no key" else "0" * 40)
        begin = time.perf_counter()
        logger = open_tracker(stage, "online", timeout=1)
        opened = time.perf_counter() - begin
        train(logger, TrackSteps(every=5, share=1), Rows())
        begin = time.perf_counter()
        name = close_tracker(logger, dict(answer=42))
    assert opened < 10 and time.perf_counter() - begin < 4
    record, said = stage.environment["wandb"], capfd.readouterr()
    assert record | dict(id=name, asked="online", mode="offline") == record and record["why"]
    assert (said.out + said.err).count("W&B") == 1 and f"wandb sync {stage.dir}/wandb/offline-run-" in said.out
    assert tracked(stage)["summary"]["answer"] == 42 and len(tracked(stage)["history"]) == 6


@pytest.mark.slow
@pytest.mark.parametrize("fate", ["answers", "ends", "falls silent"])
def test_a_server_that_is_lost_while_training_costs_seconds_at_the_end(
        fate: str, stage: Stage, serve: Callable[[], Quiet], capfd: pytest.CaptureFixture) -> None:
    server = serve()
    logger = open_tracker(stage, "online", timeout=2)
    assert stage.environment["wandb"]["mode"] == "online"
    if fate == "ends": server.shutdown(); server.server_close()
    if fate == "falls silent": Server.silent.set()
    begin = time.perf_counter()
    for i in range(500): logger.log_metrics(dict(x=i), step=i)
    logged = time.perf_counter() - begin
    close_tracker(logger, dict(answer=42))
    assert logged < 5 and time.perf_counter() - begin < 20
    said = "has not taken everything in time" in stage.environment["wandb"]["why"], "wandb sync" in capfd.readouterr().out
    assert said == (fate != "answers", fate != "answers")
    run = tracked(stage)
    assert [row["x"] for row in run["history"]] == list(range(500)) and run["summary"]["answer"] == 42


def service() -> psutil.Process:
    found = [p for p in psutil.Process().children(recursive=True) if p.name() == "wandb-core"]
    return max(found, key=psutil.Process.create_time)   # one whose server fell silent may still be there


class KillsWandb(pl.Callback):
    "End W&B's process in the second epoch."
    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: object, index: int) -> None:
        if trainer.current_epoch == 1 and index == 2: service().send_signal(signal.SIGKILL)


def test_a_run_goes_on_when_wandb_itself_is_killed(stage: Stage, capfd: pytest.CaptureFixture) -> None:
    logger = open_tracker(stage)
    first = stage.environment["wandb"]["id"]
    train(logger, TrackSteps(every=5, share=1), Rows(), KillsWandb())
    name = close_tracker(logger, dict(answer=42))
    assert stage.environment["wandb"]["earlier"] == [first] and name != first and tracked(stage)["id"] == name
    assert tracked(stage)["summary"]["answer"] == 42 and tracked(stage)["config"]["epochs"] == 2
    assert [row["epoch/val_loss"] for row in tracked(stage)["history"] if "epoch/val_loss" in row] == [1, 0.5]   # the first was told before
    assert capfd.readouterr().out.count("W&B: its process has ended") == 1


def test_a_run_of_the_callers_own_goes_on(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in dict(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false").items(): monkeypatch.setenv(name, value)
    own = wandb.init(mode="offline", dir=tmp_path, project="theirs")
    open_tracker(stage)              # of a cell that was interrupted and is run again
    logger, told = open_tracker(stage), []

    def fails_once(run: object) -> None:
        told.append(run.id)
        if len(told) == 1: raise TypeError("which is not W&B's fault")
    logger.tell(fails_once)
    close_tracker(logger, dict(accuracy=0.9))
    assert told[0] != told[1] == stage.environment["wandb"]["id"] and wandb_setup.singleton().most_recent_active_run is own
    own.log(dict(after=1.0))
    folder = Path(own.dir).parent
    own.finish()
    wandb.teardown()
    assert {"after": 1.0}.items() <= read_tracked(folder)["history"][-1].items() and tracked(stage)["summary"]["accuracy"] == 0.9


@pytest.mark.parametrize(("variables", "why"), [(dict(WANDB_MODE="offline"), "W&B is set to offline, by WANDB_MODE"), ({}, "no key is known")])
def test_why_a_run_is_not_online_is_said(stage: Stage, monkeypatch: pytest.MonkeyPatch, variables: dict, why: str) -> None:
    for name, value in variables.items(): monkeypatch.setenv(name, value)
    wandb.teardown()   # so that it reads them
    close_tracker(open_tracker(stage, "online", 2.0))
    assert why in stage.environment["wandb"]["why"] and tracked(stage)["id"] == stage.environment["wandb"]["id"]


def test_nobody_is_asked_for_a_key_beside_an_offline_run(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "`wandb.login` says nothing then, and `wandb.init` would ask."
    for name, value in dict(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false").items(): monkeypatch.setenv(name, value)
    own = wandb.init(mode="offline", dir=tmp_path, project="theirs")
    close_tracker(open_tracker(stage, "online", 2.0))
    assert "no key is known" in stage.environment["wandb"]["why"] and wandb.run is own
    assert not tracking._has_key()
    monkeypatch.setenv("WANDB_API_KEY", "k" * 40)
    assert tracking._has_key()
    own.finish()
    wandb.teardown()


def test_a_person_s_own_run_changes_neither_mode_nor_server(stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    "W&B would open ours online although it is set to offline, and where there is no key for its server it would ask for one."
    for name, value in dict(WANDB_SILENT="true", WANDB_ERROR_REPORTING="false", WANDB_MODE="offline").items(): monkeypatch.setenv(name, value)
    (tmp_path/"netrc").write_text(f"machine theirs.example login user password {'k' * 40}\n")
    wandb.teardown()
    own = wandb.init(dir=tmp_path, project="theirs", settings=wandb.Settings(base_url="https://theirs.example"))
    close_tracker(open_tracker(stage, "online", 2.0))
    assert "W&B is set to offline" in stage.environment["wandb"]["why"] and wandb.run is own
    assert not tracking._has_key(), "of another server"
    own.finish()
    wandb.teardown()


def test_settings_that_wandb_refuses(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.ai")
    wandb.teardown()
    with pytest.raises(UsageError, match=r"W&B refuses its settings \(.*https://wandb.ai is not a valid server address.*use tracking=disabled"):
        open_tracker(stage, "online", 2.0)
    monkeypatch.delenv("WANDB_BASE_URL")
    wandb.teardown()
    assert close_tracker(open_tracker(stage))


def test_a_run_that_cannot_be_ended_is_kept(stage: Stage, capfd: pytest.CaptureFixture) -> None:
    logger = open_tracker(stage)
    logger.log_metrics(dict(x=1.0))
    time.sleep(1)   # it is on its way to the disk
    service().send_signal(signal.SIGKILL)
    first = stage.environment["wandb"]["id"]
    logger.end()
    assert stage.environment["wandb"]["id"] == first and "its process has ended" in stage.environment["wandb"]["why"]
    assert f"wandb sync {stage.dir}/wandb/offline-run-" in capfd.readouterr().out and list(folder(stage).glob("*.wandb"))


class Hesitant(Server):
    "A server that takes longer for a model than a look at it."
    def reply(self, body: bytes) -> dict:
        if b"mutation CreateArtifact" in body:
            time.sleep(3)
            return dict(errors=[dict(message="there is no room for it")])
        viewer = dict(id="Vg==", entity="me", username="me", email="", flags="{}", teams=dict(edges=[]))
        known = {b"query Viewer": dict(viewer=viewer), b"query ArtifactType": dict(project=None)}
        return next((dict(data=data) for query, data in known.items() if query in body), None) or super().reply(body)


@pytest.mark.slow
def test_a_model_that_takes_long_to_arrive_is_waited_for(stage: Stage, serve: Callable[[type], Quiet]) -> None:
    serve(Hesitant)
    for name in "model.safetensors", "model.json": (stage.dir/name).write_text(name)
    logger = open_tracker(stage, "online", timeout=2)
    log_model(logger, stage.dir)
    begin = time.perf_counter()
    close_tracker(logger, dict(answer=42))
    assert time.perf_counter() - begin > 2.5 and stage.environment["wandb"]["mode"] == "online" and not stage.environment["wandb"]["earlier"]
    assert tracked(stage)["summary"]["answer"] == 42


@pytest.mark.slow
def test_a_run_goes_on_when_something_strange_answers(stage: Stage, serve: Callable[[type], Quiet]) -> None:
    serve(Strange)
    logger = open_tracker(stage, "online", timeout=2)
    end = time.monotonic() + 60
    while stage.environment["wandb"]["mode"] == "online" and time.monotonic() < end:
        logger.log_metrics(dict(x=1.0)); time.sleep(0.1)
    close_tracker(logger, dict(answer=42))
    assert stage.environment["wandb"]["mode"] == "offline" and tracked(stage)["summary"]["answer"] == 42


# While it runs


CELL = """
import gc, time
from cvnb.core.stage import Stage
from cvnb.training.tracking import close_tracker, live, open_tracker
stage = Stage("train", "run")
logger = open_tracker(stage)
tell = live(stage.report)
for step in range(1, 201):
    epochs = [1 / (e + 1) for e in range(step // 50)]
    tell(step / 200, f"epoch {1 + step // 50}/4 · 900 images/s", loss_train=epochs, loss_val=epochs, accuracy_val=epochs)
    time.sleep(0.01)
tell(1, "epoch 4/4", loss_train=epochs, loss_val=epochs, accuracy_val=epochs)
kept = [n.outputs for n in gc.get_objects() if type(n).__module__ == "wandb.jupyter" and type(n).__name__ == "Notebook"]
held = len(kept), "progress" in str(kept)
name = close_tracker(logger)
"""


def executed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, check: str = "") -> tuple[list[dict], list[str]]:
    "The outputs that a notebook keeps, and the types of the messages that its kernel sent."
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    client = NotebookClient(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL + check)]), timeout=120,
                            resources=dict(metadata=dict(path=str(tmp_path))))
    kinds, process = [], client.process_message
    client.process_message = lambda message, *rest: (kinds.append(message["msg_type"]), process(message, *rest))[1]
    client.execute()
    return client.nb.cells[0].outputs, kinds


@pytest.mark.slow
def test_a_notebook_shows_one_output_that_keeps_its_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path/"jupyter").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path/"jupyter"))   # by this name in the kernel's file W&B knows Jupyter
    outputs, kinds = executed(tmp_path, monkeypatch, check='assert held == (1, False), "W&B keeps each update in memory"')
    assert len(outputs) == 1 and kinds.count("display_data") == 1
    shown = outputs[0]["data"]
    assert shown["text/plain"].startswith("100% · epoch 5/4 · 900 images/s · in 0:0") and 'value="1.000"' in shown["text/html"]
    assert shown["text/html"].count("<img") == 1 and len(shown["text/html"]) < 60_000
    assert 5 <= kinds.count("update_display_data") <= 30   # 200 steps and some seconds


@pytest.mark.slow
def test_under_cvnb_run_the_notebook_is_updated_seldom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CVNB_PROGRESS", str(tmp_path/"progress"))
    outputs, kinds = executed(tmp_path, monkeypatch)
    assert len(outputs) == 1 and kinds.count("update_display_data") <= 5 and "<img" in outputs[0]["data"]["text/html"]
    assert json.loads((tmp_path/"progress").read_text())["curves"]["loss_val"] == [1, 1 / 2, 1 / 3, 1 / 4]


@pytest.mark.slow
def test_papermill_keeps_the_last_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(CELL)], metadata=dict(kernelspec=dict(name="python3", display_name="p")))
    nbformat.write(book, tmp_path/"in.ipynb")
    papermill.execute_notebook(tmp_path/"in.ipynb", tmp_path/"out.ipynb", cwd=tmp_path, progress_bar=False)
    outputs = nbformat.read(tmp_path/"out.ipynb", 4).cells[0].outputs
    assert len(outputs) == 1 and outputs[0]["data"]["text/plain"].startswith("100%") and "<img" in outputs[0]["data"]["text/html"]


LINE = """
import time
from cvnb.training.tracking import live
tell = live()
for step in range(1, 51): tell(step / 50, f"epoch 1/1 · {step} images/s" + " and so on" * 20); time.sleep(0.01)
tell(1, "epoch 1/1")
"""


def terminal(**environment: str) -> str:
    "What a terminal of eighty columns receives."
    outer, inner = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k not in ("CVNB_PROGRESS", "COLUMNS")} | dict(PYTHONPATH=str(ROOT)) | environment
    process = subprocess.Popen([sys.executable, "-c", LINE], stdout=inner, stderr=inner, cwd=ROOT, env=env)
    os.close(inner)
    seen = b""
    while True:
        try: chunk = os.read(outer, 4096)
        except OSError: break   # the other end is closed
        if not chunk: break
        seen += chunk
    os.close(outer)
    assert process.wait() == 0
    return seen.decode()


@pytest.mark.slow
def test_a_terminal_shows_one_clean_line() -> None:
    seen = terminal(COLUMNS="60")
    frames = seen.removesuffix("\r\n").split("\r")
    assert frames[0] == "" and seen.endswith("\r\n") and seen.count("\n") == 1
    assert 2 <= len(frames[1:]) <= 15 and all(len(f) == 59 for f in frames[1:]) and "100% · epoch 1/1 · 50 images/s" in frames[-1]


@pytest.mark.slow
def test_nothing_is_shown_under_cvnb_run_or_into_a_file(tmp_path: Path) -> None:
    assert terminal(CVNB_PROGRESS=str(tmp_path/"progress")) == ""
    done = subprocess.run([sys.executable, "-c", LINE], capture_output=True, text=True, cwd=ROOT, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_disabled_means_no_wandb(stage: Stage) -> None:
    logger = open_tracker(stage, "disabled")
    for log in (log_audit, AUDIT), (log_predictions, *answers()), (log_confusion, answers()[0]), (log_model, stage.dir): log[0](logger, *log[1:])
    assert (logger, close_tracker(logger), stage.environment) == (False, "", {}) and not (stage.dir/"wandb").exists() and wandb.run is None
