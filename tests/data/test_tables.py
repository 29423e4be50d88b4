"""Folders of classes and tables: what is read, and what a user can get wrong."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvnb.core.errors import UsageError
from cvnb.data.dataset import data_root, describe_dataset, scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.listing import list_images
from cvnb.data.sources import open_dataset
from cvnb.data.tables import read_table

CVNB = Path(sys.executable).with_name("cvnb")


def save_image(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("L", (8, 8)).save(path)


# Folders


@pytest.mark.parametrize("name, what, remedy", [
    ("absent/folder", "absent/folder does not exist", "--data"),
    ("empty", "empty is empty", "one sub-folder per class"),
    ("text", "text has no images (1 .txt files", "Known endings: .apng"),
    ("one", "one has one class (cat)", "one sub-folder per class"),
    ("flat", "flat has no labels", "Write a table with the columns path and label"),
    ("flat/a.png", "a.png is a file", "one sub-folder per class"),
])
def test_unusable_folder_is_refused_with_a_remedy(name, what, remedy, tmp_path, cache):
    (tmp_path/"empty").mkdir()
    (tmp_path/"text"/"cat").mkdir(parents=True)
    (tmp_path/"text"/"cat"/"a.txt").touch()
    save_image(tmp_path/"one"/"train"/"cat"/"a.png")
    save_image(tmp_path/"flat"/"a.png")
    with pytest.raises(UsageError) as e: open_dataset(tmp_path/name)
    assert what in e.value.what and remedy in e.value.remedy and e.value.exit_code == 2
    assert "\n" not in str(e.value) and not cache.exists()


@pytest.mark.parametrize("n, message", {
    "one class": (dict(cat=3), "one class (cat), and two are needed"),
    "case only": (dict(cat=2, Cat=2), "'Cat' and 'cat', which differ in case only"),
    "one class and an empty one": (dict(cat=3, dog=0), "one class (cat), and two are needed"),
}.values())
def test_folder_without_two_distinct_classes_is_refused(n, message, write_classes, tmp_path):
    with pytest.raises(UsageError) as e: open_dataset(write_classes(tmp_path/"data", **n))
    assert message in str(e.value)


NEAREST = {"cifar": "cifar10", "fashion_mnist": "fashion-mnist", "mnist": "mnist5k"}


@pytest.mark.parametrize("name, nearest", NEAREST.items())
def test_unknown_name_suggests_the_nearest(name, nearest, tmp_path, cache, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError) as e: open_dataset(name)
    assert str(e.value) == f"data '{name}' is neither a known name nor a folder. Did you mean '{nearest}'?"
    assert not cache.exists()


def test_list_images_follows_links_but_no_loops(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=2, dog=2)
    for name in "with space.png", "Ünïcode 猫.png", "line\nbreak.png": save_image(folder/"cat"/name)
    (folder/"cat/loop").symlink_to(folder)
    write_classes(tmp_path/"elsewhere", bird=2)
    (folder/"bird").symlink_to(tmp_path/"elsewhere/bird")
    found = list_images(folder)
    assert len(found) == 9 and not any("loop" in f for f in found)
    assert len([f for f in found if f.startswith("bird/")]) == 2
    assert inspect_images(folder, scan_dataset(folder)).ok.all()


def test_describe_dataset_notes_possible_mistakes(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=30, dog=1, bird=0)
    (folder/"cat/notes.txt").write_text("x")
    save_image(folder/"stray.png")
    notes = " | ".join(describe_dataset(folder)["notes"])
    parts = ("single image", "dog", "1 folders have no images: bird", "1 images are in no class's folder",
             "1 .txt files", "'cat' has 30")
    for part in parts: assert part in notes
    done = subprocess.run([CVNB, "data", "check", folder], capture_output=True, text=True)
    assert done.returncode == 0 and "31 images, 2 classes" in done.stdout and done.stdout.count("! ") == 5


# Tables


@pytest.fixture
def write_table(write_classes, tmp_path) -> Callable[..., Path]:
    "A function that writes a table of the images of two classes, changed in one way."
    folder = write_classes(tmp_path/"images", cat=6, dog=6)
    paths = list_images(folder)
    rows = [dict(path=f"images/{p}", label=p.split("/")[0], camera="ab"[i % 2]) for i, p in enumerate(paths)]

    def write(change: Callable[[pd.DataFrame], pd.DataFrame] = lambda t: t, name: str = "t.csv", **options) -> Path:
        table = change(pd.DataFrame(rows))
        if name.endswith("parquet"): table.to_parquet(tmp_path/name)
        else: table.to_csv(tmp_path/name, index=False, **options)
        return tmp_path/name
    return write


def test_tables_of_every_format_are_read_alike(write_table, tmp_path):
    plain = scan_dataset(write_table())
    assert list(plain.columns) == ["path", "label", "split", "meta_camera"] and len(plain) == 12
    assert scan_dataset(write_table(encoding="utf-8-sig")).equals(plain)
    assert scan_dataset(write_table(name="t.tsv", sep="\t")).equals(plain)
    assert scan_dataset(write_table(name="t.parquet")).equals(plain)
    absolute = write_table(lambda t: t.assign(path=[str(tmp_path/p) for p in t.path]))
    assert scan_dataset(absolute).label.equals(plain.label)


def test_labels_stay_text_and_splits_get_their_usual_names(write_table):
    assert set(scan_dataset(write_table(lambda t: t.assign(label=["007", "042"] * 6))).label) == {"007", "042"}
    splits = write_table(lambda t: t.assign(split=["Training", "valid", "test", ""] * 3))
    assert set(scan_dataset(splits).split) == {"train", "val", "test", ""}


def test_repeated_rows_and_missing_files_are_noted(write_table):
    twice = write_table(lambda t: pd.concat([t, t.head(3)]))
    assert len(scan_dataset(twice)) == 12 and "3 rows are repeated" in " ".join(describe_dataset(twice)["notes"])
    missing = write_table(lambda t: t.assign(path=["images/gone.png", *t.path[1:]]))
    inspected = inspect_images(data_root(missing), scan_dataset(missing))
    assert (~inspected.ok).sum() == 1 and "No such file" in inspected.error[0]
    assert "1 images are missing" in " ".join(describe_dataset(missing)["notes"])


BAD_TABLES = {
    "no path": (lambda t: t.drop(columns="path"), "has no column 'path'; it has label, camera"),
    "no label": (lambda t: t.drop(columns="label").assign(day="x"), "has no column 'label'"),
    "no rows": (lambda t: t.head(0), "has no rows"),
    "no label in any row": (lambda t: t.assign(label=""), "has no row with a label"),
    "an empty path": (lambda t: t.assign(path=["", *t.path[1:]]), "row 2 has no path"),
    "an unknown split": (lambda t: t.assign(split=["train"] * 11 + ["tset"]),
                         "row 13 has the split 'tset'. Did you mean 'test'"),
    "one class": (lambda t: t.assign(label="cat"), "has one class (cat)"),
    "another folder": (lambda t: t.assign(path="else/" + t.path + "x"), "12 of 12 images are missing, such as else/"),
    "case only": (lambda t: t.assign(label=["cat", "Cat"] * 6), "differ in case only"),
    "two labels": (lambda t: pd.concat([t, t.head(1).assign(label="dog", path="./" + t.path)]),
                   "1 images have two labels: images/cat/0-0.png ('cat', 'dog')"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_unusable_table_is_refused_with_its_fault(name, write_table):
    change, message = BAD_TABLES[name]
    with pytest.raises(UsageError) as e: open_dataset(write_table(change))
    assert message in str(e.value)


NO_TABLES = {"latin1.csv": "path,label\nä.png,x\n".encode("latin-1"), "no.parquet": b"PAR?",
             "binary.csv": bytes(range(256)), "ragged.csv": b"path,label\na,b\nc,d,e,f\n"}


@pytest.mark.parametrize("name, content", NO_TABLES.items())
def test_file_that_is_no_table_is_refused_without_traceback(name, content, tmp_path):
    (tmp_path/name).write_bytes(content)
    done = subprocess.run([CVNB, "data", "check", tmp_path/name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"cvnb: {tmp_path/name}") and "Traceback" not in done.stderr


def test_columns_of_any_type_become_text_or_numbers(write_classes, tmp_path):
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    names = [str(p) for p in sorted(folder.rglob("*.png"))]
    group = pd.array([1, None] * 3, "Int64")
    table = pd.DataFrame(dict(path=names, label=[Path(p).parent.name for p in names], box=[[1, 2]] * 6, group=group,
                              split=pd.Categorical(["train", None] * 3)))
    table.to_parquet(tmp_path/"x.parquet")
    read = read_table(tmp_path/"x.parquet")
    assert read.group.tolist() == ["1", ""] * 3 and read.split.tolist() == ["train", ""] * 3
    assert read.meta_box.nunique() == 1, "lists are written as text"
    note = ["1", "x", "", "", "", ""]
    patient = ["007"] + ["12"] * 4 + [""]
    columns = dict(age=["1", "", "3.5", "4", "", "6"], note=note, patient=patient)
    table[["path", "label"]].assign(**columns).to_csv(tmp_path/"x.csv", index=False)
    read = read_table(tmp_path/"x.csv")
    assert read.meta_age.isna().sum() == 2 and read.meta_age.max() == 6, "numbers with gaps stay numbers"
    assert read.meta_note.tolist() == note
    assert read.meta_patient.tolist() == patient, "007 is not a number"


def test_table_of_a_million_rows_is_described(tmp_path):
    for i in range(1000): (tmp_path/f"{i}.png").touch()
    names = (np.arange(1_000_000) % 1000).astype(str)
    rows = pd.DataFrame(dict(path=np.char.add(names, ".png"), label=names, person=np.arange(1_000_000)))
    rows.to_csv(tmp_path/"t.csv", index=False)
    found = describe_dataset(tmp_path/"t.csv")
    assert found["images"] == 1000 and len(found["classes"]) == 1000
    assert "999000 rows are repeated" in " ".join(found["notes"])
