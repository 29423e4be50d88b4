"""Unreadable files of every kind, private metadata in every format, copies without it, and image quality."""
from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, ImageFilter, PngImagePlugin

from cvnb.audit import quality
from cvnb.audit.privacy import check_privacy, copy_without_metadata, inspect_metadata, read_metadata, strip_metadata
from cvnb.audit.quality import _huge_header, check_integrity, check_quality, measure_appearance, whole_set_notes
from cvnb.audit.report import AuditReport, audit_notes
from cvnb.core.errors import UsageError
from cvnb.data.dataset import scan_dataset
from cvnb.data.images import Decoding, UnreadableImage, inspect_images, open_image

SECRETS = (b"Ann Person", b"SN-4711", b"2021:02:03", b"2021-02-03", b"hidden words")
rng = np.random.default_rng(0)
PHOTO = Image.fromarray(rng.integers(0, 256, (24, 40, 3), dtype=np.uint8)).resize((80, 48))
XMP = b"""<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">
<rdf:Description xmlns:dc="http://purl.org/dc/elements/1.1/" xmlns:aux="http://ns.adobe.com/exif/1.0/aux/"
 xmlns:xmp="http://ns.adobe.com/xap/1.0/" aux:SerialNumber="SN-4711" xmp:CreateDate="2021-02-03">
<dc:creator><rdf:Seq><rdf:li>Ann Person</rdf:li></rdf:Seq></dc:creator>
</rdf:Description></rdf:RDF></x:xmpmeta>"""
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif(side: int = 1) -> Image.Exif:
    "Make an EXIF block with every kind of private metadata, and an orientation."
    block = Image.Exif()
    block[0x0112], block[0x010F], block[0x0110] = side, "Maker", "Maker Model 1"
    block[0x013B], block[0x0132], block[0x010E] = "Ann Person", "2021:02:03 04:05:06", "hidden words"
    details = {0xA431: "SN-4711", 0x9003: "2021:02:03 04:05:06", 0x927C: b"hidden words", 0x829A: 0.01}
    block.get_ifd(0x8769).update(details)
    block.get_ifd(0x8825).update({1: "N", 2: (48.0, 1.0, 2.0), 3: "E", 4: (11.0, 3.0, 4.0)})
    return block


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "Ann Person")
    info.add_text("Comment", "hidden words", zip=True)
    info.add_itxt("XML:com.adobe.xmp", XMP.decode())
    info.add(b"gAMA", struct.pack(">I", 45455))
    return info


def late_text() -> bytes:
    "Make a PNG with text after its pixels and bytes after its end."
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    content = saved(PHOTO, "png")
    late = chunk(b"tEXt", b"Author\0Ann Person") + chunk(b"tIME", b"\x07\xe5\2\3\4\5\6")
    return content[:-12] + late + content[-12:] + b"hidden words"


def with_iptc() -> bytes:
    field = lambda number, value: b"\x1c\x02" + bytes([number]) + struct.pack(">H", len(value)) + value
    records = field(80, b"Ann Person") + field(55, b"20210203") + field(90, b"Town")
    header = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(records))
    block = header + records + b"\0" * (len(records) % 2)
    content = saved(PHOTO, "jpeg", comment="hidden words")
    return content[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + content[2:] + b"hidden words"


def with_thumbnail() -> bytes:
    "Make a JPEG with a thumbnail of 4 × 1 pixels in its first segment."
    content = saved(PHOTO, "jpeg")
    assert content[2:6] == b"\xff\xe0\0\x10"
    return content[:4] + b"\0\x1c" + content[6:18] + b"\4\1hidden words" + content[20:]


DEEP = Image.fromarray(np.asarray(PHOTO.convert("L")).astype(np.uint16) * 257)
EVERYTHING = {"date", "maker note", "name", "place", "serial number", "text"}
FILES: dict[str, tuple[Callable[[], bytes], set[str]]] = {
    "exif.jpg": (lambda: saved(PHOTO, "jpeg", exif=exif(6), icc_profile=PROFILE, comment="hidden words"), EVERYTHING),
    "progressive.jpg": (lambda: saved(PHOTO, "jpeg", exif=exif(3), progressive=True, restart_marker_rows=1),
                        EVERYTHING),
    "print.jpg": (lambda: saved(PHOTO.convert("CMYK"), "jpeg", exif=exif()), EVERYTHING),
    "xmp.jpg": (lambda: saved(PHOTO, "jpeg", xmp=XMP), {"date", "name", "serial number"}),
    "iptc.jpg": (with_iptc, {"date", "name", "place", "text"}),
    "thumbnail.jpg": (with_thumbnail, set()),
    "several.jpg": (lambda: saved(PHOTO, "mpo", save_all=True, append_images=[PHOTO.rotate(180)], exif=exif(8)),
                    EVERYTHING),
    "exif.png": (lambda: saved(PHOTO, "png", exif=exif(5), icc_profile=PROFILE), EVERYTHING),
    "text.png": (lambda: saved(PHOTO, "png", pnginfo=png_text()), {"date", "name", "serial number", "text"}),
    "late.png": (late_text, {"date", "name"}),
    "deep.png": (lambda: saved(DEEP, "png", exif=exif(2)), EVERYTHING),
    "palette.png": (lambda: saved(PHOTO.quantize(16), "png", transparency=3, exif=exif()), EVERYTHING),
    "exif.webp": (lambda: saved(PHOTO, "webp", exif=exif(7), xmp=XMP, quality=60), EVERYTHING),
    "glass.webp": (lambda: saved(PHOTO.convert("RGBA"), "webp", lossless=True, exif=exif()), EVERYTHING),
    "exif.tif": (lambda: saved(PHOTO, "tiff", exif=exif(6), compression="tiff_lzw"), {"date", "name", "text"}),
    "comment.gif": (lambda: saved(PHOTO.quantize(32), "gif", comment="hidden words"), {"text"}),
    "plain.bmp": (lambda: saved(PHOTO, "bmp"), set()), "plain.jpg": (lambda: saved(PHOTO, "jpeg"), set()),
    "plain.png": (lambda: saved(PHOTO, "png"), set()), "plain.pgm": (lambda: saved(PHOTO.convert("L"), "ppm"), set()),
}


@pytest.mark.parametrize("name", FILES)
def test_private_kinds_are_found_and_stripped_copy_has_none(name: str, tmp_path: Path) -> None:
    make, kinds = FILES[name]
    source, target = tmp_path/name, tmp_path/f"clean-{name}"
    source.write_bytes(make())
    found = inspect_metadata(source)
    assert kinds <= set(found["private"].split(", ")) and not any(s.decode() in str(found) for s in SECRETS)
    assert found["private"] or not kinds
    target.write_bytes(strip_metadata(source))
    content = target.read_bytes()
    assert inspect_metadata(target) == dict(private="", camera="")
    assert not any(secret in content for secret in (*SECRETS, b"Maker", b"Town"))
    assert np.array_equal(np.asarray(open_image(source)), np.asarray(open_image(target)))
    with Image.open(source) as a, Image.open(target) as b:
        assert a.mode == b.mode and all(a.info.get(key) == b.info.get(key) for key in ("icc_profile", "gamma"))
        if a.format in ("JPEG", "PNG", "WEBP"):
            assert a.format == b.format and np.array_equal(np.asarray(a), np.asarray(b))


def test_stripping_keeps_compressed_pixels_of_jpeg(tmp_path: Path) -> None:
    (tmp_path/"a.jpg").write_bytes(FILES["exif.jpg"][0]())
    before, after = (tmp_path/"a.jpg").read_bytes(), strip_metadata(tmp_path/"a.jpg")
    scan_of = lambda content: content[content.index(b"\xff\xda"):]
    assert scan_of(before) == scan_of(after) and len(after) < len(before)


def test_empty_entries_and_exposure_are_not_private(tmp_path: Path) -> None:
    block = Image.Exif()
    block[0x013B], block[0x0132] = "   ", "0000:00:00 00:00:00"
    block.get_ifd(0x8769)[0x829A] = 0.01
    xmp = XMP.replace(b"aux:SerialNumber", b"exif:ExposureTime")
    xmp = xmp.replace(b"xmp:CreateDate", b"xmp:CreatorTool").replace(b"dc:creator", b"dc:format")
    PHOTO.save(tmp_path/"a.jpg", exif=block, xmp=xmp)
    assert inspect_metadata(tmp_path/"a.jpg")["private"] == ""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    "Write every file above into two classes, and some that cannot be copied."
    folder = tmp_path/"data"
    for label in "ab":
        (folder/label).mkdir(parents=True)
        for name, (make, _) in FILES.items(): (folder/label/name).write_bytes(make())
    moving = dict(save_all=True, append_images=[PHOTO.rotate(90).quantize(8)], comment="hidden words")
    (folder/"a/moving.gif").write_bytes(saved(PHOTO.quantize(8), "gif", **moving))
    (folder/"a/cut.jpg").write_bytes(FILES["exif.jpg"][0]()[:-200])
    (folder/"b/note.txt").write_text("Ann Person")
    return folder


def test_copy_of_folder_has_no_metadata(folder: Path, tmp_path: Path) -> None:
    out = tmp_path/"out"
    done = copy_without_metadata(folder, out, lambda fraction, text: None)
    refused = dict(zip(done.path, done.refused))
    assert refused["a/cut.jpg"] == "it is cut off" and "several frames" in refused["a/moving.gif"]
    copied = scan_dataset(out)
    assert (done.refused != "").sum() == 2 and set(copied.path) == set(done.path[done.refused == ""])
    assert not (out/"b/note.txt").exists()
    for path in copied.path:
        assert np.array_equal(np.asarray(open_image(out/path)), np.asarray(open_image(folder/path))), path
    assert check_privacy(read_metadata(out, copied)).findings.empty
    assert len(check_privacy(read_metadata(folder, scan_dataset(folder))).paths) == 32
    assert not any(secret in p.read_bytes() for p in out.rglob("*.*") for secret in SECRETS)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data", "out"], "nothing half-written is left"
    with pytest.raises(UsageError, match="exists already"): copy_without_metadata(folder, out)
    with pytest.raises(UsageError, match="inside the data folder"): copy_without_metadata(folder, folder/"out")


@pytest.mark.parametrize("ending", ["csv", "tsv", "parquet"])
def test_copy_of_table_keeps_its_rows(ending: str, folder: Path, tmp_path: Path) -> None:
    place = tmp_path/"tables"
    place.mkdir()
    (place/"own.jpg").write_bytes(FILES["exif.jpg"][0]())
    paths = ["own.jpg", "../data/a/exif.png", str(folder/"b/exif.webp"), "own.jpg", "../data/a/cut.jpg"]
    rows = pd.DataFrame(dict(path=paths, label=list("aabab"), weight=["007", "1.50", "", "007", "x"]))
    sep = "\t" if ending == "tsv" else ","
    if ending == "parquet": rows.to_parquet(place/"t.parquet")
    else: rows.to_csv(place/f"t.{ending}", index=False, sep=sep)
    done = copy_without_metadata(place/f"t.{ending}", tmp_path/"out")
    copied = tmp_path/f"out/t.{ending}"
    as_text = dict(sep=sep, dtype=str, keep_default_na=False)
    again = pd.read_parquet(copied) if ending == "parquet" else pd.read_csv(copied, **as_text)
    assert again.drop(columns="path").equals(rows.drop(columns="path"))
    assert again.path[0] == again.path[3] == "own.jpg"
    assert [*done.refused] == ["", "", "", "it is cut off"]
    for path in again.path[:4]:
        assert inspect_metadata(tmp_path/"out"/path)["private"] == ""
        assert not Path(path).is_absolute() and ".." not in path


def test_failed_copy_leaves_no_files(folder: Path, tmp_path: Path) -> None:
    def stop(fraction: float, text: str) -> None: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): copy_without_metadata(folder, tmp_path/"out", stop)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["data"]


def broken_png() -> bytes:
    content = bytearray(saved(PHOTO, "png"))
    content[60:90] = bytes(30)
    return content


FAULTS = {
    "missing.png": (None, "missing"),
    "empty.png": (lambda: b"", "empty"),
    "text.jpg": (lambda: b"dear diary", "no_image"),
    "cut.jpg": (lambda: saved(PHOTO, "jpeg", quality=95)[:1500], "truncated"),
    "cut.png": (lambda: saved(PHOTO, "png")[:3000], "truncated"),
    "huge.png": (_huge_header, "too_large"),
    "large.png": (lambda: _huge_header(10_000), "too_large"),
    "broken.png": (broken_png, "broken"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_unreadable_file_is_found_with_its_kind(name: str, tmp_path: Path) -> None:
    make, kind = FAULTS[name]
    if make: (tmp_path/name).write_bytes(make())
    with pytest.raises(UnreadableImage) as raised: open_image(tmp_path/name)
    assert raised.value.kind == kind
    PHOTO.save(tmp_path/"a.png")
    PHOTO.rotate(90).save(tmp_path/"b.png")
    table = inspect_images(tmp_path, pd.DataFrame(dict(path=[name, "a.png", "b.png"], label=list("aab"), split="")))
    found = check_integrity(tmp_path, table)[0]
    assert found.paths == [name] and table.kind.tolist() == [kind, "", ""]
    assert str(tmp_path) not in found.findings.reason[0]


def test_integrity_finds_wrong_endings_frames_colours_and_sizes(tmp_path: Path) -> None:
    for i in range(30): PHOTO.rotate(i).save(tmp_path/f"{i}.png")
    Image.new("RGB", (80, 48), (9, 200, 9)).save(tmp_path/"green.png")
    Image.new("RGB", (80, 48), (255, 255, 255)).save(tmp_path/"white.png")
    PHOTO.resize((1, 1)).save(tmp_path/"dot.png")
    PHOTO.resize((800, 12)).save(tmp_path/"long.png")
    (tmp_path/"jpeg.png").write_bytes(saved(PHOTO, "jpeg"))
    (tmp_path/"several.jpg").write_bytes(FILES["several.jpg"][0]())
    PHOTO.save(tmp_path/"moving.webp", save_all=True, append_images=[PHOTO.rotate(90)], lossless=True)
    listed = [dict(path=p.name, label=p.name[0], split="") for p in sorted(tmp_path.iterdir())]
    table = inspect_images(tmp_path, pd.DataFrame(listed))
    found = {c.name: c.paths for c in check_integrity(tmp_path, table)}
    assert found == dict(unreadable=[], wrong_ending=["jpeg.png"], animated=["moving.webp"],
                         one_colour=["dot.png", "green.png", "white.png"],
                         odd_size=["dot.png"], odd_aspect=["long.png"])


def test_quality_thresholds_depend_on_the_set(tmp_path: Path) -> None:
    "Among dark photographs no one is flagged as dark, and the blurred one is flagged."
    from sklearn.datasets import load_sample_images
    photos = [Image.fromarray(p) for p in load_sample_images().images]
    for i in range(120):
        u, v = (int(x) for x in rng.integers(0, 300, 2))
        part = photos[i % 2].crop((u, v, u + 100, v + 100)).resize((64, 64)).point(lambda level: level * 0.25)
        if i == 7: part = part.filter(ImageFilter.GaussianBlur(4))
        part.save(tmp_path/f"{i:03}.png")
    files = sorted(tmp_path.iterdir())
    listed = pd.DataFrame([dict(path=p.name, label=str(i % 2), split="") for i, p in enumerate(files)])
    table = inspect_images(tmp_path, listed, measure=measure_appearance)
    found = {c.name: c.paths for c in check_quality(tmp_path, table)}
    assert found["blurry"] == ["007.png"] and found["dark"] == [] and found["bright"] == []


def write_table(folder: Path, images: list[Image.Image]) -> pd.DataFrame:
    "Save images of two classes and inspect them."
    for i, image in enumerate(images): image.save(folder/f"{i:03}.png")
    listed = [dict(path=f"{i:03}.png", label="ab"[i % 2], split="") for i in range(len(images))]
    return inspect_images(folder, pd.DataFrame(listed), measure=measure_appearance)


@pytest.mark.parametrize("size", [(280, 1), (1, 20_000), (20_000, 1), (20_000, 3), (129, 1), (128, 1), (1, 1)], ids=str)
def test_strip_passes_every_check_of_quality(size: tuple[int, int], tmp_path: Path) -> None:
    strip = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
    table = write_table(tmp_path, [PHOTO.rotate(i) for i in range(20)] + [strip])
    assert table.ok.all() and table[["dark", "blurry", "flat"]].notna().all(axis=None)
    checks = {c.name: c.paths for c in [*check_integrity(tmp_path, table), *check_quality(tmp_path, table)]}
    assert ("020.png" in checks["odd_aspect"]) == (max(size) > 1)


def test_set_of_nearly_black_images_is_said_and_found(tmp_path: Path) -> None:
    "Twelve bits that were taken for sixteen: no image is darker than the others."
    table = write_table(tmp_path, [PHOTO.rotate(i).point(lambda level: level // 16) for i in range(24)])
    found = {c.name: c for c in check_quality(tmp_path, table)}
    assert len(found["dark"].paths) == len(found["low_information"].paths) == 24 and not found["bright"].paths
    assert "like most images of the set" in found["dark"].findings.reason[0]
    notes = whole_set_notes(table)
    assert notes[0].startswith("24 of 24 images are nearly black") and "one level" in notes[1] and len(notes) == 2
    assert "audit.depth" in notes[0]
    assert not whole_set_notes(write_table(tmp_path, [PHOTO.rotate(i) for i in range(24)]))


def test_set_of_images_of_one_colour_passes_the_checks_and_is_said(tmp_path: Path) -> None:
    table = write_table(tmp_path, [Image.new("RGB", (9, 9), (200, 10 * i, 100)) for i in range(12)])
    checks = {c.name: len(c.paths) for c in [*check_integrity(tmp_path, table), *check_quality(tmp_path, table)]}
    assert checks["one_colour"] == 12 and checks["dark"] == 0
    assert whole_set_notes(table)[0].startswith("12 of 12 images have one colour only")


def test_unreadable_files_are_planted_beyond_the_limit_on_pixels(tmp_path: Path, monkeypatch) -> None:
    "An image within the limit would be given its memory before it is found to be cut off."
    planted = []
    monkeypatch.setattr(quality, "_huge_header", lambda side: planted.append(side) or _huge_header(side))
    table = write_table(tmp_path, [PHOTO.rotate(i) for i in range(4)])
    validation = check_integrity(tmp_path, table, decoding=Decoding(max_megapixels=5000))[0].validation
    assert validation.recall_by_kind["too_large"].value == 1 and planted[0] ** 2 > 5000 * 10**6


def test_too_large_image_is_reported_with_the_remedy(tmp_path: Path) -> None:
    images = [PHOTO.rotate(i) for i in range(4)]
    for i, image in enumerate(images): image.save(tmp_path/f"{i}.png")
    listed = pd.DataFrame([dict(path=f"{i}.png", label="ab"[i % 2], split="") for i in range(4)])
    PHOTO.resize((2000, 1000)).save(tmp_path/"3.png")
    table = inspect_images(tmp_path, listed, decoding=Decoding(max_megapixels=1))
    reason = check_integrity(tmp_path, table)[0].findings.reason[0]
    assert "2 megapixels, more than max_megapixels=1; set audit.max_megapixels=2" in reason


def test_copy_that_would_lose_bits_is_refused(tmp_path: Path) -> None:
    "Pillow opens 16 bits per channel, and saves 8."
    from tifffile import imwrite
    for label in "ab":
        (tmp_path/"data"/label).mkdir(parents=True)
        PHOTO.save(tmp_path/"data"/label/"plain.png")
    imwrite(tmp_path/"data/a/deep.tif", rng.integers(0, 65_536, (16, 16, 3), dtype=np.uint16), photometric="rgb")
    copies = copy_without_metadata(tmp_path/"data", tmp_path/"out").set_index("path")
    assert copies.refused["a/deep.tif"] == "its pixels would change" and copies.refused["a/plain.png"] == ""


def test_notes_on_pixels_are_printed_by_a_run_and_those_on_folders_once() -> None:
    report = AuditReport("x", 2, 2, [], notes=["layout: CLASS", "2 images have more than 8 bits"])
    manifest = pd.DataFrame(dict(path=["a", "b"], ok=True, error="", kind=""))
    said = [note["text"] for note in audit_notes(report, manifest, ["layout: CLASS"])]
    assert said == ["2 images have more than 8 bits"]
