"""The parameter contract: what is refused before anything starts, and that nothing valid is."""
from __future__ import annotations

import json
import math
import sys
import typing
from pathlib import Path

import nbformat as nbf
import pytest
import yaml

from cvnb.cli import app as cli
from cvnb.pipeline import params
from cvnb.core.errors import CvnbError, UsageError
from cvnb.pipeline.params import Contract, Param, check, contracts, parse_set, read_contract, read_recipe, timm_names

KNOWN = contracts()
PARAMS = [(stage, p) for stage, c in KNOWN.items() for p in c.params if p.name != "run"]

# --set, and what the message has to name
WRONG_SETS = {
    "unknown name": ("train.depth=3", "train.depth"),
    "near miss": ("train.epoch=3", "Did you mean 'epochs'?"),
    "transposed letters": ("train.ecpohs=3", "Did you mean 'epochs'?"),
    "capitals": ("train.Epochs=3", "Did you mean 'epochs'?"),
    "hyphen for underscore": ("train.batch-size=8", "Did you mean 'batch_size'?"),
    "of another stage": ("errors.epochs=3", "errors.epochs"),
    "no such stage": ("tarin.epochs=3", "Did you mean 'train'?"),
    "no stage": ("epochs=3", "stage.param=value"),
    "no value": ("train.epochs", "stage.param=value"),
    "no name": ("train.=3", "stage.param=value"),
    "nothing": ("", "stage.param=value"),
    "three levels": ("train.optimizer.lr=3", "stage.param=value"),
    "run directory": ("train.run=elsewhere", "Use --run DIR"),
    "text for int": ("train.epochs=many", "expected int"),
    "float for int": ("train.epochs=2.0", "train.epochs = 2.0"),
    "bool for int": ("train.epochs=true", "train.epochs = True"),
    "null for int": ("train.epochs=null", "train.epochs = None"),
    "empty for int": ("train.epochs=", "train.epochs"),
    "list for int": ("train.epochs=[1, 2]", "train.epochs = [1, 2]"),
    "mapping for int": ("train.epochs={a: 1}", "train.epochs"),
    "quoted int": ("train.epochs='3'", "train.epochs = '3'"),
    "date for int": ("train.epochs=2026-01-01", "train.epochs"),
    "broken YAML": ("train.epochs=[1", "train.epochs = '[1'"),
    "below the range": ("train.epochs=0", "1 … 1000"),
    "negative": ("train.epochs=-3", "1 … 1000"),
    "above the range": ("train.epochs=1001", "1 … 1000"),
    "huge": (f"train.epochs={10**30}", "1 … 1000"),
    "very long": ("train.epochs=" + "9" * 5000, "train.epochs"),
    "text for float": ("train.lr=fast", "expected float"),
    "bool for float": ("train.lr=yes", "expected float"),
    "NaN": ("train.lr=.nan", "train.lr = nan"),
    "infinity": ("train.lr=.inf", "train.lr = inf"),
    "too large for a float": ("train.lr=1e999", "train.lr"),
    "huge integer for float": (f"train.lr={10**400}", "train.lr"),
    "float out of range": ("train.lr=-0.1", "train.lr = -0.1"),
    "text for bool": ("train.flip=maybe", "expected bool"),
    "int for bool": ("train.flip=1", "train.flip = 1"),
    "wrong choice": ("train.augment=lots", "'light'"),
    "choice in capitals": ("train.augment=Light", "'light'"),
    "empty choice": ("train.augment=", "'light'"),
    "negative seed": ("train.seed=-1", "train.seed = -1"),
    "seed beyond 32 bits": (f"audit.seed={2**32}", "audit.seed"),
    "a network that timm has not": ("train.backbone=resnet43", "timm has no such model. Did you mean 'resnet34'?"),
}
BOMB = "a: &a [x, x]\nb0: &b0 [*a, *a]\n" + "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 26)) + "train: {epochs: *b25}"
# recipes, and what the message has to name
WRONG_RECIPES = {
    "unknown name in a section": ("train: {epoch: 3}", "Did you mean 'epochs'?"),
    "unknown section": ("trian: {epochs: 3}", "Did you mean 'train'?"),
    "parameter outside its section": ("epochs: 3", "epochs"),
    "duplicate key": ("train: {epochs: 3, epochs: 4}", "'epochs' is given twice"),
    "duplicate section": ("train: {epochs: 3}\ntrain: {lr: .1}", "'train' is given twice"),
    "wrong type of the shared seed": ("seed: many", "audit.seed"),
    "wrong type in YAML 1.1": ("train: {flip: 'no'}", "expected bool"),
    "sexagesimal": ("train: {epochs: '1:30'}", "train.epochs"),
    "nested where flat": ("train: {lr: {peak: .1}}", "train.lr"),
    "list where a section belongs": ("train: [epochs]", "'train' has to be a mapping"),
    "value where a section belongs": ("train: 3", "'train' has to be a mapping"),
    "a list": ("- train", "holds no sections"),
    "a word": ("train", "holds no sections"),
    "not closed": ("train: [", "is not YAML"),
    "tab": ("train:\n\tepochs: 3", "is not YAML"),
    "a Python object": ("train: {epochs: !!python/object/apply:os.getcwd []}", "is not YAML"),
    "unhashable key": ("? [train]\n: 3", "r.yaml"),
    "a date that does not exist": ("train: {epochs: 2026-13-41}", "r.yaml"),
    "two documents": ("train: {epochs: 3}\n---\ntrain: {epochs: 4}", "is not YAML"),
    "nested a thousand deep": ("train: " + "[" * 3000 + "]" * 3000, "r.yaml"),
    "repeated without end": (BOMB, "r.yaml"),
    "not text": (b"train: {epochs: \xff\xfe}", "is not YAML"),
    "NUL byte": ("train: {epochs: 3\0}", "is not YAML"),
    "run directory in a recipe": ("train: {run: elsewhere}", "Use --run DIR"),
}


def refuse(monkeypatch, capsys, *args: object) -> str:
    "Call the command line, see it refuse, and give what it said."
    monkeypatch.setattr(sys, "argv", ["cvnb", "run", *map(str, args)])
    with pytest.raises(SystemExit) as end: cli.main()
    out = capsys.readouterr()
    assert end.value.code == 2 and not out.out and "Traceback" not in out.err
    assert len(out.err.splitlines()) == 1 and len(out.err) < 1000
    return out.err


@pytest.mark.parametrize("kind", WRONG_SETS)
def test_a_wrong_parameter_is_refused(monkeypatch, capsys, tmp_path, kind):
    text, named = WRONG_SETS[kind]
    assert named in refuse(monkeypatch, capsys, "--run", tmp_path/"run", "--set", text)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("kind", WRONG_RECIPES)
def test_a_wrong_recipe_is_refused(monkeypatch, capsys, tmp_path, kind):
    text, named = WRONG_RECIPES[kind]
    (tmp_path/"r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert named in refuse(monkeypatch, capsys, "--run", tmp_path/"run", "--config", tmp_path/"r.yaml")
    assert not (tmp_path/"run").exists()


def valid(p) -> list:
    "Values that a parameter has to take: its default, its bounds, each choice."
    kind = next((a for a in typing.get_args(p.type) if a is not type(None)), p.type) if typing.get_origin(p.type) is typing.Union else p.type
    if typing.get_origin(kind) is typing.Literal: return [*typing.get_args(kind)]
    if kind is bool: return [True, False]
    bounds = [b for b in (p.low, p.high) if b is not None and math.isfinite(b)]
    if kind is int: return [p.default, *map(int, bounds)]
    if kind is float: return [p.default, *map(float, bounds), *(int(b) for b in bounds if b == int(b))]
    return [p.default]


@pytest.mark.parametrize("stage,p", PARAMS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_no_valid_value_is_refused(tmp_path, stage, p):
    for value in valid(p):
        read = Path(value) if p.type is Path else value
        assert check(KNOWN[stage], {p.name: value})[p.name] == read
        typed = value if isinstance(value, str) else str(value) if p.type is Path else json.dumps(value)
        assert parse_set(f"{stage}.{p.name}={typed}", KNOWN) == (stage, p.name, read)
        (tmp_path/"r.yaml").write_text(yaml.safe_dump({stage: {p.name: value}}))
        assert read_recipe(tmp_path/"r.yaml", KNOWN) == {stage: {p.name: read}}


def test_enough_kinds_are_refused():
    assert len(WRONG_SETS) + len(WRONG_RECIPES) >= 50


def test_an_empty_section_and_an_empty_recipe_are_fine(tmp_path):
    for text in "", "train:\n", "# nothing\n": (tmp_path/"r.yaml").write_text(text); assert read_recipe(tmp_path/"r.yaml", KNOWN) == {}


def notebook(folder: Path, *cells: tuple[str, list[str]], needs: str = "") -> Path:
    "Write a stage notebook in a project of its own."
    path = folder/"nbs/stages/one.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    code = [nbf.v4.new_code_cell(source, metadata=dict(tags=tags)) for source, tags in cells]
    nbf.write(nbf.v4.new_notebook(cells=[nbf.v4.new_markdown_cell(f"# One\n\n> A stage.\n\n- needs: [{needs}]"), *code]), path)
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
}


@pytest.mark.parametrize("kind", WRONG_CELLS)
def test_a_notebook_without_a_contract_is_refused(monkeypatch, capsys, tmp_path, kind):
    notebook(tmp_path, *WRONG_CELLS[kind])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cvnb", "run"])
    with pytest.raises(SystemExit) as end: cli.main()
    said = capsys.readouterr().err
    assert end.value.code in (1, 2) and "one" in said and len(said.splitlines()) == 1 and not (tmp_path/"runs").exists()


def test_the_cell_is_never_executed(tmp_path):
    path = notebook(tmp_path, (f"n: int = open({str(tmp_path/'proof')!r}, 'w').write('x')", ["parameters"]))
    with pytest.raises(CvnbError): read_contract(path)
    assert not (tmp_path/"proof").exists()


def test_every_type_of_the_list(tmp_path):
    cell = ('a: int = 1\nb: float = 1.5\nc: str = "x"\nd: bool = True\ne: Path = "x"\nf: Literal["u", "v"] = "u"\ng: Optional[int] = None\n'
            'h: list[str] = ["x"]\ni: int | None = None')
    c = read_contract(notebook(tmp_path, (cell, ["parameters"])))
    good = dict(a=2, b=2, c="y", d=False, e="y", f="v", g=3, h=["y", "z"], i=None)
    assert check(c, good) == good | dict(b=2.0, e=Path("y"))
    bad = dict(a="2", b="two", c=3, d=0, e=3, f="w", g="3", h=[1], i=1.5)
    for name, value in bad.items():
        with pytest.raises(UsageError, match=f"one.{name} = "): check(c, {name: value})


def test_every_network_of_timm_is_known(monkeypatch):
    from timm.models import _registry
    assert timm_names() == set(_registry._model_entrypoints)   # the deprecated ones, too
    own = Contract("train", Path("train.ipynb"), params=[Param("backbone", str, "resnet18", "a network of mine")])
    assert check(own, dict(backbone="mine")) == dict(backbone="mine")
    monkeypatch.setattr(params, "find_spec", lambda name: None)   # where timm is not installed, nobody can say
    timm_names.cache_clear()
    assert timm_names() == frozenset() and check(KNOWN["train"], dict(backbone="mine"))
    timm_names.cache_clear()


def test_layers_and_where_each_value_came_from(monkeypatch, capsys, tmp_path):
    notebook(tmp_path, ('run: str = "runs/x"\na: int = 1\nb: int = 1\nc: int = 1', ["parameters"]), ("from cvnb.pipeline.params import open_stage", []),
             ('stage = open_stage("one", globals())', []), ("stage.finish()", []))
    (tmp_path/"r.yaml").write_text("one: {<<: {b: 2}, c: 2}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["cvnb", "run", "--config", "r.yaml", "--set", "one.c=3", "--json"])
    with pytest.raises(SystemExit) as end: cli.main()
    assert not end.value.code, capsys.readouterr().err
    run = json.loads((tmp_path/"runs/r/run.json").read_text())
    assert {k: run["params"]["one"][k] for k in "abc"} == dict(a=1, b=2, c=3)
    assert {k: run["origins"]["one"][k] for k in "abc"} == dict(a="the notebook", b="r.yaml", c="--set")
    assert json.loads((tmp_path/"runs/r/one/stage.json").read_text())["params"] | dict(run="") == dict(run="", a=1, b=2, c=3)


def test_completion_goes_through_every_parameter():
    from cvnb.pipeline.params import completions
    names = {c for stage in KNOWN for c, _ in completions(f"{stage}.", KNOWN)}
    assert names == {f"{stage}.{p.name}=" for stage, p in PARAMS}
    for stage, p in PARAMS:
        for value, _ in completions(f"{stage}.{p.name}=", KNOWN): assert parse_set(value, KNOWN)[:2] == (stage, p.name)
