"""`--set` and recipes: wrong ones are refused before anything starts, and no valid one is."""
from __future__ import annotations

import json
import math
import sys
import typing
from pathlib import Path

import pytest
import yaml

from cvnb.cli import app as cli
from cvnb.pipeline.params import Param, check_parameters, read_contracts
from cvnb.pipeline.recipes import complete_set_option, parse_set_option, read_recipe

KNOWN = read_contracts()
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
    "unknown timm model": ("train.backbone=resnet43", "timm has no such model. Did you mean 'resnet34'?"),
}
LEVELS = "".join(f"b{i}: &b{i} [*b{i - 1}, *b{i - 1}]\n" for i in range(1, 26))
BOMB = "a: &a [x, x]\nb0: &b0 [*a, *a]\n" + LEVELS + "train: {epochs: *b25}"
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
    "Call the command line, check that it refuses, and return its message."
    monkeypatch.setattr(sys, "argv", ["cvnb", "run", *map(str, args)])
    with pytest.raises(SystemExit) as end: cli.main()
    out = capsys.readouterr()
    assert end.value.code == 2 and not out.out and "Traceback" not in out.err
    assert len(out.err.splitlines()) == 1 and len(out.err) < 1000
    return out.err


@pytest.mark.parametrize("kind", WRONG_SETS)
def test_wrong_set_option_is_refused(monkeypatch, capsys, tmp_path, kind):
    text, named = WRONG_SETS[kind]
    assert named in refuse(monkeypatch, capsys, "--run", tmp_path/"run", "--set", text)
    assert not (tmp_path/"run").exists()


@pytest.mark.parametrize("kind", WRONG_RECIPES)
def test_wrong_recipe_is_refused(monkeypatch, capsys, tmp_path, kind):
    text, named = WRONG_RECIPES[kind]
    (tmp_path/"r.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert named in refuse(monkeypatch, capsys, "--run", tmp_path/"run", "--config", tmp_path/"r.yaml")
    assert not (tmp_path/"run").exists()


def test_recipe_faults_are_at_least_fifty():
    assert len(WRONG_SETS) + len(WRONG_RECIPES) >= 50


def valid_values(p: Param) -> list:
    "List values that a parameter has to accept: its default, its bounds, each choice."
    if typing.get_origin(p.base_type) is typing.Literal: return [*typing.get_args(p.base_type)]
    if p.base_type is bool: return [True, False]
    bounds = [b for b in (p.low, p.high) if b is not None and math.isfinite(b)]
    if p.base_type is int: return [p.default, *map(int, bounds)]
    if p.base_type is float: return [p.default, *map(float, bounds), *(int(b) for b in bounds if b == int(b))]
    return [p.default]


@pytest.mark.parametrize("stage,p", PARAMS, ids=lambda x: x if isinstance(x, str) else x.name)
def test_every_valid_value_is_accepted(tmp_path, stage, p):
    for value in valid_values(p):
        read = Path(value) if p.type is Path else value
        assert check_parameters(KNOWN[stage], {p.name: value})[p.name] == read
        typed = value if isinstance(value, str) else str(value) if p.type is Path else json.dumps(value)
        assert parse_set_option(f"{stage}.{p.name}={typed}", KNOWN) == (stage, p.name, read)
        (tmp_path/"r.yaml").write_text(yaml.safe_dump({stage: {p.name: value}}))
        assert read_recipe(tmp_path/"r.yaml", KNOWN) == {stage: {p.name: read}}


@pytest.mark.parametrize("text", ["", "train:\n", "# nothing\n"])
def test_empty_sections_are_accepted(tmp_path, text):
    (tmp_path/"r.yaml").write_text(text)
    assert read_recipe(tmp_path/"r.yaml", KNOWN) == {}


def test_completion_offers_every_parameter():
    names = {c for stage in KNOWN for c, _ in complete_set_option(f"{stage}.", KNOWN)}
    assert names == {f"{stage}.{p.name}=" for stage, p in PARAMS}
    for stage, p in PARAMS:
        for value, _ in complete_set_option(f"{stage}.{p.name}=", KNOWN):
            assert parse_set_option(value, KNOWN)[:2] == (stage, p.name)
