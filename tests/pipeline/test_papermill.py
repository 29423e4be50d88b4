"papermill, with its own engine and with cvnb's: it keeps the contract, and its options do what they say."
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

import nbformat as nbf
import papermill
import pytest
from click.testing import CliRunner
from nbclient.exceptions import CellTimeoutError
from papermill.cli import papermill as papermill_command
from papermill.exceptions import PapermillExecutionError
from projects import write_project

from cvnb.core.errors import UsageError
from cvnb.core.files import read_json
from cvnb.pipeline.kernels import register_translator, start_fork_server, stop_fork_server
from cvnb.pipeline.params import read_contracts

ENGINES = [None, "cvnb"]
CELL = 'seed: int = 0  # [0..9]\nkind: Literal["a", "b"] = "a"\nshare: float | None = None  # [0..1]'
READS = 'stage.path("read.txt").write_text(repr((seed, kind, share)))'


def execute(source: Path, *, engine: str | None = "cvnb", **options: object) -> nbf.NotebookNode:
    "Execute a notebook in the folder above its project's, or its own, and return the executed one."
    folder = next((p.parent for p in source.parents if p.name == "nbs"), source.parent)
    given = dict(progress_bar=False, cwd=folder) | options
    return papermill.execute_notebook(source, folder/"out.ipynb", engine_name=engine, **given)


def write_cells(path: Path, *cells: str, kernel: str = "python3") -> Path:
    "Write a notebook that opens no stage."
    kernelspec = dict(name=kernel, display_name=kernel, language="python")
    code = [nbf.v4.new_code_cell(c) for c in cells]
    nbf.write(nbf.v4.new_notebook(cells=code, metadata=dict(kernelspec=kernelspec)), path)
    return path


@pytest.fixture(scope="module", autouse=True)
def quick_server() -> Iterator[None]:
    "A fork server that imports no packages, unless a parallel run has started one."
    start_fork_server(set())
    yield
    stop_fork_server()


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return write_project(tmp_path, f"from typing import Literal\n{CELL}", one=READS, two="")


def stage(project: Path, name: str = "one") -> Path:
    "The notebook of a stage, with a kernel as JupyterLab writes it."
    path = project/f"nbs/stages/{name}.ipynb"
    nb = nbf.read(path, 4)
    nb.metadata["kernelspec"] = dict(name="python3", display_name="python3", language="python")
    nbf.write(nb, path)
    return path


REFUSED = {
    "an unknown name": (dict(sead=5), r"two\.sead \(from papermill\): no such parameter. Did you mean 'seed'\?"),
    "another run's name": (dict(rum="runs/R"), r"two\.rum \(from papermill\): no such parameter. Did you mean 'run'\?"),
    "a wrong type": (dict(seed="5"), r"two\.seed = '5' \(from papermill\): expected int in 0 … 9"),
    "out of range": (dict(seed=10), r"two\.seed = 10 \(from papermill\): expected int in 0 … 9"),
    "no choice": (dict(kind="c"), r"two\.kind = 'c' \(from papermill\): expected one of 'a', 'b'\. See"),
    "a misspelt choice": (dict(kind="aa"), r"expected one of 'a', 'b'\. Did you mean 'a'\? See `cvnb params two`"),
    "not a number": (dict(share=float("nan")), r"two\.share = nan \(from papermill\): expected Optional\[float\] in 0"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_engine_refuses_before_a_kernel_starts(project, kind):
    given, said = REFUSED[kind]
    with pytest.raises(UsageError, match=said), patch("cvnb.pipeline.kernels._fork_client_class") as client:
        execute(stage(project, "two"), parameters=given)
    assert not client.called and not (project/"out.ipynb").exists() and not (project/"runs").exists()


@pytest.mark.parametrize("kind", ["another run's name", "a wrong type"])
def test_plain_papermill_refuses_before_any_work(project, kind):
    given, said = REFUSED[kind]
    with pytest.raises(PapermillExecutionError, match=said) as error:
        execute(stage(project, "two"), engine=None, parameters=given)
    assert "Traceback" not in str(error.value)
    assert not (project/"runs").exists(), "no stage has begun, neither this one nor one that it needs"


def test_papermill_command_prints_one_line(project):
    command = [Path(sys.executable).with_name("papermill"), stage(project), "out.ipynb", "--engine", "cvnb"]
    done = subprocess.run([*command, "-p", "kind", "c"], cwd=project, capture_output=True, text=True)
    assert done.returncode == 2 and "Passed unknown parameter" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("Error: one.kind = 'c' (from papermill): expected one of 'a', 'b'")
    assert "Traceback" not in done.stderr and sorted(p.name for p in project.iterdir()) == ["nbs"]


@pytest.mark.parametrize("engine", ENGINES)
def test_declared_values_and_names_of_the_user_pass(project, engine):
    "A parameter that was renamed in a copy, a cell by hand that looks like papermill's, and papermill's own names."
    nb = nbf.read(stage(project), 4)
    nb.cells[2].source += "\nspeed: int = 1"   # the copy's own
    hand = "# Parameters\nhelper = 3\nprint(helper)", "helper = 3"
    nb.cells[3:3] = [nbf.v4.new_code_cell(source) for source in hand]
    copy = project/"copy.ipynb"
    nbf.write(nb, copy)
    given = dict(seed=3, kind="b", share=0.5, speed=7, PAPERMILL_INPUT_PATH="copy.ipynb", run="runs/y")
    execute(copy, engine=engine, parameters=given)
    assert (project/"runs/y/one/read.txt").read_text() == "(3, 'b', 0.5)"
    assert read_json(project/"runs/y/one/stage.json")["params"] == dict(seed=3, kind="b", share=0.5, run="runs/y")


@pytest.mark.parametrize("engine", ENGINES)
def test_lost_tag_does_not_run_the_defaults(project, engine):
    nb = nbf.read(stage(project), 4)
    del nb.cells[2].metadata["tags"]
    nbf.write(nb, project/"copy.ipynb")
    with pytest.raises((UsageError, PapermillExecutionError), match=r"one\.seed .*set above the parameters cell"):
        execute(project/"copy.ipynb", engine=engine, parameters=dict(seed=3))
    assert not (project/"runs").exists()


def test_papermill_knows_every_parameter_of_every_stage(tmp_path, caplog):
    register_translator()   # another test may have imported cvnb's kernels before papermill
    for contract in read_contracts().values():
        known = papermill.inspect_notebook(contract.path)
        assert list(known) == contract.names, contract.stage
        for p in contract.params:
            shown = known[p.name]
            assert shown["inferred_type_name"] == p.type_name and shown["default"] == repr(p.default)
            assert shown["help"].startswith(p.help) and p.help, f"{contract.stage}.{p.name}"
            assert shown["help"].endswith(f"[{p.allowed}]" if p.allowed else "")
        with caplog.at_level(logging.INFO, "papermill"):
            papermill.execute_notebook(contract.path, tmp_path/"out.ipynb", contract.defaults(), prepare_only=True)
    assert caplog.records and not [r.message for r in caplog.records if r.levelno >= logging.WARNING]


def test_help_of_papermill_shows_ranges_and_choices(root):
    register_translator()
    shown = CliRunner().invoke(papermill_command, ["--help-notebook", str(root/"nbs/stages/train.ipynb")]).output
    for line in ("augment: Literal['none', 'light', 'trivial', 'randaugment'] (default 'light')",
                 "passes over the training set, in whole batches [1 … 1000]"): assert line in shown


def test_other_notebooks_are_read_by_papermill_itself(tmp_path):
    register_translator()
    path = write_cells(tmp_path/"in.ipynb", "msg = 'hi'  # what to say\nn = 2")
    nb = nbf.read(path, 4)
    nb.cells[0].metadata["tags"] = ["parameters"]
    nbf.write(nb, path)
    assert papermill.inspect_notebook(path)["msg"] == dict(
        name="msg", inferred_type_name="None", default="'hi'", help="what to say")


def test_long_cell_is_saved_as_often_as_autosave_says(tmp_path):
    saves = {}
    path = write_cells(tmp_path/"in.ipynb", "print('first')\nimport time\ntime.sleep(1.3)")
    for every in 0, 0.5:
        with patch("papermill.engines.write_ipynb") as write: execute(path, autosave_cell_every=every)
        saves[every] = write.call_count
    assert saves[0.5] - saves[0] == 2


def test_quick_cells_are_saved_while_a_long_one_runs(tmp_path):
    "Between cells the engine saves every two seconds; what it left out is saved, also where autosave is off."
    look = f"import time\ntime.sleep(2.6)\nsaved = open({str(tmp_path/'out.ipynb')!r}).read()"
    shows = "('first' in saved, 'second' in saved)"
    nb = execute(write_cells(tmp_path/"in.ipynb", "'fi' + 'rst'", "'sec' + 'ond'", look, shows), autosave_cell_every=0)
    assert nb.cells[-1].outputs[0].data["text/plain"] == "(True, True)"


def test_cell_is_stopped_after_its_time(tmp_path):
    path = write_cells(tmp_path/"in.ipynb", "import time\ntime.sleep(60)")
    for option in "execution_timeout", "timeout":   # papermill's name, and that of the notebook client
        with pytest.raises(CellTimeoutError): execute(path, **{option: 1})


def test_client_gets_the_options_that_papermill_gives_its_own(tmp_path):
    path = write_cells(tmp_path/"in.ipynb", "1")
    for given, expected in (dict(start_timeout=123), (123, None)), (dict(execution_timeout=5, timeout=7), (60, 5)):
        with patch("cvnb.pipeline.kernels._fork_client_class") as client:
            client().class_trait_names.return_value = ["timeout", "startup_timeout", "kernel_name"]
            execute(path, **given)
        options = client().call_args.kwargs
        assert (options["startup_timeout"], options["timeout"]) == expected
        assert options["kernel_name"] == "python3" and options["log"] is logging.getLogger("papermill")


def test_outputs_go_to_log_and_files(tmp_path, caplog):
    path = write_cells(tmp_path/"in.ipynb", "import sys\nprint('to out')\nprint('to err', file=sys.stderr)", "40 + 2")
    with open(tmp_path/"out.txt", "w") as out, open(tmp_path/"err.txt", "w") as err, \
            caplog.at_level(logging.INFO, "papermill"):
        execute(path, log_output=True, stdout_file=out, stderr_file=err)
    assert (tmp_path/"out.txt").read_text() == "to out\n" and (tmp_path/"err.txt").read_text() == "to err\n"
    logged = [(r.levelname, r.message.strip()) for r in caplog.records]
    assert {("INFO", "to out"), ("WARNING", "to err"), ("INFO", "42")} <= set(logged)


def test_progress_bar_names_the_cell(tmp_path, capsys):
    path = write_cells(tmp_path/"in.ipynb", "# papermill_description=Counting\n1")
    execute(path, progress_bar=dict(desc="Notebook"))
    assert "Notebook" in (said := capsys.readouterr().err) and "Counting" in said and "1/1" in said
    execute(path, progress_bar=False)
    assert capsys.readouterr().err == ""
    with pytest.raises(TypeError, match="progress_bar must be"): execute(path, progress_bar=1.5)


def test_notebook_is_written_once_on_request(tmp_path):
    path = write_cells(tmp_path/"in.ipynb", "1", "2")
    with patch("papermill.engines.write_ipynb") as write: execute(path, request_save_on_cell_execute=False)
    assert not write.called and (tmp_path/"out.ipynb").exists()


def test_kernel_that_does_not_start_in_time_is_given_up(tmp_path, monkeypatch):
    spec = tmp_path/"kernels/mute/kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps(dict(argv=["sleep", "600"], display_name="mute", language="python")))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="not ready within 1 s"):
        execute(write_cells(tmp_path/"in.ipynb", "1", kernel="mute"), start_timeout=1)


@pytest.mark.parametrize("own, seen", [({}, "10000 None"), (dict(GOMP_SPINCOUNT="7"), "7 None"),
                                       (dict(OMP_WAIT_POLICY="active"), "None active")])
def test_kernels_wait_with_a_short_spin_unless_the_user_chose_one(tmp_path, own, seen):
    body = ("import os\nnames = 'GOMP_SPINCOUNT', 'OMP_WAIT_POLICY'\n"
            "stage.path('x').write_text(' '.join(str(os.environ.get(name)) for name in names))")
    write_project(tmp_path, spin=body)
    done = subprocess.run([Path(sys.executable).with_name("cvnb"), "run"], cwd=tmp_path, capture_output=True,
                          text=True, env=os.environ | own)
    assert done.returncode == 0, done.stderr
    assert (tmp_path/"runs/smoke/spin/x").read_text() == seen
