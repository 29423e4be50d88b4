"""Groups joined as a plain union-find does it, and `cvnb data split`, with and without scipy."""
from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pandas as pd

from cvnb.data.dataset import data_root, scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.split_names import SPLITS
from cvnb.data.splits import assign_folds, assign_splits, count_copies, distinct_images, group_ids, read_splits
from cvnb.data.tables import read_manifest, write_table

CVNB = Path(sys.executable).with_name("cvnb")


def union_find(table: pd.DataFrame) -> list[str]:
    "Join rows by their pixels, groups and near-duplicates: the id of a set is its last member."
    sets = [{sha256} for sha256 in table.pixel_sha256]
    for members, group in zip(sets, table.group):
        if group: members.add(f"group {group}")
    pixels = dict(zip(table.path, table.pixel_sha256))
    sets += [{pixels[a], pixels[b]} for a, b in zip(table.path, table.near_duplicate_of) if b]
    joined: list[set[str]] = []
    for members in sets:
        touching = [other for other in joined if other & members]
        joined = [other for other in joined if not other & members] + [members.union(*touching)]
    return [next(max(members) for members in joined if sha256 in members) for sha256 in table.pixel_sha256]


def manifest_of(folder: Path, copies: dict[str, int]) -> Path:   # manifest.parquet
    "Write a manifest with four distinct images in each split, and some copies of them."
    rows = []
    for split in SPLITS:
        for i in range(4 + copies.get(split, 0)):
            rows.append(dict(path=f"{split}/{i:02}.png", label="a", split=split, ok=True, pixel_sha256=f"{i % 4}"))
    table = pd.DataFrame(rows).sample(frac=1, random_state=0, ignore_index=True)
    return write_table(folder/"manifest.parquet", table)


def test_validation_and_test_hold_each_distinct_image_once(tmp_path):
    "The first by path, whatever the order of the table; training keeps its copies."
    splits = read_splits(manifest_of(tmp_path, dict(train=3, test=13)))
    assert {split: len(rows) for split, rows in splits.items()} == dict(train=7, val=4, test=4)
    assert sorted(splits["test"].path) == [f"test/{i:02}.png" for i in range(4)]
    assert count_copies(tmp_path/"manifest.parquet") == ["test: n = 17, 4 distinct; each distinct image counts once"]


def test_manifest_without_copies_is_read_as_before(tmp_path):
    path = manifest_of(tmp_path, {})
    for split, rows in read_splits(path).items(): pd.testing.assert_frame_equal(rows, read_manifest(path, split))
    assert count_copies(path) == [] and distinct_images(read_manifest(path, "val")).equals(read_manifest(path, "val"))


def test_no_stage_reads_held_out_images_with_their_copies(root):
    for path in sorted((root/"nbs/stages").glob("*.ipynb")):
        assert "read_manifest" not in path.read_text(encoding="utf-8"), f"{path.name}: use read_splits"


def test_group_ids_join_chains_of_groups_copies_and_near_duplicates():
    rng = random.Random(0)
    for _ in range(50):
        n = rng.randint(1, 40)
        paths = [f"{i}.png" for i in range(n)]
        table = pd.DataFrame(dict(path=paths, pixel_sha256=[f"{rng.randrange(30):064x}" for _ in paths],
                                  group=[rng.choice(["", "", "a", "b", "ä"]) for _ in paths],
                                  near_duplicate_of=[rng.choice(["", "", "", *paths]) for _ in paths]))
        assert group_ids(table.sample(frac=1, random_state=n)).sort_index().tolist() == union_find(table)


def audited(n: int, **columns: object) -> pd.DataFrame:
    "List images of one class as an audit does before the splits."
    table = pd.DataFrame(dict(path=[f"{i:03}.png" for i in range(n)], label="a", split="", ok=True))
    return table.assign(pixel_sha256=[f"{i:064x}" for i in range(n)], **columns)


def test_another_seed_gives_another_split_and_the_same_seed_the_same() -> None:
    table = audited(60)
    first, again, other = (assign_splits(table, seed=seed).split.tolist() for seed in (0, 0, 1))
    assert first == again != other
    assert sorted(first) == sorted(other)   # as many images of each split
    folds = [assign_folds(table, 3, seed).tolist() for seed in (0, 0, 1)]
    assert folds[0] == folds[1] != folds[2]


def test_groups_copies_and_near_duplicates_stay_in_one_split() -> None:
    table = audited(60, group=[f"g{i // 4}" for i in range(60)])
    assert assign_splits(table).groupby(table.group).split.nunique().max() == 1
    copies = audited(60)
    copies["pixel_sha256"] = [f"{i // 3:064x}" for i in range(60)]
    assert assign_splits(copies).groupby("pixel_sha256").split.nunique().max() == 1
    pairs = pd.DataFrame(dict(path=table.path[::2].tolist(), other=table.path[1::2].tolist()))
    near = assign_splits(audited(60), pairs=pairs)
    assert (near.split[::2].to_numpy() == near.split[1::2].to_numpy()).all()
    noted = audited(60, near_duplicate_of=[f"{i - 1:03}.png" if i % 2 else "" for i in range(60)])
    found = assign_splits(noted)
    assert (found.split[::2].to_numpy() == found.split[1::2].to_numpy()).all()


def test_image_of_a_group_in_the_given_test_split_is_not_trained_on() -> None:
    "The test takes precedence over validation, and both over training."
    table = audited(12, group=["g", "g", "g", "h", "h", *[""] * 7])
    table.loc[[0, 1, 3], "split"] = ["val", "test", "val"]
    found = assign_splits(table)
    assert found.split[:5].tolist() == ["val", "test", "test", "val", "val"]
    assert set(found.split[5:]) == {"train"}


def split(table: Path, out: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([CVNB, "data", "split", table, "--out", out, *options], capture_output=True, text=True)


def test_split_command_writes_a_table_once(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=20, dog=20)
    assert split(folder, tmp_path/"out/s.csv").returncode == 0
    table = scan_dataset(tmp_path/"out/s.csv")
    assert len(table) == 40 and table.split.value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}
    again = split(folder, tmp_path/"out/s.csv")
    assert again.returncode == 2 and "exists already" in again.stderr
    assert inspect_images(data_root(tmp_path/"out/s.csv"), table).ok.all(), "paths lead to the images"


def test_split_command_splits_numbers_by_strata(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=20, dog=20)
    rows = "\n".join(f"{p},{i}" for i, p in enumerate(sorted(folder.rglob("*.png"))))
    (tmp_path/"age.csv").write_text("path,label\n" + rows)
    by_task = lambda task: split(tmp_path/"age.csv", tmp_path/f"{task}.csv", "--task", task, "--folds", "3")
    assert by_task("regression").returncode == 0
    assert by_task("regresion").stderr.startswith("cvnb: 'regresion' is not a task")
    table = pd.read_csv(tmp_path/"regression.csv")
    assert table.split.value_counts()[["val", "test"]].min() >= 4 and table.fold.nunique() == 3
    assert set(table.label) == set(range(40))


WITHOUT_SCIPY = """import sys
sys.modules["scipy"] = None
from cvnb.cli.app import main
sys.argv = ["cvnb", "data", "split", *sys.argv[1:]]
main()"""


def test_only_grouped_data_needs_scipy(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=20, dog=20)
    rows = "\n".join(f"{p},{p.parent.name},{i % 9}" for i, p in enumerate(sorted(folder.rglob("*.png"))))
    (tmp_path/"grouped.csv").write_text("path,label,group\n" + rows)
    call = lambda data, out: subprocess.run([sys.executable, "-c", WITHOUT_SCIPY, data, "--out", tmp_path/out],
                                            capture_output=True, text=True)
    assert call(folder, "plain.csv").returncode == 0
    grouped = call(tmp_path/"grouped.csv", "groups.csv")
    assert grouped.returncode == 1 and grouped.stderr.startswith("cvnb: scipy")
    assert "is not installed" in grouped.stderr and "cvnb[train]" in grouped.stderr
