"""Planted slices are found by images that did not choose them, and chance is no slice."""
from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from cvnb.core.errors import CvnbError
from cvnb.core.files import write_json
from cvnb.core.stage import Stage
from cvnb.data.tables import write_table
from cvnb.evaluate.dashboard_data import dashboard_page, read_dashboard_data
from cvnb.evaluate.errors import slice_accuracy
from cvnb.evaluate.slices import SliceRule, candidate_slices, find_slices, slice_table
from dashboards import make_run

N = 1500


def make_table(seed: int, gap: float, groups: bool = False) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    "Draw predictions that are wrong more often for the dark dogs of one camera."
    rng = np.random.default_rng(seed)
    vectors = rng.normal(size=(N, 16)).astype(np.float32)
    table = pd.DataFrame(dict(
        path=[f"{i:04}.png" for i in range(N)], label=rng.choice(["cat", "dog"], N), width=24, height=24,
        brightness=rng.uniform(0, 255, N), contrast=rng.uniform(0, 60, N), tags=[[]] * N,
        meta_camera=rng.choice(["A", "B", "C", "<b>D</b>"], N), confidence=rng.uniform(0.5, 1, N)))
    weak = (table.label == "dog").to_numpy() & (table.meta_camera == "<b>D</b>").to_numpy()
    error = rng.random(N)
    if groups:
        table["group"] = np.arange(N) // 15
        error = np.random.default_rng(seed).random(N // 15)[np.arange(N) // 15]   # a whole group is right or wrong
    correct = error > np.where(weak, 0.1 + gap, 0.1)
    other = np.where(table.label == "dog", "cat", "dog")
    return table.assign(correct=correct, predicted=np.where(correct, table.label, other)), vectors, weak


def test_planted_slice_is_found_named_and_measured() -> None:
    table, vectors, weak = make_table(0, 0.3)
    found = find_slices(table, vectors)
    row = found.rows.iloc[0]
    assert row["name"] == "dog, camera <b>D</b>" and row.q <= 0.1 and (found.masks[:, 0] == weak).mean() > 0.9
    assert row.low <= table.correct[weak].mean() <= row.high and row.gap > 0.2
    whole = slice_table(slice_accuracy(table), found, table)
    assert set(whole.members[0]) == set(table.path[found.masks[:, 0]]) and whole.slice[0] == "found"
    rules = [SliceRule.from_json(json.loads(json.dumps(row["rule"]))) for row in found.to_json()]
    assert (rules[0].mask(table, vectors) == weak).all()


def test_no_planted_slice_gives_no_false_alarm() -> None:
    alarms = sum(len(find_slices(*make_table(seed, 0.0)[:2]).rows) > 0 for seed in range(12))
    assert alarms <= 3   # one in ten is allowed


def test_errors_of_whole_groups_are_no_slices() -> None:
    alarms = sum(len(find_slices(*make_table(seed, 0.0, groups=True)[:2]).rows) > 0 for seed in range(8))
    assert alarms <= 2


def test_candidates_do_not_depend_on_predictions() -> None:
    table, vectors, _ = make_table(0, 0.3)
    right = table.assign(correct=True, predicted=table.label, confidence=0.9)
    assert (candidate_slices(table, vectors).masks == candidate_slices(right, vectors).masks).all()


@pytest.mark.parametrize("n", [1, 2, 60])
def test_few_images_have_no_slices(n: int) -> None:
    table, vectors, _ = make_table(0, 0.3)
    found = find_slices(table[:n], vectors[:n])
    assert found.rows.empty and found.masks.shape == (n, 0) and "no slice" in found.words


def test_a_thousand_classes_and_equal_embeddings() -> None:
    table, vectors, _ = make_table(1, 0.0)
    table["label"] = [f"c{i % 1000}" for i in range(N)]
    assert find_slices(table, np.zeros_like(vectors)).rows.empty
    assert find_slices(table, None).rows.empty


def test_missing_properties_are_no_conditions() -> None:
    table, vectors, _ = make_table(0, 0.3)
    bare = table.assign(brightness=np.nan, camera=None, blurry=np.nan, format=None)
    assert not find_slices(bare, vectors).rows.empty
    with pytest.raises(CvnbError, match="sharpness"): SliceRule(column="sharpness", low=1.0).mask(table, vectors)


def test_dashboard_filters_by_a_found_slice(tmp_path) -> None:
    run = make_run(tmp_path)
    table = read_dashboard_data(run).table.query("split == 'test'").reset_index(drop=True)
    found = find_slices(*make_table(0, 0.3)[:2])
    stage = Stage("errors", run)
    rows = slice_table(slice_accuracy(table), found, make_table(0, 0.3)[0])
    members = table.path[:9].tolist()
    rows.loc[0, "members"] = None
    rows.at[0, "members"] = members
    write_table(stage.path("slices.parquet"), rows)
    write_json(stage.path("errors.json"), dict(format=1, split="test", mistakes=[], found_slices=found.to_json()))
    stage.finish()
    data = read_dashboard_data(run)
    page, block = dashboard_page(data)
    first = page["slices"][0]
    assert first["kind"] == "found" and first["name"] == "dog, camera <b>D</b>"
    kind, offset, size = page["layout"]["members"]
    bits = np.frombuffer(block, np.uint8, size, offset)[first["offset"]:first["offset"] + -(-len(data.table) // 8)]
    inside = np.unpackbits(bits, bitorder="little")[:len(data.table)].astype(bool)
    assert sorted(data.table.path[inside]) == members
