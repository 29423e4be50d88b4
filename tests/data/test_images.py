"""One planted example of everything that people's data has been seen to contain, each with its defined result."""
from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from cvnb.data import images
from cvnb.core.errors import UsageError
from cvnb.core.files import read_json
from cvnb.data.tables import data_root, describe, list_images, locate, read_manifest, read_table, scan
from cvnb.data.versions import dataset_digest
from cvnb.data.images import inspect, inspect_image, open_image

CVNB = Path(sys.executable).with_name("cvnb")
rng = np.random.default_rng(0)
PHOTO = Image.fromarray(np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))


def saved(kind: str, image: Image.Image = PHOTO, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def huge_header() -> bytes:
    "A PNG of 60,000 × 60,000 pixels, as far as its header says."
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6   # to be turned by 90 degrees
    return saved("jpeg", PHOTO.crop((0, 0, 64, 16)), exif=exif)


UNREADABLE = {
    "truncated.jpg": (lambda: saved("jpeg", quality=95)[:700], "it is cut off"), "empty.png": (lambda: b"", "it is empty"),
    "text.jpg": (lambda: b"dear diary", "its bytes are no image"), "huge.png": (huge_header, "decompression bomb"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_what_cannot_be_read_is_noted_with_its_reason(name, tmp_path):
    make, reason = UNREADABLE[name]
    (tmp_path/name).write_bytes(make())
    with pytest.raises(ValueError, match=reason): open_image(tmp_path/name)
    found = inspect_image(tmp_path/name)
    assert not found["ok"] and reason in found["error"] and str(tmp_path) not in found["error"]


@pytest.mark.parametrize("info", [b"II*\0", b"junkjunk", b""], ids=repr)
def test_metadata_that_nobody_can_read_turns_nothing(tmp_path, info):
    "The pixels are whole."
    content = saved("png", PHOTO)
    chunk = struct.pack(">I", len(info)) + b"eXIf" + info + struct.pack(">I", zlib.crc32(b"eXIf" + info))
    (tmp_path/"x.png").write_bytes(content[:33] + chunk + content[33:])   # after the header
    assert inspect_image(tmp_path/"x.png")["ok"] and np.array_equal(pixels(tmp_path/"x.png"), np.asarray(PHOTO))


def test_an_image_is_turned_whatever_else_its_metadata_say(tmp_path):
    "A resolution written as text can be read and not be written anew."
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI", 0x011A, 2, 3) + b"72\0\0"
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + b"\0" * 4
    (tmp_path/"x.jpg").write_bytes(saved("jpeg", PHOTO.crop((0, 0, 64, 16)), exif=exif))
    assert pixels(tmp_path/"x.jpg").shape == (64, 16, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pages", [1, 2])
def test_a_tiff_is_turned_once(tmp_path, orientation, pages):
    "Pillow turns it while loading, and forgets that it did where it counts several pages."
    wide, exif = PHOTO.crop((0, 0, 64, 16)), Image.Exif()
    exif[0x0112] = orientation
    wide.save(tmp_path/"x.tif", tiffinfo={0x0112: orientation}, save_all=True, append_images=[wide] * (pages - 1))
    wide.save(tmp_path/"x.png", exif=exif)
    with Image.open(tmp_path/"x.png") as image: expected = np.asarray(ImageOps.exif_transpose(image))
    for name in "x.tif", "x.png": assert np.array_equal(pixels(tmp_path/name), expected), name


def test_a_description_of_the_wrong_type_ends_no_audit(tmp_path):
    "Pillow looks in it for an orientation while it loads the pixels."
    entries = TiffImagePlugin.ImageFileDirectory_v2()
    entries.tagtype[700], entries[700] = 2, "<x:xmpmeta/>"   # text where bytes belong
    PHOTO.save(tmp_path/"x.tif", tiffinfo=entries)
    found = inspect_image(tmp_path/"x.tif")
    assert not found["ok"] and found["kind"] == "broken"


def test_too_many_pixels_are_too_many_in_every_thread(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3000)
    PHOTO.save(tmp_path/"large.png")      # 64 × 64
    PHOTO.crop((0, 0, 8, 8)).save(tmp_path/"small.png")
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(inspect_image, [tmp_path/f"{name}.png" for name in ("large", "small")] * 100))
    assert {(f["ok"], f["kind"]) for f in found[::2]} == {(False, "too_large")} and all(f["ok"] for f in found[1::2])


def pixels(path: Path) -> np.ndarray: return np.asarray(open_image(path)).astype(int)


def test_every_kind_of_pixel_becomes_what_a_viewer_shows(tmp_path):
    write = lambda name, content: (tmp_path/name).write_bytes(content) and tmp_path/name
    truth = np.asarray(PHOTO).astype(int)
    grey = np.asarray(PHOTO.convert("L")).astype(int)
    deep = Image.fromarray((grey * 257).astype(np.uint16))
    assert np.abs(pixels(write("deep.png", saved("png", deep))) - grey[..., None]).max() <= 1
    assert np.abs(pixels(write("float.tif", saved("tiff", Image.fromarray((grey / 255).astype(np.float32))))) - grey[..., None]).max() <= 1
    assert np.abs(pixels(write("print.jpg", saved("jpeg", PHOTO.convert("CMYK"), quality=100, subsampling=0))) - truth).mean() < 3
    assert np.array_equal(pixels(write("grey.png", saved("png", PHOTO.convert("L")))), np.repeat(grey[..., None], 3, 2))
    assert np.abs(pixels(write("palette.gif", saved("gif", PHOTO.quantize(255)))) - truth).mean() < 3
    glass = PHOTO.copy(); glass.putalpha(Image.fromarray(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8)[None].repeat(64, 0)))
    for name, image in {"glass.png": glass, "glass.webp": glass}.items():
        seen = pixels(write(name, saved(name.split(".")[1], image, **dict(lossless=True) if "webp" in name else {})))
        assert (seen[:, :32] == 255).all() and np.array_equal(seen[:, 32:], truth[:, 32:])
    moving = saved("gif", PHOTO.quantize(255), save_all=True, append_images=[Image.new("P", (64, 64))] * 3)
    assert np.abs(pixels(write("moving.gif", moving)) - truth).mean() < 3, "the first picture of an animation"
    assert pixels(write("turned.jpg", turned())).shape == (64, 16, 3)
    assert pixels(write("dot.png", saved("png", PHOTO.crop((0, 0, 1, 1))))).shape == (1, 1, 3)


def test_colour_profiles(tmp_path):
    "A photograph in a wide colour space comes out as in sRGB; a profile that is broken changes nothing."
    lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    PHOTO.save(tmp_path/"own.png", icc_profile=ImageCms.ImageCmsProfile(srgb).tobytes())
    PHOTO.save(tmp_path/"broken.png", icc_profile=b"no profile")
    PHOTO.save(tmp_path/"other.png", icc_profile=ImageCms.ImageCmsProfile(lab).tobytes())   # made for images of another kind
    for name in "own.png", "broken.png", "other.png": assert np.array_equal(np.asarray(open_image(tmp_path/name)), np.asarray(PHOTO)), name
    swapped = bytearray(ImageCms.ImageCmsProfile(srgb).tobytes())   # a profile whose red and blue are swapped, under another name
    places = {bytes(swapped[132 + 12 * i:136 + 12 * i]): 136 + 12 * i for i in range(struct.unpack(">I", swapped[128:132])[0])}
    red, blue = places[b"rXYZ"], places[b"bXYZ"]
    swapped[red:red + 8], swapped[blue:blue + 8] = swapped[blue:blue + 8], swapped[red:red + 8]
    named = bytes(swapped).replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be")).replace(b"sRGB", b"oRGB")
    PHOTO.save(tmp_path/"swapped.png", icc_profile=named)
    assert np.abs(pixels(tmp_path/"swapped.png") - np.asarray(PHOTO).astype(int)[..., ::-1]).mean() < 3


def test_a_file_that_may_not_be_read(tmp_path):
    (tmp_path/"secret.png").write_bytes(saved("png"))
    (tmp_path/"secret.png").chmod(0)
    root = os.geteuid() == 0
    if root: os.seteuid(65534)   # nobody
    try: found = inspect_image(tmp_path/"secret.png")
    finally:
        if root: os.seteuid(0)
    assert not found["ok"] and "Permission denied" in found["error"]


def classes(folder: Path, **n: int) -> Path:
    for i, (label, count) in enumerate(n.items()):
        (folder/label).mkdir(parents=True)
        for k in range(count): Image.fromarray(rng.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(folder/label/f"{i}-{k}.png")
    return folder


def test_links_names_and_loops(tmp_path):
    folder = classes(tmp_path/"data", cat=2, dog=2)
    for name in "with space.png", "Ünïcode 猫.png", "line\nbreak.png": PHOTO.save(folder/"cat"/name)
    (folder/"cat/loop").symlink_to(folder)
    classes(tmp_path/"elsewhere", bird=2)
    (folder/"bird").symlink_to(tmp_path/"elsewhere/bird")
    found = list_images(folder)
    assert len(found) == 9 and not any("loop" in f for f in found) and len([f for f in found if f.startswith("bird/")]) == 2
    assert inspect(folder, scan(folder)).ok.all()


@pytest.mark.parametrize("n, said", {
    "one class": (dict(cat=3), "one class (cat), and two are needed"),
    "case only": (dict(cat=2, Cat=2), "'Cat' and 'cat', which differ in case only"),
    "one class and an empty one": (dict(cat=3, dog=0), "one class (cat), and two are needed"),
}.values())
def test_folders_that_are_refused(n, said, tmp_path):
    with pytest.raises(UsageError) as e: locate(classes(tmp_path/"data", **n))
    assert said in str(e.value)


def test_folders_that_are_told_about(tmp_path):
    folder = classes(tmp_path/"data", cat=30, dog=1, bird=0)
    (folder/"cat/notes.txt").write_text("x")
    PHOTO.save(folder/"stray.png")
    notes = " | ".join(describe(folder)["notes"])
    for part in "single image", "dog", "1 folders have no images: bird", "1 images are in no class's folder", "1 other files", "'cat' has 30":
        assert part in notes
    done = subprocess.run([CVNB, "data", "check", folder], capture_output=True, text=True)
    assert done.returncode == 0 and "31 images, 2 classes" in done.stdout and done.stdout.count("! ") == 5


@pytest.fixture
def table(tmp_path) -> Callable[..., Path]:
    "Write a table of the images of two classes, changed in one way."
    folder = classes(tmp_path/"images", cat=6, dog=6)
    rows = [dict(path=f"images/{p}", label=p.split("/")[0], camera="ab"[i % 2]) for i, p in enumerate(list_images(folder))]

    def write(change: Callable[[pd.DataFrame], pd.DataFrame] = lambda t: t, name: str = "t.csv", **options: object) -> Path:
        made = change(pd.DataFrame(rows))
        if name.endswith("parquet"): made.to_parquet(tmp_path/name)
        else: made.to_csv(tmp_path/name, index=False, **options)
        return tmp_path/name
    return write


def test_tables_that_are_read(table, tmp_path):
    plain = scan(table())
    assert list(plain.columns) == ["path", "label", "split", "meta_camera"] and len(plain) == 12
    assert scan(table(encoding="utf-8-sig")).equals(plain) and scan(table(name="t.tsv", sep="\t")).equals(plain)
    assert scan(table(name="t.parquet")).equals(plain)
    assert scan(table(lambda t: t.assign(path=[str(tmp_path/p) for p in t.path]))).label.equals(plain.label), "whole paths"
    assert set(scan(table(lambda t: t.assign(label=["007", "042"] * 6))).label) == {"007", "042"}, "a label is text"
    assert set(scan(table(lambda t: t.assign(split=["Training", "valid", "test", ""] * 3))).split) == {"train", "val", "test", ""}
    twice = table(lambda t: pd.concat([t, t.head(3)]))
    assert len(scan(twice)) == 12 and "3 rows stand twice" in " ".join(describe(twice)["notes"])
    missing = table(lambda t: t.assign(path=["images/gone.png", *t.path[1:]]))
    seen = inspect(data_root(missing), scan(missing))
    assert (~seen.ok).sum() == 1 and "No such file" in seen.error[0] and "1 images are missing" in " ".join(describe(missing)["notes"])
    before = dataset_digest(missing)
    PHOTO.save(tmp_path/"images/gone.png")
    assert dataset_digest(missing) != before, "an image that appears is a change of the data"


BAD_TABLES = {
    "no path": (lambda t: t.rename(columns=dict(path="file")), "has no column 'path'; it has file, label, camera"),
    "no label": (lambda t: t.drop(columns="label"), "has no column 'label'"), "no rows": (lambda t: t.head(0), "has no rows"),
    "an empty label": (lambda t: t.assign(label=["", *t.label[1:]]), "row 2 has no label"),
    "an unknown split": (lambda t: t.assign(split=["train"] * 11 + ["tset"]), "row 13 has the split 'tset'. Did you mean 'test'"),
    "one class": (lambda t: t.assign(label="cat"), "has one class (cat)"),
    "another folder": (lambda t: t.assign(path="else/" + t.path), "12 of 12 images are missing"),
    "case only": (lambda t: t.assign(label=["cat", "Cat"] * 6), "differ in case only"),
    "two labels": (lambda t: pd.concat([t, t.head(1).assign(label="dog", path="./" + t.path)]), "images/cat/0-0.png has two labels, 'cat' and 'dog'"),
}


@pytest.mark.parametrize("name", BAD_TABLES)
def test_tables_that_are_refused(name, table):
    change, said = BAD_TABLES[name]
    with pytest.raises(UsageError) as e: locate(table(change))
    assert said in str(e.value)


NO_TABLES = {"latin1.csv": "path,label\nä.png,x\n".encode("latin-1"), "no.parquet": b"PAR?", "binary.csv": bytes(range(256)),
             "ragged.csv": b"path,label\na,b\nc,d,e,f\n"}


@pytest.mark.parametrize("name, content", NO_TABLES.items())
def test_files_that_are_no_tables(name, content, tmp_path):
    (tmp_path/name).write_bytes(content)
    done = subprocess.run([CVNB, "data", "check", tmp_path/name], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"cvnb: {tmp_path/name} ") and "Traceback" not in done.stderr


def test_columns_of_any_type(tmp_path):
    "Lists become text, numbers with gaps stay numbers, and a split or group may have a type of its own."
    folder = classes(tmp_path/"photos", a=3, b=3)
    names = [str(p) for p in sorted(folder.rglob("*.png"))]
    table = pd.DataFrame(dict(path=names, label=[Path(p).parent.name for p in names], box=[[1, 2]] * 6, group=pd.array([1, None] * 3, "Int64"),
                              split=pd.Categorical(["train", None] * 3)))
    table.to_parquet(tmp_path/"x.parquet")
    seen = read_table(tmp_path/"x.parquet")
    assert seen.group.tolist() == ["1", ""] * 3 and seen.split.tolist() == ["train", ""] * 3 and seen.meta_box.nunique() == 1
    columns = dict(age=["1", "", "3.5", "4", "", "6"], note=["1", "x", "", "", "", ""], patient=["007"] + ["12"] * 4 + [""])
    table[["path", "label"]].assign(**columns).to_csv(tmp_path/"x.csv", index=False)
    seen = read_table(tmp_path/"x.csv")
    assert seen.meta_age.isna().sum() == 2 and seen.meta_age.max() == 6 and seen.meta_note.tolist() == ["1", "x", "", "", "", ""]
    assert seen.meta_patient.tolist() == ["007"] + ["12"] * 4 + [""], "a name is no number"


def test_a_row_that_cannot_be_read_is_no_end(tmp_path):
    folder = classes(tmp_path/"photos", a=3, b=3)
    rows = "".join(f"photos/{p.relative_to(folder)},{p.parent.name}\n" for p in folder.rglob("*.png"))
    (tmp_path/"x.csv").write_text("path,label\nphotos/a,a\n" + rows)
    before = dataset_digest(tmp_path/"x.csv")   # the first row is a folder
    assert before == dataset_digest(tmp_path/"x.csv")
    seen = inspect(tmp_path, scan(tmp_path/"x.csv"))
    assert seen.ok.tolist().count(False) == 1


def test_a_file_that_was_away_for_a_moment_is_not_remembered_as_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    folder, look = classes(tmp_path/"photos", a=3, b=3), images.inspect_image
    table, away = scan(folder), []

    def flaky(path: Path, *more: object) -> dict:
        if path.stem == "0-0" and len(away) < 2: return away.append(path) or look(path.with_suffix(".gone"), *more)
        return look(path, *more)
    monkeypatch.setattr(images, "inspect_image", flaky)
    first = inspect(folder, table)
    assert len(away) == 2 and not first.ok.all() and inspect(folder, table).ok.all()


def test_images_that_a_table_names_with_whole_paths_are_part_of_its_digest(tmp_path):
    folder = classes(tmp_path/"photos", a=3, b=3)
    (tmp_path/"tables").mkdir()
    table = tmp_path/"tables/photos.csv"
    table.write_text("path,label\n" + "".join(f"{p},{p.parent.name}\n" for p in sorted(folder.rglob("*.png"))))
    before = dataset_digest(table)
    PHOTO.rotate(90).save(next(folder.rglob("*.png")))
    assert dataset_digest(table) != before


def test_a_million_rows(tmp_path):
    for i in range(1000): (tmp_path/f"{i}.png").touch()
    names = (np.arange(1_000_000) % 1000).astype(str)
    rows = pd.DataFrame(dict(path=np.char.add(names, ".png"), label=names, person=np.arange(1_000_000)))
    rows.to_csv(tmp_path/"t.csv", index=False)
    found = describe(tmp_path/"t.csv")
    assert found["images"] == 1000 and len(found["classes"]) == 1000 and "999000 rows stand twice" in " ".join(found["notes"])


def test_splits_become_a_table(tmp_path):
    folder = classes(tmp_path/"data", cat=20, dog=20)
    split = lambda: subprocess.run([CVNB, "data", "split", folder, "--out", tmp_path/"out/s.csv"], capture_output=True, text=True)
    assert split().returncode == 0
    first = scan(tmp_path/"out/s.csv")
    assert len(first) == 40 and first.split.value_counts().to_dict() == {"train": 28, "val": 6, "test": 6}
    again = split()
    assert again.returncode == 2 and "exists already" in again.stderr
    assert inspect(data_root(tmp_path/"out/s.csv"), first).ok.all(), "paths lead to the images"
    (tmp_path/"age.csv").write_text("path,label\n" + "\n".join(f"{p},{i}" for i, p in enumerate(sorted(folder.rglob("*.png")))))
    ages = lambda task: subprocess.run([CVNB, "data", "split", tmp_path/"age.csv", "--out", tmp_path/f"{task}.csv", "--task", task, "--folds", "3"],
                                       capture_output=True, text=True)
    assert ages("regression").returncode == 0 and ages("regresion").stderr.startswith("cvnb: 'regresion' is not a task")
    table = pd.read_csv(tmp_path/"regression.csv")
    assert table.split.value_counts()[["val", "test"]].min() >= 4 and table.fold.nunique() == 3 and set(table.label) == set(range(40))


@pytest.mark.slow
def test_a_whole_audit_of_people_s_data(tmp_path):
    "From a table with every kind of image in it; two persons are kept apart."
    folder = classes(tmp_path/"images", cat=40, dog=40)
    moving = saved("gif", PHOTO.quantize(9), save_all=True, append_images=[Image.new("P", (64, 64))])
    kinds = {name: make() for name, (make, _) in UNREADABLE.items()} | {
        "turned.jpg": turned(), "dot.png": saved("png", PHOTO.crop((0, 0, 1, 1))), "print.jpg": saved("jpeg", PHOTO.convert("CMYK")),
        "moving.gif": moving, "line\nbreak 猫.png": saved("png", PHOTO.rotate(90))}
    for name, content in kinds.items(): (folder/"cat"/name).write_bytes(content)
    rows = [dict(path=f"images/{p}", label=p.split("/")[0], group=f"person {i % 11}", camera="ab"[i % 2]) for i, p in enumerate(list_images(folder))]
    pd.DataFrame(rows).to_csv(tmp_path/"t.csv", index=False)
    done = subprocess.run([CVNB, "run", "audit", "--data", tmp_path/"t.csv", "--run", tmp_path/"run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = pd.read_parquet(tmp_path/"run/audit/manifest.parquet")
    assert set(manifest[~manifest.ok].path) == {f"images/cat/{name}" for name in UNREADABLE} and len(manifest) == 89
    ok = read_manifest(tmp_path/"run/audit/manifest.parquet")
    assert ok.groupby("group").split.nunique().max() == 1 and set(ok.split) == {"train", "val", "test"} and set(ok.meta_camera) == {"a", "b"}
    audit = read_json(tmp_path/"run/audit/audit.json")
    assert audit["n_unreadable"] == read_json(tmp_path/"run/audit/stage.json")["metrics"]["n_unreadable"]["value"] == 4
    assert {u["path"] for u in audit["unreadable"]} == {f"images/cat/{name}" for name in UNREADABLE} and all(u["error"] for u in audit["unreadable"])
    assert json.loads(subprocess.run([CVNB, "status", tmp_path/"run", "--json"], capture_output=True, text=True).stdout)[0]["state"] == "fresh"
