"""Label errors that were planted: what cvnb's check and cleanlab's defaults find of them, and what the check predicts of itself.

    python benchmarks/audit_labels.py [--images 50000] [--side 64] [--vectors CIFAR.npy] [--write]
    python benchmarks/audit_labels.py --intervals [--only digits mnist5k cifar10 FOLDER] [--vectors CIFAR.npy] [--write]
    python benchmarks/audit_labels.py --folds 3 --only digits mnist5k [--write]

Labels are turned at random, or to the class that a classifier confuses their true class with most, one class to one class, so that the
true precision is known as far as the data's own labels are right. All methods see the same images: views of a network, of thumbnails and of edges,
reduced to 512 components, and cleanlab besides them the network's own 1,280 numbers. `check` is `doubt` and `pick_chance`; the repetition with
planted labels, which cleanlab has nothing like, is timed once per data set
(`check + proof`). --vectors keeps the network's numbers of CIFAR-10 between runs.

--intervals asks whether the predicted precision and its interval hold, down to labels of which none is wrong. Folders of classes can be given
too: sign-digits, and Fashion-MNIST as 500 images a class from Debian's `dataset-fashion-mnist`, which the check was not made after.

--folds asks what the answers of networks add that were trained on the same labels, wrong ones included, each without the images that it answers:
the recipe that `cvnb run` takes for such data. Their training counts.
"""
from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from cvnb.audit.embeddings import answers, views
from cvnb.core.project import asset_folder
from cvnb.data.tables import auto_image_size, data_root, locate, scan
from cvnb.audit.duplicates import mark_duplicates, originals
from cvnb.data.images import inspect, load_images
from cvnb.audit.label_errors import discriminate, doubt, expand, expect, leave_one_out, pick_chance, prove_labels
from cvnb.audit.label_errors import reduce, typical
from cvnb.metrics.estimates import accuracy, bootstrap
from cvnb.models.weights import create_model
from cvnb.models.embedding import embed
from cvnb.pipeline.params import contracts, read_recipe

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402


def load(name: str, n_images: int, side: int, vectors: Path | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    "The network's numbers, the reduced features and the labels of a data set."
    source = locate(name)
    table = scan(source)
    if name == "cifar10": table = table[table.split == "train"].groupby("label").head(n_images // 10).reset_index(drop=True)
    images = load_images(data_root(source), table.path, side)
    network = np.load(vectors) if name == "cifar10" and vectors and vectors.exists() else embed(images, side)
    if name == "cifar10" and vectors: np.save(vectors, network)
    return network, reduce(views(images, network)), np.unique(table.label.to_numpy(str), return_inverse=True)[1]


def turned(labels: np.ndarray, share: float, kind: str, target: np.ndarray, seed: int = 0) -> np.ndarray:
    "Labels of which some are turned."
    rng, n, out = np.random.default_rng(seed), labels.max() + 1, labels.copy()
    rows = rng.permutation(len(labels))[:round(share * len(labels))]
    out[rows] = (labels[rows] + rng.integers(1, n, len(rows))) % n if kind == "at random" else target[labels[rows]]
    return out


def similar(z: np.ndarray, labels: np.ndarray) -> np.ndarray:
    "For each class the one that it is confused with most."
    logits = discriminate(leave_one_out(z, labels, np.ones(len(labels)))[0], labels)
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confused = np.stack([proba[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    np.fill_diagonal(confused, 0)
    return confused.argmax(axis=1)


def ours(x: np.ndarray, labels: np.ndarray, proof: bool = False) -> tuple[np.ndarray, np.ndarray, float]:
    "Chance of each label to be wrong, whether it is flagged, and the precision that is predicted."
    z = expand(x)
    belief, wrong = doubt(z, labels)
    if proof: prove_labels(z, labels, belief, wrong, 0.8)
    flagged, shown = wrong >= pick_chance(wrong, 0.8), belief.shows(np.arange(len(labels)), labels).argmax(axis=1)
    return wrong, flagged, expect(wrong[flagged], typical(z, np.flatnonzero(flagged), shown), len(labels)).value


def cleanlab(x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    "CleanLearning with everything at its default: logistic regression, five folds, its filter and its score."
    from cleanlab.classification import CleanLearning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        issues = CleanLearning(seed=0, find_label_issues_kwargs=dict(n_jobs=1)).find_label_issues(x, labels)
    return 1 - issues.label_quality.to_numpy(), issues.is_label_issue.to_numpy(), float("nan")


def row(data: str, noise: str, method: str, call: Callable, wrong: np.ndarray) -> dict:
    "Measure one method."
    from sklearn.metrics import average_precision_score
    begin = time.process_time()
    score, flagged, predicted = call()
    seconds = time.process_time() - begin
    ap = bootstrap(average_precision_score, wrong, score, n_resamples=100)
    precision, recall = accuracy(wrong[flagged]), accuracy(flagged[wrong])
    known = predicted == predicted
    return {"data": data, "noise": noise, "method": method, "average precision": f"{ap.value:.3f} [{ap.low:.3f}, {ap.high:.3f}]",
            "flagged": int(flagged.sum()), "precision": f"{precision.value:.3f} [{precision.low:.3f}, {precision.high:.3f}]",
            "recall": f"{recall.value:.3f}", "predicted precision": f"{predicted:.3f}" if known else "",
            "off by, points": f"{100 * (predicted - precision.value):+.1f}" if known else "", "CPU s": seconds}


def interval(data: str, x: np.ndarray, given: np.ndarray, wrong: np.ndarray) -> dict:
    "Compare the precision that the check reports with the true one."
    z = expand(x)
    belief, chance = doubt(z, given)
    flagged = chance >= pick_chance(chance, 0.8)
    said, true = prove_labels(z, given, belief, chance, 0.8).precision, float(wrong[flagged].mean()) if flagged.any() else None
    apart = f"{100 * (said.value - true):+.1f}" if true is not None and said.value == said.value else ""   # NaN: an interval alone
    return {"data": data, "wrong labels": int(wrong.sum()), "flagged": int(flagged.sum()), "true precision": "" if true is None else f"{true:.3f}",
            "predicted": str(said) if said.n else "", "off by, points": apart,
            "inside the interval": "" if true is None else ("no", "yes")[said.low <= true <= said.high]}


def intervals(args: argparse.Namespace) -> list[dict]:
    "Measure with few and many wrong labels; on CIFAR-10 with many."
    rows = []
    for name in args.only:
        _, x, labels = load(name, args.images, args.side, args.vectors)
        target, shares = similar(expand(x), labels), (0.2, 0.4) if name == "cifar10" else (0.005, 0.02, 0.05, 0.2, 0.4)
        for kind, share in [("", 0), *((k, s) for k in ("at random", "to a similar class") for s in shares)]:
            given = turned(labels, share, kind, target, seed=1)
            rows.append(interval(f"{Path(name).name}, {share:.1%} {kind}", x, given, given != labels))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def out_of_fold(name: str, rows: pd.DataFrame, k: int) -> dict[str, np.ndarray]:   # of the pixels -> probabilities
    "Train k times with the data's recipe, and let each network answer what it has not seen."
    from cvnb.training.cross_validation import cross_validate
    from cvnb.training.loaders import labelled
    from cvnb.training.options import FitOptions
    from cvnb.training.tuning import settle
    known, file = contracts(), asset_folder("configs")/f"{Path(name).name}.yaml"
    recipe = known["train"].defaults() | read_recipe(file if file.exists() else asset_folder("configs")/"default.yaml", known)["train"]
    classes, size = sorted(set(rows.label)), recipe["image_size"] or auto_image_size(rows.width, rows.height)
    data = labelled(data_root(locate(name)), rows, classes, size)

    make = lambda: create_model(recipe["backbone"], classes, size, recipe["stem"], recipe["weights"])
    with TemporaryDirectory() as folder:
        options, _ = settle(FitOptions.of(recipe), make(), data, Path(folder)/"auto")
        told = cross_validate(make, rows, data, options, Path(folder)/"folds", k).predictions
    return dict(zip(told.pixel_sha256, told.probabilities))


def with_networks(name: str, rows: pd.DataFrame, k: int, seen: dict[str, np.ndarray], given: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    "As `ours`, with the answers of networks as one more view."
    return ours(reduce(seen | answers(out_of_fold(name, rows, k), rows.pixel_sha256, seen)), given)


def folds(args: argparse.Namespace) -> list[dict]:
    "Measure the check without and with the answers of networks."
    rows = []
    for name in args.only:
        source = locate(name)
        table = originals(mark_duplicates(inspect(data_root(source), scan(source)))).reset_index(drop=True)
        images = load_images(data_root(source), table.path, args.side)
        seen, (classes, labels) = views(images, embed(images, args.side)), np.unique(table.label.to_numpy(str), return_inverse=True)
        x = reduce(seen)
        target = similar(expand(x), labels)
        for kind, share in [(k, s) for k in ("at random", "to a similar class") for s in (0.05, 0.2)]:
            given = turned(labels, share, kind, target)
            both = partial(with_networks, name, table.assign(label=classes[given]), args.folds, seen, given)
            methods = {"check": partial(ours, x, given), f"check, and {args.folds} networks": both}
            rows += [row(Path(name).name, f"{share:.0%} {kind}", method, call, given != labels) for method, call in methods.items()]
            print(*rows[-2:], sep="\n", file=sys.stderr, flush=True)
    return rows


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50000, help="of CIFAR-10")
    parser.add_argument("--side", type=int, default=64, help="pixels at which the network sees images")
    parser.add_argument("--vectors", type=Path, help="where the network's numbers of CIFAR-10 are kept")
    parser.add_argument("--only", nargs="+", default=["digits", "mnist5k", "cifar10"], help="data sets by name, or folders of classes")
    parser.add_argument("--intervals", action="store_true", help="ask instead whether the predicted intervals hold")
    parser.add_argument("--folds", type=int, default=0, help="ask instead what networks trained on so many folds add")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/audit_labels*.md")
    args, rows = parser.parse_args(), []
    if args.intervals:
        title = "The precision that the check of labels predicts, and its interval"
        return show("audit_labels_intervals", title, intervals(args), args.write)
    if args.folds: return show("audit_labels_folds", "Planted label errors, without and with networks' answers", folds(args), args.write)
    for name in args.only:
        network, x, labels = load(name, args.images, args.side, args.vectors)
        target = similar(expand(x), labels)
        for kind in "at random", "to a similar class":
            for share in (0.2, 0.4) if name == "cifar10" else (0.02, 0.05, 0.2, 0.4):
                given = turned(labels, share, kind, target)
                methods = {"check": partial(ours, x, given), "cleanlab, same features": partial(cleanlab, x, given),
                           "cleanlab, network only": partial(cleanlab, network, given)}
                if (share, kind) == (0.2, "at random"): methods["check + proof"] = partial(ours, x, given, True)
                rows += [row(name, f"{share:.0%} {kind}", method, call, given != labels) for method, call in methods.items()]
                print(*rows[-len(methods):], sep="\n", file=sys.stderr, flush=True)
    show("audit_labels", "Planted label errors", rows, args.write)


if __name__ == "__main__": main()
