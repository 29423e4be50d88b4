"""Planted label errors: what cvnb's check and cleanlab's defaults find, and the precision that the check predicts.

    python benchmarks/audit_labels.py [--images 50000] [--side 64] [--vectors CIFAR.npy] [--write]
    python benchmarks/audit_labels.py --intervals [--only digits mnist5k cifar10 FOLDER] [--vectors CIFAR.npy] [--write]
    python benchmarks/audit_labels.py --folds 3 --only digits mnist5k [--write]

The script flips labels at random, or to the class that a classifier confuses with the true class most (one class for
each class). So the true precision is known as far as the data's own labels are right. All methods get the same
features: views of a network, of thumbnails and of edges, reduced to 512 components. cleanlab also runs on the
network's own 1,280 numbers. `check` is `estimate_label_errors` and `pick_error_threshold`. `check + validation` adds
the repetition with planted labels, for which cleanlab has no counterpart; it is timed once per data set. --vectors
caches the network's numbers of CIFAR-10 between calls.

--intervals measures whether the predicted precision and its interval hold, down to labels without errors. It also
takes folders of classes: sign-digits, and Fashion-MNIST as 500 images a class from Debian's `dataset-fashion-mnist`,
on which the check was not tuned.

--folds measures the gain from out-of-fold predictions. The networks train with the recipe that `cvnb run` selects for
the data, on the same labels, wrong ones included, and each predicts the images that it was not trained on. The CPU
time includes their training.
"""
from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from cvnb.audit.duplicates import mark_duplicates, select_unique_images
from cvnb.audit.embeddings import feature_views, out_of_fold_view
from cvnb.audit.label_errors import (
    add_fourier_features,
    discriminant_logits,
    estimate_label_errors,
    leave_one_out_scores,
    pca_features,
    pick_error_threshold,
    predict_precision,
    typicality,
    validate_label_check,
)
from cvnb.core.project import asset_folder
from cvnb.data.dataset import data_root, locate_data, scan_dataset
from cvnb.data.images import inspect_images, load_images
from cvnb.data.tables import auto_image_size
from cvnb.metrics.classification import accuracy
from cvnb.metrics.estimates import bootstrap
from cvnb.models.embedding import embed_images
from cvnb.models.weights import create_model
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.recipes import read_recipe

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

TARGET_PRECISION = 0.8   # of the flagged labels
NOISE_KINDS = ("at random", "to a similar class")
Result = tuple[np.ndarray, np.ndarray, float]   # score (N,), flagged (N,), predicted precision


def class_indices(table: pd.DataFrame) -> tuple[np.ndarray, np.ndarray]:   # class names (C,), class indices (N,)
    "Encode the labels of a table."
    return np.unique(table.label.to_numpy(str), return_inverse=True)


def load_features(
    name: str, n_images: int, side: int, vectors: Path | None,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:   # embeddings (N, 1280), reduced features (N, 512), class indices (N,)
    "Compute the features of a data set, or read CIFAR-10's embeddings from a file."
    source = locate_data(name)
    table = scan_dataset(source)
    if name == "cifar10":
        train = table[table.split == "train"]
        table = train.groupby("label").head(n_images // 10).reset_index(drop=True)
    images = load_images(data_root(source), table.path, side)
    file = vectors if name == "cifar10" else None
    network = np.load(file) if file and file.exists() else embed_images(images, side)
    if file: np.save(file, network)
    return network, pca_features(feature_views(images, network)), class_indices(table)[1]


def flip_some(labels: np.ndarray, share: float, kind: str, target: np.ndarray, seed: int = 0) -> np.ndarray:
    "Flip a share of the labels."
    rng = np.random.default_rng(seed)
    n_classes = labels.max() + 1
    rows = rng.permutation(len(labels))[:round(share * len(labels))]
    out = labels.copy()
    if kind == "at random": out[rows] = (labels[rows] + rng.integers(1, n_classes, len(rows))) % n_classes
    else: out[rows] = target[labels[rows]]
    return out


def most_confused_class(z: np.ndarray, labels: np.ndarray) -> np.ndarray:   # a class index per class (C,)
    "Find for each class the class that a classifier confuses with it most."
    logits = discriminant_logits(leave_one_out_scores(z, labels, np.ones(len(labels)))[0], labels)
    proba = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    confused = np.stack([proba[labels == c].mean(axis=0) for c in range(labels.max() + 1)])
    np.fill_diagonal(confused, 0)
    return confused.argmax(axis=1)


def run_check(x: np.ndarray, labels: np.ndarray, validate: bool = False) -> Result:
    "Run cvnb's check; the scores are the probabilities that labels are wrong."
    z = add_fourier_features(x)
    model, wrong = estimate_label_errors(z, labels)
    if validate: validate_label_check(z, labels, model, wrong, TARGET_PRECISION)
    flagged = wrong >= pick_error_threshold(wrong, TARGET_PRECISION)
    shown = model.posterior(np.arange(len(labels)), labels).argmax(axis=1)
    ranks = typicality(z, np.flatnonzero(flagged), shown)
    return wrong, flagged, predict_precision(wrong[flagged], ranks, len(labels)).value


def run_cleanlab(x: np.ndarray, labels: np.ndarray) -> Result:
    "Run CleanLearning with its defaults: logistic regression, five folds, its filter and its score."
    from cleanlab.classification import CleanLearning
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner = CleanLearning(seed=0, find_label_issues_kwargs=dict(n_jobs=1))
        issues = learner.find_label_issues(x, labels)
    return 1 - issues.label_quality.to_numpy(), issues.is_label_issue.to_numpy(), float("nan")


def measure_method(data: str, noise: str, method: str, call: Callable[[], Result], wrong: np.ndarray) -> dict:
    "Run a method, and compare what it flags with the flipped labels."
    from sklearn.metrics import average_precision_score
    begin = time.process_time()
    score, flagged, predicted = call()
    seconds = time.process_time() - begin
    ap = bootstrap(average_precision_score, wrong, score, n_resamples=100)
    precision = accuracy(wrong[flagged])
    recall = accuracy(flagged[wrong])
    known = not np.isnan(predicted)
    return {"data": data, "noise": noise, "method": method,
            "average precision": f"{ap.value:.3f} [{ap.low:.3f}, {ap.high:.3f}]", "flagged": int(flagged.sum()),
            "precision": f"{precision.value:.3f} [{precision.low:.3f}, {precision.high:.3f}]",
            "recall": f"{recall.value:.3f}", "predicted precision": f"{predicted:.3f}" if known else "",
            "error, points": f"{100 * (predicted - precision.value):+.1f}" if known else "", "CPU s": seconds}


def measure_interval(data: str, x: np.ndarray, given: np.ndarray, wrong: np.ndarray) -> dict:
    "Compare the precision that the check predicts with the true one."
    z = add_fourier_features(x)
    model, chance = estimate_label_errors(z, given)
    flagged = chance >= pick_error_threshold(chance, TARGET_PRECISION)
    predicted = validate_label_check(z, given, model, chance, TARGET_PRECISION).precision
    row = {"data": data, "wrong labels": int(wrong.sum()), "flagged": int(flagged.sum()), "true precision": "",
           "predicted": str(predicted) if predicted.n else "", "error, points": "", "inside the interval": ""}
    if not flagged.any(): return row
    true = float(wrong[flagged].mean())
    row["true precision"] = f"{true:.3f}"
    if not np.isnan(predicted.value): row["error, points"] = f"{100 * (predicted.value - true):+.1f}"
    row["inside the interval"] = "yes" if predicted.low <= true <= predicted.high else "no"
    return row


def measure_intervals(args: argparse.Namespace) -> list[dict]:
    "Measure the prediction with few and many wrong labels; on CIFAR-10 with many."
    rows = []
    for name in args.only:
        _, x, labels = load_features(name, args.images, args.side, args.vectors)
        target = most_confused_class(add_fourier_features(x), labels)
        shares = (0.2, 0.4) if name == "cifar10" else (0.005, 0.02, 0.05, 0.2, 0.4)
        for kind, share in [("", 0), *product(NOISE_KINDS, shares)]:
            given = flip_some(labels, share, kind, target, seed=1)
            rows.append(measure_interval(f"{Path(name).name}, {share:.1%} {kind}", x, given, given != labels))
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def predict_out_of_fold(name: str, rows: pd.DataFrame, k: int) -> dict[str, np.ndarray]:   # digest -> probabilities
    "Train k times with the data's recipe, and predict the images of each fold."
    from cvnb.training.cross_validation import cross_validate
    from cvnb.training.loaders import load_labelled
    from cvnb.training.options import FitOptions
    from cvnb.training.tuning import autotune
    contracts = read_contracts()
    file = asset_folder("configs")/f"{Path(name).name}.yaml"
    if not file.exists(): file = asset_folder("configs")/"default.yaml"
    recipe = contracts["train"].defaults() | read_recipe(file, contracts)["train"]
    classes = sorted(set(rows.label))
    size = recipe["image_size"] or auto_image_size(rows.width, rows.height)
    data = load_labelled(data_root(locate_data(name)), rows, classes, size)

    make_model = lambda: create_model(recipe["backbone"], classes, size, recipe["stem"], recipe["weights"])
    with TemporaryDirectory() as folder:
        options = autotune(FitOptions.from_params(recipe), make_model(), data, Path(folder)/"auto").options
        predictions = cross_validate(make_model, rows, data, options, Path(folder)/"folds", k).predictions
    return dict(zip(predictions.pixel_sha256, predictions.probabilities))


def run_check_with_networks(
    name: str, rows: pd.DataFrame, k: int, views: dict[str, np.ndarray], given: np.ndarray,
) -> Result:
    "Run cvnb's check with out-of-fold predictions as one more view."
    view = out_of_fold_view(predict_out_of_fold(name, rows, k), rows.pixel_sha256, views)
    return run_check(pca_features(views | view), given)


def measure_folds(args: argparse.Namespace) -> list[dict]:
    "Measure the check without and with out-of-fold predictions."
    rows = []
    for name in args.only:
        source = locate_data(name)
        inspected = inspect_images(data_root(source), scan_dataset(source))
        table = select_unique_images(mark_duplicates(inspected)).reset_index(drop=True)
        images = load_images(data_root(source), table.path, args.side)
        views = feature_views(images, embed_images(images, args.side))
        classes, labels = class_indices(table)
        x = pca_features(views)
        target = most_confused_class(add_fourier_features(x), labels)
        for kind, share in product(NOISE_KINDS, (0.05, 0.2)):
            given = flip_some(labels, share, kind, target)
            noisy = table.assign(label=classes[given])
            with_networks = partial(run_check_with_networks, name, noisy, args.folds, views, given)
            methods = {"check": partial(run_check, x, given), f"check, and {args.folds} networks": with_networks}
            for method, call in methods.items():
                rows.append(measure_method(Path(name).name, f"{share:.0%} {kind}", method, call, given != labels))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def compare_methods(args: argparse.Namespace) -> list[dict]:
    "Measure the check and cleanlab on the same flipped labels."
    rows = []
    for name in args.only:
        network, x, labels = load_features(name, args.images, args.side, args.vectors)
        target = most_confused_class(add_fourier_features(x), labels)
        shares = (0.2, 0.4) if name == "cifar10" else (0.02, 0.05, 0.2, 0.4)
        for kind, share in product(NOISE_KINDS, shares):
            given = flip_some(labels, share, kind, target)
            methods = {"check": partial(run_check, x, given),
                       "cleanlab, same features": partial(run_cleanlab, x, given),
                       "cleanlab, network only": partial(run_cleanlab, network, given)}
            if (share, kind) == (0.2, "at random"): methods["check + validation"] = partial(run_check, x, given, True)
            for method, call in methods.items():
                rows.append(measure_method(name, f"{share:.0%} {kind}", method, call, given != labels))
                print(rows[-1], file=sys.stderr, flush=True)
    return rows


def main() -> None:
    "Measure, print, and write the table with --write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50000, help="number of CIFAR-10's training images")
    parser.add_argument("--side", type=int, default=64, help="side in pixels of the network's input")
    parser.add_argument("--vectors", type=Path, help="file that caches the embeddings of CIFAR-10")
    parser.add_argument("--only", nargs="+", default=["digits", "mnist5k", "cifar10"], metavar="DATA",
                        help="names of data sets, or folders of classes")
    parser.add_argument("--intervals", action="store_true", help="measure instead whether the predicted intervals hold")
    parser.add_argument("--folds", type=int, default=0, metavar="K",
                        help="measure instead the gain from out-of-fold predictions of K networks")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/audit_labels*.md")
    args = parser.parse_args()
    if args.intervals:
        title = "The precision that the label check predicts, and its interval"
        show("audit_labels_intervals", title, measure_intervals(args), args.write)
    elif args.folds:
        title = "Planted label errors, without and with out-of-fold predictions"
        show("audit_labels_folds", title, measure_folds(args), args.write)
    else: show("audit_labels", "Planted label errors", compare_methods(args), args.write)


if __name__ == "__main__": main()
