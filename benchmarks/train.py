"""Training beside its peers: the loader alone, the speed of training, the way to an accuracy, and a GPU.

    python benchmarks/train.py loader [--rounds 5] [--images 10000] --sign-digits FOLDER [--write]
    python benchmarks/train.py speed [--steps 24] --sign-digits FOLDER [--write]
    python benchmarks/train.py accuracy [--data mnist5k sign-digits cifar10] [--sides ours stock] [--seeds 3] [--jobs 1] [--keep FOLDER] [--write]
    python benchmarks/train.py gpu --run RUN [--config cifar10_fast] [--target 0.94] [--write]

The sides (`train_sides.py`) take turns, each in a process of its own, with the same threads, model, images and changes to images. `ours, again`
is the control: a comparison is void where it leaves 0.95 to 1.05 of `ours`. In `speed` the turns are single training steps of processes that
live side by side, so that a machine that slows down slows all of them, and cvnb makes its batches within its turns (`workers=0`).
At 32 pixels the images are CIFAR-10's PNG files; at 224 they are the photographs of sign-digits, enlarged once to JPEG files of 256 pixels, so
that reading one costs what a photograph's thumbnail costs.

`accuracy` counts the processor time of a process with its workers from before the first image is read (cvnb's cache is empty) until the
validation that reached the target; validating counts for both. It takes hours; with --keep a call that was cut goes on where it was. `gpu` runs
the train notebook on a run whose audit is there.
"""
from __future__ import annotations

import argparse
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import product
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402
from train_data import folders  # noqa: E402

from cvnb.core.files import read_json, write_json
from cvnb.core.project import asset_folder
from cvnb.core.system import n_cores  # noqa: E402
from cvnb.data.tables import auto_image_size, read_manifest  # noqa: E402
from cvnb.metrics.estimates import Estimate, mean, proportion  # noqa: E402
from cvnb.pipeline.params import contracts, parse_set, read_recipe  # noqa: E402

# The cases of `loader` and `speed`: the model, its images, and how they are changed.
CASES = {
    "32": dict(source="cifar10", side=0, size=32, resize=False, change="crop", flip=True, batch_size=64,
               backbone="resnet18", stem="small", weights="", lr=1e-3, weight_decay=0.02),
    "224": dict(source="sign-digits", side=256, size=224, resize=True, change="light", flip=True, batch_size=32,
                backbone="tf_efficientnet_lite0", stem="full", weights="imagenet", lr=1e-3, weight_decay=0.02),
}
CASES["224-crop"] = CASES["224"] | dict(change="crop")
# What the book says for the same model at the same size: torchvision's reference from scratch, and fine-tuning with AdamW at 1e-3.
SCRATCH = dict(optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128)
TUNED = dict(optimizer="adamw", lr=1e-3, weight_decay=0.01, batch_size=32)
BOOK = {
    "mnist5k": SCRATCH | dict(change="crop", flip=False, resize=False, epochs=30),
    "sign-digits": TUNED | dict(change="light", flip=True, resize=True, epochs=10),
    "cifar10": TUNED | dict(change="crop", flip=True, resize=True, epochs=4),   # three end below the target
    "cifar10_scratch": SCRATCH | dict(change="crop", flip=True, resize=False, epochs=10),
}
WARM = 3   # first steps of a training, which are not timed
SHORT = 20   # CPU minutes: how far a training had come by then is a column of its own
TARGETS = {"mnist5k": 0.985, "sign-digits": 0.98, "cifar10": 0.90, "cifar10_scratch": 0.90}


@contextmanager
def started(side: str, task: dict, folder: Path, cores: list[int] | None = None) -> Iterator[Callable[[], dict]]:   # waits for its answer
    "Start one side in a fresh process, on certain cores where they are given; end it in any case."
    name = f"{side}-{time.monotonic_ns()}"
    write_json(folder/f"{name}.task", task)
    env = os.environ | dict(OMP_NUM_THREADS=str(task["threads"]), CUDA_VISIBLE_DEVICES="", CVNB_CACHE=str(folder/"cache"))
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    log = folder/f"{name}.log"
    with open(log, "w") as out:
        process = subprocess.Popen([sys.executable, Path(__file__).with_name("train_sides.py"), side, folder/f"{name}.task", folder/f"{name}.json"],
                                   env=env, preexec_fn=pin, stdout=out, stderr=subprocess.STDOUT, pass_fds=task.get("turns", ()))

    def answer() -> dict:
        if process.wait(): raise SystemExit(f"{side} failed:\n{log.read_text()[-3000:]}")
        found = read_json(folder/f"{name}.json")
        print(side, {k: np.round(v, 1).tolist() if k == "images_per_s" else v for k, v in found.items()}, file=sys.stderr, flush=True)
        return found

    try: yield answer
    finally: process.kill()


def run_side(side: str, task: dict, folder: Path, cores: list[int] | None = None) -> dict:
    "Run one side to its end."
    with started(side, task, folder, cores) as answer: return answer()


def said(values: list[float], digits: int = 0, most: float = np.inf) -> str:   # "212 [208, 216]"
    "Write the mean of several runs with its interval, which begins and ends where the values must."
    if len(values) < 2: return f"{values[0]:.{digits}f}"
    figure = mean(values)
    return f"{figure.value:.{digits}f} [{max(0, figure.low):.{digits}f}, {min(figure.high, most):.{digits}f}]"


def ratio(a: list[float], b: list[float]) -> str:
    "Write the geometric mean of a over b, round by round, with its interval; b over a is its inverse, which no other mean gives."
    if len(a) < 2: return f"{a[0] / b[0]:.3f}"
    figure = mean(np.log(np.divide(a, b)))
    return f"{np.exp(figure.value):.3f} [{np.exp(figure.low):.3f}, {np.exp(figure.high):.3f}]"


def case_folder(case: dict, images: int, sign_digits: Path, folder: Path) -> Path:
    "Prepare a case's images."
    source = sign_digits if case["source"] == "sign-digits" else case["source"]
    return folders(str(source), folder/f"images-{time.monotonic_ns()}", limit=images, side=case["side"])


def turns(sides: dict[str, tuple[str, dict]], rounds: int, folder: Path) -> dict[str, list[dict]]:   # name -> an answer per round
    "Let the sides take turns; every other round goes backwards."
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for r in range(rounds):
        for name in (list(sides) if r % 2 == 0 else list(sides)[::-1]): found[name].append(run_side(*sides[name], folder))
    return found


def step_by_step(sides: dict[str, tuple[str, dict]], folder: Path) -> dict[str, list[float]]:   # name -> images per second of each step
    "Let the sides live beside each other and work one at a time, a training step each; every other round goes backwards."
    with ExitStack() as stack:
        ends, answers = {}, {}
        for name, (side, task) in sides.items():
            (theirs, go), (done, own) = os.pipe(), os.pipe()
            answers[name] = stack.enter_context(started(side, task | dict(turns=[theirs, own], sides=len(sides)), folder))
            for end in theirs, own: os.close(end)          # so that a side that ends is noticed
            ends[name] = stack.enter_context(open(go, "wb", 0)), stack.enter_context(open(done, "rb", 0))

        def heard(name: str) -> None:
            if not ends[name][1].read(1): raise SystemExit(f"{name} ended early: {answers[name]()}")

        for name in sides: heard(name)                     # it waits for its first turn
        for r in range(task["steps"]):
            for name in (list(sides) if r % 2 == 0 else list(sides)[::-1]):
                ends[name][0].write(b".")
                heard(name)
        for go, _ in ends.values(): go.close()             # what comes after the last step disturbs nobody
        return {name: answer()["images_per_s"][WARM:task["steps"]] for name, answer in answers.items()}


def speeds(answers: list[dict]) -> list[float]:
    "Give one speed per round."
    return [float(np.median(a["images_per_s"])) for a in answers]


def void(again: list[float], ours: list[float]) -> str:
    "Say whether the control holds."
    value = float(np.exp(np.mean(np.log(np.divide(again, ours)))))
    return f"{value:.3f}" + ("" if 0.95 <= value <= 1.05 else " (void)")


def loader(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Measure the loaders alone."
    rows = []
    for name in args.cases:
        case = CASES[name]
        task = case | dict(folder=str(case_folder(case, args.images, args.sign_digits, folder)), threads=args.threads, workers=args.threads,
                           repeats=args.repeats, batch_size=128 if name == "32" else 32)
        found = turns({"ours": ("loader_ours", task), "stock": ("loader_stock", task), "ours, again": ("loader_ours", task)}, args.rounds, folder)
        rate = {side: speeds(a) for side, a in found.items()}
        for side in "ours", "stock":
            rows.append({"images": f"{case['size']}², {'PNG' if name == '32' else 'JPEG'}", "changes": f"{case['change']} and flip", "side": side,
                         "images/s": said(rate[side]),
                         "÷ stock": ratio(rate[side], rate["stock"]), "first epoch, images/s": said([a["first"] for a in found[side]]),
                         "first ÷ stock's first": ratio(*([a["first"] for a in found[s]] for s in (side, "stock"))),
                         "control": void(rate["ours, again"], rate["ours"]) if side == "ours" else ""})
    return rows


def speed(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Measure training."
    rows, kinds = [], {"ours": "ours", "stock": "stock", "ceiling: random images in memory": "ceiling", "plain loop": "plain", "ours, again": "ours"}
    for name in args.cases:
        case = CASES[name]
        place = case_folder(case, args.steps * case["batch_size"], args.sign_digits, folder)
        task = case | dict(folder=str(place), threads=args.threads, workers=args.threads,
                           steps=len(list((place/"train").glob("*/*"))) // case["batch_size"])
        rows += speed_rows(case, step_by_step({title: (f"speed_{kind}", task) for title, kind in kinds.items()}, folder))
    return rows


def speed_rows(case: dict, rate: dict[str, list[float]]) -> list[dict]:   # of each side, images per second of each step
    "Compare the sides step by step."
    ceiling = next(rate[title] for title in rate if title.startswith("ceiling"))
    return [{"images": f"{case['size']}²", "model": f"{case['backbone']}, {case['stem']} stem", "side": title, "steps": len(own),
             "images/s": said(own, 1), "÷ ceiling": ratio(own, ceiling), "÷ plain loop": ratio(own, rate["plain loop"]),
             "÷ stock": ratio(own, rate["stock"]), "control": void(rate["ours, again"], rate["ours"]) if title == "ours" else ""}
            for title, own in rate.items() if title != "ours, again"]


def recipe_of(name: str, changes: list[str]) -> dict:   # parameter -> value
    "Read the train section of a recipe over the stage's defaults, and change some values, given as train.name=value."
    known = contracts()
    given = {key: value for stage, key, value in (parse_set(text, known) for text in changes) if stage == "train"}
    if len(given) < len(changes): raise SystemExit(f"--set changes parameters of train, each once: {' '.join(changes)}")
    return known["train"].defaults() | read_recipe(asset_folder("configs")/f"{name}.yaml", known).get("train", {}) | given


def accuracy_task(name: str, side: str, place: Path, seed: int, args: argparse.Namespace) -> dict:
    "Describe one training."
    recipe, changed = recipe_of(name, args.set if side == "ours" else []), dict(epochs=args.epochs) if args.epochs else {}
    table = read_manifest(place/"manifest.parquet")
    size = recipe["image_size"] or auto_image_size(table.width, table.height)
    own = dict(folder=str(place), size=size, threads=args.threads, workers=args.threads, seed=seed,
               backbone=recipe["backbone"], stem=recipe["stem"], weights=recipe["weights"])
    return own | (dict(recipe=recipe | changed | dict(seed=seed)) if side == "ours" else BOOK[name] | changed)


def row_of(name: str, side: str, answers: list[dict], changes: list[str]) -> dict:
    "Put the seeds of one side together."
    target, ours = TARGETS[name], side == "ours"
    reached = [next((s for s, a in zip(x["cpu_s"], x["accuracy"]) if a >= target), None) for x in answers]
    times = [t / 60 for t in reached if t is not None]
    early = [100 * max((a for s, a in zip(x["cpu_s"], x["accuracy"]) if s <= 60 * SHORT), default=0) for x in answers]
    test = [proportion(x["right"], x["n"]) for x in answers]
    worst: Estimate = min(test, key=lambda f: f.value)
    return {"data": name, "side": ", ".join([side, *(c.removeprefix("train.") for c in changes if ours)]),
            "epochs": len(answers[0]["accuracy"]), "target": f"{target:.1%}",
            "seeds that reached it": f"{len(times)} of {len(answers)}",
            "CPU-minutes to it": said(times, 2) if times else "", "CPU-minutes in all": said([x["cpu_s"][-1] / 60 for x in answers], 2),
            f"best validation within {SHORT} CPU-minutes": said(early, 2, 100),
            "wall s": said([x["wall_s"] for x in answers]), "best validation": said([100 * max(x["accuracy"]) for x in answers], 2, 100),
            "tested": "mirrored too" if ours and recipe_of(name, changes)["tta"] == "flip" else "as it is",
            "test, mean of seeds": said([100 * f.value for f in test], 2, 100),
            "worst seed's test": f"{100 * worst.value:.2f} [{100 * worst.low:.2f}, {100 * worst.high:.2f}] (n={worst.n})"}


def accuracy(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Train every seed of every side, several at once where there are the cores."
    places, jobs = {}, []
    for name in args.data:
        source = str(args.sign_digits) if name == "sign-digits" else name.split("_")[0]
        if source not in places: places[source] = folders(source, folder/f"images-{len(places)}", 0.1 if source == "cifar10" else 0.15, args.images)
        jobs += [(name, side, accuracy_task(name, side, places[source], seed, args)) for seed in range(args.seeds) for side in args.sides]
    free: Queue = Queue()
    cores = sorted(os.sched_getaffinity(0))
    for i in range(args.jobs): free.put([cores[c % len(cores)] for c in range(i * args.threads, (i + 1) * args.threads)])

    def one(job: tuple[str, str, dict]) -> dict:
        name, side, task = job
        kept, same = args.keep and args.keep/f"{name}-{side}-{task['seed']}.json", {k: v for k, v in task.items() if k != "folder"}
        if kept and kept.exists() and (known := read_json(kept))["task"] == same: return known["answer"]
        own = free.get()
        try: answer = run_side(f"accuracy_{side}", task, folder, own)
        finally: free.put(own)
        if kept: write_json(kept, dict(task=same, answer=answer))
        return answer

    with ThreadPoolExecutor(args.jobs) as pool: answers = list(pool.map(one, jobs))
    kinds = dict.fromkeys((name, side) for name, side, _ in jobs)
    return [row_of(name, side, [a for a, job in zip(answers, jobs) if job[:2] == (name, side)], args.set) for name, side in kinds]


def watch_gpu(stop: threading.Event, used: list[float]) -> None:
    "Note the GPU's memory in use, in megabytes, until told to stop."
    ask = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not stop.is_set():
        used.append(float(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.split()[0]))
        stop.wait(0.2)


def gpu_row(name: str, seed: int, args: argparse.Namespace) -> dict:
    "Run the train notebook with one recipe and one seed."
    import papermill
    known, used, stop = contracts(), [], threading.Event()
    given = read_recipe(asset_folder("configs")/f"{name}.yaml", known).get("train", {}) | dict(run=str(args.run.resolve()), seed=seed, tracking="disabled")
    watch = threading.Thread(target=watch_gpu, args=(stop, used))
    if not args.no_gpu: watch.start()
    begin = time.perf_counter()
    try: papermill.execute_notebook(known["train"].path, args.run/f"train-{name}-{seed}.ipynb", given, kernel_name="python3", progress_bar=False)
    finally: stop.set()
    wall, stage = time.perf_counter() - begin, read_json(args.run/"train"/"stage.json")
    figures = stage["metrics"]
    test, history = figures.get("accuracy_test_tta", figures["accuracy_test"]), read_json(args.run/"train"/"metrics.json")["history"]
    rate, table = figures["images_per_s"]["value"], read_manifest(args.run/"audit"/"manifest.parquet", "train")
    return {"recipe": name, "seed": seed, "GPU": device_name(args.no_gpu), "epochs": len(history),
            "test": f"{100 * test['value']:.2f} [{100 * test['low']:.2f}, {100 * test['high']:.2f}] (n={test['n']})",
            f"at least {args.target:.0%}": "yes" if test["value"] >= args.target else "no", "images/s": rate,
            "training s": len(table) * len(history) / rate, "stage s": stage["seconds"], "notebook s": wall,
            "GPU memory MB": max(used) - used[0] if used else ""}


def gpu(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Run the train notebook on a run whose audit is there, once per recipe and seed."
    rows = []
    for name, seed in product(args.config, range(args.seeds)):
        rows.append(gpu_row(name, seed, args))
        print(rows[-1], file=sys.stderr, flush=True)   # what is done is not lost with what is cut
    return rows


def device_name(none: bool) -> str:
    "Name the GPU."
    import torch
    return "" if none else torch.cuda.get_device_name()


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    titles: dict[Callable, str] = {loader: "The loader alone", speed: "Training", accuracy: "Processor time to an accuracy",
                                   gpu: "CIFAR-10 on a GPU, through the train notebook"}
    for call, title in titles.items():
        part = parts.add_parser(call.__name__, help=title)
        part.set_defaults(call=call, title=title)
        part.add_argument("--write", action="store_true", help=f"write benchmarks/results/train_{call.__name__}*.md")
        part.add_argument("--threads", type=int, default=n_cores(), help="of each side, and its workers")
        part.add_argument("--images", type=int, default=10_000 if call is loader else 0, help="per split; 0 is the case's own, or all")
        part.add_argument("--sign-digits", type=Path, help="the folder of the Sign Language Digits Dataset")
        part.add_argument("--work", type=Path, help="folder for prepared images, on a real disk; a temporary one by default")
        if call is loader: part.add_argument("--rounds", type=int, default=5, help="turns of each side")
        if call is speed: part.add_argument("--steps", type=int, default=24, help=f"training steps of each side; the first {WARM} do not count")
        if call in (loader, speed):
            part.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES) if call is loader else ["32", "224"],
                              help="sides of the images in pixels; `crop` instead of turning, moving and scaling")
        if call is loader: part.add_argument("--repeats", type=int, default=3, help="timed epochs of a turn")
        if call in (accuracy, gpu): part.add_argument("--seeds", type=int, default=3)
        if call is accuracy:
            part.add_argument("--data", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="recipes")
            part.add_argument("--sides", nargs="+", choices=["ours", "stock"], default=["ours", "stock"])
            part.add_argument("--epochs", type=int, default=0, help="instead of the recipe's and the book's")
            part.add_argument("--set", action="append", default=[], metavar="train.NAME=VALUE", help="in our recipe; can be repeated")
            part.add_argument("--jobs", type=int, default=1, help="trainings at once, each on cores of its own")
            part.add_argument("--keep", type=Path, help="folder for what each training came to, which is not trained again")
        if call is gpu:
            part.add_argument("--run", type=Path, required=True, help="a run directory with an audit")
            part.add_argument("--config", nargs="+", default=["cifar10_fast"], help="recipes")
            part.add_argument("--target", type=float, default=0.94)
            part.add_argument("--no-gpu", action="store_true", help="to try it on a CPU")
    args = parser.parse_args()
    wanted = [CASES[c]["source"] for c in getattr(args, "cases", [])] + getattr(args, "data", [])
    if "sign-digits" in wanted and not args.sign_digits: parser.error("sign-digits is a folder of yours: say with --sign-digits where")
    with TemporaryDirectory(dir=args.work) as folder: rows = args.call(args, Path(folder))
    if args.call is not accuracy: return show(f"train_{args.part}", args.title, rows, args.write)
    how = f"{args.threads} cores each" + (f", {args.jobs} at a time" if args.jobs > 1 else "")
    for name in args.data: show(f"train_accuracy_{name}", f"{args.title}: {name}, {how}", [r for r in rows if r["data"] == name], args.write)


if __name__ == "__main__": main()
