"""The bundle decodes apart from training: equal pixels for every kind of image, and a fault of one side is seen."""
from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from bundles import make_bundle
from deep_files import png, tiff
from PIL import Image, ImageCms

from cvnb.core.errors import CvnbError, UsageError
from cvnb.data import images
from cvnb.data.depth import scale_of_bits
from cvnb.data.images import DEFAULT_DECODING, Decoding, UnreadableImage, open_image
from cvnb.export import pixels
from cvnb.export.bundle import Bundle, to_image_array
from cvnb.export.decoding_parity import compare_decodings
from cvnb.export.onnx import export_onnx
from cvnb.export.parity import check_parity
from cvnb.export.pixels import decode_pixels
from cvnb.models.weights import create_model

rng = np.random.default_rng(0)
GLASS = Image.fromarray(rng.integers(0, 256, (12, 9, 4), dtype=np.uint8))
PHOTO = GLASS.convert("RGB")
DEEP = rng.integers(0, 65_536, (12, 9, 4), dtype=np.uint16)
FRACTIONS = rng.uniform(-0.1, 1.1, (12, 9)).astype(np.float32)
FRACTIONS[0, :3] = np.nan, np.inf, -np.inf
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()   # fits no RGB file
DECODINGS = [DEFAULT_DECODING, Decoding(scale_of_bits(12)), Decoding(scale_of_bits(16))]


def linear_profile() -> bytes:
    "A profile with the primaries of sRGB and another tone curve."
    body = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    assert body.count(b"para") == 1 or body.count(b"curv"), "the curve is where this test expects it"
    at = body.index(b"para")
    body[at:at + 16] = b"para" + bytes(8) + (65_536).to_bytes(4, "big")   # x to the power of 1
    return bytes(body.replace("sRGB".encode("utf-16-be"), "flat".encode("utf-16-be")))


def saved(image: Image.Image, **options: object) -> Callable[[Path], None]:
    return lambda path: image.save(path, **options)


def written(content: bytes) -> Callable[[Path], None]: return lambda path: path.write_bytes(content) and None


def kinds() -> dict[str, Callable[[Path], None]]:   # file name -> writes it
    "One file of each mode and layout."
    as_mode = lambda mode: (GLASS if mode in ("RGBA", "LA") else PHOTO).convert(mode)
    found = {f"{mode} {i}.{ending}": saved(as_mode(mode), **options)
             for i, (ending, modes, options) in enumerate([
                 ("png", "RGB RGBA L LA P 1", {}), ("jpg", "RGB L CMYK", {}), ("tif", "RGB RGBA L CMYK YCbCr 1", {}),
                 ("webp", "RGB RGBA", dict(lossless=True)), ("gif", "P L", {}), ("bmp", "RGB L", {})])
             for mode in modes.split()}
    found |= {"profile.png": saved(PHOTO, icc_profile=linear_profile()),
              "profile of opaque.png": saved(GLASS, icc_profile=linear_profile()),
              "profile of another mode.png": saved(PHOTO, icc_profile=PROFILE),
              "damaged profile.png": saved(PHOTO, icc_profile=b"no profile"),
              "one colour is transparent.png": saved(PHOTO, transparency=PHOTO.getpixel((0, 0))),
              "transparent palette.gif": saved(PHOTO.quantize(16), transparency=3),
              "fractions.tif": saved(Image.fromarray(FRACTIONS)),
              "large floats.tif": saved(Image.fromarray(FRACTIONS * 300)),
              "integers.tif": saved(Image.fromarray((DEEP[..., 0].astype(np.int32) - 9000) * 3))}
    found |= {f"deep {colors}.png": written(png(DEEP[..., :bands], colors))
              for colors, bands in {0: 1, 2: 3, 4: 2, 6: 4}.items()}
    return found | {"deep rgb.tif": written(tiff(DEEP[..., :3], 2)),
                    "deep big endian.tif": written(tiff(DEEP[..., :3], 2, ">")),
                    "white is lowest.tif": written(tiff(DEEP[..., 0], 0)),
                    "multiplied.tif": written(tiff(DEEP, 2, extra=1)),
                    "deep opacity.tif": written(tiff(DEEP, 2, extra=2)), "deep cmyk.tif": written(tiff(DEEP, 5))}


KINDS = kinds()


@pytest.mark.parametrize("name", KINDS)
def test_bundle_decodes_as_training_does(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path/name)
    for decoding in DECODINGS:
        expected = images.open_image(tmp_path/name, decoding)
        clipped = images.inspect_image(tmp_path/name, None, decoding)
        found, share = decode_pixels(tmp_path/name, decoding)
        assert np.array_equal(found, np.asarray(expected)), decoding
        assert share == pytest.approx(clipped.get("clipped", 0), abs=1e-9)


@pytest.mark.parametrize("name", KINDS)
def test_bytes_and_pillow_images_become_the_pixels_of_their_file(name: str, tmp_path: Path) -> None:
    KINDS[name](tmp_path/name)
    for decoding in DECODINGS:
        expected, share = decode_pixels(tmp_path/name, decoding)
        content = to_image_array((tmp_path/name).read_bytes(), decoding)
        assert np.array_equal(content[0], expected) and content[1] == share
        with Image.open(tmp_path/name) as image:
            try: found, clipped = to_image_array(image, decoding)
            except UsageError as e:   # Pillow keeps 8 of 16 bits of colours, and does not invert deep TIFF files
                assert "a Pillow image cannot be read (Pillow does not keep" in str(e) and decoding.scale
                assert name.startswith(("deep", "white", "multiplied"))
                continue
        assert np.array_equal(found, expected) and clipped == pytest.approx(share, abs=1e-9), decoding


def test_bytes_that_are_no_image_are_refused_in_one_line(bundle_of_bytes: Bundle) -> None:
    for content in b"", b"no image", b"\x89PNG\r\n\x1a\n" + bytes(40):
        with pytest.raises(UsageError, match=r"a file of \d+ bytes cannot be read \(.*Give a whole PNG") as e:
            bundle_of_bytes.predict(content)
        assert "\n" not in str(e.value)
    answers = bundle_of_bytes.predict([PHOTO, np.asarray(PHOTO)])
    assert answers[0] == answers[1] and answers[0]["path"] is None
    assert bundle_of_bytes.predict(PHOTO) == answers[:1]


@pytest.fixture
def bundle_of_bytes(tmp_path: Path) -> Bundle:
    "A bundle."
    return Bundle.load(make_bundle(tmp_path))


def test_colour_profile_of_the_corpus_changes_pixels(tmp_path: Path) -> None:
    KINDS["profile.png"](tmp_path/"x.png")
    assert np.abs(decode_pixels(tmp_path/"x.png")[0].astype(int) - np.asarray(PHOTO)).max() > 20


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "jpg", "tif", "webp"])
def test_bundle_turns_images_as_training_does(ending: str, orientation: int, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    GLASS.convert("RGB").save(tmp_path/f"x.{ending}", exif=exif)
    found = decode_pixels(tmp_path/f"x.{ending}")[0]
    assert np.array_equal(found, np.asarray(open_image(tmp_path/f"x.{ending}")))
    assert found.shape == ((9, 12, 3) if orientation > 4 else (12, 9, 3))


def test_bundle_refuses_what_training_refuses(tmp_path: Path) -> None:
    PHOTO.save(tmp_path/"whole.png")
    (tmp_path/"cut.png").write_bytes((tmp_path/"whole.png").read_bytes()[:200])
    (tmp_path/"text.png").write_text("no image")
    (tmp_path/"planes.tif").write_bytes(tiff(DEEP[..., :3], 2, planar=2))
    for name in "cut.png", "text.png", "planes.tif":
        messages = []
        for read in open_image, decode_pixels:
            with pytest.raises(UnreadableImage) as refused: read(tmp_path/name)
            messages.append(str(refused.value))
        assert messages[0] == messages[1]
    limit = Decoding(max_megapixels=1e-6)
    with pytest.raises(UnreadableImage, match="max_megapixels"): decode_pixels(tmp_path/"whole.png", limit)


FAULTS = {   # a fault of one side -> module, function, what it does instead
    "training swaps red and blue": (
        images, "_to_rgb", lambda real: lambda image: Image.fromarray(np.asarray(real(image))[..., ::-1])),
    "training ignores the orientation": (
        images, "_apply_orientation", lambda real: lambda image: image.load() and image),
    "bundle swaps red and blue": (pixels, "_to_rgb", lambda real: lambda image: real(image)[..., ::-1]),
    "bundle ignores the orientation": (pixels, "_read_orientation", lambda real: lambda image: 1),
    "bundle shows transparent parts on black": (
        pixels, "_blend_with_white", lambda real: lambda values: values[..., :3] * (values[..., 3:] > 0)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_one_decoder_is_found_and_named(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    PHOTO.save(tmp_path/"turned.png", exif=exif)
    GLASS.save(tmp_path/"glass.png")
    names = ["turned.png", "glass.png"]
    compare_decodings(tmp_path, names).require()
    module, function, change = FAULTS[fault]
    monkeypatch.setattr(module, function, change(getattr(module, function)))
    said = r"the bundle decodes (turned|glass)\.png \(PNG, RGBA?, (9 × 12|12 × 9)\) .* differs by \d+ of 255 levels"
    with pytest.raises(CvnbError, match=said): compare_decodings(tmp_path, names).require()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A run with an exported model and three images, one of them turned by its metadata."
    run = tmp_path_factory.mktemp("run")
    torch.manual_seed(0)
    model = create_model("test_resnet", ["cat", "dog"], 24).eval()
    (run/"export").mkdir()
    export_onnx(model, run/"export/trained.onnx")
    shutil.copy(run/"export/trained.onnx", run/"export/trained_int8.onnx")
    torch.save(model.state_dict(), run/"weights.pt")
    exif = Image.Exif()
    exif[0x0112] = 3
    for i in range(2): PHOTO.resize((30, 20 + i)).save(run/f"{i}.png")
    Image.fromarray(np.linspace(0, 255, 30 * 40 * 3).astype(np.uint8).reshape(30, 40, 3)).save(run/"2.jpg", exif=exif)
    return run


def parity_of(run: Path, **options: object):   # noqa: ANN201
    "Check the parity of the run's model over its three images."
    model = create_model("test_resnet", ["cat", "dog"], 24).eval()
    model.load_state_dict(torch.load(run/"weights.pt", weights_only=True))
    test = pd.DataFrame(dict(path=["0.png", "1.png", "2.jpg"], label=["cat", "dog", "cat"]))
    return check_parity(dict(trained=model), run, run, test, ["cat", "dog"], **options)


def test_parity_says_on_which_inputs_it_was_checked(run: Path) -> None:
    train = pd.DataFrame(dict(format=["PNG", "PNG", "TIFF", "TIFF"], mode=["RGB", "L", "I;16", "I;16"]))
    parity = parity_of(run, train=train)
    parity.require(1e-4)
    found = parity.decodings
    assert (found.n, found.max_difference, found.n_sizes) == (3, 0, 3)
    assert (found.smallest, found.largest) == ("30 × 20", "40 × 30")
    assert found.formats == {"PNG": 2, "JPEG": 1} and found.modes == {"RGB": 3}
    assert found.orientations == {"1": 2, "3": 1}
    assert found.not_covered == {"TIFF, I;16": 2, "PNG, L": 1}
    assert "TIFF, I;16 (2 training images); PNG, L (1 training images)" in parity.notes[-1]
    for text in "30 × 20", "EXIF orientations", "JPEG (1)": assert text in repr(parity) and text in parity._repr_html_()


@pytest.mark.parametrize("side", [images, pixels], ids=["training", "bundle"])
def test_probabilities_and_pixels_of_a_faulty_decoder_both_differ(
    side: object, run: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    "If one decoder fed both sides, the probabilities would agree."
    darker = lambda image: Image.fromarray(np.asarray(image.convert("RGB")) // 4)
    monkeypatch.setattr(side, "_to_rgb", darker if side is images else lambda image: np.asarray(darker(image)))
    parity = parity_of(run)
    assert parity.decodings.max_difference > 100
    assert parity.results["trained"]["onnx fp32"].max_difference > 1e-3
    with pytest.raises(CvnbError, match=r"the bundle decodes .* otherwise than training"): parity.require(1)


def test_bundle_predicts_with_its_own_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = Bundle.load(make_bundle(tmp_path))
    PHOTO.save(tmp_path/"x.png")
    expected = bundle.predict(np.asarray(PHOTO))[0]["probabilities"]
    monkeypatch.delattr(images, "_to_rgb")   # of training's decoder
    assert bundle.predict(tmp_path/"x.png")[0]["probabilities"] == expected
