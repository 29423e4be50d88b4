"""One planted example of each kind of image that users have, with its defined result."""
from __future__ import annotations

import ast
import io
import json
import os
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageCms, ImageOps, TiffImagePlugin

from cvnb.audit.privacy import inspect_metadata, strip_metadata
from cvnb.core.errors import UsageError
from cvnb.core.files import read_json
from cvnb.data import images
from cvnb.data.dataset import scan_dataset
from cvnb.data.images import Decoding, UnreadableImage, inspect_image, inspect_images, load_images, open_image
from cvnb.data.listing import IMAGE_FORMATS, list_images
from cvnb.data.tables import read_manifest
from cvnb.export.runtimes import read_pixels

CVNB = Path(sys.executable).with_name("cvnb")
rng = np.random.default_rng(0)
PHOTO = Image.fromarray(np.kron(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))


def encode(kind: str, image: Image.Image = PHOTO, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png_chunk(name: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def huge_header() -> bytes:
    "A PNG of 60,000 × 60,000 pixels, as far as its header says."
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", b"") + png_chunk(b"IEND", b"")


def rotated() -> bytes:
    "A JPEG that its metadata rotate by 90 degrees."
    exif = Image.Exif()
    exif[0x0112] = 6
    return encode("jpeg", PHOTO.crop((0, 0, 64, 16)), exif=exif)


def pixels(path: Path) -> np.ndarray: return np.asarray(open_image(path)).astype(int)


UNREADABLE = {
    "truncated.jpg": (lambda: encode("jpeg", quality=95)[:700], "it is cut off"),
    "empty.png": (lambda: b"", "it is empty"),
    "text.jpg": (lambda: b"dear diary", "its bytes are no image"),
    "huge.png": (huge_header, "3,600 megapixels, more than max_megapixels=90; set audit.max_megapixels=3600"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_image_is_recorded_with_its_reason(name, tmp_path):
    make, reason = UNREADABLE[name]
    (tmp_path/name).write_bytes(make())
    with pytest.raises(ValueError, match=reason): open_image(tmp_path/name)
    found = inspect_image(tmp_path/name)
    assert not found["ok"] and reason in found["error"] and str(tmp_path) not in found["error"]


def test_file_without_read_permission_is_recorded_as_unreadable(tmp_path):
    (tmp_path/"secret.png").write_bytes(encode("png"))
    (tmp_path/"secret.png").chmod(0)
    is_root = os.geteuid() == 0
    if is_root: os.seteuid(65534)   # the user nobody
    try: found = inspect_image(tmp_path/"secret.png")
    finally:
        if is_root: os.seteuid(0)
    assert not found["ok"] and "Permission denied" in found["error"]


# Metadata


@pytest.mark.parametrize("info", [b"II*\0", b"junkjunk", b""], ids=repr)
def test_malformed_exif_leaves_the_pixels_as_they_are(tmp_path, info):
    content = encode("png")
    (tmp_path/"x.png").write_bytes(content[:33] + png_chunk(b"eXIf", info) + content[33:])   # after the header
    assert inspect_image(tmp_path/"x.png")["ok"] and np.array_equal(pixels(tmp_path/"x.png"), np.asarray(PHOTO))


def test_orientation_is_applied_beside_malformed_metadata(tmp_path):
    "Pillow can read a resolution that is text, but cannot write it."
    entries = struct.pack(">HHIHH", 0x0112, 3, 1, 6, 0) + struct.pack(">HHI", 0x011A, 2, 3) + b"72\0\0"
    exif = b"Exif\0\0MM\0*" + struct.pack(">IH", 8, 2) + entries + b"\0" * 4
    (tmp_path/"x.jpg").write_bytes(encode("jpeg", PHOTO.crop((0, 0, 64, 16)), exif=exif))
    assert pixels(tmp_path/"x.jpg").shape == (64, 16, 3)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("pages", [1, 2])
def test_orientation_of_a_tiff_is_applied_once(tmp_path, orientation, pages):
    "Pillow applies it while it loads a TIFF, and forgets that if it counts several pages."
    wide = PHOTO.crop((0, 0, 64, 16))
    exif = Image.Exif()
    exif[0x0112] = orientation
    wide.save(tmp_path/"x.tif", tiffinfo={0x0112: orientation}, save_all=True, append_images=[wide] * (pages - 1))
    wide.save(tmp_path/"x.png", exif=exif)
    with Image.open(tmp_path/"x.png") as image: expected = np.asarray(ImageOps.exif_transpose(image))
    for name in "x.tif", "x.png": assert np.array_equal(pixels(tmp_path/name), expected), name


def test_tiff_with_a_description_of_the_wrong_type_is_recorded_as_broken(tmp_path):
    "Pillow looks for an orientation in it while it loads the pixels."
    entries = TiffImagePlugin.ImageFileDirectory_v2()
    entries.tagtype[700] = 2   # text in place of bytes
    entries[700] = "<x:xmpmeta/>"
    PHOTO.save(tmp_path/"x.tif", tiffinfo=entries)
    found = inspect_image(tmp_path/"x.tif")
    assert not found["ok"] and found["kind"] == "broken"


# Pixels


def test_too_large_image_is_refused_in_every_thread(tmp_path):
    PHOTO.save(tmp_path/"large.png")      # 64 × 64
    PHOTO.crop((0, 0, 8, 8)).save(tmp_path/"small.png")
    paths = [tmp_path/"large.png", tmp_path/"small.png"] * 100
    inspect = lambda path: inspect_image(path, decoding=Decoding(max_megapixels=0.003))
    with ThreadPoolExecutor(8) as pool: found = list(pool.map(inspect, paths))
    assert {(f["ok"], f["kind"]) for f in found[::2]} == {(False, "too_large")} and all(f["ok"] for f in found[1::2])
    assert found[0]["error"].startswith("64 × 64 pixels are 0.004096 megapixels, more than max_megapixels=0.003; set ")


@pytest.mark.parametrize("pixels", [(12_000, 8_000), (20_000, 10_000)], ids=["96 MP", "200 MP, refused by Pillow"])
def test_limit_on_pixels_is_raised_by_the_parameter(tmp_path, monkeypatch, pixels):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)   # the limit is raised for the process
    Image.new("L", pixels).save(tmp_path/"scan.png")
    n = pixels[0] * pixels[1] // 10**6
    with pytest.raises(images.UnreadableImage) as refused: open_image(tmp_path/"scan.png")
    assert refused.value.kind == "too_large" and f"{n} megapixels, more than max_megapixels=90" in str(refused.value)
    assert f"set audit.max_megapixels={n}" in str(refused.value)
    assert open_image(tmp_path/"scan.png", Decoding(max_megapixels=n)).size == pixels


def test_cached_facts_follow_the_limit_on_pixels(write_classes, tmp_path, monkeypatch):
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    PHOTO.resize((100, 100)).save(folder/"a/large.png")
    table = scan_dataset(folder)
    ok = lambda limit: inspect_images(folder, table, decoding=Decoding(max_megapixels=limit)).ok.sum()
    assert [ok(limit) for limit in (1, 0.009, 1, 0.009)] == [7, 6, 7, 6]


def test_every_pixel_format_becomes_rgb_as_a_viewer_shows_it(tmp_path):
    rgb = np.asarray(PHOTO).astype(int)
    grey = np.asarray(PHOTO.convert("L")).astype(int)
    grey_rgb = np.repeat(grey[..., None], 3, 2)

    def read(name: str, kind: str, image: Image.Image, **options: object) -> np.ndarray:
        (tmp_path/name).write_bytes(encode(kind, image, **options))
        return pixels(tmp_path/name)

    assert np.abs(read("16bit.png", "png", Image.fromarray((grey * 257).astype(np.uint16))) - grey_rgb).max() <= 1
    assert np.abs(read("float.tif", "tiff", Image.fromarray((grey / 255).astype(np.float32))) - grey_rgb).max() <= 1
    assert np.abs(read("cmyk.jpg", "jpeg", PHOTO.convert("CMYK"), quality=100, subsampling=0) - rgb).mean() < 3
    assert np.array_equal(read("grey.png", "png", PHOTO.convert("L")), grey_rgb)
    assert np.abs(read("palette.gif", "gif", PHOTO.quantize(255)) - rgb).mean() < 3
    glass = PHOTO.copy()
    glass.putalpha(Image.fromarray(np.tile(np.where(np.arange(64) < 32, 0, 255).astype(np.uint8), (64, 1))))
    for transparent in read("glass.png", "png", glass), read("glass.webp", "webp", glass, lossless=True):
        assert (transparent[:, :32] == 255).all() and np.array_equal(transparent[:, 32:], rgb[:, 32:])
    more = [Image.new("P", (64, 64))] * 3
    animation = read("moving.gif", "gif", PHOTO.quantize(255), save_all=True, append_images=more)
    assert np.abs(animation - rgb).mean() < 3, "the first frame"
    assert read("dot.png", "png", PHOTO.crop((0, 0, 1, 1))).shape == (1, 1, 3)
    (tmp_path/"rotated.jpg").write_bytes(rotated())
    assert pixels(tmp_path/"rotated.jpg").shape == (64, 16, 3)


def test_images_are_made_smaller_as_pillow_does_it(tmp_path):
    "Bilinear over all pixels that a smaller one covers; without antialiasing three of four pixels would not count."
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    noise.save(tmp_path/"x.png")
    expected = np.asarray(noise.resize((16, 16), Image.Resampling.BILINEAR)).astype(int)
    assert np.abs(load_images(tmp_path, ["x.png"], 16)[0] - expected).max() <= 1


def test_unusable_colour_profile_leaves_the_pixels_as_they_are(tmp_path):
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()   # made for images of another mode
    for name, profile in dict(own=srgb, broken=b"no profile", other=lab).items():
        PHOTO.save(tmp_path/f"{name}.png", icc_profile=profile)
        assert np.array_equal(pixels(tmp_path/f"{name}.png"), np.asarray(PHOTO)), name


def test_colour_profile_is_converted_to_srgb(tmp_path):
    "The profile has red and blue swapped, and another name."
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    n_tags = struct.unpack(">I", profile[128:132])[0]
    places = {bytes(profile[132 + 12 * i:136 + 12 * i]): 136 + 12 * i for i in range(n_tags)}
    red = places[b"rXYZ"]
    blue = places[b"bXYZ"]
    profile[red:red + 8], profile[blue:blue + 8] = profile[blue:blue + 8], profile[red:red + 8]
    renamed = bytes(profile).replace("sRGB".encode("utf-16-be"), "oRGB".encode("utf-16-be")).replace(b"sRGB", b"oRGB")
    PHOTO.save(tmp_path/"swapped.png", icc_profile=renamed)
    assert np.abs(pixels(tmp_path/"swapped.png") - np.asarray(PHOTO).astype(int)[..., ::-1]).mean() < 3


# Inspecting and loading


def test_inspect_images_counts_unreadable_images_and_refuses_too_few_classes(write_classes, tmp_path):
    folder = write_classes(tmp_path/"data", cat=4, dog=4)
    cut = folder/"cat/0-1.png"
    cut.write_bytes(cut.read_bytes()[:50])
    found = inspect_images(folder, scan_dataset(folder))
    assert found[~found.ok].path.tolist() == ["cat/0-1.png"] and found[~found.ok].error.item()
    for path in (folder/"cat").iterdir(): path.write_bytes(b"")
    with pytest.raises(UsageError, match="4 of 8 images cannot be read, and fewer than two classes are left"):
        inspect_images(folder, scan_dataset(folder))


def test_images_are_read_without_a_writable_cache(write_classes, tmp_path, monkeypatch):
    (tmp_path/"file").touch()
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"file"))
    folder = write_classes(tmp_path/"data", cat=4, dog=4)
    found = inspect_images(folder, scan_dataset(folder))
    assert load_images(folder, found.path, 4, digests=found.file_sha256).shape == (8, 4, 4, 3)


def test_file_that_was_missing_for_a_moment_is_inspected_again(write_classes, tmp_path, monkeypatch):
    monkeypatch.setenv("CVNB_CACHE", str(tmp_path/"cache"))
    folder = write_classes(tmp_path/"photos", a=3, b=3)
    table = scan_dataset(folder)
    missing = []

    def flaky(path: Path, *more: object) -> dict:
        if path.stem == "0-0" and len(missing) < 2:
            missing.append(path)
            path = path.with_suffix(".gone")
        return inspect_image(path, *more)

    monkeypatch.setattr(images, "inspect_image", flaky)
    first = inspect_images(folder, table)
    assert len(missing) == 2 and not first.ok.all() and inspect_images(folder, table).ok.all()


@pytest.mark.slow
def test_audit_handles_every_kind_of_image_and_keeps_groups_together(write_classes, tmp_path):
    folder = write_classes(tmp_path/"images", cat=40, dog=40)
    moving = encode("gif", PHOTO.quantize(9), save_all=True, append_images=[Image.new("P", (64, 64))])
    kinds = {name: make() for name, (make, _) in UNREADABLE.items()}
    kinds |= {"rotated.jpg": rotated(), "dot.png": encode("png", PHOTO.crop((0, 0, 1, 1))), "moving.gif": moving,
              "print.jpg": encode("jpeg", PHOTO.convert("CMYK")), "line\nbreak 猫.png": encode("png", PHOTO.rotate(90))}
    for name, content in kinds.items(): (folder/"cat"/name).write_bytes(content)
    rows = [dict(path=f"images/{p}", label=p.split("/")[0], group=f"person {i % 11}", camera="ab"[i % 2])
            for i, p in enumerate(list_images(folder))]
    pd.DataFrame(rows).to_csv(tmp_path/"t.csv", index=False)
    command = [CVNB, "run", "audit", "--data", tmp_path/"t.csv", "--run", tmp_path/"run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    unreadable = {f"images/cat/{name}" for name in UNREADABLE}
    manifest = pd.read_parquet(tmp_path/"run/audit/manifest.parquet")
    assert set(manifest[~manifest.ok].path) == unreadable and len(manifest) == 89
    ok = read_manifest(tmp_path/"run/audit/manifest.parquet")
    assert ok.groupby("group").split.nunique().max() == 1 and set(ok.split) == {"train", "val", "test"}
    assert set(ok.meta_camera) == {"a", "b"}
    audit = read_json(tmp_path/"run/audit/audit.json")
    metric = read_json(tmp_path/"run/audit/stage.json")["metrics"]["n_unreadable"]
    assert audit["n_unreadable"] == metric["value"] == 4
    assert {u["path"] for u in audit["unreadable"]} == unreadable and all(u["error"] for u in audit["unreadable"])
    status = subprocess.run([CVNB, "status", tmp_path/"run", "--json"], capture_output=True, text=True).stdout
    assert json.loads(status)["stages"][0]["state"] == "fresh"


# Formats


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"


@pytest.fixture
def ghostscript(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    "The file that a stand-in for Ghostscript on the search path writes when it is started."
    from PIL import EpsImagePlugin
    started = tmp_path/"started"
    (tmp_path/"bin").mkdir()
    (tmp_path/"bin/gs").write_text(f"#!/bin/sh\ntouch {started}\necho 10.0.0\n")
    (tmp_path/"bin/gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path/'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return started


def test_postscript_in_a_png_is_no_image_and_starts_no_program(tmp_path, ghostscript):
    (tmp_path/"x.png").write_bytes(POSTSCRIPT)
    with pytest.raises(UnreadableImage, match="its bytes are EPS, and the formats that are read are JPEG, PNG,") as e:
        open_image(tmp_path/"x.png")
    assert len(str(e.value).splitlines()) == 1
    assert inspect_image(tmp_path/"x.png")["kind"] == "unsupported"
    assert inspect_metadata(tmp_path/"x.png") == dict(private="", camera="")
    for call in images.read_deep_values, strip_metadata:
        with pytest.raises((UnreadableImage, OSError)): call(tmp_path/"x.png")
    with pytest.raises(UsageError, match=r"x\.png is not an image that can be read \(its bytes are EPS"):
        read_pixels(tmp_path/"x.png")
    assert not ghostscript.exists()


@pytest.mark.parametrize("format_", ["PCX", "SGI", "DDS", "EPS"])
def test_format_that_is_not_documented_is_refused(format_, tmp_path):
    PHOTO.save(tmp_path/"x.jpg", format_)
    with pytest.raises(UnreadableImage, match=rf"{format_}, and the formats that are read are"):
        open_image(tmp_path/"x.jpg")


def test_every_documented_format_is_read_whatever_its_ending(tmp_path):
    written = [f for f in IMAGE_FORMATS if f in Image.SAVE or Image.init() and f in Image.SAVE]
    assert {"JPEG", "PNG", "BMP", "GIF", "TIFF", "WEBP", "PPM", "TGA", "ICO"} <= {*written}
    several = dict(MPO=dict(save_all=True, append_images=[PHOTO]))
    for format_ in [*written, "MPO", "DIB"]:
        PHOTO.save(tmp_path/"x.png", format_, **several.get(format_, {}))
        assert inspect_image(tmp_path/"x.png")["format"] == format_


def test_each_call_that_opens_an_image_names_formats(root):
    nodes = [(path, node) for path in (root/"cvnb").rglob("*.py") for node in ast.walk(ast.parse(path.read_text()))]
    calls = [(path, node) for path, node in nodes
             if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("Image.open")]
    assert calls and [path.name for path, node in calls if "formats" not in {k.arg for k in node.keywords}] == []
