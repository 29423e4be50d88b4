"""Wrong calls of the command line: one message that names the fault and the remedy, exit code 2, nothing written."""
from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import get_type_hints

import pytest
from PIL import Image

from cvnb.cli import app as cli
from cvnb.cli.audit import audit_app
from cvnb.cli.data import data_app, data_split_command
from cvnb.cli.errors import errors_app
from cvnb.cli.runs import run_command
from cvnb.cli.sweeps import sweep_command
from cvnb.data.named import NAMED_DATASETS
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.sweep_engines import ENGINES
from cvnb.pipeline.sweep_trials import SEARCH_METHODS
from cvnb.tasks.labels import TASKS


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    "Run the command line in this process; return exit code, standard output and standard error."
    def run(*args: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cvnb", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        out = capsys.readouterr()
        return end.value.code or 0, out.out, out.err
    return run


@pytest.fixture
def folders(tmp_path) -> Path:
    "Unusable data folders, and a usable one."
    names = "empty", "no_images/cat", "one_class/cat", "good/cat", "good/dog"
    for name in names: (tmp_path/"data"/name).mkdir(parents=True)
    (tmp_path/"data/no_images/cat/notes.txt").write_text("x")
    for name in "one_class/cat", "good/cat", "good/dog": Image.new("RGB", (8, 8)).save(tmp_path/"data"/name/"a.png")
    return tmp_path/"data"


WRONG_DATA = {"missing": "does not exist", "empty": "is empty", "no_images": "has no images",
              "one_class": "has one class (cat)", "good/cat/a.png": "is a file"}


@pytest.mark.parametrize("name", WRONG_DATA)
def test_unusable_data_folder_is_refused(call, folders, tmp_path, name):
    code, _, error = call("run", "--data", folders/name, "--run", tmp_path/"run")
    assert code == 2 and WRONG_DATA[name] in error and str(folders/name) in error
    assert len(error.splitlines()) == 1 and not (tmp_path/"run").exists()


WRONG_CALLS = {
    "unknown data": (["run", "--data", "mnist5"], ["mnist5", "mnist5k"]),
    "unknown stage": (["run", "trian"], ["trian", "Did you mean 'train'?"]),
    "no such recipe": (["run", "--config", "nowhere.yaml"], ["nowhere.yaml", "does not exist"]),
    "not a run": (["status", "nowhere"], ["nowhere", "not a run directory"]),
    "verdict on no run": (["gate", "nowhere"], ["nowhere", "not a run directory"]),
    "dashboard of no run": (["dashboard", "nowhere"], ["nowhere", "not a run directory"]),
    "comparison with no run": (["compare", "nowhere", "--reference", "nowhere"], ["nowhere", "not a run directory"]),
    "browse no run": (["browse", "nowhere"], ["nowhere", "not a run directory"]),
    "corrections of no run": (["audit", "accept", "nowhere"], ["nowhere", "not a run directory"]),
    "params of no stage": (["params", "tain"], ["tain", "Did you mean 'train'?"]),
    "predict without a model": (["predict", "nowhere", "a.png"], ["nowhere"]),
    "verify no bundle": (["verify", "nowhere"], ["no bundle in nowhere"]),
    "no such option": (["run", "--sett", "train.epochs=3"], ["no such option: --sett", "--set", "cvnb run --help"]),
    "a parameter as an option": (["run", "--batch-size", "3"],
                                 ["no such option: --batch-size", "--set train.batch_size=…", "cvnb run --help"]),
    "a parameter of several stages": (["sweep", "--epochs", "3"], ["--set train.epochs=… or compress.epochs=…"]),
    "a sweep of nothing": (["sweep"], ["nothing to sweep", "--set train.lr=1e-3,3e-3", "--seeds 3"]),
    "no such command": (["rnu"], ["no such command 'rnu'", "Did you mean 'run'?", "cvnb --help"]),
    "no such command of a group": (["data", "gett"], ["'gett'", "Did you mean 'get'?", "cvnb data --help"]),
    "an option without its value": (["sweep", "--out"], ["option '--out' requires an argument"]),
    "text for a number": (["sweep", "--jobs", "many", "--set", "train.lr=1,2"], ["'--jobs'", "cvnb sweep --help"]),
    "nothing to look at": (["status"], ["missing argument 'run'", "cvnb status --help"]),
    "one argument too many": (["status", "a", "b"], ["unexpected extra argument", "(b)"]),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_wrong_call_is_refused_in_one_line(call, tmp_path, case):
    args, fragments = WRONG_CALLS[case]
    where = ["--run", tmp_path/"run"] if args[0] == "run" else []
    code, out, error = call(*args, *where)
    assert code == 2 and len(error.splitlines()) == 1 and not out
    for fragment in fragments: assert fragment in error
    assert not (tmp_path/"run").exists()


def test_unwritable_run_directory_is_refused(call, tmp_path):
    (tmp_path/"file").write_text("precious")
    unwritable = {tmp_path/"file": "is a file", tmp_path/"file/run": "cannot be written",
                  Path("/proc/run"): "cannot be written"}
    for run, reason in unwritable.items():
        code, _, error = call("run", "--run", run)
        assert code == 2 and reason in error and str(run) in error
    assert (tmp_path/"file").read_text() == "precious"


def test_other_folder_is_refused_as_run_directory(call, tmp_path, root, monkeypatch):
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis/chapter.txt").write_text("precious")
    monkeypatch.chdir(tmp_path/"thesis")
    wrong = {tmp_path/"thesis": "it holds chapter.txt", "": "it holds chapter.txt", "/": "is not a run directory",
             root/"nbs/run": "under nbs/"}
    for run, reason in wrong.items():
        code, _, error = call("run", "--run", run)
        assert code == 2 and reason in error and len(error.splitlines()) == 1
    assert [p.name for p in (tmp_path/"thesis").iterdir()] == ["chapter.txt"]


def test_installed_command_prints_no_traceback():
    command = Path(sys.executable).with_name("cvnb")
    done = subprocess.run([command, "run", "trian"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("cvnb: no stage 'trian'") and "Traceback" not in done.stderr


COMMANDS = ["run", "status", "gate", "card", "report", "sweep", "init", "params", "dashboard", "compare", "browse",
            "audit", "errors", "predict", "verify", "serve", "package", "sign", "data", "doctor"]


def test_every_command_has_help_and_is_documented(call, root):
    commands = [c.name for c in cli.app.registered_commands] + [g.name for g in cli.app.registered_groups]
    assert sorted(COMMANDS) == sorted(commands)
    pages = [*sorted((root/"nbs/cli").glob("*.ipynb")), root/"README.md"]
    text = "".join(page.read_text() for page in pages)
    for command in COMMANDS:
        code, out, _ = call(command, "--help")
        assert code == 0 and "Usage" in out and f"cvnb {command}" in text


@pytest.mark.parametrize("group, app", [("audit", audit_app), ("data", data_app), ("errors", errors_app)])
def test_every_sub_command_has_help(call, group, app):
    assert app.registered_commands
    for command in app.registered_commands:
        code, out, _ = call(group, command.name, "--help")
        assert code == 0 and f"cvnb {group} {command.name}" in out and command.callback.__doc__.split()[0] in out


def test_listing_commands_print_tables_and_json(call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    assert all(name in call("data")[1] for name in NAMED_DATASETS)
    table = call("params", "train")[1]
    assert "passes over the training set" in table and "1 … 1000" in table and "timm model" in table
    assert '"maximum": 1000' in call("params", "train", "--json")[1]
    assert "complete" in call("doctor")[1]


# Help texts, written without the modules that they describe: importing those takes seconds


def option_help(command: object, name: str) -> str:
    "Return the help text of a command's option."
    return get_type_hints(command, include_extras=True)[name].__metadata__[0].help


@pytest.mark.parametrize("minutes", ["0.1", "0", "-3", "nan"])
def test_deadline_that_is_too_short_is_refused_before_anything_is_written(call, folders, tmp_path, minutes):
    run = tmp_path/"run"
    code, out, err = call("run", "--data", folders/"good", "--run", run, "--minutes", minutes)
    assert code == 2 and not run.exists() and not out
    assert err.strip() == f"cvnb: --minutes {minutes} is too short for a training. Give 0.5 or more."


@pytest.mark.parametrize(("args", "message"), [
    (["audit", "--minutes", "2"], "--minutes is for the stage train, which this call does not run."),
    (["--minutes", "2", "--set", "train.minutes=3"], "--minutes and --set train.minutes say the same.")])
def test_deadline_that_says_nothing_or_the_same_twice_is_refused(call, folders, tmp_path, args, message):
    code, _, err = call("run", *args, "--data", folders/"good", "--run", tmp_path/"run")
    assert code == 2 and message in err and not (tmp_path/"run").exists()


def test_help_of_run_lists_every_stage_in_order():
    assert run_command.__doc__.rstrip(".").split(": ")[1].split(", ") == list(read_contracts())


def test_help_of_data_split_lists_every_task():
    assert re.split(", | or ", option_help(data_split_command, "task").split(":")[0]) == list(TASKS)


def test_help_of_sweep_lists_every_search_method():
    assert re.split(", | or ", option_help(sweep_command, "search").split(".")[0]) == list(SEARCH_METHODS)


def test_help_of_sweep_lists_every_engine():
    listed = option_help(sweep_command, "engine").split(".")[0].removeprefix("Where trials run: ")
    assert re.split(", | or ", listed) == list(ENGINES)
