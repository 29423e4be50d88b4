"""Compression side by side: cvnb's front against stock torch-pruning and OpenVINO INT8 of the unpruned model.

    python benchmarks/compress.py run mnist5k --work DIR [--minutes 30] [--levels 3] [--fraction 0.1]
    python benchmarks/compress.py run sign-digits --data FOLDER --work DIR
    python benchmarks/compress.py run groceries --data FOLDER/groceries.csv --work DIR
    python benchmarks/compress.py run cifar10 --teacher FILE --data FOLDER --work DIR
    python benchmarks/compress.py stock NAME --work DIR [--epochs N]
    python benchmarks/compress.py report --work DIR [--write]

`run` is `cvnb run` with the set's recipe and a front of several levels, at the smallest margin that the test images
can prove (CIFAR-10: one point); a call that was stopped goes on. `stock` prunes the same trained model to the MACs of
the candidate nearest to a quarter by torch-pruning's own loop (`BasePruner`, L2 magnitude of groups, the same ratio in
every layer), trains it on the labels for as many epochs as one candidate is distilled in a round, and predicts the same
test images. A candidate of a later level begins with the one before it, so it has had more epochs in all: the rows
`epochs` and `stock_epochs` have both numbers. `report` makes the table of what is finished.

CIFAR-10: `--teacher` is the ResNet-18 of PyPI's pyautoattack, which has seen all 50,000 training images. `--data` is a
folder with train/CLASS/*.png and test/CLASS/*.png. Of the training images `--train-images` teach the students; of the
10,000 test images half choose and half report, by the digest of the file's name.
"""
from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
from table import show

ROOT = Path(__file__).resolve().parent.parent
CIFAR_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
RECIPES = {"mnist5k": "mnist5k", "cifar10": "cifar10", "sign-digits": "sign-digits", "groceries": "default"}
MARGINS = {"cifar10": 0.01}   # acceptable loss of accuracy; of the others the smallest that their test images can prove
NEAR = 0.25   # of the MACs, where stock pruning is compared


def smallest_provable(run: Path) -> float:
    "Round the smallest margin that a run's test images can prove up to a tenth of a point."
    from cvnb.core.files import read_json
    from cvnb.metrics.paired import DEFAULT_LEVEL, smallest_margin
    counts = read_json(run/"audit/audit.json")["counts"]["test"]
    return float(np.ceil(1000 * smallest_margin(sum(counts.values()), DEFAULT_LEVEL)) / 1000)


def convert_teacher(source: Path, folder: Path) -> Path:
    "Write the usual CIFAR ResNet-18, whose input is 0 ... 1 and not normalised, as a model of cvnb."
    from cvnb.models.vision_model import ModelSpec, build_model
    from cvnb.models.weights import read_weights, save_model
    model = build_model(ModelSpec("resnet18", CIFAR_CLASSES, 32, [0.0] * 3, [1.0] * 3, stem="small"))
    state = {}
    for name, tensor in read_weights(source).items():
        state[name.removeprefix("module.").replace("shortcut.", "downsample.").replace("linear.", "fc.")] = tensor
    model.net.load_state_dict(state)
    return save_model(model, folder)


def split_cifar(folder: Path, target: Path, n_train: int) -> Path:
    "Write a table: some training images teach, half of the test images choose, and the other half report."
    import hashlib
    rows = []
    for path in sorted(folder.glob("*/*/*.png")):
        digest = int(hashlib.sha256(path.name.encode()).hexdigest(), 16)
        split = "train" if path.parent.parent.name == "train" else "test" if digest % 2 else "val"
        rows.append(dict(path=str(path), label=path.parent.name, split=split, order=digest))
    table = pd.DataFrame(rows).sort_values("order", key=lambda column: column.map(str))
    kept = table[table.split != "train"], table[table.split == "train"].head(n_train)
    pd.concat(kept).drop(columns="order").to_csv(target, index=False)
    return target


def run_front(args: argparse.Namespace) -> None:
    "Run all stages of cvnb; the margin is known after the audit."
    run = args.work/args.name
    recipe = ROOT/"configs"/f"{RECIPES[args.name]}.yaml"
    data = ["--data", str(args.data)] if args.data else []
    options: dict[str, object] = {"compress.levels": args.levels, "compress.macs_fraction": args.fraction,
                                  "compress.minutes": args.minutes, "compress.n_tests": 3,
                                  "compress.rounds": args.rounds, "compress.repair": args.repair}
    if args.name == "groceries": options["train.image_size"] = 160
    if args.epochs: options["compress.epochs"] = args.epochs
    if args.name == "cifar10":
        weights = convert_teacher(args.teacher, args.work/"teacher")
        data = ["--data", str(split_cifar(args.data, args.work/"cifar10.csv", args.train_images))]
        options |= {"train.weights": weights, "train.backbone": "resnet18", "train.stem": "small", "train.epochs": 1,
                    "train.image_size": 32, "train.lr": 1e-7, "train.tune": "full", "train.resolution": 1}

    def call(*stages: str) -> None:
        sets = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
        command = [str(Path(sys.executable).with_name("cvnb")), "run", *stages, "--config", str(recipe), "--run",
                   str(run), *data, *sets]
        subprocess.run(command, check=True, cwd=ROOT)

    call("audit")
    options["compress.margin"] = MARGINS.get(args.name) or smallest_provable(run)
    call()


def fine_tune_stock(args: argparse.Namespace) -> None:
    "Prune with torch-pruning's loop, train on the labels, and predict the test images."
    import torch
    import torch_pruning as tp

    from cvnb.core.files import read_json
    from cvnb.data.images import Decoding
    from cvnb.data.splits import read_splits
    from cvnb.models.cost import count_macs
    from cvnb.models.weights import load_classifier
    from cvnb.training.fit import fit
    from cvnb.training.loaders import load_labelled
    from cvnb.training.options import FitOptions
    from cvnb.training.predict import predict_table
    run = args.work/args.name
    audit = read_json(run/"audit/audit.json")
    params = read_json(run/"compress/stage.json")["params"]
    model = load_classifier(run/"train", "benchmark")
    full = count_macs(model)
    front = pd.read_parquet(run/"compress/front.parquet")
    goal = min(front.macs[1:], key=lambda macs: abs(macs - NEAR * full))
    rows = read_splits(run/"audit/manifest.parquet")
    images = {split: load_labelled(audit["root"], rows[split], audit["classes"], model.spec.image_size,
                                   decoding=Decoding.from_audit(audit)) for split in ("train", "val", "test")}
    size = model.spec.image_size
    pruner = tp.pruner.BasePruner(
        model.net, torch.zeros(1, 3, size, size), tp.importance.GroupMagnitudeImportance(p=2), pruning_ratio=0.95,
        iterative_steps=100, ignored_layers=[model.net.get_classifier()], round_to=8)
    while count_macs(model) > goal: pruner.step()
    options = FitOptions(epochs=args.epochs or params["epochs"], lr=params["lr"], batch_size=params["batch_size"],
                         augment=params["augment"], flip=params["flip"], seed=params["seed"], device="cpu")
    fit(model, images["train"], images["val"], options, args.work/f"{args.name}-stock")
    found = {split: float(predict_table(model, rows[split], images[split], device="cpu").correct.mean())
             for split in ("val", "test")}
    found |= dict(macs=count_macs(model), goal=int(goal), epochs=options.epochs)
    from cvnb.benchmark.latency import measure_latency
    found["latency_ms"] = measure_latency(dict(stock=model)).latency("stock").value
    (args.work/f"{args.name}-stock.json").write_text(json.dumps(found, indent=1))
    print(found)


def gather(run: Path) -> dict[str, object]:
    "Collect the row of one set from a run's files."
    from cvnb.core.files import read_json
    front = pd.read_parquet(run/"compress/front.parquet")
    verdict = read_json(run/"compress/verdict.json")
    percent = lambda value: f"{100 * value:.1f}"
    row = dict(set=run.name, n_test=verdict["n"], margin=percent(verdict["margin"]), candidate=verdict["candidate"],
               accepted=verdict["accepted"],
               difference=f"{100 * verdict['difference']:+.1f} [{100 * verdict['low']:+.1f}, "
                          f"{100 * verdict['high']:+.1f}]")
    tested = front.set_index("candidate").loc[verdict["candidate"]]
    row["macs_gain"] = front.macs[0] / tested.macs
    row["fp32_speed_gain"] = front.latency_ms[0] / tested.latency_ms
    export = read_json(run/"export/export.json") if (run/"export/export.json").exists() else {}
    speed = (export.get("int8_decision") or {}).get("speed")
    row["int8_to_fp32"] = speed["value"] if speed else None
    if (run/"benchmark/benchmark.json").exists():
        record = read_json(run/"benchmark/benchmark.json")
        column = "cpu_" if record["control"]["clock"] != "wall" else ""
        row["control"] = dict(none="void; CPU times", cpu="CPU times", wall="wall times")[record["control"]["clock"]]
        files = {"onnx fp32"} | ({"onnx int8"} if (export.get("int8_test") or {}).get("accepted") else set())
        ours = [r for r in record["rows"] if r["model"] == record["shipped"] and r["runtime"] in files]
        fastest = min(ours, key=lambda r: r["cpu_ms"] if column else r["p50_ms"])
        tested = [r for r in record["rows"] if r["model"] == "compressed" and r["runtime"].startswith("onnx")]
        best = min(tested, key=lambda r: r["cpu_ms"] if column else r["p50_ms"])
        row |= dict(tested=f"{verdict['candidate']}, {best['runtime']}", tested_vs_torch=best[f"{column}speedup"],
                    tested_vs_openvino_int8=best[f"{column}vs_peer"] or "its answers differ from torch's")
        row |= dict(ships=f"{record['shipped']}, {fastest['runtime']}", vs_torch=fastest[f"{column}speedup"],
                    vs_openvino_int8=fastest[f"{column}vs_peer"] or "its answers differ from torch's")
    stock = run.parent/f"{run.name}-stock.json"
    if stock.exists():
        found = read_json(stock)
        place = int((front.macs - found["goal"]).abs().argmin())
        near = front.iloc[place]
        curves = pd.read_csv(run/"compress/history.csv")
        row |= dict(epochs=int(curves.candidate.isin(front.candidate[:place + 1]).sum()),
                    stock_epochs=found.get("epochs", ""))
        trained = front.iloc[0]
        row |= dict(at_macs=found["goal"] / trained.macs, drop_val=percent(trained.accuracy - near.accuracy),
                    stock_drop_val=percent(trained.accuracy - found["val"]),
                    stock_speed_gain=trained.latency_ms / found["latency_ms"])
    return row


def report(args: argparse.Namespace) -> None:
    "Show the table of all sets that have a front."
    rows = [gather(path.parent.parent) for path in sorted(args.work.glob("*/compress/front.parquet"))]
    if not rows: raise SystemExit(f"no front in {args.work}: run a set first")
    names = list(dict.fromkeys(name for row in rows for name in row if name != "set"))
    show("compress" if rows[1:] else f"compress_{rows[0]['set']}",
         "Compression side by side: cvnb, stock torch-pruning, OpenVINO INT8 of the unpruned model",
         [dict(figure=name) | {row["set"]: row.get(name, "") for row in rows} for name in names], args.write)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["run", "stock", "report"])
    parser.add_argument("name", nargs="?", choices=[*RECIPES])
    parser.add_argument("--work", type=Path, required=True, help="folder for runs and results")
    parser.add_argument("--data", type=Path, help="the data set; not for mnist5k")
    parser.add_argument("--teacher", type=Path, help="weights of CIFAR-10's teacher")
    parser.add_argument("--train-images", type=int, default=8000, help="of CIFAR-10")
    parser.add_argument("--minutes", type=float, default=30, help="after which no further candidate is begun")
    parser.add_argument("--levels", type=int, default=3)
    parser.add_argument("--fraction", type=float, default=0.1, help="of the MACs, of the smallest candidate")
    parser.add_argument("--epochs", type=int, default=0, help="of each distillation; 0: the recipe's")
    parser.add_argument("--rounds", type=int, default=1, help="of each distillation, at most")
    parser.add_argument("--repair", type=float, default=0.5, help="loss before distilling that ends the front, 0 ... 1")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/compress.md, or compress_SET.md")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.part != "report" and not args.name: parser.error(f"{args.part} needs the name of a set")
    dict(run=run_front, stock=fine_tune_stock, report=report)[args.part](args)


if __name__ == "__main__": main()
