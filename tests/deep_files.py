"""Image files with 16 bits per value, which Pillow cannot write."""
from __future__ import annotations

import struct
import zlib

import numpy as np


def png(values: np.ndarray, colors: int) -> bytes:
    "A PNG of 16 bits per value: 0 is grey, 2 RGB, 4 grey with opacity, 6 RGBA. Its rows are filtered, as encoders do."
    height, width = values.shape[:2]
    rows = values.astype(">u2").reshape(height, -1).view(np.uint8).reshape(height, -1)
    before = np.zeros_like(rows)
    n_bytes = rows.shape[1] // width
    before[:, n_bytes:] = rows[:, :-n_bytes]
    filtered = np.hstack([np.ones((height, 1), np.uint8), rows - before])
    chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
    header = struct.pack(">IIBBBBB", width, height, 16, colors, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(filtered.tobytes()))
            + chunk(b"IEND", b""))


def tiff(
    values: np.ndarray,          # (H, W) or (H, W, C)
    photometric: int = 1,        # 0 white is lowest, 1 black is lowest, 2 RGB, 5 CMYK, 8 LAB
    order: str = "<",            # of the bytes
    planar: int = 1,             # 2: planes apart
    extra: int | None = None,    # kind of a fourth channel
) -> bytes:
    "A TIFF without compression."
    bands = values.shape[2] if values.ndim == 3 else 1
    kinds = dict(u=1, i=2, f=3)
    numbers = [kinds[values.dtype.kind]] * bands
    body = values.transpose(2, 0, 1) if planar == 2 else values
    pixels = body.astype(values.dtype.newbyteorder(order)).tobytes()
    share = len(pixels) // (bands if planar == 2 else 1)
    strips = [8 + i * share for i in range(len(pixels) // share)]
    tags = {256: [values.shape[1]], 257: [values.shape[0]], 258: [8 * values.itemsize] * bands, 259: [1],
            262: [photometric], 273: strips, 277: [bands], 278: [values.shape[0]], 279: [share] * len(strips),
            284: [planar], 339: numbers}
    if extra is not None: tags[338] = [extra]
    after = 8 + len(pixels)
    place = after + 2 + 12 * len(tags) + 4
    entries = b""
    longer = b""
    for tag, numbers in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        entries += struct.pack(f"{order}HHI", tag, 4, len(numbers))
        entries += packed if len(packed) == 4 else struct.pack(f"{order}I", place + len(longer))
        longer += packed if len(packed) > 4 else b""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    header = mark + struct.pack(f"{order}I", after)
    return header + pixels + struct.pack(f"{order}H", len(tags)) + entries + bytes(4) + longer
