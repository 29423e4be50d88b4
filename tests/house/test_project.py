"""A project of one's own, and cvnb installed from its wheel, away from the checkout."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import nbformat as nbf
import pytest
from projects import write_project

from cvnb.core.files import read_json

BIN = Path(sys.executable).parent


def call(*command: object, **kw) -> subprocess.CompletedProcess:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def install(folder: Path, *what: object) -> Path:
    "Make a venv and install into it; gives its bin folder."
    call(BIN/"uv", "venv", "-q", "--python", sys.executable, folder)
    call(BIN/"uv", "pip", "install", "-q", "--python", folder/"bin/python", *what)
    return folder/"bin"


def test_project_runs_edited_and_additional_stages(tmp_path, small_photos):
    mine = tmp_path/"mine"
    call(BIN/"cvnb", "init", mine, "--data", small_photos)
    errors = nbf.read(mine/"nbs/stages/errors.ipynb", 4)
    errors.cells.insert(-1, nbf.v4.new_code_cell('stage.path("mine.txt").write_text("mine")'))
    nbf.write(errors, mine/"nbs/stages/errors.ipynb")
    head = nbf.v4.new_markdown_cell("# Letter\n\n> Write one.\n\n- needs: [errors]")
    declared = nbf.v4.new_code_cell('seed: int = 0\nrun: str = "runs/smoke"', metadata=dict(tags=["parameters"]))
    body = ['from cvnb.pipeline.params import open_stage', 'stage = open_stage("letter", globals())',
            'text = stage.input("errors", "mine.txt").read_text()',
            'stage.path("letter.txt").write_text(f"Dear {text}")',
            'stage.finish()']
    letter = nbf.v4.new_notebook(cells=[head, declared, *map(nbf.v4.new_code_cell, body)])
    nbf.write(letter, mine/"nbs/stages/letter.ipynb")
    small = ("--set", "train.backbone=resnet10t", "--set", "train.weights=", "--set", "train.epochs=1")
    done = call(BIN/"cvnb", "run", "letter", "--config", "mine", *small, "--json", cwd=mine)
    assert list(json.loads(done.stdout)["stages"]) == ["audit", "train", "errors", "letter"]
    assert (mine/"runs/mine/letter/letter.txt").read_text() == "Dear mine"
    again = call(BIN/"cvnb", "run", "letter", "--run", mine/"runs/mine", "--json", cwd=mine)
    assert {o["state"] for o in json.loads(again.stdout)["stages"].values()} == {"fresh"}
    rows = json.loads(call(BIN/"cvnb", "status", "runs/mine", "--json", cwd=mine).stdout)["stages"]
    assert rows[-1]["stage"] in ("letter", "benchmark")


def test_stage_opened_in_jupyter_runs_needed_stages_first(tmp_path):
    "As a person opens it: with an ordinary kernel, in the notebook's own folder, before anything has run."
    body = 'stage.path("b.txt").write_text(2 * stage.input("one", "a.txt").read_text())'
    write_project(tmp_path, one='stage.path("a.txt").write_text("a")', two=body)
    call(BIN/"jupyter", "execute", "two.ipynb", cwd=tmp_path/"nbs/stages")
    assert (tmp_path/"runs/x/two/b.txt").read_text() == "aa"
    records = {s: read_json(tmp_path/f"runs/x/{s}/stage.json") for s in ("one", "two")}
    assert all(r["status"] == "done" for r in records.values())
    assert records["one"]["key"] and records["two"]["key"] is None
    assert not (tmp_path/"nbs/stages/runs").exists()
    for name in "two/stage.json", "run.json": (tmp_path/"runs/x"/name).unlink()   # as after Ctrl-C
    again = call(BIN/"cvnb", "run", "--run", "runs/x", "--json", cwd=tmp_path)
    assert {s: o["state"] for s, o in json.loads(again.stdout)["stages"].items()} == dict(one="fresh", two="done")


def test_init_refuses_unwritable_folder():
    done = subprocess.run([BIN/"cvnb", "init", "/proc/mine"], capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("cvnb: /proc/mine cannot be written")


def test_init_refuses_to_overwrite(tmp_path):
    (tmp_path/"README.md").write_text("precious")
    done = subprocess.run([BIN/"cvnb", "init", tmp_path], capture_output=True, text=True)
    assert done.returncode == 2 and "README.md already" in done.stderr and len(done.stderr.splitlines()) == 1
    assert [p.name for p in tmp_path.iterdir()] == ["README.md"] and (tmp_path/"README.md").read_text() == "precious"


@pytest.mark.slow
@pytest.mark.usefixtures("own_fork_server")
def test_core_installation_is_small_and_predicts(wheel, smoke_run, tmp_path):
    bin = install(tmp_path/"venv", wheel)
    site = next((tmp_path/"venv").glob("lib/*/site-packages"))
    assert not (site/"torch").exists() and sum(p.stat().st_size for p in site.rglob("*") if p.is_file()) < 200e6
    bundle = Path(shutil.copytree(smoke_run/"export/bundle", tmp_path/"bundle"))
    image = next((Path(read_json(smoke_run/"audit/audit.json")["root"])/"7").glob("*.png"))
    mine = call(bin/"cvnb", "predict", bundle, image, "--json", cwd=tmp_path).stdout
    assert json.loads(mine) == json.loads(call(BIN/"cvnb", "predict", bundle, image, "--json").stdout)
    call(bin/"cvnb", "--help", cwd=tmp_path)
    done = subprocess.run([bin/"cvnb", "run", "--data", "digits"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr and "pip install" in done.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("own_fork_server")
def test_wheel_starts_a_project_runs_all_stages_and_predicts(wheel, small_photos, tmp_path):
    bin = install(tmp_path/"venv", "--no-deps", wheel)
    site = next((tmp_path/"venv").glob("lib/*/site-packages"))
    (site/"lock.pth").write_text(sysconfig.get_path("purelib"))   # the lock's packages, where `make setup` has put them
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    where = call(bin/"python", "-c", "import cvnb, torch; print(cvnb.__file__)", cwd=tmp_path, env=env).stdout.strip()
    assert where == str(site/"cvnb/__init__.py")
    call(bin/"cvnb", "init", "mine", "--data", small_photos, cwd=tmp_path, env=env)
    assert (tmp_path/"mine/configs/recipe.schema.json").exists()
    assert "train" in call(bin/"cvnb", "params", cwd=tmp_path/"mine", env=env).stdout
    sets = ("train.backbone=resnet10t", "train.weights=", "train.epochs=1", "compress.epochs=1", "benchmark.n_calls=20",
            "benchmark.rounds=3", "benchmark.control_seconds=0")
    options = [arg for s in sets for arg in ("--set", s)]
    table = "path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in sorted(small_photos.rglob("*.png")))
    (tmp_path/"whole.csv").write_text(table)   # with whole paths, so that its folder is another one than the images'
    done = call(bin/"cvnb", "run", "--data", tmp_path/"whole.csv", *options, cwd=tmp_path, env=env)
    assert "× torch" in done.stdout and "× peer: speed relative to trained, openvino int8" in done.stdout
    assert (tmp_path/"runs/whole.csv/benchmark/report.html").exists()
    (example,) = [line for line in done.stdout.splitlines() if line.startswith("  cvnb predict ")]
    assert str(small_photos) in example, "the example names an image of the data"
    image = next(small_photos.rglob("*.png"))
    done = call(bin/"cvnb", "predict", "runs/whole.csv", image, "--json", cwd=tmp_path, env=env)
    answer = json.loads(done.stdout)
    assert answer["path"] == str(image) and answer["label"] in ("1", "7")
