"""What a tracked run holds, and what tracking costs."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import pytorch_lightning as pl
import torch
import wandb
from PIL import Image
from tracking_helpers import FixedHistory, make_audit, make_predictions, read_run, run_folder, train_adder

from cvnb.core.errors import UsageError
from cvnb.core.files import read_json, sha256_file
from cvnb.core.stage import Stage, read_stage_manifest
from cvnb.metrics.classification import accuracy
from cvnb.tasks.labels import Classification
from cvnb.training import tracking
from cvnb.training.tracking import (
    StepTracker,
    close_tracker,
    log_audit,
    log_confusion,
    log_model,
    log_predictions,
    open_tracker,
)

pytestmark = pytest.mark.usefixtures("wandb_defaults")


def read_pixels(path: Path) -> np.ndarray: return np.asarray(Image.open(path))


def logged_values(run: dict) -> dict:
    "Join the rows of a run's history."
    values = {}
    for row in run["history"]: values |= row
    return values


def test_offline_run_holds_config_and_summary(stage: Stage) -> None:
    table, _ = make_predictions()
    stage.metric("accuracy_val", accuracy(table.correct))
    stage.metric("params", 5)
    for name in "model.safetensors", "model.json": (stage.dir/name).write_text(name)
    tracker = open_tracker(stage)
    log_audit(tracker, make_audit())
    log_model(tracker, stage.dir)
    name = close_tracker(tracker, stage.metrics)
    stage.finish()
    assert read_stage_manifest(stage.run, "train")["environment"]["wandb"]["id"] == name
    run = read_run(stage)
    assert run["id"] == name and {k: run["config"][k] for k in stage.params} == stage.params
    counts = {"audit/near_duplicates": 3, "audit/label_errors": 5, "audit/n_images": 60}
    assert {k: run["summary"][k] for k in counts} == counts
    for part, value in stage.metrics["accuracy_val"].items():
        assert run["summary"]["accuracy_val" + ("" if part == "value" else f"_{part}")] == value
    assert run["summary"]["params"] == 5
    assert run["artifacts"][f"model-{name}"]["sha256"] == sha256_file(stage.dir/"model.safetensors")


def test_offline_run_holds_curves_of_steps_and_epochs(stage: Stage) -> None:
    tracker = open_tracker(stage)
    train_adder(tracker, StepTracker(every=4, share=1), FixedHistory())
    close_tracker(tracker)
    curves = pd.DataFrame(read_run(stage)["history"])
    steps, epochs = curves.dropna(subset="step/loss"), curves.dropna(subset="epoch")
    assert steps["trainer/global_step"].tolist() == [0, 4, 8, 12, 16]
    assert (steps["step/lr"] == 0.05).all() and (steps["step/grad_norm"] > 0).all()
    assert epochs["epoch/val_loss"].tolist() == [1, 0.5] and epochs["epoch/images_per_s"].tolist() == [100, 100]


def test_offline_run_holds_images_confusion_matrix_and_audit(stage: Stage) -> None:
    table, images = make_predictions()
    tracker = open_tracker(stage)
    log_audit(tracker, make_audit())
    log_predictions(tracker, table, images)
    log_confusion(tracker, table)
    close_tracker(tracker)
    run = read_run(stage)
    logged, files = logged_values(run), run_folder(stage)/"files"
    order = Classification().rank_predictions(table)
    for end, positions in dict(worst=order[:8], best=order[::-1][:8]).items():
        captions = [caption.split(":")[0] for caption in logged[f"val/{end}/captions"]]
        assert captions == table.path.iloc[positions].tolist()
        for file, i in zip(logged[f"val/{end}/filenames"], positions):
            assert file in run["files"] and (read_pixels(files/file) == images[i]).all()
    matrix = read_json(files/logged["val/confusion_table/path"])
    assert {(t, p): n for t, p, n in matrix["data"]} == table.groupby(["label", "predicted"]).size().to_dict()
    checks = read_json(files/logged["audit/checks/path"])
    assert [row[:3] for row in checks["data"]] == [["near_duplicates", 3, 60], ["label_errors", 5, 60]]


def test_offline_run_holds_no_code_and_no_console_output(stage: Stage) -> None:
    close_tracker(open_tracker(stage))
    names = {p.name for p in run_folder(stage).rglob("*") if p.is_file()}
    assert not names & {"requirements.txt", "output.log"}
    assert not [name for name in names if name.endswith((".py", ".ipynb"))]


class RecordsNorm(pl.Callback):
    "Keep the norm of the gradients before each step."
    def __init__(self) -> None: self.norms = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: object) -> None:
        self.norms.append(float(torch.cat([p.grad.flatten() for p in module.parameters()]).norm()))


def test_gradient_norm_is_measured_before_clipping(stage: Stage) -> None:
    tracker, recorder = open_tracker(stage), RecordsNorm()
    train_adder(tracker, StepTracker(every=1, share=1), recorder, gradient_clip_val=1e-3)
    close_tracker(tracker)
    rows = pd.DataFrame(read_run(stage)["history"]).dropna(subset="step/loss")
    assert rows["step/grad_norm"].to_numpy() == pytest.approx(recorder.norms, rel=1e-5)
    assert len(recorder.norms) == 20 and min(recorder.norms) > 1e-3


class Clock:
    "A clock that runs only while a step or a logger says how long it takes."
    seconds = 0.0

    def perf_counter(self) -> float: return self.seconds


class SlowLogger(pl.loggers.CSVLogger):
    "A logger that needs twenty milliseconds for each call."
    def __init__(self, folder: Path, clock: Clock) -> None:
        super().__init__(folder)
        self.clock = clock
        self.calls = 0

    def log_metrics(self, metrics: dict, step: int | None = None) -> None:
        self.calls += 1
        self.clock.seconds += 0.02


class TakesTime(pl.Callback):
    "Let each step take five milliseconds."
    def __init__(self, clock: Clock) -> None: self.clock = clock

    def on_train_batch_start(self, *_: object) -> None: self.clock.seconds += 0.005


def test_step_tracker_keeps_to_its_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(tracking, "time", clock)
    unlimited, limited = SlowLogger(tmp_path, clock), SlowLogger(tmp_path, clock)
    train_adder(unlimited, StepTracker(every=1, share=1), TakesTime(clock), steps=100)
    begin, callback = clock.seconds, StepTracker(every=1, share=0.1)
    train_adder(limited, callback, TakesTime(clock), steps=100)
    seconds = clock.seconds - begin
    assert unlimited.calls == 200 and 1 <= limited.calls < 60
    assert callback.seconds_spent <= 0.1 * seconds + 0.02   # the last step may begin just within the share


def test_untracked_steps_cost_nothing_and_weights_do_not_change(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    untracked, calls, total_norm = train_adder(False), [], torch.nn.utils.get_total_norm
    monkeypatch.setattr(torch.nn.utils, "get_total_norm", lambda grads: calls.append(1) or total_norm(grads))
    tracker = open_tracker(stage)
    tracked = train_adder(tracker, StepTracker(every=7, share=1))
    close_tracker(tracker)
    assert len(calls) == 3 and all(map(torch.equal, untracked.parameters(), tracked.parameters()))


def test_disabled_tracking_does_not_use_wandb(stage: Stage) -> None:
    table, images = make_predictions()
    tracker = open_tracker(stage, "disabled")
    log_audit(tracker, make_audit())
    log_predictions(tracker, table, images)
    log_confusion(tracker, table)
    log_model(tracker, stage.dir)
    assert (tracker, close_tracker(tracker), stage.environment) == (False, "", {})
    assert not (stage.dir/"wandb").exists() and wandb.run is None


def test_unknown_tracking_is_refused_with_the_nearest_name(stage: Stage) -> None:
    with pytest.raises(UsageError, match="Did you mean 'offline'"): open_tracker(stage, "ofline")
