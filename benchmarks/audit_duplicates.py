"""Near duplicates: recall, average precision and cost of cvnb's check, fiftyone-brain, imagededup and cleanvision.

    python benchmarks/audit_duplicates.py [--images 50000] [--slow 2000] [--write] [--also FOLDER ...]
    python benchmarks/audit_duplicates.py --million [--write]

The script writes changed copies of CIFAR-10's training images among the originals. A fifth each is resized,
recompressed, cropped, made brighter or darker, or mirrored. Their seed differs from the seed of the check's own
planted copies. Every method reads the same files and runs on one thread in a new process. Its CPU seconds include
decoding, but neither imports nor the evaluation nor FiftyOne's database.

Recall and flagged images are those at a method's default threshold. Average precision ranks all pairs of a copy and
an image. CIFAR-10 has near duplicates of its own, so two kinds of pairs are left out for every method: pairs of two
originals, and pairs of a copy with an image whose pixels correlate with its source by 0.9 or more. Methods that need
more than a second of CPU time for 100 images run on fewer images.

Networks have the weights of an installed package (EfficientNet-Lite0), because the script downloads no weights.
imagededup's own, smaller network runs without weights; only its cost is measured.

The second table plants copies among images whose origin rules out near duplicates, and compares the precision that
the check predicts with the true one.

--million indexes and searches a million vectors: synthetic clustered vectors of 53 and of 512 numbers with two
threads, and the vectors of CIFAR-10's images and of blends of two of them with one thread, as the check does. CPU
seconds are comparable on a busy machine too.
"""
from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd

from cvnb.audit.duplicates import (
    COPY_TRANSFORMS,
    find_near_duplicates,
    make_thumbnails,
    plant_copies,
    transform_image,
)
from cvnb.data.dataset import locate_data, scan_dataset
from cvnb.data.images import load_images, open_image

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

PEER_PACKAGES = ("imagededup==0.3.3.post2", "PyWavelets")   # installed into a temporary folder
FAST = ("cvnb", "imagededup dhash", "cleanvision", "fiftyone-brain")
LARGE = ("cvnb", "cleanvision", "fiftyone-brain")   # without imagededup, which keeps all pairs in memory
SLOW = ("imagededup CNN, Lite0", "imagededup CNN, own network without weights")
SEED = 20_251
N_PLANTED = 600   # copies in `measure_candidate_search`


def write_images(folder: Path, root: Path, paths: list[str], n: int) -> pd.DataFrame:   # name, source or -1, kind
    "Link images into a folder, and write changed copies of n of them."
    rng = np.random.default_rng(SEED)
    kinds = list(COPY_TRANSFORMS)
    rows = []
    folder.mkdir()
    for i, path in enumerate(paths):
        name = f"{i:06}.png"
        os.symlink(root/path, folder/name)
        rows.append((name, -1, ""))
    for i, source in enumerate(rng.permutation(len(paths))[:n]):
        kind = kinds[i % len(kinds)]
        strengths = COPY_TRANSFORMS[kind]
        strength = strengths[i // len(kinds) % len(strengths)]
        image = open_image(root/paths[source])
        name = f"copy{i:06}.{'jpg' if kind == 'recompressed' else 'png'}"
        if kind == "recompressed": image.save(folder/name, quality=strength)
        else: transform_image(image, kind, strength, rng).save(folder/name)
        rows.append((name, int(source), kind))
    return pd.DataFrame(rows, columns=["name", "source", "kind"])


# Each `run_…` returns the pairs of names at the method's default threshold, a function that scores copies against all
# images, and a note. The function runs after the clock has stopped.


def run_cvnb(folder: Path, names: list[str], copies: list[str]):
    thumbs = make_thumbnails(load_images(folder, names, 32))
    planted = plant_copies(folder, names)
    result = find_near_duplicates(thumbs, make_thumbnails(planted.images), planted)
    found = [(names[i], names[j]) for i, j in zip(result.pairs.i, result.pairs.j)]
    validation = result.validation
    note = (f"threshold {result.threshold:.3f}, own recall {validation.recall}, "
            f"predicted precision {validation.precision}")

    def score() -> np.ndarray:
        row = {name: i for i, name in enumerate(copies)}
        scores = np.zeros((len(copies), len(names)), np.float32)
        pairs = find_near_duplicates(thumbs, make_thumbnails(planted.images), planted, threshold=1e-12).pairs
        logits = np.log(pairs.similarity) - np.log1p(-pairs.similarity.clip(upper=1 - 1e-15))
        for i, j, logit in zip(pairs.i, pairs.j, logits):
            for a, b in ((i, j), (j, i)):
                if names[a] in row: scores[row[names[a]], b] = logit + 50
        return scores
    return found, score, note


def run_dhash(folder: Path, names: list[str], copies: list[str]):
    from imagededup.methods import DHash
    method = DHash(verbose=False)
    codes = method.encode_images(folder, num_enc_workers=0)
    duplicates = method.find_duplicates(encoding_map=codes, num_dist_workers=0)

    def score() -> np.ndarray:
        hashes = [np.frombuffer(bytes.fromhex(codes[name]), np.uint8) for name in names]
        bits = np.array([np.unpackbits(code) for code in hashes], np.float32)
        copied = bits[[names.index(c) for c in copies]]
        return -(copied @ (1 - bits).T + (1 - copied) @ bits.T)
    return pairs_of(duplicates), score, "Hamming distance 10"


def run_cnn(folder: Path, names: list[str], copies: list[str], packaged: bool):
    import torch
    from imagededup.methods import CNN
    from imagededup.utils.models import CustomModel, MobilenetV3
    from torchvision import models, transforms

    from cvnb.models.embedding import create_embedding_model
    if packaged:
        net = create_embedding_model(224).net
        scale = transforms.Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3)
        transform = transforms.Compose([*MobilenetV3.transform.transforms[:3], scale])
    else:
        own = models.mobilenet_v3_small(weights=None).eval()
        net = torch.nn.Sequential(own.features, own.avgpool, torch.nn.Flatten())
        transform = MobilenetV3.transform
    method = CNN(verbose=False, model_config=CustomModel("packaged", net.eval(), transform))
    codes = method.encode_images(folder, num_enc_workers=0)
    duplicates = method.find_duplicates(encoding_map=codes, num_sim_workers=0) if packaged else {}
    score = lambda: cosine_scores(np.array([codes[name] for name in names]), names, copies)
    return pairs_of(duplicates), score, "cosine 0.9"


def run_fiftyone(folder: Path, names: list[str], copies: list[str]):
    from cvnb.data.fiftyone_db import import_fiftyone
    from cvnb.models.embedding import embed_images
    fo = import_fiftyone()
    import fiftyone.brain as brain
    dataset = fo.Dataset()
    dataset.add_samples([fo.Sample(filepath=str(folder/name)) for name in names], progress=False)
    vectors = embed_images(load_images(folder, names, 64), 64)
    index = brain.compute_near_duplicates(dataset, embeddings=vectors, progress=False)
    ids, files = dataset.values(["id", "filepath"])
    name_of = {sample: Path(file).name for sample, file in zip(ids, files)}
    found = []
    for sample, neighbours in index.neighbors_map.items():
        group = [name_of[other] for other, _ in neighbours]
        found += [(name_of[sample], other) for other in group]
        if len(group) < 49: found += pairs_within(group)
    dataset.delete()
    return found, lambda: cosine_scores(vectors, names, copies), f"cosine distance {index.thresh}"


def run_cleanvision(folder: Path, names: list[str], copies: list[str]):
    from cleanvision import Imagelab
    lab = Imagelab(data_path=str(folder))
    lab.find_issues({"near_duplicates": {}}, n_jobs=1, verbose=False)
    sets = lab.info["near_duplicates"]["sets"] + lab.info.get("exact_duplicates", {}).get("sets", [])
    found = []
    for files in sets: found += pairs_within([Path(file).name for file in files])

    def score() -> np.ndarray:
        row = {name: i for i, name in enumerate(copies)}
        column = {name: i for i, name in enumerate(names)}
        scores = np.zeros((len(copies), len(names)), np.float32)
        for a, b in found:
            if a in row: scores[row[a], column[b]] = 1
        return scores
    return found, score, "equal perceptual hashes"


def pairs_of(duplicates: dict[str, list[str]]) -> list[tuple[str, str]]:
    "List the pairs in imagededup's result."
    pairs = []
    for name, others in duplicates.items(): pairs += [(name, other) for other in others]
    return pairs


def pairs_within(group: list[str]) -> list[tuple[str, str]]:
    "List all ordered pairs of different names."
    pairs = []
    for a in group: pairs += [(a, b) for b in group if a != b]
    return pairs


def cosine_scores(vectors: np.ndarray, names: list[str], copies: list[str]) -> np.ndarray:
    "Score copies against all images by the cosine of their vectors."
    x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (x[[names.index(c) for c in copies]] @ x.T).astype(np.float32)


def cpu_seconds() -> float:
    "Return the CPU time of this process and its children."
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(sum(u[:2]) for u in usage)


def peak_gb() -> float:
    "Return the peak memory of this process; `ru_maxrss` would include that of the process that started it."
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def import_packages(method: str) -> None:
    "Import what a method needs, before its clock starts."
    names = ["faiss", "scipy.fft", "scipy.stats", "scipy.optimize", "torch"]
    if "CNN" in method or method == "fiftyone-brain": names += ["cvnb.models.embedding", "torchvision"]
    if "imagededup" in method: names.append("imagededup.methods")
    if method == "cleanvision": names.append("cleanvision")
    if method == "fiftyone-brain":
        from cvnb.data.fiftyone_db import import_fiftyone
        import_fiftyone().list_datasets()
        names.append("fiftyone.brain")
    for name in names: importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def run_method(method: str, folder: Path) -> None:
    "Run a method in this process, and write its cost and its quality to a file."
    truth = pd.read_parquet(folder.parent/f"{folder.name}.parquet")
    names = truth.name.tolist()
    copies = truth.name[truth.source >= 0].tolist()
    runs = {"cvnb": run_cvnb, "imagededup dhash": run_dhash, "cleanvision": run_cleanvision,
            "fiftyone-brain": run_fiftyone,
            SLOW[0]: lambda *a: run_cnn(*a, True), SLOW[1]: lambda *a: run_cnn(*a, False)}
    import_packages(method)
    begin = cpu_seconds()
    found, score, note = runs[method](folder, names, copies)
    cost = dict(seconds=cpu_seconds() - begin, peak_gb=peak_gb(), note=note)
    quality = evaluate(truth, found, score(), folder)
    (folder.parent/f"{method}.json").write_text(json.dumps(cost | quality))


def evaluate(truth: pd.DataFrame, found: list[tuple[str, str]], score: np.ndarray, folder: Path) -> dict:
    "Compare found pairs and scores with the planted copies."
    planted = truth[truth.source >= 0]
    pairs = {tuple(sorted(pair)) for pair in found}
    hit = np.array([tuple(sorted((r.name, truth.name[r.source]))) in pairs for r in planted.itertuples(index=False)])
    copies = set(planted.name)
    flagged = set()   # originals in a pair without a copy
    for pair in pairs:
        if not copies & set(pair): flagged |= set(pair)
    target = np.zeros(score.shape, bool)
    target[np.arange(len(planted)), planted.source] = True
    keep = ~np.load(folder.parent/f"{folder.name}-alike.npy") | target
    keep[:, planted.index] = False   # other copies, and the copy itself
    true = score[target]
    others = np.sort(score[keep & ~target])
    above = len(others) - np.searchsorted(others, np.sort(true)[::-1])   # ties count against the method
    rank = np.arange(1, len(true) + 1)
    precision = rank / (rank + above)
    kinds = {kind: float(hit[(planted.kind == kind).to_numpy()].mean()) for kind in COPY_TRANSFORMS}
    return dict(recall=float(hit.mean()), kinds=kinds, own_share=len(flagged) / (len(truth) - len(planted)),
                ap=float(precision.mean()),
                precision_at_99=float(precision[int(np.ceil(0.99 * len(true))) - 1]))


def find_similar_images(folder: Path, truth: pd.DataFrame) -> np.ndarray:   # bool (copies, images)
    "Mark images whose pixels correlate with a copy's source or its mirror image by 0.9 or more."
    thumbs = make_thumbnails(load_images(folder, truth.name, 32)).astype(np.float32)
    source = thumbs[truth.source[truth.source >= 0]]

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), -1) - x.mean(axis=(1, 2, 3))[:, None]
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)

    x = unit(thumbs)
    plain = unit(source)
    mirrored = unit(np.ascontiguousarray(source[:, :, ::-1]))
    return np.maximum(plain @ x.T, mirrored @ x.T) >= 0.9


def method_row(method: str, truth: pd.DataFrame, r: dict) -> dict:   # a row of the first table
    "Format the result of a method."
    quality = {"recall": f"{r['recall']:.4f}", **{kind: f"{share:.3f}" for kind, share in r["kinds"].items()},
               "own images flagged": f"{r['own_share']:.2%}", "average precision": f"{r['ap']:.4f}",
               "precision at recall 0.99": f"{r['precision_at_99']:.4f}"}
    if "without weights" in method: quality = dict.fromkeys(quality, "")
    return {"method": method, "images": len(truth), "planted": int((truth.source >= 0).sum()), "default": r["note"],
            **quality, "CPU s per 1,000": r["seconds"] / len(truth) * 1000,
            "images per CPU s": f"{len(truth) / r['seconds']:.0f}", "peak GB": r["peak_gb"]}


def compare_methods(n: int, methods: tuple[str, ...], peers: Path, temp: Path) -> list[dict]:   # rows of a table
    "Run methods on the same images, one after the other."
    root = locate_data("cifar10")
    train = [p for p in scan_dataset(root).path if p.startswith("train/")]
    paths = [train[i] for i in np.sort(np.random.default_rng(SEED).permutation(len(train))[:n])]
    folder = temp/f"images{n}"
    truth = write_images(folder, root, paths, max(500, n // 50))
    truth.to_parquet(temp/f"{folder.name}.parquet")
    np.save(temp/f"{folder.name}-alike.npy", find_similar_images(folder, truth))
    python_path = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(peers)])
    env = os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=python_path)
    rows = []
    for method in methods:
        command = [sys.executable, __file__, "--execute", method, "--in", folder]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
        if done.returncode:
            print(f"{method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        rows.append(method_row(method, truth, json.loads((temp/f"{method}.json").read_text())))
        print(json.dumps(rows[-1]), flush=True)
    ours = float(rows[0]["images per CPU s"])
    for row in rows:
        reached = row["precision at recall 0.99"] and float(row["precision at recall 0.99"]) >= 0.5
        ratio = f"{ours / float(row['images per CPU s']):.2f}"
        row["cvnb's speed ÷ method's speed"] = ratio if reached else f"{ratio} (misses recall 0.99)"
    return rows


def measure_precision(data: str) -> dict:   # a row of the second table
    "Plant copies among images without near duplicates, and compare the predicted precision with the true one."
    root = locate_data(data)
    paths = scan_dataset(root).path.tolist()
    own = make_thumbnails(load_images(root, paths, 32))
    hidden = plant_copies(root, paths, n=len(paths) // 20, seed=SEED)
    check = plant_copies(root, paths)
    result = find_near_duplicates(np.concatenate([own, hidden.images]), check.images, check)
    true = {(s, len(own) + i) for i, s in enumerate(hidden.source)}
    found = list(zip(result.pairs.i, result.pairs.j))
    precision = sum(pair in true for pair in found) / max(1, len(found))
    recall = sum(pair in true for pair in found) / len(true)
    validation = result.validation
    return {"data": Path(data).name, "images": len(own), "planted": len(true), "found": len(found),
            "threshold": result.threshold, "recall predicted": str(validation.recall), "true recall": recall,
            "precision predicted": str(validation.precision), "true precision": precision,
            "difference, points": abs(validation.precision.value - precision) * 100}


def clustered_vectors(n: int, size: int, rng: np.random.Generator) -> np.ndarray:   # float32, rows of length 1
    "Draw vectors around 20,000 centres."
    x = np.empty((n, size), np.float32)
    centres = rng.normal(size=(20_000, size)).astype(np.float32)
    for i in range(0, n, 50_000):
        shape = x[i:i + 50_000].shape
        centre = centres[rng.integers(0, len(centres), shape[0])]
        part = centre + 0.7 * rng.normal(size=shape).astype(np.float32)
        x[i:i + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    return x


def measure_index(n: int, size: int, n_queries: int = 100_000) -> dict:   # a row of the table
    "Index synthetic vectors in clusters, and search the neighbours of some."
    from cvnb.audit.duplicates import build_index, nearest_neighbours
    rng = np.random.default_rng(0)
    x = clustered_vectors(n, size, rng)
    clocks = [(time.perf_counter(), cpu_seconds())]
    index = build_index(x, n_threads=2)
    clocks.append((time.perf_counter(), cpu_seconds()))
    nearest_neighbours(index, x[:n_queries], 8, n_threads=2)
    clocks.append((time.perf_counter(), cpu_seconds()))
    peak = peak_gb()
    wall, cpu = np.diff(clocks, axis=0).T.tolist()
    some = rng.integers(0, n, 500)
    near = x[some] + rng.normal(size=(500, size)).astype(np.float32) * 0.3 / np.sqrt(size)   # cosine of about 0.96
    found = nearest_neighbours(index, near, 8)
    share = np.isin(np.arange(500), found.i[found.j.to_numpy() == some[found.i]]).mean()
    n_queries = min(n_queries, n)
    return {"synthetic vectors in 20,000 clusters": n, "dimensions": size, "cells": index.nlist,
            "indexed in s": wall[0], "CPU s": cpu[0], "queries": n_queries, "queries answered in s": wall[1],
            "CPU ms per query": cpu[1] / n_queries * 1000, "peak GB, vectors included": peak,
            "near copies found": float(share)}


def run_in_process(call: Callable, *args: object) -> dict:   # the result of the call
    "Call a function in a new process, so that its memory can be measured."
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(call, *args).result()


def blend_images(n: int) -> np.ndarray:   # uint8 (n, 32, 32, 3)
    "Take CIFAR-10's images, and fill up with blends of two of them."
    root = locate_data("cifar10")
    rng = np.random.default_rng(SEED)
    own = make_thumbnails(load_images(root, scan_dataset(root).path, 32))[:n]
    out = np.empty((n, 32, 32, 3), np.uint8)
    out[:len(own)] = own
    for i in range(len(own), n, 10_000):
        part = out[i:i + 10_000]
        first, second = rng.integers(0, len(own), (2, len(part)))
        share = rng.uniform(0.5, 0.75, (len(part), 1, 1, 1)).astype(np.float32)
        part[:] = own[first] * share + own[second] * (1 - share)
    return out


def measure_candidate_search(n: int) -> dict:   # a row of the table
    "Search the candidates for near duplicates among many images, and compare a sample of the pairs, as the check does."
    from PIL import Image

    from cvnb.audit.duplicates import (
        PlantedCopies,
        _match_planted_copies,
        build_index,
        candidate_pairs,
        compare_pairs,
        dct_features,
    )
    thumbs = blend_images(n)
    rng = np.random.default_rng(SEED)
    source = rng.permutation(n)[:N_PLANTED]
    kinds = list(COPY_TRANSFORMS)
    kind, strength, copies = [], [], []
    for i, s in enumerate(source):
        kind.append(kinds[i % len(kinds)])
        strengths = COPY_TRANSFORMS[kind[-1]]
        strength.append(float(strengths[i // len(kinds) % len(strengths)]))
        copy = transform_image(Image.fromarray(thumbs[s]), kind[-1], strength[-1], rng)
        copies.append(make_thumbnails(np.array(copy)[None]))
    fit = np.arange(N_PLANTED) // 20 % 2 == 0
    planted = PlantedCopies(np.concatenate(copies), source, np.array(kind), np.array(strength), fit)
    clocks = [cpu_seconds()]
    x = dct_features(thumbs)
    clocks.append(cpu_seconds())
    index = build_index(x)
    clocks.append(cpu_seconds())
    matches, _, least = _match_planted_copies(index, planted.images, planted)
    pairs = candidate_pairs(index, x, min_similarity=least)
    clocks.append(cpu_seconds())
    some = pairs.iloc[rng.permutation(len(pairs))[:20_000]]
    compare_pairs(thumbs, thumbs, some)
    clocks.append(cpu_seconds())
    described, indexed, searched, compared = np.diff(clocks).tolist()
    return {"images": n, "described in CPU s": described, "indexed in CPU s": indexed, "searched in CPU s": searched,
            "candidate pairs": len(pairs), "CPU s per million compared pairs": compared / len(some) * 1e6,
            "planted copies among the candidates": matches.i.nunique() / N_PLANTED,
            "peak GB, thumbnails included": peak_gb()}


def measure_million(n: int, write: bool) -> None:
    "Measure the index and the search for candidates, and print two tables."
    rows = [run_in_process(measure_index, n, size) for size in (53, 512)]
    show("audit_duplicates_million", "A million vectors on two cores", rows, write)
    title = "Near duplicates among a million images: the search for candidates"
    show("audit_duplicates_million_images", title, [run_in_process(measure_candidate_search, n)], write)


def main() -> None:
    "Measure, print, and write the tables with --write."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000,
                        help="number of CIFAR-10's training images for methods that are fast enough")
    parser.add_argument("--slow", type=int, default=2000,
                        help="number of CIFAR-10's training images for all methods")
    parser.add_argument("--also", nargs="*", default=[], metavar="FOLDER",
                        help="folders of images without near duplicates, for the second table")
    parser.add_argument("--million", action="store_true", help="index and search a million vectors instead")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="number of vectors for --million")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/audit_duplicates*.md")
    parser.add_argument("--execute", help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.execute: return run_method(args.execute, args.folder)
    if args.million: return measure_million(args.vectors, args.write)
    with tempfile.TemporaryDirectory() as temp:
        peers = Path(temp)/"peers"
        uv = Path(sys.executable).with_name("uv")
        subprocess.run([uv, "pip", "install", "-q", "--target", peers, "--no-deps", *PEER_PACKAGES], check=True)
        rows = compare_methods(args.slow, FAST + SLOW, peers, Path(temp))
        if args.images > args.slow: rows += compare_methods(args.images, LARGE, peers, Path(temp))
    show("audit_duplicates", "Near duplicates planted among CIFAR-10's training images", rows, args.write)
    rows = [measure_precision(data) for data in ("digits", "mnist5k", *args.also)]
    show("audit_duplicates_precision", "Predicted and true precision, with planted copies", rows, args.write)


if __name__ == "__main__": main()
