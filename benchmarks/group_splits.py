"""What a test accuracy is worth with and without groups: claimed on the run's own test, against new objects.

    python benchmarks/group_splits.py --groceries FOLDER --signs FOLDER [--draws 20] [--write]

Each draw sets a quarter of the groups aside: objects, people or bursts that appear only later. The rest is split into
training and test twice: image by image (without groups), and by whole groups. A linear probe on EfficientNet-Lite0's
embeddings learns from each training part. Its accuracy on its own test part is what a run claims; its accuracy on the
groups set aside is what new objects give. Both probes learn from 70 % of the rest. The table has means over the draws
with bootstrap intervals over the draws, and the interval of claimed − new.

Sets: groceries by runs of consecutive numbers, sign-digits by person (numbers that run through the classes), and tiles
of textures, cut from scikit-image's brick, grass and gravel, intact or scratched, six pictures each at other
exposures, shifts and light.
"""
from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageDraw
from table import show

ASIDE = 0.25   # share of the groups that stand for new objects
TEST = 0.3     # share of the rest
VIEWS = 6      # pictures of a tile


def write_tiles(folder: Path, seed: int = 5) -> Path:
    "Write tiles of three textures, intact or scratched, six pictures each."
    import skimage.data
    rng = np.random.default_rng(seed)
    for name in "brick", "grass", "gravel":
        picture = np.asarray(Image.open(Path(skimage.data.__file__).parent/f"{name}.png").convert("L"))
        for k in range(48):
            y, x = rng.integers(4, picture.shape[0] - 100, 2)
            scratch = [tuple(p) for p in rng.integers(10, 86, (3, 2)).tolist()] if k % 2 else []
            for view in range(VIEWS):
                dy, dx = rng.integers(-4, 5, 2)
                tile = Image.fromarray(picture[y + dy:y + dy + 96, x + dx:x + dx + 96])
                if scratch: ImageDraw.Draw(tile).line(scratch, fill=int(rng.integers(150, 220)), width=1)
                levels = np.asarray(tile, float) / 255
                exposed = levels**rng.uniform(0.6, 1.6) * rng.uniform(0.7, 1.1) + rng.normal(0, 0.01, (96, 96))
                levels = np.clip(exposed, 0, 1)
                path = folder/("scratched" if scratch else "intact")/f"{name}{k:02d}_{view}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((255 * levels).astype(np.uint8)).save(path)
    return folder


def read_set(root: Path, rule: str) -> pd.DataFrame:   # path, label, group
    "List the images of a folder with their groups; images without one stand alone."
    from cvnb.audit.groups import assign_groups
    from cvnb.audit.privacy import read_metadata
    from cvnb.data.dataset import scan_dataset
    from cvnb.data.images import inspect_images
    table = inspect_images(root, scan_dataset(root))
    table = table[table.ok].drop_duplicates("pixel_sha256").reset_index(drop=True)
    table = table.join(read_metadata(root, table.path)) if rule in ("camera", "date") else table
    table, notes = assign_groups(table, rule, root)
    for note in notes: print(f"! {note}", file=sys.stderr)
    alone = pd.Series([f"alone {i}" for i in range(len(table))])
    return table.assign(group=table.group.where(table.group != "", alone))


def draw(table: pd.DataFrame, rng: np.random.Generator) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    "Choose training, test and new images, with and without groups."
    groups = rng.permutation(table.group.unique())
    new = table.group.isin(groups[:int(ASIDE * len(groups))]).to_numpy()
    rest = np.flatnonzero(~new)
    shuffled = rng.permutation(rest)
    cut = int(TEST * len(rest))
    left = rng.permutation(table.group[rest].unique())
    sizes = table.group[rest].value_counts()[left].cumsum()
    in_test = table.group.isin(left[:int(np.searchsorted(sizes, cut)) + 1]).to_numpy()
    whole = rest[~in_test[rest]], rest[in_test[rest]], np.flatnonzero(new)
    return {"without": (shuffled[cut:], shuffled[:cut], np.flatnonzero(new)), "with": whole}


def score(vectors: np.ndarray, targets: np.ndarray, parts: tuple[np.ndarray, ...]) -> tuple[float, float]:
    "Fit a probe to the first part; return its accuracy on the test and on new groups."
    from sklearn.linear_model import LogisticRegression
    train, test, new = parts
    probe = LogisticRegression(C=10, max_iter=300).fit(vectors[train], targets[train])
    return probe.score(vectors[test], targets[test]), probe.score(vectors[new], targets[new])


def interval(values: np.ndarray, rng: np.random.Generator) -> str:
    "Write a mean with its bootstrap interval over the draws."
    means = values[rng.integers(0, len(values), (2000, len(values)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return f"{values.mean():.3f} [{low:.3f}, {high:.3f}]"


def measure(name: str, root: Path, rule: str, by: str, draws: int) -> list[dict]:
    "Measure a set; two rows."
    from cvnb.data.images import load_images
    from cvnb.models.embedding import embed_images
    table = read_set(root, rule)
    vectors = 10 * embed_images(load_images(root, table.path, 96, digests=table.file_sha256))
    targets = table.label.to_numpy()
    rng = np.random.default_rng(0)
    found: dict[str, list[tuple[float, float]]] = {"without": [], "with": []}
    for _ in range(draws):
        for kind, parts in draw(table, rng).items(): found[kind].append(score(vectors, targets, parts))
    rows = []
    for kind, pairs in found.items():
        claimed, new = np.array(pairs).T
        about = f"{len(table):,} in {table.group.nunique()} groups by {by}"
        rows.append({"data": name, "images": about, "split": f"{kind} groups", "claimed": interval(claimed, rng),
                     "new objects": interval(new, rng), "claimed − new": interval(claimed - new, rng)})
    return rows


def main() -> None:
    "Measure, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groceries", type=Path, help="folder of groceries")
    parser.add_argument("--signs", type=Path, help="folder of sign-digits")
    parser.add_argument("--draws", type=int, default=20)
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/group_splits.md")
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        rows += measure("tiles", write_tiles(Path(folder)), r"([^/]+)_[0-9]+\.png$", "tile", args.draws)
    if args.signs: rows += measure("sign-digits", args.signs, "rounds", "person", args.draws)
    if args.groceries: rows += measure("groceries", args.groceries, "runs", "consecutive numbers", args.draws)
    show("group_splits", f"Test accuracy with and without groups, {args.draws} draws", rows, args.write)


if __name__ == "__main__": main()
