"""Planted data sets of every depth: one scale, found from the training images, for every stage."""
from __future__ import annotations

import base64
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from deep_files import png, tiff
from PIL import Image, ImageCms

from cvnb.core.errors import CvnbError, UsageError
from cvnb.data.deep_images import InspectedImages, inspect_depth
from cvnb.data.depth import PixelScale, parse_depth, scale_of_bits
from cvnb.data.images import (
    DEFAULT_DECODING,
    Decoding,
    UnreadableImage,
    inspect_images,
    load_images,
    open_image,
    read_deep_values,
)

rng = np.random.default_rng(0)
SHARES = rng.uniform(0, 1, (12, 16, 16))   # of the range of values
SHARES[:, 0, :2] = 0, 1


def write_set(
    folder: Path,
    contents: list[bytes],       # of files
    ending: str,
    splits: list[str] | None = None,
) -> pd.DataFrame:   # path, label, split
    "Write a data set of two classes."
    folder.mkdir()
    rows = []
    for i, content in enumerate(contents):
        (folder/f"{i:02}{ending}").write_bytes(content)
        rows.append(dict(path=f"{i:02}{ending}", label="ab"[i % 2], split=splits[i] if splits else ""))
    return pd.DataFrame(rows)


def levels(folder: Path, found: InspectedImages) -> np.ndarray:
    "The grey levels that training gets."
    return load_images(folder, found.table.path, 16, digests=found.table.file_sha256, decoding=found.decoding)[..., 0]


def as_png(low: float, high: float) -> Callable[[], list[bytes]]:
    return lambda: [png((low + s * (high - low)).astype(np.uint16), 0) for s in SHARES]


def as_tiff(low: float, high: float, kind: str, **options: object) -> Callable[[], list[bytes]]:
    return lambda: [tiff((low + s * (high - low)).astype(kind), **options) for s in SHARES]


def in_color(high: int) -> Callable[[], list[bytes]]:
    return lambda: [png(np.repeat((s * high).astype(np.uint16)[..., None], 3, 2), 2) for s in SHARES]


DEPTHS = {   # files, ending, name of the scale
    "8 bits in 16": (as_png(0, 255), ".png", "8 bits"),
    "8 bits in 32": (as_tiff(0, 255, "i4"), ".tif", "8 bits"),
    "10 bits": (as_png(0, 1023), ".png", "10 bits"),
    "12 bits": (as_png(0, 4095), ".png", "12 bits"),
    "12 bits, most significant byte first": (as_tiff(0, 4095, "u2", order=">"), ".tif", "12 bits"),
    "12 bits of colour": (in_color(4095), ".png", "12 bits"),
    "14 bits": (as_png(0, 16_383), ".png", "14 bits"),
    "16 bits": (as_png(0, 65_535), ".png", "16 bits"),
    "thermal camera": (as_png(29_120, 31_004), ".png", "29,120 … 31,004"),
    "32 bits": (as_tiff(0, 4e9, "u4"), ".tif", "0 … 4e+09"),
    "fractions": (as_tiff(0, 1, "f4"), ".tif", "0 … 1"),
    "floats to 255": (as_tiff(0, 255, "f4"), ".tif", "8 bits"),
    "Hounsfield units": (as_tiff(-1000, 1040, "i2"), ".tif", "-1,000 … 1,040"),
    "signed fractions": (as_tiff(-1, 1, "f4"), ".tif", "-1 … 1"),
}


@pytest.mark.parametrize("name", DEPTHS)
def test_every_depth_keeps_its_order_and_fills_the_levels(name, tmp_path, cache):
    make, ending, expected = DEPTHS[name]
    table = write_set(tmp_path/"data", make(), ending)
    found = inspect_depth(tmp_path/"data", table)
    assert found.decoding.scale.name == expected and len(found.notes) == 1 and not found.table.clipped.any()
    assert "12 images have more than 8 bits" in found.notes[0] and "audit.depth" in found.notes[0]
    got = levels(tmp_path/"data", found).astype(int)
    assert (got.min(), got.max()) == (0, 255)
    assert (np.diff(got.ravel()[SHARES.ravel().argsort()]) >= 0).all(), "the order"
    assert np.abs(got - 255 * SHARES).max() <= 1, "of all images alike"


def test_twelve_bit_set_keeps_the_order_of_its_4096_levels(tmp_path, cache):
    every = rng.permutation(4096).reshape(16, 16, 16).astype(np.uint16)
    found = inspect_depth(tmp_path/"data", write_set(tmp_path/"data", [png(v, 0) for v in every], ".png"))
    got = levels(tmp_path/"data", found).ravel()[every.ravel().argsort()].astype(int)
    assert (np.diff(got) >= 0).all() and np.ptp(got) >= 200 and len(set(got)) == 256


def test_given_validation_and_test_images_do_not_choose_the_scale(tmp_path):
    tops = [4095] * 8 + [65_535] * 4
    contents = [png((s * top).astype(np.uint16), 0) for s, top in zip(SHARES, tops)]
    splits = ["train"] * 4 + [""] * 4 + ["val", "val", "test", "test"]
    found = inspect_depth(tmp_path/"data", write_set(tmp_path/"data", contents, ".png", splits))
    assert found.decoding.scale == scale_of_bits(12) and "8 training images" in found.notes[0]
    assert (found.table.clipped > 0.8).tolist() == 8 * [False] + 4 * [True]
    assert "4 images have values outside of this scale, which are clipped" in found.notes[1]


def test_broken_pixels_do_not_stretch_the_scale(tmp_path):
    values = [(29_120 + s * 1884).astype(np.uint16) for s in SHARES]
    values[3][7, 7] = 0
    values[5][9, 9] = 65_535
    found = inspect_depth(tmp_path/"data", write_set(tmp_path/"data", [png(v, 0) for v in values], ".png"))
    assert found.decoding.scale.name == "29,120 … 31,004" and (found.table.clipped > 0).sum() == 2


def test_parameter_sets_the_scale(tmp_path):
    table = write_set(tmp_path/"data", as_png(0, 4095)(), ".png")
    assert inspect_depth(tmp_path/"data", table, "14").decoding.scale == scale_of_bits(14)
    found = inspect_depth(tmp_path/"data", table, "0..1000")
    assert found.decoding.scale.high == 1000 and found.table.clipped.mean() > 0.7 and "(audit.depth)" in found.notes[0]
    with pytest.raises(UsageError, match="depth 'twelve' is neither"): parse_depth("twelve")


def test_mixed_depths_are_said(tmp_path):
    contents = [png((s * top).astype(np.uint16), 0) for s, top in zip(SHARES, [255, 65_535] * 5)]
    Image.fromarray((SHARES[0] * 255).astype(np.uint8)).save(tmp_path/"plain.png")
    table = write_set(tmp_path/"data", [*contents, (tmp_path/"plain.png").read_bytes()], ".png")
    found = inspect_depth(tmp_path/"data", table)
    assert found.decoding.scale == scale_of_bits(16)
    assert "5 images fill less than 5% of this scale, such as 00.png (0 … 255)" in found.notes[1]
    assert "1 image has 8 bits and no scale" in found.notes[2]


def test_data_set_of_8_bits_has_the_caches_and_columns_of_before(write_classes, tmp_path, cache):
    from cvnb.data.dataset import scan_dataset
    folder = write_classes(tmp_path/"data", a=4, b=4)
    found = inspect_depth(folder, scan_dataset(folder))
    assert found.decoding == DEFAULT_DECODING and not found.notes and found.decoding.cache_suffix == ""
    assert found.table.equals(inspect_images(folder, scan_dataset(folder))) and "clipped" not in found.table
    load_images(folder, found.table.path, 8, digests=found.table.file_sha256, decoding=found.decoding)
    names = sorted(p.name for p in (cache/"rows").iterdir())
    assert [n.rpartition("-")[0] for n in names] == [f"facts-3-{Image.__version__}", f"images-3-{Image.__version__}"]
    assert [n.rpartition("-")[2] for n in names] == ["plain", "8"]
    unused = inspect_depth(folder, scan_dataset(folder), "12")
    assert unused.decoding == DEFAULT_DECODING and "audit.depth=12 changes nothing" in unused.notes[0]


def test_pixels_of_two_scales_are_cached_apart(tmp_path, cache):
    table = write_set(tmp_path/"data", as_png(0, 4095)(), ".png")
    first = levels(tmp_path/"data", inspect_depth(tmp_path/"data", table)).copy()
    second = levels(tmp_path/"data", inspect_depth(tmp_path/"data", table, "16"))
    assert first.max() == 255 and second.max() == 16
    again = inspect_depth(tmp_path/"data", table)
    assert np.array_equal(levels(tmp_path/"data", again), first)


# Layouts of files

COLOR = (SHARES[:3].transpose(1, 2, 0) * 4095).astype(np.uint16)   # (16, 16, 3)
OPAQUE = np.full((16, 16, 1), 65_535, np.uint16)
TWELVE = Decoding(scale_of_bits(12))
DEEP_FILES = {
    "rgb.png": lambda: png(COLOR, 2), "rgba.png": lambda: png(np.dstack([COLOR, OPAQUE]), 6),
    "rgb.tif": lambda: tiff(COLOR, 2), "big endian.tif": lambda: tiff(COLOR, 2, ">"),
    "rgba.tif": lambda: tiff(np.dstack([COLOR, OPAQUE]), 2, extra=2),
    "multiplied.tif": lambda: tiff(np.dstack([COLOR, OPAQUE]), 2, extra=1),
    "unused band.tif": lambda: tiff(np.dstack([COLOR, OPAQUE // 3]), 2, extra=0),
}


@pytest.mark.parametrize("name", DEEP_FILES)
def test_colour_images_keep_all_16_bits(name, tmp_path):
    (tmp_path/name).write_bytes(DEEP_FILES[name]())
    assert np.array_equal(np.asarray(open_image(tmp_path/name, TWELVE)), TWELVE.scale.to_levels(COLOR))


def test_greys_with_opacity_or_with_white_as_the_lowest_value_keep_16_bits(tmp_path):
    grey = COLOR[..., 0]
    expected = TWELVE.scale.to_levels(grey)
    (tmp_path/"glass.png").write_bytes(png(np.dstack([grey, OPAQUE]), 4))
    (tmp_path/"clear.png").write_bytes(png(np.dstack([grey, 0 * OPAQUE]), 4))
    (tmp_path/"negative.tif").write_bytes(tiff(65_535 - grey, 0))
    for name in "glass.png", "negative.tif":
        assert np.array_equal(np.asarray(open_image(tmp_path/name, TWELVE))[..., 1], expected), name
    assert (np.asarray(open_image(tmp_path/"clear.png", TWELVE)) == 255).all(), "transparent is white"


def test_orientation_of_a_deep_image_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOR[:4, :, 0].copy()).save(tmp_path/"turned.png", exif=exif)
    assert np.array_equal(read_deep_values(tmp_path/"turned.png"), np.rot90(COLOR[:4, :, 0], -1))


LAYOUTS = {   # content, what the message names
    "five.tif": (lambda: tiff(np.zeros((8, 8, 5), np.uint8), planar=2), "5 bands, 8 bits, unsigned, planes apart"),
    "half.tif": (lambda: tiff(np.zeros((8, 8), np.float16)), "1 band, 16 bits, floating point"),
    "double colour.tif": (lambda: tiff(np.zeros((8, 8, 3), np.float32), 2), "3 bands, 32 bits, floating point"),
    "planes.tif": (lambda: tiff(COLOR, 2, planar=2), "16 bits with planes apart"),
    "signed.tif": (lambda: tiff(np.zeros((8, 8), np.int8)), "signed values of 8 bits"),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_that_is_not_decoded_is_named_with_the_remedy(name, tmp_path):
    make, layout = LAYOUTS[name]
    (tmp_path/name).write_bytes(make())
    with pytest.raises(UnreadableImage) as refused: open_image(tmp_path/name)
    assert refused.value.kind == "unsupported" and layout in str(refused.value)
    assert "convert it to a PNG or TIFF" in str(refused.value)


def test_lab_and_other_modes_become_rgb(tmp_path):
    photo = Image.fromarray(np.kron(rng.integers(40, 216, (4, 4, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8)))
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    ImageCms.profileToProfile(photo, *profiles, outputMode="LAB").save(tmp_path/"lab.tif")
    for mode in "YCbCr", "CMYK": photo.convert(mode).save(tmp_path/f"{mode}.tif")
    for file in sorted(tmp_path.iterdir()):
        assert np.abs(np.asarray(open_image(file)).astype(int) - np.asarray(photo).astype(int)).max() <= 8, file.name


HEIC = ("c-muNV30{GsVvAy%}izhg51nBLl8SRGck>Ufw49>wIq=N0u(b+a*CjAhJwuG5(YG&l$nzcHpIn&fe{FSfN>#&27(kIR?f`KO9S&jqM|@"
        "fDif5KQI>27V)7MamgK^f{LL&VDge@VGYgXQfpi&AnKL6ZNN56Bk=zG{KYxGxU|`^9P5|nVaA4$N{Qn=MfElEM8HD6^F*zgxCAFLw8PQ}G"
        "C^WK8d-Y`5&K(>X1`0qSW)Q)km;_YL=E8We_&_Jn65-_hoT9wsoC=^QF9TZxP)H=RxF8kkGY2TvNX|(Fxl94-crg9{|NjR-nh8b&u|Pp)M"
        "J7liGY1C;kdnwO$b|(mFx*%hnV4Byfb5*yltfS<CulIP7jAfJJhA@&!majS<%Itox^VUXog|Gv_Y40YKCBf`{;2%Fw!-5Z_vJL+?u}ntvf"
        "Ih?eCVRdW*%=&e==OYxMOk4w-cqc$ty~i9K7*>>6^UCiO$~%8qB<56aJm6v0SPH05$f4Vg")   # 32 × 32: red beside blue


def test_heic_is_decoded_with_its_package_and_named_without(tmp_path, monkeypatch):
    from cvnb.data import images
    (tmp_path/"phone.heic").write_bytes(zlib.decompress(base64.b85decode(HEIC)))
    monkeypatch.setattr(Image, "OPEN", {name: opener for name, opener in Image.OPEN.items() if name != "HEIF"})
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.setattr(images, "_register_heif", lambda: None)
    with pytest.raises(UnreadableImage, match="HEIC image needs the package pi-heif; pip install 'cvnb.heif.'"):
        open_image(tmp_path/"phone.heic")
    pytest.importorskip("pi_heif").register_heif_opener()
    opened = open_image(tmp_path/"phone.heic")
    assert [opened.getpixel(at) for at in ((3, 3), (28, 3))] == [(200, 40, 40), (40, 40, 200)]


# Records


def test_decoding_of_an_older_run_is_that_of_before_scales(tmp_path):
    Image.fromarray(np.full((4, 4), 2560, np.uint16)).save(tmp_path/"x.png")
    assert Decoding.from_audit(dict(root="x")) == DEFAULT_DECODING
    assert (np.asarray(open_image(tmp_path/"x.png", Decoding.from_audit({}))) == 10).all()


@pytest.mark.parametrize("record", [dict(depth=5), dict(depth=dict(low=3, high=1, name="")), dict(depth=dict(low=0)),
                                    dict(max_megapixels="many")], ids=str)
def test_damaged_record_of_a_decoding_is_refused(record):
    with pytest.raises(CvnbError, match="does not say how images are decoded"): Decoding.from_json(record)


def test_record_of_a_decoding_is_read_again():
    decoding = Decoding(PixelScale(29_120, 31_004, "29,120 … 31,004"), 400)
    assert Decoding.from_json(decoding.to_json()) == decoding


def test_module_of_the_scale_needs_no_heavy_package():
    import subprocess
    code = "import cvnb.data.depth, cvnb.data.images, sys; assert not {'torch', 'pandas'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_features_of_two_scales_are_cached_apart(tmp_path, cache):
    from cvnb.audit.embeddings import compute_embeddings, feature_views
    table = write_set(tmp_path/"data", as_png(0, 4095)(), ".png")
    views = []
    for depth in "auto", "16", "auto":
        found = inspect_depth(tmp_path/"data", table, depth)
        keys = found.table.file_sha256
        images = load_images(tmp_path/"data", table.path, 64, digests=keys, decoding=found.decoding)
        vectors = compute_embeddings(images, keys, decoding=found.decoding)
        views.append(feature_views(images, vectors, keys, found.decoding))
    for name in "network", "edges":
        assert np.array_equal(views[0][name], views[2][name]) and not np.allclose(views[0][name], views[1][name]), name
