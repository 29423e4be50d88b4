"""The first model of `cvnb run --minutes` beside the obvious ones, each with the same CPU time on the same images.

    python benchmarks/first_model.py groceries=FOLDER sign-digits=FOLDER digits --minutes 10 --seeds 3 --write

Sides:
- probe: logistic regression on the embeddings that cvnb's audit computes; the validation images choose the penalty.
- plain: a Lightning fine-tuning as tutorials have it. The same network and weights as cvnb's, images decoded and
  resized to 224 pixels for each epoch, mirrored at random, batches of 32, Adam at 0.001, until the time is over.
- cvnb: `configs/default.yaml` with the deadline: image size, epochs and tuning follow from the measured speed.

Time is the CPU time of a side's process, from its first image on. So it means the same on a busy machine. The audit and
the imports are not counted. The table has the accuracy on the validation images (which cvnb's tuning and the probe's
penalty have seen) and on the test images (which nothing has seen), with 95 % intervals.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from table import show

SIDES = ("probe", "plain", "cvnb")


def read_audit(run: Path) -> tuple[Path, dict]:
    "Read the audit's manifest and its record."
    from cvnb.core.output_formats import AuditRecord
    from cvnb.core.records import read_record
    return run/"audit/manifest.parquet", read_record(run/"audit/audit.json", AuditRecord)


def run_probe(run: Path, job: dict) -> dict:
    "Fit the probe of the train stage's baselines; its images are not decoded."
    from cvnb.training.baselines import fit_baselines, read_split_embeddings
    from cvnb.training.loaders import load_splits
    manifest, audit = read_audit(run)
    data = load_splits(manifest, audit, image_size=8)
    begin = time.process_time()
    vectors = read_split_embeddings(run/"audit/embeddings.npy", manifest, data.rows)
    logits = fit_baselines(vectors, data, job["seed"]).logits["probe"]
    right = {split: logits[split].argmax(1) == data.images[split].targets for split in ("val", "test")}
    return dict(right=right, choice="embeddings of the audit", seconds=time.process_time() - begin)


def run_plain(run: Path, job: dict) -> dict:
    "Fine-tune as tutorials do."
    import pytorch_lightning as pl
    import timm
    import torch
    from PIL import Image
    from torch.nn.functional import cross_entropy
    from torch.utils.data import DataLoader, Dataset
    from torchvision.transforms import v2

    from cvnb.data.splits import read_splits
    from cvnb.models.weights import PACKAGED_BACKBONE, load_packaged_weights
    manifest, audit = read_audit(run)
    rows = read_splits(manifest)
    classes = sorted(rows["train"].label.unique())
    normalize = [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([127 / 255] * 3, [128 / 255] * 3)]

    class Images(Dataset):
        def __init__(self, split: str) -> None:
            self.rows = rows[split]
            flip = [v2.RandomHorizontalFlip()] if split == "train" else []
            self.change = v2.Compose([v2.Resize((224, 224)), *flip, *normalize])

        def __len__(self) -> int: return len(self.rows)

        def __getitem__(self, i: int) -> tuple:
            row = self.rows.iloc[i]
            with Image.open(Path(audit["root"])/row.path) as image: x = self.change(image.convert("RGB"))
            return x, classes.index(row.label)

    class Model(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = timm.create_model(PACKAGED_BACKBONE)
            self.net.load_state_dict(load_packaged_weights(self.net.state_dict()))
            self.net.reset_classifier(len(classes))

        def training_step(self, batch: tuple, _: int) -> torch.Tensor:
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> torch.optim.Optimizer: return torch.optim.Adam(self.parameters(), 1e-3)

    def predict(split: str) -> np.ndarray:
        model.eval()
        with torch.inference_mode():
            return np.concatenate([(model.net(x).argmax(1) == y).numpy() for x, y in DataLoader(Images(split), 64)])

    class Stop(pl.Callback):
        steps = 0

        def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
            self.steps += 1
            trainer.should_stop = time.process_time() - begin > 60 * job["minutes"] - predict_s

    pl.seed_everything(job["seed"], verbose=False)
    model = Model()
    begin = time.process_time()
    right = {"val": predict("val")}   # to know what the predictions at the end will take
    predict_s = (time.process_time() - begin) * (1 + len(rows["test"]) / len(rows["val"]))
    stop = Stop()
    model.train()   # Lightning leaves a model in the mode that it finds
    loader = DataLoader(Images("train"), 32, shuffle=True, drop_last=len(rows["train"]) > 32)
    pl.Trainer(max_epochs=1000, accelerator="cpu", logger=False, callbacks=[stop], enable_progress_bar=False,
               enable_checkpointing=False, enable_model_summary=False).fit(model, loader)
    right = {split: predict(split) for split in ("val", "test")}
    choice = f"224 pixels, {stop.steps / max(1, len(loader)):.1f} epochs"
    return dict(right=right, choice=choice, seconds=time.process_time() - begin)


def run_cvnb(run: Path, job: dict) -> dict:
    "Do what the train stage does with `minutes`, by CPU time."
    import torch

    from cvnb.models.weights import create_model
    from cvnb.pipeline.params import read_contracts
    from cvnb.pipeline.recipes import read_recipe
    from cvnb.training import callbacks, plan
    from cvnb.training.fit import fit
    from cvnb.training.loaders import load_splits
    from cvnb.training.options import FitOptions
    from cvnb.training.predict import predict_splits
    from cvnb.training.tuning import autotune
    callbacks.read_clock = plan.read_clock = time.process_time
    manifest, audit = read_audit(run)
    given = read_recipe(Path(__file__).parents[1]/"configs/default.yaml", read_contracts())["train"]
    given = {"label_smoothing": 0.05, "precision": "auto", "workers": -1} | given | dict(seed=job["seed"], device="cpu")
    make_model = partial(create_model, given["backbone"], weights=given["weights"])
    begin = time.process_time()
    with TemporaryDirectory() as folder:
        planned = plan.plan_training(job["minutes"], manifest, audit, "classification", make_model, 0,
                                     FitOptions.from_params(given), folder)
        data = load_splits(manifest, audit, image_size=planned.image_size)
        torch.manual_seed(job["seed"])
        model = make_model(data.classes, data.image_size)
        options = autotune(planned.options, model, data.images["train"], folder, pretrained=True).options
        history = fit(model, data.images["train"], data.images["val"], options, folder)
        found = predict_splits(model, data)
    right = {split: found.tables[split].correct.to_numpy(bool) for split in ("val", "test")}
    kept = ", the probe is kept" if any(c["picked"] == "probe" for c in history.attrs["changed"]) else ""
    choice = f"{data.image_size} pixels, {len(history)} epochs of {options.tune}{kept}"
    return dict(right=right, choice=choice, seconds=time.process_time() - begin)


def run_side(job: dict) -> None:
    "Run a side in this process, and print what it reached."
    import torch
    torch.set_num_threads(job["threads"])
    warnings.filterwarnings("ignore")
    found = globals()[f"run_{job['side']}"](Path(job["run"]), job)
    right = {split: values.astype(int).tolist() for split, values in found["right"].items()}
    print(json.dumps(found | dict(right=right)))


def audit(data: str, folder: str, work: Path) -> Path:
    "Audit a data set, or find that it has been."
    run, cvnb = work/data, Path(sys.executable).with_name("cvnb")
    subprocess.run([cvnb, "run", "audit", "--data", folder, "--run", str(run)], check=True, stdout=subprocess.DEVNULL)
    return run


def measure(data: str, folder: str, side: str, seed: int, args: argparse.Namespace, work: Path) -> dict:
    "Run a side with a seed, or read what an earlier call measured, and return its row."
    from cvnb.metrics.classification import accuracy
    job = dict(side=side, run=str(work/data), seed=seed, minutes=args.minutes, threads=args.threads)
    kept = work/f"{data}-{side}-{seed}-{args.minutes:g}-{args.threads}.json"
    if not kept.exists():
        audit(data, folder, work)
        done = subprocess.run([sys.executable, __file__, "--job", json.dumps(job)], check=True,
                              stdout=subprocess.PIPE, text=True)
        kept.write_text(done.stdout.splitlines()[-1])
    found = json.loads(kept.read_text())
    estimates = {f"{split} accuracy": str(accuracy(np.array(right, bool))) for split, right in found["right"].items()}
    row = dict(data=data, side=side, seed=seed, **estimates, chose=found["choice"],
               **{"CPU minutes": f"{found['seconds'] / 60:.1f}"})
    print(row, file=sys.stderr, flush=True)
    return row | dict(right=found["right"])


def summarize(rows: list[dict], other: str) -> dict:
    "Compare cvnb's seeds with those of another side, on the same images."
    from cvnb.metrics.paired import noninferiority
    ours = [r["right"] for r in rows if r["side"] == "cvnb"]
    theirs = [r["right"] for r in rows if r["side"] == other]
    found = {}
    for split in "val", "test":
        pairs = [(theirs[min(i, len(theirs) - 1)][split], right[split]) for i, right in enumerate(ours)]
        # images are the units: the seeds of one image are one group
        reference, model = (np.concatenate([np.array(p[k], bool) for p in pairs]) for k in (0, 1))
        groups = np.tile(np.arange(len(pairs[0][0])), len(pairs)).astype(str) if len(pairs) > 1 else None
        d = noninferiority(reference, model, groups=groups)
        found[f"{split} accuracy"] = f"{d.difference:+.4f} [{d.low:+.4f}, {d.high:+.4f}]"
    return dict(data=rows[0]["data"], side=f"cvnb − {other}", seed="all", **found, chose="", **{"CPU minutes": ""})


def main() -> None:
    "Measure, and print the table."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*", help="a named data set, or NAME=FOLDER")
    parser.add_argument("--minutes", type=float, default=10, help="CPU minutes of a side")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--work", type=Path, help="a folder that keeps what was measured: the same call goes on there")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/first_model.md")
    parser.add_argument("--job", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.job: return run_side(json.loads(args.job))
    with TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        given = {name: path or name for name, _, path in (text.partition("=") for text in args.data)}
        # a seed of all sets, then the next one: what was measured when it is stopped is balanced
        jobs = [(name, side, seed) for seed in range(args.seeds) for name in given for side in SIDES
                if side != "probe" or not seed]
        found = [measure(name, given[name], side, seed, args, work) for name, side, seed in jobs]
    rows = []
    for name in given:
        of_set = sorted((r for r in found if r["data"] == name), key=lambda r: (SIDES.index(r["side"]), r["seed"]))
        rows += of_set + [summarize(of_set, side) for side in ("probe", "plain")]
    rows = [{k: v for k, v in row.items() if k != "right"} for row in rows]
    show("first_model", f"The first model after {args.minutes:g} CPU minutes", rows, args.write)


if __name__ == "__main__": main()
