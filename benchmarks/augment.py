"""Augmented images per second: cvnb's batches compared with torchvision's transforms of single images, on one thread.

    python benchmarks/augment.py [--rounds 5] [--device cuda] [--write]

Both take and return a batch of uint8 images in memory; torchvision's transforms get each image with the channels
first, as they need it. They run in turns, and the median round counts. On a CPU the benchmark measures the time of
the process, which on an idle core is wall-clock time; on a GPU it measures wall-clock time until the GPU has
finished. `copies` is the number of plain copies of the batch that take as long as cvnb.
"""
from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torchvision.transforms import v2

from cvnb.training.augment import Augmentation, mix_batch

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402

BATCHES = {32: 512, 224: 64}   # side in pixels -> images
AFFINE = dict(degrees=10, translate=(.08, .08), scale=(.9, 1.1), interpolation=v2.InterpolationMode.BILINEAR, fill=None)


def augmentations(size: int, generator: torch.Generator) -> dict[str, tuple[Callable, Callable]]:
    "List cvnb's functions of a batch, and torchvision's of an image (3, S, S) or, for mixing, of a batch."
    pad = 4 if size < 100 else size // 8
    ours = lambda **how: lambda images, labels: Augmentation(**how)(images, generator)
    mixed = lambda *alphas: lambda images, labels: mix_batch(images, labels, *alphas, generator)
    crop = [v2.RandomCrop(size, pad, padding_mode="reflect")]
    several = v2.Compose([*crop, v2.RandomHorizontalFlip(), v2.TrivialAugmentWide(), v2.RandomErasing(0.25)])
    return {"flip": (ours(flip=True), v2.RandomHorizontalFlip()),
            "flip, shift": (ours(flip=True, shift=pad), v2.Compose([v2.RandomHorizontalFlip(), *crop])),
            "light": (ours(name="light"), v2.RandomAffine(**AFFINE)),
            "trivial": (ours(name="trivial"), v2.TrivialAugmentWide()),
            "randaugment": (ours(name="randaugment"), v2.RandAugment()),
            "erasing": (ours(erasing=0.25), v2.RandomErasing(0.25)),
            "shift, flip, trivial, erasing": (ours(name="trivial", flip=True, shift=pad, erasing=0.25), several),
            "mixup": (mixed(1.0, 0), v2.MixUp(num_classes=10)), "cutmix": (mixed(0, 1.0), v2.CutMix(num_classes=10))}


def one_by_one(transform: Callable) -> Callable:
    "Apply a transform to each image of a batch."
    def apply(images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        out = torch.stack([transform(image) for image in images.permute(0, 3, 1, 2)])
        return out.permute(0, 2, 3, 1).contiguous()

    return apply


def whole_batch(transform: Callable) -> Callable:
    "Apply torchvision's mixing, which takes floats."
    return lambda images, labels: transform(images.permute(0, 3, 1, 2).float(), labels)


def time_call(work: Callable, images: torch.Tensor, labels: torch.Tensor) -> float:   # seconds
    "Time one call."
    if images.device.type == "cpu":
        begin = time.process_time()
        work(images, labels)
        return time.process_time() - begin
    torch.cuda.synchronize()
    begin = time.perf_counter()
    work(images, labels)
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def measure(size: int, rounds: int, device: str) -> list[dict]:
    "Measure all augmentations at one size."
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (BATCHES[size], size, size, 3), generator=generator, dtype=torch.uint8).to(device)
    labels = torch.randint(10, (len(images),), generator=generator).to(device)
    shares = torch.nn.functional.one_hot(labels, 10).float()
    rows = []
    for name, (ours, peer) in augmentations(size, generator).items():
        theirs = whole_batch(peer) if name in ("mixup", "cutmix") else one_by_one(peer)
        works = dict(cvnb=(ours, shares), torchvision=(theirs, labels), copy=(lambda x, _: x.clone(), labels))
        times = {who: [] for who in works}
        for _ in range(rounds + 1):
            for who, (work, target) in works.items(): times[who].append(time_call(work, images, target))
        best = {who: median(t[1:]) for who, t in times.items()}
        speed = {who: len(images) / t for who, t in best.items()}
        rows.append({"side": size, "images": len(images), "augmentation": name, "cvnb, images/s": round(speed["cvnb"]),
                     "torchvision, images/s": round(speed["torchvision"]),
                     "ratio": speed["cvnb"] / speed["torchvision"], "copies": best["cvnb"] / best["copy"]})
    return rows


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--write", action="store_true", help="write the table into benchmarks/results/")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows = [row for size in BATCHES for row in measure(size, args.rounds, args.device)]
    where = "one CPU thread, its own time" if args.device == "cpu" else torch.cuda.get_device_name()
    name = "augment" if args.device == "cpu" else "augment_gpu"
    show(name, f"Augmentation in batches and image by image, {where}", rows, args.write)


if __name__ == "__main__": main()
