"""What the key of a stage depends on, and a stage whose input was written again: each in milliseconds."""
from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from cvnb.core.stage import PENDING_MANIFEST, Stage, stage_key
from cvnb.pipeline.freshness import key_parts, stale_reasons
from cvnb.pipeline.params import Contract, read_contracts

PARTS = dict(code="c", functions={"core.files.digest": "f"}, params=dict(epochs=2), files={}, data="d", lock="l")


def test_key_of_a_stage_depends_on_every_part_and_on_its_inputs() -> None:
    inputs = {"audit/manifest.parquet": "1"}
    changed = [PARTS | {name: "other"} for name in PARTS]
    keys = [stage_key(PARTS, inputs), stage_key(PARTS, {}), stage_key(PARTS, {"audit/manifest.parquet": "2"}),
            *(stage_key(parts, inputs) for parts in changed)]
    assert len(set(keys)) == len(keys) and stage_key(PARTS, dict(inputs)) == keys[0]


def test_parts_of_a_key_hold_parameters_lock_and_functions(tmp_path: Path) -> None:
    contract = read_contracts()["train"]
    (tmp_path/"requirements.lock").write_text("torch==2.8.0")
    params = contract.defaults()
    parts = key_parts(contract, params, tmp_path)
    assert parts["params"].keys() == params.keys() - {"run"} and parts["params"]["epochs"] == params["epochs"]
    assert parts["functions"]["training.fit.fit"] and parts["functions"]["data.splits.read_splits"]
    differing = lambda other: [name for name in parts if parts[name] != other[name]]
    assert differing(key_parts(contract, params, tmp_path)) == []
    assert differing(key_parts(contract, params | dict(epochs=99), tmp_path)) == ["params"]
    (tmp_path/"requirements.lock").write_text("torch==2.9.0")
    assert differing(key_parts(contract, params, tmp_path)) == ["lock"]


def finish(stage: Stage, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    "Write an output and the manifest, as in a pipeline."
    monkeypatch.setenv("CVNB_KEY_PARTS", json.dumps(PARTS))
    stage.path("a.txt").write_text(content)
    stage.finish()
    os.replace(stage.dir/PENDING_MANIFEST, stage.dir/"stage.json")


def test_input_that_was_written_again_makes_a_stage_stale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(Stage("first", tmp_path), "one", monkeypatch)
    second = Stage("second", tmp_path)
    second.input("first", "a.txt")
    finish(second, "result", monkeypatch)
    contract = Contract("second", tmp_path/"second.ipynb", params=[])
    assert stale_reasons(tmp_path, contract, PARTS) == []
    finish(Stage("first", tmp_path), "one", monkeypatch)   # the same content
    assert stale_reasons(tmp_path, contract, PARTS) == []
    finish(Stage("first", tmp_path), "two", monkeypatch)
    assert stale_reasons(tmp_path, contract, PARTS) == ["input first/a.txt changed"]
