"""Images of many sizes that preprocessing has to treat right, and faults of a reader."""
from __future__ import annotations

from pathlib import Path

import numpy as np
from deep_files import png
from PIL import Image, ImageFilter

from cvnb.data.depth import scale_of_bits
from cvnb.data.images import Decoding

SIDE = 32            # pixels of the network's input
TOLERANCE = 0.01     # the export stage's default
CLASSES = ["cat", "dog", "eel"]
DECODING = Decoding(scale_of_bits(12))
SIZES = {"large.png": (1000, 700), "tall.png": (96, 250), "fits.png": (32, 32), "small.png": (20, 15)}
FILES = [*SIZES, "turned.jpg", "deep.png"]
READER_FAULTS = {   # function of the bundle's reader -> what it does instead
    "EXIF": ("_read_orientation", lambda image: 1),
    "depth": ("_scale_levels", lambda values, scale: ((values >> 8).astype(np.uint8), 0.0))}


def write_images(folder: Path) -> None:
    "Write images with fine stripes, three colours that differ, a turned photograph and one of 12 bits."
    rng = np.random.default_rng(0)
    for name, (width, height) in SIZES.items():
        rows, columns = np.mgrid[:height, :width]
        stripes = 128 + 100 * np.sin(0.9 * rows + 0.4 * columns)[..., None] * [1, 0.2, 0.6]
        values = (stripes * [1, 0.5, 0.8] + rng.normal(0, 15, (height, width, 3))).clip(0, 255)
        Image.fromarray(values.astype(np.uint8)).save(folder/name)
    exif = Image.Exif()
    exif[0x0112] = 6
    left = np.arange(90) < 45
    turned = np.where(left[None, :, None], [255, 0, 40], [0, 90, 255]) * np.linspace(0.3, 1, 60)[:, None, None]
    turned = turned.astype(np.uint8)
    Image.fromarray(turned).filter(ImageFilter.BoxBlur(1)).save(folder/"turned.jpg", exif=exif)
    deep = rng.integers(500, 4096, (48, 64, 3), dtype=np.uint16)
    (folder/"deep.png").write_bytes(png(deep, 2))
