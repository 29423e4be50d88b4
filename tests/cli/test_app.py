"""What the command line says to a wrong call: one message that names the thing and the remedy, exit code 2, nothing written."""
from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from cvnb.cli import app as cli
from cvnb.data.named import NAMED


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    "Run the command line in this process, in an empty folder; gives exit code, standard output and standard error."
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cvnb", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err
    return run


@pytest.fixture
def folders(tmp_path) -> Path:
    "Data folders that nothing can be learned from, and one that would do."
    for name in "empty", "no_images/cat", "one_class/cat", "good/cat", "good/dog": (tmp_path/"data"/name).mkdir(parents=True)
    (tmp_path/"data/no_images/cat/notes.txt").write_text("x")
    for name in "one_class/cat", "good/cat", "good/dog": Image.new("RGB", (8, 8)).save(tmp_path/"data"/name/"a.png")
    return tmp_path/"data"


WRONG_DATA = {"missing": "does not exist", "empty": "is empty", "no_images": "has no images", "one_class": "has one class (cat)",
              "good/cat/a.png": "is a file"}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_a_folder_that_nothing_can_be_learned_from(call, folders, tmp_path, name):
    code, _, said = call("run", "--data", folders/name, "--run", tmp_path/"run")
    assert code == 2 and WRONG_DATA[name] in said and str(folders/name) in said
    assert len(said.splitlines()) == 1 and not (tmp_path/"run").exists()


WRONG_CALLS = {
    "unknown data": (["run", "--data", "mnist5"], ["mnist5", "mnist5k"]),
    "unknown stage": (["run", "trian"], ["trian", "Did you mean 'train'?"]),
    "no such recipe": (["run", "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    "not a run": (["status", "nowhere"], ["nowhere", "not a run directory"]),
    "dashboard of no run": (["dashboard", "nowhere"], ["nowhere", "not a run directory"]),
    "browse no run": (["browse", "nowhere"], ["nowhere", "not a run directory"]),
    "corrections of no run": (["audit", "accept", "nowhere"], ["nowhere", "not a run directory"]),
    "params of no stage": (["params", "tain"], ["tain", "Did you mean 'train'?"]),
    "predict without a model": (["predict", "nowhere", "a.png"], ["nowhere"]),
    "no such option": (["run", "--sett", "train.epochs=3"], ["no such option: --sett", "--set", "cvnb run --help"]),
    "a parameter as an option": (["run", "--batch-size", "3"], ["no such option: --batch-size", "--set train.batch_size=…", "cvnb run --help"]),
    "a parameter of several stages": (["sweep", "--epochs", "3"], ["--set train.epochs=… or compress.epochs=…"]),
    "a sweep of nothing": (["sweep"], ["a sweep of one run", "--set train.lr=1e-3,3e-3", "--seeds 3"]),
    "no such command": (["rnu"], ["no such command 'rnu'", "Did you mean 'run'?", "cvnb --help"]),
    "no such command of a group": (["data", "gett"], ["'gett'", "Did you mean 'get'?", "cvnb data --help"]),
    "an option without its value": (["sweep", "--out"], ["option '--out' requires an argument"]),
    "text for a number": (["sweep", "--jobs", "many", "--set", "train.lr=1,2"], ["'--jobs'", "cvnb sweep --help"]),
    "nothing to look at": (["status"], ["missing argument 'run'", "cvnb status --help"]),
    "one argument too many": (["status", "a", "b"], ["unexpected extra argument", "(b)"]),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_a_wrong_call(call, tmp_path, case):
    args, fragments = WRONG_CALLS[case]
    where = ["--run", tmp_path/"run"] if args[0] == "run" else []
    code, out, said = call(*args, *where)
    assert code == 2 and len(said.splitlines()) == 1 and not out
    for fragment in fragments: assert fragment in said
    assert not (tmp_path/"run").exists()


def test_a_run_directory_that_cannot_be(call, tmp_path):
    (tmp_path/"file").write_text("precious")
    for run, reason in ((tmp_path/"file", "is a file"), (tmp_path/"file/run", "cannot be written"), (Path("/proc/run"), "cannot be written")):
        code, _, said = call("run", "--run", run)
        assert code == 2 and reason in said and str(run) in said
    assert (tmp_path/"file").read_text() == "precious"


def test_a_folder_that_is_something_else_is_no_run_directory(call, tmp_path, root, monkeypatch):
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis/chapter.txt").write_text("precious")
    monkeypatch.chdir(tmp_path/"thesis")
    wrong = {tmp_path/"thesis": "it holds chapter.txt", "": "it holds chapter.txt", "/": "is not a run directory", root/"nbs/run": "under nbs/"}
    for run, reason in wrong.items():
        code, _, said = call("run", "--run", run)
        assert code == 2 and reason in said and len(said.splitlines()) == 1
    assert [p.name for p in (tmp_path/"thesis").iterdir()] == ["chapter.txt"]


def test_no_traceback_from_the_installed_command():
    command = Path(sys.executable).with_name("cvnb")
    done = subprocess.run([command, "run", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cvnb: no stage 'trian'") and "Traceback" not in done.stderr


COMMANDS = ["run", "status", "sweep", "init", "params", "dashboard", "browse", "audit", "predict", "data", "doctor"]


def test_every_command_has_help_and_is_documented(call, root):
    assert sorted(COMMANDS) == sorted([c.callback.__name__ for c in cli.app.registered_commands] + [g.name for g in cli.app.registered_groups])
    page = (root/"nbs/14_cli.ipynb").read_text() + (root/"README.md").read_text()
    for command in COMMANDS:
        code, said, _ = call(command, "--help")
        assert code == 0 and "Usage" in said and f"cvnb {command}" in page


def test_lists(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert all(name in call("data")[1] for name in NAMED)
    said = call("params", "train")[1]
    assert "passes over the training set" in said and "1 … 1000" in said
    assert '"maximum": 1000' in call("params", "train", "--json")[1]
    assert "complete" in call("doctor")[1]


def test_a_file_is_told_now_and_then_how_far_a_stage_is():
    out = io.StringIO()
    with cli.Lines(out) as lines:
        lines("train", "start", 0, "stale")
        lines("train", "progress", 0.4, "epoch 2/5")   # half a minute has not gone by
        lines.pause = 0
        lines("train", "progress", 0.6, "epoch 3/5")
        lines("train", "done", 1, "98 % right")
    begun, going, done = out.getvalue().splitlines()
    assert begun == "… train" and going.split() == ["…", "train", "60%", "epoch", "3/5"]
    assert done.startswith("✓ train") and done.endswith("98 % right")
