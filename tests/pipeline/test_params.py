"""The parameter contract: what a stage notebook may declare, and what its marks do."""
from __future__ import annotations

import json
import sys
from pathlib import Path

import nbformat as nbf
import pytest

from cvnb.cli import app as cli
from cvnb.core.errors import CvnbError, UsageError
from cvnb.pipeline import params
from cvnb.pipeline.freshness import named_files
from cvnb.pipeline.params import (
    Contract,
    Param,
    check_parameters,
    list_timm_models,
    parameter_table,
    pydantic_model,
    read_contract,
    read_contracts,
)

KNOWN = read_contracts()


def notebook(folder: Path, *cells: tuple[str, list[str]]) -> Path:
    "Write a stage notebook in a project of its own."
    path = folder/"nbs/stages/one.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = nbf.v4.new_markdown_cell("# One\n\n> A stage.\n\n- needs: []")
    code = [nbf.v4.new_code_cell(source, metadata=dict(tags=tags)) for source, tags in cells]
    nbf.write(nbf.v4.new_notebook(cells=[head, *code]), path)
    return path


WRONG_CELLS = {
    "the tag was lost": [("n: int = 1", [])],
    "two cells": [("n: int = 1", ["parameters"]), ("m: int = 1", ["parameters"])],
    "a call": [("n: int = int(3)", ["parameters"])],
    "no annotation": [("n = 1", ["parameters"])],
    "a type outside the list": [("n: complex = 1", ["parameters"])],
    "declared twice": [("n: int = 1\nn: int = 2", ["parameters"])],
    "code": [("n: int = 1\nprint(n)", ["parameters"])],
    "no Python": [("n: int = = 1", ["parameters"])],
    "a default of another type": [('run: str = "runs/x"\nn: int = "one"', ["parameters"])],
    "a default out of range": [('run: str = "runs/x"\nn: int = 0  # number [1..3]', ["parameters"])],
    "an unknown mark": [('net: str = "x"  # network [timm modle]', ["parameters"])],
    "a mark on a number": [('n: int = 1  # number [file]', ["parameters"])],
}


@pytest.mark.parametrize("kind", WRONG_CELLS)
def test_notebook_without_contract_is_refused(monkeypatch, capsys, tmp_path, kind):
    notebook(tmp_path, *WRONG_CELLS[kind])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cvnb", "run"])
    with pytest.raises(SystemExit) as end: cli.main()
    error = capsys.readouterr().err
    assert end.value.code in (1, 2) and "one" in error and len(error.splitlines()) == 1
    assert not (tmp_path/"runs").exists()


def test_parameters_cell_is_never_executed(tmp_path):
    path = notebook(tmp_path, (f"n: int = open({str(tmp_path/'proof')!r}, 'w').write('x')", ["parameters"]))
    with pytest.raises(CvnbError): read_contract(path)
    assert not (tmp_path/"proof").exists()


def test_values_of_every_type_are_checked(tmp_path):
    cell = ('a: int = 1\nb: float = 1.5\nc: str = "x"\nd: bool = True\ne: Path = "x"\nf: Literal["u", "v"] = "u"\n'
            'g: Optional[int] = None\nh: list[str] = ["x"]\ni: int | None = None')
    c = read_contract(notebook(tmp_path, (cell, ["parameters"])))
    good = dict(a=2, b=2, c="y", d=False, e="y", f="v", g=3, h=["y", "z"], i=None)
    assert check_parameters(c, good) == good | dict(b=2.0, e=Path("y"))
    bad = dict(a="2", b="two", c=3, d=0, e=3, f="w", g="3", h=[1], i=1.5)
    for name, value in bad.items():
        with pytest.raises(UsageError, match=f"one.{name} = "): check_parameters(c, {name: value})


def test_list_timm_models_finds_every_registered_network():
    from timm.models import _registry
    assert list_timm_models() == set(_registry._model_entrypoints)   # the deprecated ones, too


def test_network_is_checked_only_with_mark_and_with_timm(monkeypatch):
    own = Contract("train", Path("train.ipynb"), params=[Param("backbone", str, "resnet18", "timm model name")])
    given = dict(backbone="mine")
    assert check_parameters(own, given) == given, "the wording of the comment does not matter"
    with pytest.raises(UsageError, match="timm has no such model"): check_parameters(KNOWN["train"], given)
    monkeypatch.setattr(params, "find_spec", lambda name: None)   # timm is not installed
    list_timm_models.cache_clear()
    assert list_timm_models() == frozenset() and check_parameters(KNOWN["train"], given)
    list_timm_models.cache_clear()


def test_marks_reach_table_schema_and_named_files(tmp_path):
    cell = ('weights: str = ""  # a name or a file [file]\nnote: str = ""  # text\nwhere: str = "cpu"  # [device]\n'
            'table: Path = ""')
    c = read_contract(notebook(tmp_path, (cell, ["parameters"])))
    assert [row["values"] for row in parameter_table(c)] == ["file", "", "device", "file"]
    described = pydantic_model(c).model_json_schema()["properties"]
    assert [described[p.name].get("x-refers-to") for p in c.params] == ["file", None, "device", "file"]
    (tmp_path/"w.bin").touch()
    given = dict(weights="w.bin", note="w.bin", where="w.bin", table=Path("w.bin"))
    assert named_files(c, given, tmp_path) == dict(weights=tmp_path/"w.bin", table=tmp_path/"w.bin")
    assert named_files(c, given | dict(weights="imagenet", table=Path()), tmp_path) == {}


def test_stages_mark_networks_devices_and_files():
    marked = {(stage, p.name): p.mark for stage, c in KNOWN.items() for p in c.params if p.mark}
    assert marked == {("train", "backbone"): "timm model", ("train", "weights"): "file", ("train", "costs"): "file",
                      ("train", "device"): "device", ("compress", "device"): "device",
                      ("compress", "student"): "timm model", ("errors", "kept_slices"): "file"}


def test_origin_of_each_value_is_recorded(monkeypatch, capsys, tmp_path):
    notebook(tmp_path, ('run: str = "runs/x"\na: int = 1\nb: int = 1\nc: int = 1', ["parameters"]),
             ("from cvnb.pipeline.params import open_stage", []), ('stage = open_stage("one", globals())', []),
             ("stage.finish()", []))
    (tmp_path/"r.yaml").write_text("one: {<<: {b: 2}, c: 2}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cvnb", "run", "--config", "r.yaml", "--set", "one.c=3", "--json"])
    with pytest.raises(SystemExit) as end: cli.main()
    assert not end.value.code, capsys.readouterr().err
    run = json.loads((tmp_path/"runs/r/run.json").read_text())
    assert {k: run["params"]["one"][k] for k in "abc"} == dict(a=1, b=2, c=3)
    assert {k: run["origins"]["one"][k] for k in "abc"} == dict(a="the notebook", b="r.yaml", c="--set")
    manifest = json.loads((tmp_path/"runs/r/one/stage.json").read_text())
    assert manifest["params"] | dict(run="") == dict(run="", a=1, b=2, c=3)
