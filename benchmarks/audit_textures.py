"""Near duplicates among textures and series: recall of planted copies, true precision and cost of cvnb's check.

    python benchmarks/audit_textures.py [--sets NAME ...] [--images 1200] [--write]

Texture sets are tiles of 128 x 128 pixels, cut without overlap from the pictures that scikit-image and scikit-learn
bring, and from the photographs of groceries (--groceries FOLDER). In a set "in series" each tile is there three to
six times: with another gamma, contrast and brightness, and with noise of its own. Tiles of one series are relatives.
The other sets are real ones: sign-digits (--signs FOLDER), CIFAR-10 and digits.

Hidden copies (one for twenty images, at most 60) are planted among the images of each set, with another seed than the
check's own. A found pair is right when it is a hidden copy and its source. A pair of a series, hidden copies included,
counts as a relative. All other found pairs are false, except in sets that may hold real copies (CIFAR-10, sign-digits),
where they are only counted. CPU seconds include decoding and planting, but no imports.

Sets in series are measured twice: by thumbnails alone, which is how the check worked until 2026-11-30, and as the audit
runs it.
"""
from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

SEED = 20_251
TILE = 128   # pixels
SETS = ("pictures", "pictures in series", "groceries", "groceries in series", "sign-digits", "cifar10", "digits")
PICTURES = ("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png", "coins.png",
            "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png",
            "motorcycle_left.png", "page.png", "retina.jpg", "rocket.jpg", "text.png")   # of scikit-image


def bundled_pictures() -> list[Path]:
    "List the pictures that the installed packages bring; motorcycle_right is a copy of the left one from aside."
    import skimage.data
    import sklearn.datasets
    folder = Path(skimage.data.__file__).parent
    images = Path(sklearn.datasets.__file__).parent/"images"
    return [folder/name for name in PICTURES] + [images/"china.jpg", images/"flower.jpg"]


def cut_tiles(paths: list[Path], n: int, per_picture: int, rng: np.random.Generator) -> list[np.ndarray]:
    "Cut tiles that have some contrast from pictures, without overlap."
    tiles = []
    for path in paths:
        pixels = np.asarray(Image.open(path).convert("RGB"))
        down, across = pixels.shape[0] // TILE, pixels.shape[1] // TILE
        own = [pixels[y * TILE:(y + 1) * TILE, x * TILE:(x + 1) * TILE] for y in range(down) for x in range(across)]
        own = [tile for tile in own if tile.mean(axis=2).std() > 12]
        tiles += [own[i] for i in sorted(rng.permutation(len(own))[:per_picture])]
    return [tiles[i] for i in sorted(rng.permutation(len(tiles))[:n])]


def expose(tile: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    "Take a tile at another exposure: gamma, contrast, brightness, and noise of three levels."
    x = (tile / 255) ** np.exp(rng.uniform(-0.7, 0.7)) * rng.uniform(0.7, 1.2) + rng.uniform(-0.1, 0.1)
    return np.clip(x * 255 + rng.normal(0, 3, x.shape), 0, 255).round().astype(np.uint8)


def write_set(name: str, folder: Path, n: int, groceries: Path) -> pd.DataFrame:   # path, series
    "Write the tiles of a set."
    rng = np.random.default_rng(SEED)
    series = name.endswith("series")
    wanted = n * 2 // 9 if series else n
    if name.startswith("groceries"): tiles = cut_tiles(sorted(groceries.rglob("*.jpg")), wanted, 1, rng)
    else: tiles = cut_tiles(bundled_pictures(), wanted, 16, rng)
    rows = []
    for k, tile in enumerate(tiles):
        shots = [expose(tile, rng) for _ in range(rng.integers(3, 7))] if series else [tile]
        for s, shot in enumerate(shots):
            rows.append((f"{k:04}_{s}.png", k))
            Image.fromarray(shot).save(folder/rows[-1][0])
    return pd.DataFrame(rows, columns=["path", "series"])


def open_set(name: str, folder: Path, n: int, args: argparse.Namespace) -> tuple[Path, pd.DataFrame]:
    "Write or find the images of a set."
    from cvnb.data.dataset import locate_data, scan_dataset
    if name.startswith(("pictures", "groceries")): return folder, write_set(name, folder, n, args.groceries)
    root = args.signs if name == "sign-digits" else locate_data(name)
    paths = scan_dataset(root).path.to_numpy()
    paths = paths[np.sort(np.random.default_rng(SEED).permutation(len(paths))[:n])]
    return Path(root), pd.DataFrame(dict(path=paths, series=np.arange(len(paths))))


def run_check(root: Path, paths: pd.Series, hidden: object, size: int, alone: bool) -> tuple:   # result, CPU seconds
    "Run the near-duplicate check as the audit does, or by thumbnails alone; hidden copies stand behind the images."
    from cvnb.audit.duplicates import find_near_duplicates, make_thumbnails, plant_copies
    from cvnb.audit.series import find_in_series
    from cvnb.data.images import load_images
    start = time.process_time()
    images = np.concatenate([load_images(root, paths, size), hidden.images])
    copies = plant_copies(root, paths, size)
    result = find_near_duplicates(make_thumbnails(images), make_thumbnails(copies.images), copies)
    if not alone: result = find_in_series(result, images)
    return result, time.process_time() - start


def measure(name: str, args: argparse.Namespace) -> dict:   # a row of the table
    "Measure the check on one set."
    import torch

    from cvnb.audit.duplicates import COPY_TRANSFORMS, plant_copies
    from cvnb.metrics.estimates import estimate_proportion
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root, table = open_set(name, Path(folder), args.images, args)
        size = dict(digits=64, cifar10=64).get(name, TILE)
        hidden = plant_copies(root, table.path, size, min(60, len(table) // 20), SEED)
        result, seconds = run_check(root, table.path, hidden, size, args.alone)
    n = len(table)
    series = np.append(table.series, table.series.to_numpy()[hidden.source])
    true = {(int(s), n + k) for k, s in enumerate(hidden.source)}
    found = list(zip(result.pairs.i, result.pairs.j))
    right = sum(pair in true for pair in found)
    relatives = sum(bool(series[i] == series[j]) for i, j in found) - right
    kinds = result.validation.recall_by_kind
    row = {"set": name, "check": "thumbnails alone" if args.alone else "audit", "images": n + len(true)}
    row["recall on planted copies"] = str(result.validation.recall)
    row |= {kind: str(kinds[kind]) if kind in kinds else "" for kind in COPY_TRANSFORMS}
    row |= {"threshold": float(result.threshold), "predicted precision": str(result.validation.precision),
            "found pairs": len(found), "relatives": relatives, "other": len(found) - right - relatives,
            "recall of hidden copies": str(estimate_proportion(right, len(true))),
            "precision": str(estimate_proportion(right, len(found))), "off": result.off or "",
            "path": result.path, "CPU s": seconds, "CPU s per 1,000": seconds / len(series) * 1000}
    same = [bool(series[i] == series[j]) for i, j in zip(result.relatives.i, result.relatives.j)]
    return row | {"pairs reported as relatives": len(same), "of one series": sum(same)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=SETS, help="names of sets")
    parser.add_argument("--images", type=int, default=1200, help="of each set, about")
    parser.add_argument("--groceries", type=Path, default=Path("groceries"), help="folder with the photographs")
    parser.add_argument("--signs", type=Path, default=Path("sign-digits"), help="folder with the photographs")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/audit_textures.md")
    parser.add_argument("--alone", action="store_true", help="with --one: by thumbnails alone")
    parser.add_argument("--one", help="measure one set in this process and print its row as JSON")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args)))
        return
    rows = []
    both = [(name, alone) for name in args.sets for alone in ((True, False) if name.endswith("series") else (False,))]
    for name, alone in both:
        command = [sys.executable, __file__, "--one", name, "--images", str(args.images),
                   "--groceries", args.groceries, "--signs", args.signs] + ["--alone"] * alone
        done = subprocess.run(command, env=os.environ | dict(OMP_NUM_THREADS="1"), stdout=subprocess.PIPE, text=True)
        if done.returncode: sys.exit(f"{name}: exit status {done.returncode}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    show("audit_textures", "Near duplicates among textures and series", rows, args.write)


if __name__ == "__main__":
    main()
