"""Near duplicates: recall, average precision and cost of cvnb's check, fiftyone-brain, imagededup and cleanvision, side by side.

    python benchmarks/audit_duplicates.py [--images 50000] [--slow 2000] [--write] [--also FOLDER ...]
    python benchmarks/audit_duplicates.py --million [--write]

Changed copies of CIFAR-10's training images are written among them: resized, recompressed, cropped, brighter or darker, mirrored, a fifth
each, drawn with a seed that the check's own planted copies do not share. Every method sees the same files and runs on one thread in a fresh
process; its CPU seconds, imports and evaluation excluded, count decoding and all that follows. The database behind FiftyOne is not counted.

Recall and what is flagged are those at a method's own default threshold. Average precision ranks the pairs of a copy and any image. CIFAR-10
has near duplicates of its own: pairs of two unplanted images are left out for every method, and so are pairs of a copy with an image that
correlates with its source by 0.9 or more, pixel by pixel. A method that needs more than a second of CPU for 100 images runs on fewer.

Hubs cannot be reached from everywhere, so networks have the weights that a package brings, EfficientNet-Lite0's; imagededup's own network,
a smaller one, is measured without weights, for its cost alone.

The second table plants copies among images that have no near duplicates because of where they come from, and compares the precision that
the check predicts with the true one.

--million indexes and searches a million vectors: synthetic ones of 53 and of 512 numbers, in clusters, with two threads; and those of
CIFAR-10's images and of blends of two of them, as the check itself does it, with one. CPU seconds hold on a busy machine, too.
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

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

from cvnb.data.tables import locate, scan  # noqa: E402
from cvnb.audit.duplicates import KINDS, change, near_duplicates, plant, thumbnails  # noqa: E402
from cvnb.data.images import load_images, open_image  # noqa: E402

PEER = ("imagededup==0.3.3.post2", "PyWavelets")   # what it needs beyond what is installed
FAST = ("cvnb", "imagededup dhash", "cleanvision", "fiftyone-brain")
LARGE = ("cvnb", "cleanvision", "fiftyone-brain")   # imagededup compares all pairs, and keeps them
SLOW = ("imagededup CNN, Lite0", "imagededup CNN, own network without weights")
SEED = 20_251


def prepare(folder: Path, root: Path, paths: list[str], n: int) -> pd.DataFrame:   # name, source, kind; source -1 for an original
    "Link images into a folder, and write changed copies of n of them among them."
    rng, rows, names = np.random.default_rng(SEED), [], list(KINDS)
    folder.mkdir()
    for i, path in enumerate(paths):
        rows.append((f"{i:06}.png", -1, ""))
        os.symlink(root/path, folder/rows[-1][0])
    for i, source in enumerate(rng.permutation(len(paths))[:n]):
        kind = names[i % len(names)]
        strength = KINDS[kind][i // len(names) % len(KINDS[kind])]
        rows.append((f"copy{i:06}.{'jpg' if kind == 'recompressed' else 'png'}", int(source), kind))
        image = open_image(root/paths[source])
        if kind == "recompressed": image.save(folder/rows[-1][0], quality=strength)
        else: change(image, kind, strength, rng).save(folder/rows[-1][0])
    return pd.DataFrame(rows, columns=["name", "source", "kind"])


# Each method gives (pairs of names that it returns by default, function that scores copies against all images), the second after the clock.


def run_cvnb(folder: Path, names: list[str], copies: list[str]):
    thumbs = thumbnails(load_images(folder, names, 32))
    planted = plant(folder, names)
    result = near_duplicates(thumbs, thumbnails(planted.images), planted)
    found = [(names[i], names[j]) for i, j in zip(result.pairs.i, result.pairs.j)]
    note = f"threshold {result.threshold:.3f}, own recall {result.proof.recall}, predicted precision {result.proof.precision}"

    def score() -> np.ndarray:
        place, out = {n: i for i, n in enumerate(copies)}, np.zeros((len(copies), len(names)), np.float32)
        every = near_duplicates(thumbs, thumbnails(planted.images), planted, threshold=1e-12).pairs
        for i, j, s in zip(every.i, every.j, np.log(every.similarity) - np.log1p(-every.similarity.clip(upper=1 - 1e-15))):
            for a, b in ((i, j), (j, i)):
                if names[a] in place: out[place[names[a]], b] = s + 50
        return out
    return found, score, note


def run_dhash(folder: Path, names: list[str], copies: list[str]):
    from imagededup.methods import DHash
    method = DHash(verbose=False)
    codes = method.encode_images(folder, num_enc_workers=0)
    found = method.find_duplicates(encoding_map=codes, num_dist_workers=0)

    def score() -> np.ndarray:
        bits = np.array([np.unpackbits(np.frombuffer(bytes.fromhex(codes[n]), np.uint8)) for n in names], np.float32)
        mine = bits[[names.index(c) for c in copies]]
        return -(mine @ (1 - bits).T + (1 - mine) @ bits.T)
    return [(a, b) for a, others in found.items() for b in others], score, "Hamming distance 10"


def run_cnn(folder: Path, names: list[str], copies: list[str], packaged: bool):
    import torch
    from imagededup.methods import CNN
    from imagededup.utils.models import CustomModel, MobilenetV3
    from torchvision import models, transforms

    from cvnb.models.embedding import embedder
    if packaged:
        net = embedder(224).net
        scale = transforms.Normalize(mean=[127 / 255] * 3, std=[128 / 255] * 3)
        transform = transforms.Compose([*MobilenetV3.transform.transforms[:3], scale])
    else:
        own = models.mobilenet_v3_small(weights=None).eval()
        net, transform = torch.nn.Sequential(own.features, own.avgpool, torch.nn.Flatten()), MobilenetV3.transform
    method = CNN(verbose=False, model_config=CustomModel("packaged", net.eval(), transform))
    codes = method.encode_images(folder, num_enc_workers=0)
    found = method.find_duplicates(encoding_map=codes, num_sim_workers=0) if packaged else {}
    return [(a, b) for a, others in found.items() for b in others], lambda: cosine(np.array([codes[n] for n in names]), names, copies), "cosine 0.9"


def run_fiftyone(folder: Path, names: list[str], copies: list[str]):
    from cvnb.data.fiftyone_db import fiftyone
    from cvnb.models.embedding import embed
    fo = fiftyone()
    import fiftyone.brain as brain
    dataset = fo.Dataset()
    dataset.add_samples([fo.Sample(filepath=str(folder/n)) for n in names], progress=False)
    vectors = embed(load_images(folder, names, 64), 64)
    index = brain.compute_near_duplicates(dataset, embeddings=vectors, progress=False)
    by = {s: Path(p).name for s, p in zip(*dataset.values(["id", "filepath"]))}
    groups = [[by[k], *(by[other] for other, _ in v)] for k, v in index.neighbors_map.items()]
    dataset.delete()
    return [(g[0], other) for g in groups for other in g[1:]] + [(a, b) for g in groups for a in g[1:] for b in g[1:] if a != b and len(g) < 50], \
        lambda: cosine(vectors, names, copies), f"cosine distance {index.thresh}"


def run_cleanvision(folder: Path, names: list[str], copies: list[str]):
    from cleanvision import Imagelab
    lab = Imagelab(data_path=str(folder))
    lab.find_issues({"near_duplicates": {}}, n_jobs=1, verbose=False)
    sets = lab.info["near_duplicates"]["sets"] + lab.info.get("exact_duplicates", {}).get("sets", [])
    found = [(Path(a).name, Path(b).name) for s in sets for a in s for b in s if a != b]

    def score() -> np.ndarray:
        place, all_of = {n: i for i, n in enumerate(copies)}, {n: i for i, n in enumerate(names)}
        out = np.zeros((len(copies), len(names)), np.float32)
        for a, b in found:
            if a in place: out[place[a], all_of[b]] = 1
        return out
    return found, score, "equal perceptual hashes"


def cosine(vectors: np.ndarray, names: list[str], copies: list[str]) -> np.ndarray:
    "Score copies against all images."
    x = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return (x[[names.index(c) for c in copies]] @ x.T).astype(np.float32)


def used() -> float:   # CPU seconds
    "Tell the CPU time of this process and its children."
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def peak_gb() -> float:
    "Tell the most memory that this process has held; `ru_maxrss` would count that of the process that started it."
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 2**20


def warm(method: str) -> None:
    "Import what a method needs, before its clock starts."
    names = ["faiss", "scipy.fft", "scipy.stats", "scipy.optimize", "torch"]
    if "CNN" in method or method == "fiftyone-brain": names += ["cvnb.models", "torchvision"]
    if "imagededup" in method: names.append("imagededup.methods")
    if method == "cleanvision": names.append("cleanvision")
    if method == "fiftyone-brain":
        from cvnb.data.fiftyone_db import fiftyone
        fiftyone().list_datasets()
        names.append("fiftyone.brain")
    for name in names: importlib.import_module(name)
    importlib.import_module("torch").set_num_threads(1)


def execute(method: str, folder: Path) -> None:
    "Run a method in this process, and write down what it found."
    truth = pd.read_parquet(folder.parent/f"{folder.name}.parquet")
    names, copies = truth.name.tolist(), truth.name[truth.source >= 0].tolist()
    runs = {"cvnb": run_cvnb, "imagededup dhash": run_dhash, "cleanvision": run_cleanvision, "fiftyone-brain": run_fiftyone,
            SLOW[0]: lambda *a: run_cnn(*a, True), SLOW[1]: lambda *a: run_cnn(*a, False)}
    warm(method)
    begin = used()
    found, score, note = runs[method](folder, names, copies)
    out = dict(seconds=used() - begin, peak_gb=peak_gb(), note=note) | judge(truth, found, score(), folder)
    (folder.parent/f"{method}.json").write_text(json.dumps(out))


def judge(truth: pd.DataFrame, found: list[tuple[str, str]], score: np.ndarray, folder: Path) -> dict:
    "Compare what was found with what was planted."
    planted = truth[truth.source >= 0]
    pairs = {tuple(sorted(p)) for p in found}
    hit = np.array([tuple(sorted((r.name, truth.name[r.source]))) in pairs for r in planted.itertuples(index=False)])
    copies = set(planted.name)
    own = {n for p in pairs if not copies & set(p) for n in p}
    target = np.zeros(score.shape, bool)
    target[np.arange(len(planted)), planted.source] = True
    keep = ~np.load(folder.parent/f"{folder.name}-alike.npy") | target
    keep[:, planted.index] = False   # other copies, and itself
    true, others = score[target], np.sort(score[keep & ~target])
    above = len(others) - np.searchsorted(others, np.sort(true)[::-1])      # with ties against the method
    precision = np.arange(1, len(true) + 1) / (np.arange(1, len(true) + 1) + above)
    kinds = {k: float(hit[(planted.kind == k).to_numpy()].mean()) for k in KINDS}
    return dict(recall=float(hit.mean()), kinds=kinds, own_share=len(own) / (len(truth) - len(planted)), ap=float(precision.mean()),
                precision_at_99=float(precision[int(np.ceil(0.99 * len(true))) - 1]))


def alike(folder: Path, truth: pd.DataFrame) -> np.ndarray:   # bool (copies, images)
    "Say which images resemble a copy's source pixel by pixel, as they are or mirrored."
    thumbs = thumbnails(load_images(folder, truth.name, 32)).astype(np.float32)
    source = thumbs[truth.source[truth.source >= 0]]

    def unit(x: np.ndarray) -> np.ndarray:
        x = x.reshape(len(x), -1) - x.mean(axis=(1, 2, 3))[:, None]
        return x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1)

    x, both = unit(thumbs), (unit(source), unit(np.ascontiguousarray(source[:, :, ::-1])))
    return np.maximum(both[0] @ x.T, both[1] @ x.T) >= 0.9


def side_by_side(n: int, methods: tuple[str, ...], peers: Path, temp: Path) -> list[dict]:   # rows of the table
    "Run methods on the same images, one after the other."
    root = locate("cifar10")
    every = [p for p in scan(root).path if p.startswith("train/")]
    paths = [every[i] for i in np.sort(np.random.default_rng(SEED).permutation(len(every))[:n])]
    folder = temp/f"images{n}"
    truth = prepare(folder, root, paths, max(500, n // 50))
    truth.to_parquet(temp/f"{folder.name}.parquet")
    np.save(temp/f"{folder.name}-alike.npy", alike(folder, truth))
    rows, env = [], os.environ | dict(OMP_NUM_THREADS="1", PYTHONPATH=os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(peers)]))
    for method in methods:
        done = subprocess.run([sys.executable, __file__, "--execute", method, "--in", folder], env=env, capture_output=True, text=True)
        if done.returncode:
            print(f"{method}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
            continue
        r = json.loads((temp/f"{method}.json").read_text())
        no_quality = "without weights" in method
        quality = {"recall": f"{r['recall']:.4f}", **{k: f"{v:.3f}" for k, v in r["kinds"].items()}, "own images flagged": f"{r['own_share']:.2%}",
                   "average precision": f"{r['ap']:.4f}", "precision at recall 0.99": f"{r['precision_at_99']:.4f}"}
        rows.append({"method": method, "images": len(truth), "planted": int((truth.source >= 0).sum()), "default": r["note"],
                     **({k: "" for k in quality} if no_quality else quality), "CPU s per 1,000": r["seconds"] / len(truth) * 1000,
                     "images per CPU s": f"{len(truth) / r['seconds']:.0f}", "peak GB": r["peak_gb"]})
        print(json.dumps(rows[-1]), flush=True)
    ours = float(rows[0]["images per CPU s"])
    reaches = lambda r: r["precision at recall 0.99"] and float(r["precision at recall 0.99"]) >= 0.5
    return [r | {"cvnb's speed ÷": f"{ours / float(r['images per CPU s']):.2f}" + " (misses recall 0.99)" * (not reaches(r))} for r in rows]


def predicted(data: str) -> dict:   # a row of the second table
    "Plant copies among images without near duplicates, and compare the predicted precision with the true one."
    root = locate(data)
    paths = scan(root).path.tolist()
    own, (hidden, check) = thumbnails(load_images(root, paths, 32)), (plant(root, paths, n=len(paths) // 20, seed=SEED), plant(root, paths))
    result = near_duplicates(np.concatenate([own, hidden.images]), check.images, check)
    true = {(s, len(own) + i) for i, s in enumerate(hidden.source)}
    found = list(zip(result.pairs.i, result.pairs.j))
    right = sum(p in true for p in found)
    return {"data": Path(data).name, "images": len(own), "planted": len(true), "found": len(found), "threshold": result.threshold,
            "recall predicted": str(result.proof.recall), "true recall": right / len(true), "precision predicted": str(result.proof.precision),
            "true precision": right / max(1, len(found)), "points apart": abs(result.proof.precision.value - right / max(1, len(found))) * 100}


def million(n: int, size: int, asked: int = 100_000) -> dict:   # a row of the table
    "Index vectors in clusters, and search the neighbours of some."
    from cvnb.audit.duplicates import build_index, search
    rng, x = np.random.default_rng(0), np.empty((n, size), np.float32)
    centres = rng.normal(size=(20_000, size)).astype(np.float32)
    for i in range(0, n, 50_000):
        part = centres[rng.integers(0, len(centres), len(x[i:i + 50_000]))] + 0.7 * rng.normal(size=x[i:i + 50_000].shape).astype(np.float32)
        x[i:i + 50_000] = part / np.linalg.norm(part, axis=1, keepdims=True)
    clocks = [(time.perf_counter(), used())]
    index = build_index(x, n_threads=2)
    clocks.append((time.perf_counter(), used()))
    search(index, x[:asked], 8, n_threads=2)
    clocks.append((time.perf_counter(), used()))
    peak, (wall, cpu) = peak_gb(), np.diff(clocks, axis=0).T
    some = rng.integers(0, n, 500)
    near = x[some] + rng.normal(size=(500, size)).astype(np.float32) * 0.3 / np.sqrt(size)   # cosine of about 0.96
    found = search(index, near, 8)
    share = np.isin(np.arange(500), found.i[found.j.to_numpy() == some[found.i]]).mean()
    return {"synthetic vectors in 20,000 clusters": n, "dimensions": size, "cells": index.nlist, "indexed in s": float(wall[0]),
            "CPU s": float(cpu[0]), "neighbours asked of": min(asked, n), "answered in s": float(wall[1]),
            "CPU ms each": float(cpu[1]) / min(asked, n) * 1000, "peak GB, vectors included": peak, "near copies found": float(share)}


def alone(call: Callable, *args: object) -> dict:   # what it gives
    "Call a function in a process of its own, whose memory is its own."
    with ProcessPoolExecutor(1, get_context("spawn")) as pool: return pool.submit(call, *args).result()


def blends(n: int) -> np.ndarray:   # uint8 (n, 32, 32, 3)
    "Take CIFAR-10's images, and for the rest mix two of them."
    root, rng = locate("cifar10"), np.random.default_rng(SEED)
    own = thumbnails(load_images(root, scan(root).path, 32))[:n]
    out = np.empty((n, 32, 32, 3), np.uint8)
    out[:len(own)] = own
    for i in range(len(own), n, 10_000):
        part = out[i:i + 10_000]
        first, second, share = (*rng.integers(0, len(own), (2, len(part))), rng.uniform(0.5, 0.75, (len(part), 1, 1, 1)).astype(np.float32))
        part[:] = own[first] * share + own[second] * (1 - share)
    return out


def million_images(n: int) -> dict:   # a row of the table
    "Find the candidates for near duplicates among many images, and look at some of the pairs, as the check does."
    from PIL import Image

    from cvnb.audit.duplicates import Planted, _hits, build_index, compare, own_pairs, vectors
    thumbs, rng, names = blends(n), np.random.default_rng(SEED), list(KINDS)
    source = rng.permutation(n)[:600]
    kind = np.array([names[i % len(names)] for i in range(600)])
    strength = np.array([KINDS[k][i // len(names) % len(KINDS[k])] for i, k in enumerate(kind)], float)
    copies = [np.array(change(Image.fromarray(thumbs[s]), k, by, rng)) for s, k, by in zip(source, kind, strength)]
    planted = Planted(np.concatenate([thumbnails(c[None]) for c in copies]), source, kind, strength, np.arange(600) // 20 % 2 == 0)
    clocks = [used()]
    x = vectors(thumbs); clocks.append(used())
    index = build_index(x); clocks.append(used())
    hits, _, least = _hits(index, planted.images, planted, 8)
    pairs = own_pairs(index, x, 8, least); clocks.append(used())
    some = pairs.iloc[rng.permutation(len(pairs))[:20_000]]
    compare(thumbs, thumbs, some); clocks.append(used())
    described, indexed, searched, compared = np.diff(clocks).tolist()
    return {"images": n, "described in CPU s": described, "indexed in CPU s": indexed, "searched in CPU s": searched, "candidate pairs": len(pairs),
            "CPU s per million pairs looked at": compared / len(some) * 1e6, "planted copies among the candidates": hits.i.nunique() / 600,
            "peak GB, thumbnails included": peak_gb()}


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=50_000, help="of CIFAR-10's training images")
    parser.add_argument("--slow", type=int, default=2000, help="images where all methods are compared, the slow ones too")
    parser.add_argument("--also", nargs="*", default=[], help="folders of images without near duplicates, for the second table")
    parser.add_argument("--million", action="store_true", help="index and search a million vectors instead")
    parser.add_argument("--vectors", type=int, default=1_000_000, help="that --million indexes")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/audit_duplicates*.md")
    parser.add_argument("--execute", help=argparse.SUPPRESS)
    parser.add_argument("--in", dest="folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.execute: return execute(args.execute, args.folder)
    if args.million:
        rows = [alone(million, args.vectors, size) for size in (53, 512)]
        show("audit_duplicates_million", "A million vectors on two cores", rows, args.write)
        title = "Near duplicates among a million images: the search for candidates"
        return show("audit_duplicates_million_images", title, [alone(million_images, args.vectors)], args.write)
    with tempfile.TemporaryDirectory() as temp:
        peers = Path(temp)/"peers"
        subprocess.run([Path(sys.executable).with_name("uv"), "pip", "install", "-q", "--target", peers, "--no-deps", *PEER], check=True)
        rows = side_by_side(args.slow, FAST + SLOW, peers, Path(temp))
        if args.images > args.slow: rows += side_by_side(args.images, LARGE, peers, Path(temp))
    show("audit_duplicates", "Near duplicates planted among CIFAR-10's training images", rows, args.write)
    show("audit_duplicates_precision", "The precision that the check predicts, where the truth is planted",
         [predicted(data) for data in ("digits", "mnist5k", *args.also)], args.write)


if __name__ == "__main__": main()
