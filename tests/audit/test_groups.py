"""Groups: rules are applied or refused, and series are suggested by their evidence alone."""
from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvnb.audit import groups as rules
from cvnb.audit.groups import assign_groups, check_group_rule, check_group_splits, sibling_evidence, suggest_groups
from cvnb.audit.privacy import read_metadata
from cvnb.core.errors import UsageError

SEED = 0


def series(names: str = "{label}/{group}_exp{k}.png", scale: float = 0.3, n_groups: int = 60) -> tuple:
    "Make a table of series of four images in two classes, and embeddings in which siblings are close."
    rng = np.random.default_rng(SEED)
    rows, x = [], []
    for g in range(n_groups):
        centre = rng.normal(size=24)
        for k in range(4):
            label = "ab"[g % 2]
            path = names.format(label=label, group=f"tile{g:03d}", k=k, i=g * 4 + k)
            rows.append(dict(path=path, label=label, ok=True, private="", camera="", true=f"tile{g:03d}"))
            x.append(centre + scale * rng.normal(size=24))
    table = pd.DataFrame(rows)
    return table.assign(split=rng.choice(["train", "train", "val", "test"], len(table))), np.float32(x)


def same(a: pd.Series, b: pd.Series) -> bool:
    "Say whether two columns group the rows alike."
    return (pd.factorize(a)[0] == pd.factorize(b)[0]).all()


@pytest.mark.parametrize(("names", "name"), [
    ("{label}/{group}_exp{k}.png", "file name without its last number"),
    ("{label}/{group} ({k}).jpg", "file name without its last number"),
    ("{label}/{group}left{k}b.jpg", "file name up to its first number"),
    ("{label}/{group}-{k}-x.jpg", "first part of the file name"),
    ("{label}/{group}_jpg.rf.0{k}ab.jpg", "file name before .rf."),
    ("{label}/{group}/{k}.png", "folder")])
def test_series_are_suggested_with_a_rule_that_makes_the_same_groups(names, name):
    table, x = series(names)
    found = suggest_groups(table, x, "", "my data")
    assert found.best is not None and same(found.best.groups, table.true), found.table.to_string()
    named = rules.NAME_GROUPS.get(name, "([^/]+)/[^/]+$")
    assert same(assign_groups(table, named, "")[0].group, table.true)
    grouped, notes = assign_groups(table, found.best.rule, "")
    assert same(grouped.group, table.true) and not notes
    assert "cvnb data split 'my data' --anew --group" in suggest_groups(table, x, "", "my data", given=True).note
    assert "cvnb data split 'my data' --group" in found.note and "\n" not in found.note
    assert all(a in set(table.path[table.split == "test"]) and b in set(table.path[table.split == "train"])
               for a, b in found.pairs)


def test_a_column_of_the_table_is_suggested_by_its_name():
    table, x = series("{label}/{i:05d}.png")
    table = table.sample(frac=1, random_state=1).rename(columns=dict(true="meta_patient"))
    found = suggest_groups(table, x[table.index], "")
    assert found.best.rule == "patient" and same(assign_groups(table, "patient", "")[0].group, table.meta_patient)


def test_names_without_evidence_are_silent():
    table, _ = series()
    x = np.random.default_rng(1).normal(size=(len(table), 24)).astype(np.float32)
    found = suggest_groups(table, x, "")
    assert found.best is None and found.note == ""
    assert found.table.verdict[0] == "siblings are not alike"


def test_series_that_the_splits_keep_together_are_silent():
    table, x = series()
    split = {name: ["train", "train", "test"][i % 3] for i, name in enumerate(sorted(set(table.true)))}
    found = suggest_groups(table.assign(split=table.true.map(split)), x, "")
    assert found.best is None and found.table.verdict[0] == "splits keep them together"


def test_names_that_are_the_class_are_silent():
    table, _ = series()
    x = np.random.default_rng(1).normal(size=(len(table), 24)) + 3 * (table.label == "a").to_numpy()[:, None]
    numbers = np.random.default_rng(2).permutation(99_999)
    table["path"] = [f"{label}/{label}_{number}.png" for label, number in zip(table.label, numbers)]
    assert suggest_groups(table, np.float32(x), "").best is None


def test_series_without_telling_names_are_found_as_clusters():
    table, x = series(scale=0.05)
    numbers = np.random.default_rng(3).permutation(9999)
    table["path"] = [f"{label}/{number:06d}.png" for number, label in zip(numbers, table.label)]
    found = suggest_groups(table, x, "")
    assert found.best.name == "clusters of embeddings" and same(found.best.groups, table.true)
    assert "suggested_group" in found.note


def test_noise_has_no_clusters():
    assert (rules.cluster_groups(np.random.default_rng(0).normal(size=(500, 24)).astype(np.float32)) != "").mean() < 0.1
    assert (rules.cluster_groups(np.zeros((2, 3), np.float32)) == "").all()


def test_a_person_who_shows_each_class_once_is_a_round_of_numbers():
    rng = np.random.default_rng(0)
    classes = rng.normal(size=(5, 24)) * 2
    rows, x = [], []
    for person in range(60):
        own = rng.normal(size=24)
        for k in range(5):
            number = person * 5 + k + 1000 + 7 * (person > 30)
            rows.append(dict(path=f"{k}/IMG_{number}.jpg", label=str(k), private="", camera="", true=f"p{person}"))
            x.append(classes[k] + own + 0.3 * rng.normal(size=24))
    table = pd.DataFrame(rows)
    table["split"] = rng.choice(["train", "train", "test"], len(table))
    found = suggest_groups(table, np.float32(x), "")
    assert found.best.rule == "rounds" and same(found.best.groups, table.true)
    assert "this is no gain" in found.note   # the siblings are of other classes


def test_evidence_of_random_groups_is_chance():
    "In 40 draws, the interval of `alike` misses one half about as often as it may."
    table, x = series()
    everything = np.ones(len(table), bool)
    missed = 0
    for seed in range(40):
        groups = pd.Series(np.random.default_rng(seed).permutation(table.true))
        found = sibling_evidence(x, table.label, groups, everything, everything, seed)
        missed += not found.alike.low <= 0.5 <= found.alike.high
    assert missed <= 6


def test_exif_dates_make_groups_by_camera_and_day(tmp_path):
    rows = []
    for i in range(6):
        exif = Image.Exif()
        exif[0x0110] = "cam"
        exif.get_ifd(0x8769)[0x9003] = f"2024:05:{1 + i // 2:02d} 10:0{i}:00"
        Image.new("RGB", (8, 8)).save(tmp_path/f"{i}.jpg", exif=exif)
        rows.append(dict(path=f"{i}.jpg", label="ab"[i % 2], ok=True))
    Image.new("RGB", (8, 8)).save(tmp_path/"6.jpg")
    table = read_metadata(tmp_path, pd.DataFrame([*rows, dict(path="6.jpg", label="a", ok=True)]))
    grouped, notes = assign_groups(table, "date", tmp_path)
    assert grouped.group.tolist() == [*np.repeat([f"cam 2024:05:0{d}" for d in (1, 2, 3)], 2), ""]
    assert notes == ["1 of 7 images have no group by date: each stands alone"]


@pytest.mark.parametrize(("rule", "message"), [
    ("", "is empty"), ("(a", "is no regular expression"), ("(a)(b)", "2 capturing groups"), ("tile[0-9]+", "no column"),
    ("(nothing)", "none of 240 images"), ("(tile)", "one group, 'tile'"), ("(.*)", "a group of its own"),
    ("(.*)/", "one group of each class"), ("folder", "one group of each class"), ("camera", "none of 240 images"),
    ("patiant", "Did you mean 'patient'")])
def test_a_faulty_rule_gets_one_line_with_the_remedy(rule, message):
    table, _ = series()
    table = table.assign(meta_patient=table.true)
    with pytest.raises(UsageError) as e: assign_groups(table, rule, "")
    assert message in str(e.value) and "\n" not in str(e.value) and e.value.remedy
    if rule != "camera":
        with pytest.raises(UsageError): check_group_rule(table.drop(columns=["camera", "private", "ok"]), rule)


def test_groups_that_leave_a_split_empty_are_refused():
    table, _ = series()
    grouped = assign_groups(table, r"/(tile\d+)", "")[0]
    with pytest.raises(UsageError, match="leaves the split test empty: 60 groups, of which the largest has 4 of 240"):
        check_group_splits(grouped.assign(split="train"), "x", test=0.15)
    check_group_splits(grouped.assign(split="train"), "x", test=0)
    check_group_splits(grouped, "x", val=0.15, test=0.15)


def test_a_rule_replaces_the_column_group_and_says_so():
    table, _ = series()
    grouped, notes = assign_groups(table.assign(group="old"), r"/(tile\d+)", Path())
    assert same(grouped.group, table.true) and notes == ["groups replace the column group of the table"]
    assert assign_groups(table.assign(group=table.true), "group", "")[1] == []
    assert "group" not in assign_groups(table, "auto", "")[0]


def test_a_class_of_one_group_is_named():
    table, _ = series()
    table.loc[table.label == "b", "path"] = "b/same_" + table.path.str[-5:]
    notes = assign_groups(table, r"/([a-z]+\d*)_", "")[1]
    assert notes == ["all images of b are of one group, which splits cannot divide"]


def test_the_plot_of_nothing_is_a_sentence():
    table, x = series()
    found = suggest_groups(table, x, "")
    assert replace(found, best=None).plot("") == "None is shown."


def test_a_column_with_brackets_in_its_name_is_no_regular_expression():
    table, _ = series()
    named = table.assign(**{"meta_patient (id)": table.true})
    assert same(assign_groups(named, "patient (id)", "")[0].group, table.true)


def test_a_measured_number_is_no_group():
    table, x = series("{label}/{i:05d}.png")
    table = table.sample(frac=1, random_state=1).drop(columns="true").assign(meta_age=np.repeat(np.arange(60.0), 4))
    assert suggest_groups(table, np.random.default_rng(0).normal(size=x.shape).astype(np.float32), "").best is None
    assert "age in the table" not in set(suggest_groups(table, x, "").table.siblings_by)
