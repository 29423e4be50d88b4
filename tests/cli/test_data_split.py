"""`cvnb data split --group`: groups stay in one split, and a faulty rule is refused before anything is written."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image
from typer.testing import CliRunner

from cvnb.cli.data import data_app
from cvnb.core.errors import UsageError

RULE = r"([^/]*?)_exp[0-9]+"


@pytest.fixture
def tiles(tmp_path: Path) -> Path:
    "Write 2 x 20 series of 3 images, with splits that tear the series apart."
    rng = np.random.default_rng(0)
    for i in range(40):
        for k, split in enumerate(("train", "val", "test")):
            path = tmp_path/"tiles"/split/"ab"[i % 2]/f"t{i:02d}_exp{k}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(path)
    return tmp_path/"tiles"


def split(*args: object) -> str:
    return CliRunner().invoke(data_app, ["split", *map(str, args)], catch_exceptions=False).stdout


def test_groups_stay_in_one_split_and_splits_that_are_given_stay_unless_made_anew(tiles, tmp_path):
    said = split(tiles, "--group", RULE, "--anew", "--out", tmp_path/"anew.csv")
    table = pd.read_csv(tmp_path/"anew.csv")
    assert table.group.nunique() == 40 and (table.groupby("group").split.nunique() == 1).all()
    assert set(table.split) == {"train", "val", "test"} and "! 40 groups of 3 to 3 images" in said
    said = split(tiles, "--group", RULE, "--out", tmp_path/"given.csv")
    assert "40 groups are in several splits, which the data gives (--anew makes other splits)" in said
    assert (pd.read_csv(tmp_path/"given.csv").groupby("group").split.nunique() == 3).all()
    split(tmp_path/"given.csv", "--group", "group", "--anew", "--out", tmp_path/"column.csv")
    columns = ["label", "split", "group"]
    assert pd.read_csv(tmp_path/"column.csv")[columns].equals(table[columns])


@pytest.mark.parametrize(("rule", "message"), [
    ("(zzz)", "none of 120 images a group"), ("(.*)", "a group of its own"), ("(t)[0-9]", "into one group"),
    ("/([ab])/", "one group of each class"), ("(t[0-9]", "no regular expression"), ("t[0-9]", "no column of the data"),
    ("auto", "is of the audit"), ("(t0|t)", "leaves the split val empty: 2 groups"), ("camera", "none of 120 images")])
def test_a_faulty_rule_writes_nothing(tiles, tmp_path, rule, message):
    with pytest.raises(UsageError, match=".") as e: split(tiles, "--group", rule, "--anew", "--out", tmp_path/"x.csv")
    assert message in str(e.value) and not (tmp_path/"x.csv").exists()
