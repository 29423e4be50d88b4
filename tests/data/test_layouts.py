"""Layouts of folders: what is recognised, what is refused with its readings, and what is left out."""
from __future__ import annotations

import os
import subprocess
import sys
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
from PIL import Image

from cvnb.cli.common import LAYOUT_HELP
from cvnb.core.errors import UsageError
from cvnb.data.dataset import Dataset, check_trainable, describe_dataset, read_dataset
from cvnb.data.layouts import LAYOUTS, Reading
from cvnb.data.sources import open_dataset
from cvnb.data.split_names import parse_split_name
from cvnb.data.versions import dataset_digest
from cvnb.pipeline.params import read_contracts

CVNB = Path(sys.executable).with_name("cvnb")


@pytest.fixture
def write_files(tmp_path: Path) -> Callable[..., Path]:
    "A function that writes a folder: paths ending in / get three images, other paths one, or the given text."
    image = tmp_path/"one.png"
    Image.new("L", (8, 8)).save(image)

    def write(*paths: str, **texts: str) -> Path:
        folder = tmp_path/"data"
        folder.mkdir()
        for path in paths:
            for target in [f"{path}{i}.png" for i in range(3)] if path.endswith("/") else [path]:
                (folder/target).parent.mkdir(parents=True, exist_ok=True)
                (folder/target).write_bytes(image.read_bytes())
        for name, text in texts.items():
            target = folder/name.replace("__", "/").replace("_csv", ".csv").replace("_jsonl", ".jsonl")
            target.write_text(text)
        return folder
    return write


def count(dataset: Dataset) -> dict[tuple[str, str], int]:
    "Count images by label and split."
    return dict(Counter((label, split) for _, label, split in dataset.images))


# Recognised


@pytest.mark.parametrize("train, val, test", [
    ("train", "val", "test"), ("training", "validation", "testing"), ("trn", "valid", "tst"), ("Train", "Dev", "Eval"),
    ("train_set", "val_set", "holdout"), ("seg_train", "seg_val", "seg_test"), ("TrainSet", "ValSet", "TestSet"),
    ("train_images", "val_images", "test_images"), ("train2017", "val2017", "hold-out"),
    ("trainset", "devset", "evaluation"),
])
def test_usual_names_of_splits_are_recognised(train, val, test, write_files):
    data = read_dataset(write_files(*(f"{split}/{c}/" for split in (train, val, test) for c in ("cat", "dog"))))
    assert data.kind == "splits/classes" and data.layout == f"{train}/CLASS, {val}/CLASS, {test}/CLASS"
    assert count(data) == {(c, s): 3 for c in ("cat", "dog") for s in ("train", "val", "test")}


@pytest.mark.parametrize("name", ["cat", "trainer", "test tube", "valley", "developer", "images", "contest"])
def test_names_of_classes_are_no_splits(name):
    assert parse_split_name(name) == ""


@pytest.mark.parametrize("prefix", ["", "my_data/", "a/b/c/"])
@pytest.mark.parametrize("inside", ["", "train/", "images/"])
def test_wrapping_folders_are_descended(prefix, inside, write_files):
    data = read_dataset(write_files(*(f"{prefix}train/{inside}{c}/" for c in ("cat", "dog")), f"{prefix}test/cat/",
                                    f"{prefix}test/dog/"))
    assert count(data)["cat", "train"] == 3 and count(data)["dog", "test"] == 3
    assert data.layout == f"{prefix}train/{inside}CLASS, {prefix}test/CLASS"


def test_wrapped_classes_are_read_with_a_note(write_files):
    data = read_dataset(write_files("animals/cat/", "animals/dog/", "animals/stray.png"))
    assert data.layout == "animals/CLASS" and count(data) == {("cat", ""): 3, ("dog", ""): 3}
    assert "the sub-folders of animals/" in data.notes[0] and "in no class's folder" in " ".join(data.notes)


@pytest.mark.parametrize("extra, note", [
    ("test/", "3 images are directly in the folder of a split, without a label, and are left out: test/"),
    ("test/images/", "3 images are directly in the folder of a split"),
    ("train/unsup/", "3 images are in a folder whose name says that they have no label and are left out: train/unsup/"),
    ("unlabeled/", "3 images are beside the folders of splits and are left out: unlabeled/"),
    ("seg_pred/seg_pred/", "3 images are beside the folders of splits and are left out: seg_pred/"),
])
def test_unlabelled_images_are_left_out_and_counted(extra, note, write_files):
    data = read_dataset(write_files("train/cat/", "train/dog/", extra))
    assert count(data) == {("cat", "train"): 3, ("dog", "train"): 3}
    assert any(n.startswith(note) for n in data.notes) and "(left out)" in data.layout


def test_folder_that_is_taken_in_is_a_class(write_files):
    folder = write_files("train/cat/", "train/unsup/")
    assert count(read_dataset(folder, Reading(take_in=("unsup",)))) == {("cat", "train"): 3, ("unsup", "train"): 3}


def test_class_named_train_is_kept_beside_other_classes(write_files):
    data = read_dataset(write_files("bus/", "car/", "train/"))
    assert data.kind == "classes" and count(data) == {("bus", ""): 3, ("car", ""): 3, ("train", ""): 3}


# Refused


@pytest.mark.parametrize("paths, parts", {
    "a class named train with sub-folders": (
        ["bus/", "car/", "train/diesel/", "train/steam/"],
        ["2 ways", "splits train/ with the classes diesel/, steam/, without bus/, car/",
         "the classes bus/, car/, train/", "--layout splits/classes or --layout classes"]),
    "labels in file names": (["train/cat.0.png", "train/dog.1.png", "test/1.png"],
                             ["has no labels", "directly in test/, train/", "cat.0.png", "Write a table"]),
    "images and masks under each class": (
        [f"{c}/{kind}/" for c in ("cat", "dog") for kind in ("images", "masks")],
        ["classes without masks/", "--leave-out masks"]),
    "splits under each class": ([f"{c}/{kind}/" for c in ("cat", "dog") for kind in ("train", "test")],
                                ["test/, train/ recur under each", "below each of cat/, dog/", "write a table"]),
    "masks with another ending": ([f"{c}/{i}.{e}" for c in ("cat", "dog") for i in range(3) for e in ("jpg", "png")],
                                  ["each of which has the name of another image", "--leave-out '*."]),
    "masks with a suffix": ([f"{c}/{i}{e}.png" for c in ("cat", "dog") for i in range(3) for e in ("", "_mask")],
                            ["--leave-out '*_mask*'"]),
    "masks under one class only": (["cat/images/", "cat/masks/", "dog/images/"],
                                   ["without masks/", "--leave-out masks"]),
    "masks of one class only": (["dog/", *(f"cat/{i}{e}.png" for i in range(4) for e in ("", "_mask_1"))],
                                ["--leave-out '*_mask*'"]),
    "thumbnails": ([f"{c}/{i}{e}.jpg" for c in ("cat", "dog") for i in range(3) for e in ("", "_thumb")],
                   ["--leave-out '*_thumb*'"]),
    "masks before the name": ([f"{c}/{e}{i}.png" for c in ("cat", "dog") for i in range(3) for e in ("", "mask_")],
                              ["--leave-out 'mask*'"]),
    "pairs of names": ([f"{c}/{i}{e}.png" for c in ("cat", "dog") for i in range(3) for e in ("_image", "_mask")],
                       ["--leave-out '*_mask*'"]),
    "images and masks in the place of classes": (["train/images/", "train/masks/"], ["without masks/"]),
    "splits with another word": (["letters_train/a/", "letters_train/b/", "letters_test/"],
                                 ["splits, which their names mention"]),
    "one folder of classes beside others": (["set/cat/", "set/dog/", "assets/"],
                                            ["the classes cat/, dog/ below set/", "--data"]),
    "folds": ([f"fold{i}/{c}/" for i in range(3) for c in ("cat", "dog")],
              ["the classes cat/, dog/ below each of fold0/, fold1/, fold2/"]),
    "splits beside folders of other names": (["train/cat/", "train/dog/", "extra/cat/", "extra/dog/"],
                                             ["2 ways", "without extra/"]),
}.values())
def test_folder_with_several_readings_is_refused_with_the_option(paths, parts, write_files):
    with pytest.raises(UsageError) as e: read_dataset(write_files(*paths))
    for part in parts: assert part in str(e.value)
    assert "\n" not in str(e.value)


def test_audit_and_help_offer_every_layout():
    (layout,) = [p for p in read_contracts()["audit"].params if p.name == "layout"]
    assert get_args(layout.type) == LAYOUTS and all(name in LAYOUT_HELP for name in LAYOUTS)


def test_options_choose_a_reading(write_files):
    folder = write_files("bus/", "train/diesel/", "train/steam/")
    assert {label for label, _ in count(read_dataset(folder, Reading("classes")))} == {"bus", "train"}
    splits = read_dataset(folder, Reading("splits/classes"))
    assert count(splits) == {("diesel", "train"): 3, ("steam", "train"): 3}
    assert "3 images are beside the folders of splits and are left out: bus/" in splits.notes
    assert count(read_dataset(folder, Reading(leave_out=("bus",)))) == count(splits)
    done = subprocess.run([CVNB, "data", "check", folder, "--layout", "splits/classes"], capture_output=True, text=True)
    assert "layout: train/CLASS, bus/ (left out)" in done.stdout
    done = subprocess.run([CVNB, "data", "check", folder, "--layout", "clases"], capture_output=True, text=True)
    assert done.returncode == 2 and "no layout 'clases'. Did you mean 'classes'?" in done.stderr


def test_masks_are_left_out_by_their_pattern(write_files):
    folder = write_files(*(f"{c}/{i}{e}.png" for c in ("cat", "dog") for i in range(3) for e in ("", "_mask")))
    assert count(read_dataset(folder, Reading(leave_out=("*_mask*",)))) == {("cat", ""): 3, ("dog", ""): 3}
    assert len(read_dataset(folder, Reading("classes")).images) == 12


@pytest.mark.parametrize("option", [dict(leave_out=("masks",)), dict(take_in=("unsup",))])
def test_option_that_matches_nothing_is_refused(option, write_files):
    folder = write_files("cat/", "dog/")
    with pytest.raises(UsageError, match="matches nothing"): read_dataset(folder, Reading(**option))


def test_rows_of_tables_are_left_out_by_patterns_too(write_files, tmp_path):
    folder = write_files("train/", "valid/", train___classes_csv=ROBOFLOW, valid___classes_csv=ROBOFLOW)
    data = read_dataset(folder, Reading(leave_out=("0.png",)))
    assert len(data.images) == 4 and "2 rows of tables match leave_out and are left out" in data.notes
    table = folder/"train/_classes.csv"
    assert len(read_dataset(table, Reading(leave_out=("0.png",))).images) == 2
    with pytest.raises(UsageError, match="--leave-out 9.png matches nothing"):
        read_dataset(table, Reading(leave_out=("9.png",)))
    with pytest.raises(UsageError, match="--take-in is of folders"): read_dataset(table, Reading(take_in=("x",)))


def test_unlabelled_folder_beside_classes_is_left_out_with_a_note(write_files):
    data = read_dataset(write_files("cat/", "dog/", "not labeled/"))
    assert count(data) == {("cat", ""): 3, ("dog", ""): 3} and "3 images are in a folder whose name" in data.notes[0]


# Tables in folders


ROBOFLOW = "filename, cat, dog\n0.png, 1, 0\n1.png, 0, 1\n2.png, 1, 0\n"


def test_one_hot_tables_of_split_folders_are_read(write_files):
    folder = write_files("train/", "valid/", train___classes_csv=ROBOFLOW, valid___classes_csv=ROBOFLOW)
    data = read_dataset(folder)
    assert count(data) == {(c, s): n for s in ("train", "val") for c, n in (("cat", 2), ("dog", 1))}
    assert data.files == ["train/_classes.csv", "valid/_classes.csv"] and data.kind == "table"
    assert ("train/1.png", "dog", "train") in data.images


def test_metadata_of_hugging_face_is_read(write_files):
    line = '{"file_name": "%d.png", "label": "%s"}\n'
    text = "".join(line % (i, label) for i, label in enumerate(("cat", "dog", "cat")))
    data = read_dataset(write_files("train/", "test/", train__metadata_jsonl=text, test__metadata_jsonl=text))
    assert count(data)["dog", "test"] == 1 and len(data.images) == 6


def test_kaggle_table_with_ids_labels_the_training_images_only(write_files):
    folder = write_files("train_images/", "test_images/7.png", train_csv="id,breed\n0,pug\n1,husky\n2,pug\n",
                         sample_submission_csv="id,breed\n7,pug\n")
    data = read_dataset(folder)
    assert count(data) == {("pug", ""): 2, ("husky", ""): 1}
    notes = " | ".join(data.notes)
    for part in ("3 files are found by their names without endings", "1 images are in no table", "the column 'breed'",
                 "sample_submission.csv"): assert part in notes


def test_table_that_contradicts_the_folders_is_refused(write_files):
    rows = [(f"{c}/{i}.png", "ab"[i % 2]) for c in ("part1", "part2") for i in range(3)]
    folder = write_files("part1/", "part2/", labels_csv="path,label\n" + "".join(f"{p},{c}\n" for p, c in rows))
    with pytest.raises(UsageError, match="--layout classes or --layout table"): read_dataset(folder)
    assert {label for label, _ in count(read_dataset(folder, Reading("table")))} == {"a", "b"}
    assert {label for label, _ in count(read_dataset(folder, Reading("classes")))} == {"part1", "part2"}


def test_numbered_parts_are_no_classes_if_a_table_names_their_images(write_files):
    rows = [f"{i},nv,back" for i in range(3)]
    folder = write_files("part_1/", "part_2/7.png", meta_csv="image_id,dx,site\n" + "\n".join([*rows, "7,mel,ear"]))
    with pytest.raises(UsageError, match="Rename the column with the labels in meta.csv"): read_dataset(folder)
    assert len(read_dataset(folder, Reading("classes")).images) == 4


def test_table_that_agrees_with_the_folders_is_named(write_files):
    rows = [(f"{c}/{i}.png", c) for c in ("cat", "dog") for i in range(3)]
    data = read_dataset(write_files("cat/", "dog/", x_csv="path,label\n" + "".join(f"{p},{c}\n" for p, c in rows)))
    assert data.kind == "classes" and "not read: x.csv" in " ".join(data.notes)


def test_tables_of_splits_over_shared_images_give_the_splits(write_files):
    tables = {f"{split}_csv": f"path,label\n{i}.png,a\n{i + 1}.png,b\n" for i, split in ((0, "train"), (2, "test"))}
    data = read_dataset(write_files("0.png", "1.png", "2.png", "3.png", **tables))
    assert count(data) == {(c, s): 1 for c in "ab" for s in ("train", "test")}
    assert "test.csv: its images are for test, by its name" in data.notes


def test_several_tables_of_the_same_images_are_refused(write_files):
    table = "path,label\n0.png,a\n1.png,b\n2.png,a\n"
    with pytest.raises(UsageError, match=r"2 ways: as .*labels of a.csv; or as .*labels of b.csv\. Choose one: --data"):
        read_dataset(write_files("0.png", "1.png", "2.png", a_csv=table, b_csv=table))


# Files


def test_files_of_tools_are_left_out_and_other_files_counted_by_ending(write_files):
    junk = ("cat/@eaDir/0.png", "cat/.ipynb_checkpoints/0.png", "__MACOSX/cat/0.png", "cat/._0.png", "cat/Thumbs.db",
            "dog/desktop.ini", "dog/.DS_Store", ".thumbnails/1.png", "lost+found/1.png", "cat/.hidden.png")
    folder = write_files("cat/", "dog/", *junk)
    for name in "cat/0.txt", "cat/1.txt", "dog/notes.md": (folder/name).write_text("x")
    data = read_dataset(folder)
    assert count(data) == {("cat", ""): 3, ("dog", ""): 3}
    notes = " | ".join(data.notes)
    for part in "5 folders of operating systems", "5 files of operating systems", "2 .txt files", "1 .md files":
        assert part in notes


def test_images_are_known_by_their_bytes_whatever_the_ending(write_files, tmp_path):
    folder = write_files("cat/", "dog/")
    picture = Image.new("RGB", (8, 8))
    kinds = {"a.jfif": "JPEG", "b.JPE": "JPEG", "c.jp2": "JPEG2000", "d": "PNG", "e.dat": "WEBP", "f.avif": "AVIF"}
    for name, kind in kinds.items(): picture.save(folder/"cat"/name, format=kind)
    (folder/"cat/g").write_text("BM is no bitmap, and this is no image")
    data = read_dataset(folder)
    assert count(data)["cat", ""] == 3 + len(kinds)
    assert "1 other files without an image are left out: cat/g" in data.notes


def test_broken_links_and_pipes_are_left_out(write_files):
    folder = write_files("cat/", "dog/")
    (folder/"cat/gone.png").symlink_to(folder/"nowhere.png")
    os.mkfifo(folder/"dog/pipe")
    data = read_dataset(folder)
    assert len(data.images) == 6 and any(note.startswith("2 broken links") for note in data.notes)


def test_empty_files_and_pointers_of_git_lfs_are_said(write_files):
    folder = write_files("cat/", "dog/")
    (folder/"cat/empty.png").touch()
    (folder/"dog/large.png").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n")
    data = read_dataset(folder)
    assert len(data.images) == 7 and "1 images are empty files, such as cat/empty.png" in data.notes
    assert any(note.startswith("1 pointers of Git LFS") for note in data.notes)


def test_heic_without_its_package_names_the_extra(write_files, monkeypatch):
    folder = write_files("cat/", "dog/", "dog/x.heic")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install cvnb[heif]" in " ".join(read_dataset(folder).notes)


def test_name_that_is_not_utf8_is_left_out_and_shown_escaped(write_files):
    folder = write_files("cat/", "dog/")
    os.rename(os.fsencode(folder/"cat/0.png"), os.fsencode(folder/"cat") + b"/caf\xe9.png")
    data = read_dataset(folder)
    assert count(data)["cat", ""] == 2 and any("caf\\udce9.png" in note for note in data.notes)
    done = subprocess.run([CVNB, "data", "check", folder], capture_output=True, text=True)
    assert done.returncode == 0 and "names that are not UTF-8" in done.stdout


def test_spellings_of_one_class_are_joined_with_a_note(write_files):
    names = [unicodedata.normalize(form, "café") for form in ("NFC", "NFD")]
    data = read_dataset(write_files(f"train/{names[0]}/", f"test/{names[1]}/", "train/tea/", "test/tea /"))
    assert count(data) == {(c, s): 3 for c in (names[0], "tea") for s in ("train", "test")}
    assert any(note.startswith("2 classes have several spellings") for note in data.notes)


def test_class_name_with_a_line_break_is_refused(write_files):
    folder = write_files("a\nb/", "c/")
    with pytest.raises(UsageError, match=r"the class 'a\\nb', with a line break"): read_dataset(folder)


# Classes


def test_class_without_training_images_is_refused_before_the_audit(write_files):
    data = read_dataset(write_files("train/cat/", "train/dog/", "test/cat/", "test/owl/"))
    assert data.faults == ["1 classes have no training image: 'owl'"]
    with pytest.raises(UsageError, match="'owl'"): check_trainable(data, "classification")
    check_trainable(data, "regression")
    assert any("no image in test" in note and "'dog'" in note for note in data.notes)
    run = data.root.parent/"run"
    done = subprocess.run([CVNB, "run", "--data", data.root, "--run", run], capture_output=True, text=True)
    assert done.returncode == 2 and "no training image: 'owl'" in done.stderr and "Traceback" not in done.stderr
    assert not (run/"audit").exists()


def test_empty_splits_and_small_classes_are_noted(write_files):
    folder = write_files("cat/", "dog/0.png", "dog/1.png", "owl/0.png")
    notes = " | ".join(read_dataset(folder).notes)
    assert "fewer images than there are splits: 'dog'" in notes and "a single image" in notes
    (folder/"x").mkdir()
    os.rename(folder, folder.with_name("train"))
    (folder/"valid").mkdir(parents=True)
    os.rename(folder.with_name("train"), folder/"train")
    assert "the split valid/ has no images" in read_dataset(folder).notes


def test_run_prints_the_layout_and_what_was_left_out(write_files):
    folder = write_files("train/cat/", "train/dog/", "test/")
    done = subprocess.run([CVNB, "run", "audit", "--data", folder, "--run", folder.parent/"run"], capture_output=True,
                          text=True)
    assert "layout: train/CLASS, test/ unlabelled (left out) · 6 images" in done.stdout
    assert "! 3 images are directly in the folder of a split" in done.stdout


# Zip files


def zip_folder(folder: Path, target: Path) -> Path:
    with zipfile.ZipFile(target, "w") as file:
        for path in sorted(folder.rglob("*.png")): file.write(path, path.relative_to(folder.parent))
    return target


def test_zip_file_is_read_like_the_folder(write_files, tmp_path, cache):
    folder = write_files("train/cat/", "train/dog/")
    data = open_dataset(zip_folder(folder, tmp_path/"x.zip"))
    assert count(data) == {("cat", "train"): 3, ("dog", "train"): 3} and data.layout == "data/train/CLASS"
    assert describe_dataset(data)["images"] == 6 and len(dataset_digest(data)) == 64


def test_folder_with_a_zip_file_only_names_it(write_files, tmp_path):
    folder = write_files("cat/", "dog/")
    (tmp_path/"outer").mkdir()
    zip_folder(folder, tmp_path/"outer/digits.zip")
    with pytest.raises(UsageError, match=r"outer/digits\.zip\.$"): read_dataset(tmp_path/"outer")


@pytest.mark.parametrize("fault, message", {
    "a path above": (lambda file: file.writestr("../evil.png", b"x"), "lies outside of its folder"),
    "an absolute path": (lambda file: file.writestr("/evil.png", b"x"), "lies outside of its folder"),
    "a bomb": (lambda file: file.writestr("cat/1.png", bytes(10**7), zipfile.ZIP_DEFLATED), "would grow"),
    "a link": (lambda file: file.writestr(_link("cat/1.png"), "/etc/passwd"), "holds the link"),
}.values())
def test_unsafe_zip_file_is_refused_and_leaves_nothing(fault, message, tmp_path, cache):
    with zipfile.ZipFile(tmp_path/"x.zip", "w") as file:
        file.writestr("cat/0.png", b"x")
        fault(file)
    with pytest.raises(UsageError, match=message): open_dataset(tmp_path/"x.zip")
    assert not [p for p in tmp_path.rglob("*.png")] and not (tmp_path.parent/"evil.png").exists()


def _link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = 0o120777 << 16
    return info


def test_folder_is_walked_through_once(write_files, monkeypatch):
    folder = write_files("cat/", "dog/")
    calls = []
    walk = os.walk
    monkeypatch.setattr("os.walk", lambda *args, **options: calls.append(args) or walk(*args, **options))
    read_dataset(folder)
    assert len(calls) == 1
