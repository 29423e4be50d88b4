"""Tables as people have them: what is read and how that is said, and what is refused."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from cvnb.core.errors import UsageError
from cvnb.data.dataset import check_trainable, describe_dataset, read_dataset
from cvnb.data.paths import resolve_paths
from cvnb.data.tables import ImageTable, open_table, parse_table

CVNB = Path(sys.executable).with_name("cvnb")
NAMES = ["cat_0", "cat_1", "dog_0", "dog_1"]
ROWS = [(f"images/{name}.png", name[:3]) for name in NAMES]
LABELS = ["cat", "cat", "dog", "dog"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "A folder with four images of two classes in images/."
    (tmp_path/"images").mkdir()
    for i, name in enumerate(NAMES): Image.fromarray(np.full((4, 4), i, np.uint8)).save(tmp_path/f"images/{name}.png")
    return tmp_path


@pytest.fixture
def parse(folder: Path) -> Callable[..., ImageTable]:
    "A function that writes a table of text beside the images and reads it."
    def write_and_parse(text: str | bytes, name: str = "t.csv") -> ImageTable:
        (folder/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse_table(folder/name)
    return write_and_parse


def lines(template: str, header: str = "path,label") -> str:
    "Write a table of the four images: {path}, {name}, {label}."
    return f"{header}\n" + "".join(template.format(path=p, name=n, label=c) + "\n" for (p, c), n in zip(ROWS, NAMES))


PLAIN = lines("{path},{label}")
READ = {   # what a table looks like -> its content, part of a note
    "semicolons": (lines("{path};{label}", "path;label"), "the separator is ';'"),
    "tabs in .csv": (lines("{path}\t{label}", "path\tlabel"), "the separator is '\\t'"),
    "Excel's sep=": ("sep=;\n" + lines("{path};{label}", "path;label"), "the separator is ';'"),
    "a mark of UTF-8": (PLAIN.encode("utf-8-sig"), ""),
    "UTF-16": (PLAIN.encode("utf-16"), ""),
    "carriage returns": (PLAIN.replace("\n", "\r"), ""),
    "Windows line ends": (PLAIN.replace("\n", "\r\n"), ""),
    "comments": ("# of May\n" + PLAIN + "# end\n", "2 comment lines were skipped"),
    "no header": (PLAIN.partition("\n")[2], "the first line is a row"),
    "empty last column": (lines("{path},{label},", "path,label,"), ""),
    "rows with a trailing comma": (lines("{path},{label},"), ""),
    "an index of pandas": (",path,label\n" + "".join(f"{i},{p},{c}\n" for i, (p, c) in enumerate(ROWS)), ""),
    "capital names with spaces": (lines("{path}, {label}", "Path , Label"), ""),
    "usual names": (lines("{path},{label}", "filename,species"), ""),
    "a label of another name": (lines("{name},{label}", "id,breed"), "the column 'breed' is read as the label"),
    "one column per class": (lines("{path},{label}", "path, cat, dog").replace(",cat\n", ",1,0\n").replace(
        ",dog\n", ",0,1\n"), "2 columns hold one class each"),
    "quoted values": (lines('"{path}","{label}"'), ""),
    "NUL after the label": (lines("{path},{label}\0"), ""),
    "no-break spaces": (lines("{path},\u00a0{label}"), ""),
    "./ before the path": (lines("./{path},{label}"), ""),
    "backslashes": (lines("{path},{label}").replace("/", "\\"), "4 files are found after backslashes"),
    "a leading slash": (lines("/{path},{label}"), "4 files are found after backslashes"),
    "a space after the path": (lines("{path} ,{label}"), "4 files are found after"),
    "a path of Windows": (lines("C:\\data\\{path},{label}").replace("/", "\\"), "by the end of their paths"),
    "a path of another machine": (lines("/other/disk/{path},{label}"), "by the end of their paths"),
    "a file address": (lines("file:///other/disk/{path},{label}"), "by the end of their paths"),
    "another folder": (lines("imgs/{name}.png,{label}"), "by the end of their paths"),
    "names only": (lines("{name}.png,{label}"), "by the end of their paths"),
    "ids": (lines("{name},{label}"), "by their names without endings"),
    "capital endings": (lines("images/{name}.PNG,{label}"), "with another spelling of their paths"),
    "an upload of Label Studio": (lines("/data/upload/1/0a1b2c3d-{name}.png,{label}", "image,choice"),
                                  "without the prefix of an upload"),
}


@pytest.mark.parametrize("name", READ)
def test_table_is_read_and_what_was_assumed_is_said(name, parse):
    content, note = READ[name]
    found = parse(content)
    assert found.rows.label.tolist() == LABELS and found.rows.path.tolist() == [p for p, _ in ROWS]
    assert found.n_missing == 0 and note in " | ".join(found.notes)


REFUSED = {
    "Latin-1": (PLAIN.replace("dog", "Straße").encode("latin-1"), "not a table in UTF-8: line 4 has the byte 0xdf"),
    "an unclosed quotation mark": (PLAIN + '"images/dog_1.png,dog\n', "line 6 cannot be read"),
    "an unquoted separator": (lines("{path},{label}, big"), "line 2 has 3 values, and the header names 2"),
    "no header and three columns": (lines("{path},{label},x").partition("\n")[2], "no line of column names"),
    "web addresses": (lines("https://example.org/{path},{label}"), "4 paths are web addresses, such as https://"),
    "a column twice": (lines("{path},{label},x", "path,label,label"), "the column 'label' twice"),
    "two columns of labels":
        (lines("{path},{label},x", "path,class,category"), "several columns that can be the label"),
    "a line break in a label": (lines('{path},"{label}\nold"'), "with a line break"),
    "two labels of an image": (PLAIN + "./images/cat_0.png,dog\n", r"1 images have two labels: images/cat_0.png"),
    "two splits of an image": (lines("{path},{label},train", "path,label,split") + "images/cat_0.png,cat,test\n",
                               "1 images have two splits: images/cat_0.png ('train', 'test')"),
    "numbers as splits": (lines("{path},{label},0", "path,label,split"), "row 2 has the split '0'"),
    "a flag among columns of classes": (
        "path,cat,dog,is_train\n" + "".join(f"{p},{int(c == 'cat')},{int(c == 'dog')},{i % 2}\n"
                                           for i, (p, c) in enumerate(ROWS)), "with the column 'is_train'"),
    "two columns of flags": (lines("{path},{label},0,1", "path,label,is_valid,is_test"), "is_valid and is_test"),
    "a split beside other values": (
        "path,label,subset\n" + "".join(f"{p},{c},{s}\n" for (p, c), s in zip(
            ROWS, ("train", "train", "test", "other"))), "the column 'subset' names splits, and also 'other'"),
    "names of masks as labels": (lines("{path},{name}_mask.png", "image,mask"), "has no column 'label'"),
    "missing files": (lines("{path}x,{label}"), "4 of 4 images are missing, such as images/cat_0.pngx, images/cat_1"),
    "nothing": ("", "is empty"),
    "only a header": ("path,label\n", "has no rows"),
    "case only": (PLAIN.replace("_1.png,cat", "_1.png,Cat"), "differ in case only"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_table_that_cannot_be_read_safely_is_refused_in_one_line(name, parse, folder):
    content, message = REFUSED[name]
    with pytest.raises(UsageError) as e: parse(content)
    assert message in str(e.value) and "\n" not in str(e.value)


def test_refusal_says_what_was_tried(parse):
    with pytest.raises(UsageError) as e: parse(lines("{path}x,{label}"))
    for part in "by the end of their paths", "by their names without endings", "Paths are relative to":
        assert part in str(e.value)


# Labels


def test_numbers_are_one_class_only_if_all_labels_are_numbers(parse):
    label = lambda *values: parse("path,label\n" + "".join(f"{p},{v}\n" for (p, _), v in zip(ROWS, values))).rows.label
    assert label("3", "3.0", "03", "4").tolist() == ["3", "3", "3", "4"]
    assert label("3", "3.0", "03", "four").tolist() == ["3", "3.0", "03", "four"]
    assert label("007", "42", "007", "42").tolist() == ["007", "42"] * 2


def test_joined_spellings_are_said_with_counts(parse):
    found = parse(PLAIN.replace("_1.png,cat", "_1.png,cat\u200b"))
    assert found.rows.label.tolist() == LABELS
    assert "'cat' ('cat' 1, 'cat\\u200b' 1)" in " ".join(found.notes)


def test_rows_without_a_label_are_counted_and_left_out(parse):
    found = parse(PLAIN.replace("_1.png,cat", "_1.png,"))
    assert found.rows.path.tolist() == ["images/cat_0.png", "images/dog_0.png", "images/dog_1.png"]
    assert "1 rows have no label and are left out" in found.notes
    assert set(parse(PLAIN.replace("cat\n", "NA\n")).rows.label) == {"NA", "dog"}, "NA can be a class"


def test_images_of_several_classes_are_for_another_task(parse, folder):
    text = "path,cat,dog\n" + "".join(f"{p},1,{i % 2}\n" for i, (p, _) in enumerate(ROWS))
    assert set(parse(text).rows.label) == {"cat", "cat|dog"}
    data = read_dataset(folder/"t.csv")
    with pytest.raises(UsageError, match="2 images are of several classes.*audit.task=multilabel"):
        check_trainable(data, "classification")
    check_trainable(data, "multilabel")


@pytest.mark.parametrize("values, labels", [
    ([b"cat", b"cat", b"dog", b"dog"], LABELS), ([3.0, 3.0, 4.0, np.nan], ["3", "3", "4"]),
    (pd.Categorical(LABELS), LABELS), ([["a"], ["a", "b"], ["b"], ["b"]], ["a", "a|b", "b", "b"])])
def test_labels_of_parquet_may_have_any_type(values, labels, folder):
    table = pd.DataFrame(dict(path=[p for p, _ in ROWS], label=values))
    table.to_parquet(folder/"t.parquet")
    assert parse_table(folder/"t.parquet").rows.label.tolist() == labels
    table.set_index("path").to_parquet(folder/"t.parquet")
    assert parse_table(folder/"t.parquet").rows.label.tolist() == labels


def test_json_lines_are_read(folder):
    (folder/"t.jsonl").write_text("".join(json.dumps(dict(file_name=p, label=c)) + "\n" for p, c in ROWS))
    assert parse_table(folder/"t.jsonl").rows.label.tolist() == LABELS
    (folder/"t.jsonl").write_text("{")
    with pytest.raises(UsageError, match="is not a table of JSON lines"): parse_table(folder/"t.jsonl")


# Splits


@pytest.mark.parametrize("column, values, splits", [
    ("split", ["Train", " val", "TEST ", "nan"], ["train", "val", "test", ""]),
    ("subset", ["training", "dev", "eval", ""], ["train", "val", "test", ""]),
    ("is_valid", ["True", "False", "0", "1"], ["val", "train", "train", "val"]),
    ("phase", ["train", "val", "test", "train"], ["train", "val", "test", "train"]),
    ("is_test", ["no", "no", "no", "yes"], ["train", "train", "train", "test"]),
])
def test_usual_columns_of_splits_are_read(column, values, splits, parse):
    text = f"path,label,{column}\n" + "".join(f"{p},{c},{v}\n" for (p, c), v in zip(ROWS, values))
    found = parse(text)
    assert found.rows.split.tolist() == splits and found.columns[column] == "split"


def test_column_that_only_looks_like_a_split_is_named(parse):
    found = parse("path,label,fold\n" + "".join(f"{p},{c},{i}\n" for i, (p, c) in enumerate(ROWS)))
    assert found.rows.meta_fold.tolist() == [0, 1, 2, 3] and set(found.rows.split) == {""}
    assert "the column 'fold' is not used as the split, because its values name none (0, 1, 2, 3)" in found.notes


# Paths


def test_files_that_come_later_are_found_in_the_same_process(folder):
    (folder/"t.csv").write_text(PLAIN + "images/late.png,dog\n")
    assert open_table(folder/"t.csv").n_missing == 1
    (folder/"images/late.png").touch()
    assert open_table(folder/"t.csv").n_missing == 0


def test_single_missing_file_is_not_taken_for_another_one(parse):
    rows = "".join(f"images/cat_0.png,cat\n{p},{c}\n" for p, c in ROWS)
    found = parse("path,label\n" + "images/dog_0.png,dog\n" * 20 + rows + "old/cat_1.png,cat\n")
    assert found.n_missing == 1 and "old/cat_1.png" in set(found.rows.path)
    assert "1 images are missing and will be left out, such as old/cat_1.png" in found.notes


def test_column_with_files_is_the_path_although_another_is_called_id(parse):
    rows = "".join(f"{n},{p},{c}\n" for n, (p, c) in zip(reversed(NAMES), ROWS))
    found = parse("id,photo,label\n" + rows)
    assert found.columns["photo"] == "path" and found.rows.label.tolist() == LABELS


def test_file_of_another_folder_is_not_taken_for_a_missing_one(folder):
    for name in "a/0.png", "a/1.png", "b/2.png", "b/8.png":
        (folder/name).parent.mkdir(exist_ok=True)
        (folder/name).touch()
    images = ["a/0.png", "a/1.png", "b/2.png", "b/8.png"]
    written = ["/old/a/0.png", "/old/a/1.png", "/old/b/2.png", "/old/a/8.png"]
    found = resolve_paths(written, folder, lambda: images, "t.csv")
    assert found.missing == ["/old/a/8.png"] and len(found.files) == 3


def test_value_of_any_length_is_read(parse):
    assert parse("path,label,note\n" + "".join(f"{p},{c},{'x' * 200_000}\n" for p, c in ROWS)).n_missing == 0


def test_single_path_in_other_case_is_repaired(parse):
    rows = "images/cat_0.png,cat\n" * 20 + "images/CAT_1.png,cat\nimages/dog_0.png,dog\n"
    assert parse("path,label\n" + rows).n_missing == 0


def test_path_that_two_files_could_mean_is_not_repaired(folder):
    (folder/"more").mkdir()
    for name in NAMES: (folder/f"more/{name}.png").touch()
    images = [f"{d}/{n}.png" for d in ("images", "more") for n in NAMES]
    found = resolve_paths([f"{n}.png" for n in NAMES], folder, lambda: images, "t.csv")
    assert found.missing == [f"{n}.png" for n in NAMES] and not found.notes
    longer = resolve_paths([f"C:\\x\\more\\{n}.png" for n in NAMES], folder, lambda: images, "t.csv")
    assert set(longer.files.values()) == {f"more/{n}.png" for n in NAMES}


def test_class_that_loses_all_its_images_is_named(parse):
    found = parse(PLAIN.replace("images/dog_0.png", "images/gone.png").replace("images/dog_1.png", "images/lost.png"))
    assert "1 classes lose all their images, because the files are missing: dog" in found.notes


# What is printed


def test_check_lists_columns_metadata_and_groups(folder):
    rows = "".join(f"{p},{c},{i // 3},day\n" for i, (p, c) in enumerate(ROWS))
    (folder/"t.csv").write_text("Image Path,species,group,Light\n" + rows)
    done = subprocess.run([CVNB, "data", "check", folder/"t.csv"], capture_output=True, text=True)
    assert "columns: path: Image Path · label: species · group: group · metadata: Light" in done.stdout
    assert "groups: 2 of 1 to 3 images, median 2; 0 images without" in done.stdout
    assert describe_dataset(folder/"t.csv")["columns"]["species"] == "label"
