"""Training compared with its peers: the loader alone, the speed of training, the time to an accuracy, and a GPU.

    python benchmarks/train.py loader [--rounds 5] [--images 10000] --sign-digits FOLDER [--write]
    python benchmarks/train.py speed [--steps 24] --sign-digits FOLDER [--write]
    python benchmarks/train.py accuracy [--data mnist5k sign-digits cifar10] [--sides ours stock] [--seeds 3] [--jobs 1]
                                        [--keep FOLDER] [--write]
    python benchmarks/train.py beside [--steps 24] [--busy 2] --sign-digits FOLDER [--write]
    python benchmarks/train.py gpu --run RUN [--config cifar10_fast] [--target 0.94] [--write]

The sides (`train_sides.py`) run in turns, each in its own process, with the same threads, model, images and
augmentation. `ours, again` is the control: a comparison is void unless the interval of its ratio to `ours` lies within
0.95 to 1.05. In `speed`, a turn is a single training step of processes that run beside each other, so that a slow
phase of the machine affects all of them. cvnb makes its batches within its turns (`workers=0`). At 32 pixels the
images are CIFAR-10's PNG files. At 224 pixels they are the photographs of sign-digits, enlarged to JPEG files of 256
pixels, so that reading one costs what reading the thumbnail of a photograph costs.

`accuracy` measures the processor time of a process and its workers, from before the first image is read (cvnb's cache
is empty) until the validation that reached the target. Validation counts on both sides. It takes hours; with --keep,
an interrupted call resumes. `beside` trains alone and beside busy processes, with several settings of OpenMP's waiting
threads; cvnb sets GOMP_SPINCOUNT for the kernels of its stages. `gpu` runs the train notebook on a run that has its
audit.
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
from functools import partial
from itertools import product
from pathlib import Path
from queue import Queue
from tempfile import TemporaryDirectory

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from table import show  # noqa: E402
from train_data import prepare_folders  # noqa: E402

from cvnb.benchmark.timing import CONTROL_LIMITS  # noqa: E402
from cvnb.core.files import read_json, write_json  # noqa: E402
from cvnb.core.project import asset_folder  # noqa: E402
from cvnb.core.system import n_cores  # noqa: E402
from cvnb.data.tables import auto_image_size, read_manifest  # noqa: E402
from cvnb.metrics.estimates import Estimate, estimate_mean, estimate_proportion  # noqa: E402
from cvnb.pipeline.kernels import SPIN_COUNT  # noqa: E402
from cvnb.pipeline.params import read_contracts  # noqa: E402
from cvnb.pipeline.recipes import parse_set_option, read_recipe  # noqa: E402

# The cases of `loader` and `speed`: the model, its images and their augmentation.
CASES = {
    "32": dict(source="cifar10", side=0, size=32, resize=False, change="crop", flip=True, batch_size=64,
               backbone="resnet18", stem="small", weights="", lr=1e-3, weight_decay=0.02),
    "224": dict(source="sign-digits", side=256, size=224, resize=True, change="light", flip=True, batch_size=32,
                backbone="tf_efficientnet_lite0", stem="full", weights="imagenet", lr=1e-3, weight_decay=0.02),
}
CASES["64"] = CASES["224"] | dict(side=64, size=64, backbone="resnet18", weights="", stem="half")   # of `beside`
CASES["224-crop"] = CASES["224"] | dict(change="crop")
# Documented recipes for the same model and size: torchvision's reference from scratch, and fine-tuning with AdamW.
SCRATCH = dict(optimizer="sgd", lr=0.1, weight_decay=5e-4, batch_size=128)
TUNED = dict(optimizer="adamw", lr=1e-3, weight_decay=0.01, batch_size=32)
STOCK_RECIPES = {
    "mnist5k": SCRATCH | dict(change="crop", flip=False, resize=False, epochs=30),
    "sign-digits": TUNED | dict(change="light", flip=True, resize=True, epochs=10),
    "cifar10": TUNED | dict(change="crop", flip=True, resize=True, epochs=4),   # three epochs end below the target
    "cifar10_scratch": SCRATCH | dict(change="crop", flip=True, resize=False, epochs=10),
}
WARM_UP_STEPS = 3   # first steps of a training, which are not timed
SHORT_MINUTES = 20  # CPU minutes: the accuracy by then has a column of its own
TARGETS = {"mnist5k": 0.985, "sign-digits": 0.98, "cifar10": 0.90, "cifar10_scratch": 0.90}


@contextmanager
def start_side(
    side: str,      # a function of train_sides.py
    job: dict,      # for that function
    folder: Path,   # gets the job and its result
    cores: list[int] | None = None,   # to use; all by default
) -> Iterator[Callable[[], dict]]:    # waits for the result
    "Start one side in a new process; end it in any case."
    name = f"{side}-{time.monotonic_ns()}"
    job_file, result_file, log = (folder/f"{name}.{end}" for end in ("job", "json", "log"))
    write_json(job_file, job)
    own = dict(OMP_NUM_THREADS=str(job["threads"]), CUDA_VISIBLE_DEVICES="", CVNB_CACHE=str(folder/"cache"))
    own |= job.get("environment", {})
    command = [sys.executable, Path(__file__).with_name("train_sides.py"), side, job_file, result_file]
    pin = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    with open(log, "w") as out:
        process = subprocess.Popen(command, env=os.environ | own, preexec_fn=pin, stdout=out, stderr=subprocess.STDOUT,
                                   pass_fds=job.get("turns", ()))

    def wait_for_result() -> dict:
        if process.wait(): raise SystemExit(f"{side} failed:\n{log.read_text()[-3000:]}")
        result = read_json(result_file)
        shown = {k: np.round(v, 1).tolist() if k == "images_per_s" else v for k, v in result.items()}
        print(side, shown, file=sys.stderr, flush=True)
        return result

    try: yield wait_for_result
    finally: process.kill()


def run_side(side: str, job: dict, folder: Path, cores: list[int] | None = None) -> dict:
    "Run one side to its end."
    with start_side(side, job, folder, cores) as wait_for_result: return wait_for_result()


def format_mean(values: list[float], digits: int = 0, largest: float = np.inf) -> str:   # "212 [208, 216]"
    "Format the mean of several runs with its interval, clipped to 0 … `largest`."
    if len(values) < 2: return f"{values[0]:.{digits}f}"
    estimate = estimate_mean(values)
    return f"{estimate.value:.{digits}f} [{max(0, estimate.low):.{digits}f}, {min(estimate.high, largest):.{digits}f}]"


def format_ratio(a: list[float], b: list[float]) -> str:
    "Format the geometric mean of a over b with its interval, round by round. b over a is exactly its inverse."
    if len(a) < 2: return f"{a[0] / b[0]:.3f}"
    estimate = estimate_mean(np.log(np.divide(a, b)))
    return f"{np.exp(estimate.value):.3f} [{np.exp(estimate.low):.3f}, {np.exp(estimate.high):.3f}]"


def prepare_case(case: dict, images: int, sign_digits: Path, folder: Path) -> Path:   # a folder
    "Prepare the images of a case."
    source = sign_digits if case["source"] == "sign-digits" else case["source"]
    return prepare_folders(str(source), folder/f"images-{time.monotonic_ns()}", limit=images, side=case["side"])


def in_turns(names: list[str], number: int) -> list[str]:
    "Order the sides for a round; every other round is reversed."
    return names if number % 2 == 0 else names[::-1]


def run_in_turns(sides: dict[str, tuple[str, dict]], rounds: int, folder: Path) -> dict[str, list[dict]]:
    "Run each side once per round; return the results by name."
    found: dict[str, list[dict]] = {name: [] for name in sides}
    for r in range(rounds):
        for name in in_turns(list(sides), r): found[name].append(run_side(*sides[name], folder))
    return found


def run_step_by_step(sides: dict[str, tuple[str, dict]], folder: Path) -> dict[str, list[float]]:
    "Run the sides beside each other, one training step at a time; return images per second of each step by name."
    with ExitStack() as stack:
        pipes, results = {}, {}
        for name, (side, job) in sides.items():
            (side_go, go), (done, side_done) = os.pipe(), os.pipe()
            turns = dict(turns=[side_go, side_done], sides=len(sides))
            results[name] = stack.enter_context(start_side(side, job | turns, folder))
            for end in side_go, side_done: os.close(end)   # so that reading fails when the side ends
            pipes[name] = stack.enter_context(open(go, "wb", 0)), stack.enter_context(open(done, "rb", 0))

        def wait_until_done(name: str) -> None:
            if not pipes[name][1].read(1): raise SystemExit(f"{name} ended early: {results[name]()}")

        for name in sides: wait_until_done(name)   # it waits for its first turn
        for r in range(job["steps"]):
            for name in in_turns(list(sides), r):
                pipes[name][0].write(b".")
                wait_until_done(name)
        for go, _ in pipes.values(): go.close()   # what follows the last step is not timed
        return {name: wait()["images_per_s"][WARM_UP_STEPS:job["steps"]] for name, wait in results.items()}


def median_speeds(results: list[dict]) -> list[float]:
    "Return one speed per round."
    return [float(np.median(result["images_per_s"])) for result in results]


def format_control(again: list[float], ours: list[float]) -> str:
    "Format the ratio of the control; the comparison is void where its interval leaves 0.95 to 1.05, or has none."
    if len(ours) < 2: return f"{format_ratio(again, ours)} (void)"
    ratio = estimate_mean(np.log(np.divide(again, ours)))
    holds = CONTROL_LIMITS[0] <= np.exp(ratio.low) and np.exp(ratio.high) <= CONTROL_LIMITS[1]
    return format_ratio(again, ours) + ("" if holds else " (void)")


def loader(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Measure the loaders alone."
    rows = []
    for name in args.cases:
        case = CASES[name]
        prepared = prepare_case(case, args.images, args.sign_digits, folder)
        job = case | dict(folder=str(prepared), threads=args.threads, workers=args.threads, repeats=args.repeats,
                          batch_size=128 if name == "32" else 32)
        sides = {"ours": ("loader_ours", job), "stock": ("loader_stock", job), "ours, again": ("loader_ours", job)}
        results = run_in_turns(sides, args.rounds, folder)
        speeds = {side: median_speeds(found) for side, found in results.items()}
        firsts = {side: [result["first"] for result in found] for side, found in results.items()}
        for side in "ours", "stock":
            rows.append({
                "images": f"{case['size']}², {'PNG' if name == '32' else 'JPEG'}",
                "changes": f"{case['change']} and flip", "side": side,
                "images/s": format_mean(speeds[side]), "÷ stock": format_ratio(speeds[side], speeds["stock"]),
                "first epoch, images/s": format_mean(firsts[side]),
                "first ÷ stock's first": format_ratio(firsts[side], firsts["stock"]),
                "control": format_control(speeds["ours, again"], speeds["ours"]) if side == "ours" else ""})
    return rows


def speed(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Measure training."
    kinds = {"ours": "ours", "stock": "stock", "ceiling: random images in memory": "ceiling", "plain loop": "plain",
             "ours, again": "ours"}
    rows = []
    for name in args.cases:
        case = CASES[name]
        prepared = prepare_case(case, args.steps * case["batch_size"], args.sign_digits, folder)
        steps = len(list((prepared/"train").glob("*/*"))) // case["batch_size"]
        job = case | dict(folder=str(prepared), threads=args.threads, workers=args.threads, steps=steps)
        sides = {title: (f"speed_{kind}", job) for title, kind in kinds.items()}
        rows += speed_rows(case, run_step_by_step(sides, folder))
    return rows


def speed_rows(
    case: dict,                        # of `CASES`
    speeds: dict[str, list[float]],    # side -> images per second of each step
) -> list[dict]:
    "Compare the sides step by step."
    ceiling = next(speeds[title] for title in speeds if title.startswith("ceiling"))
    rows = []
    for title, own in speeds.items():
        if title == "ours, again": continue
        rows.append({
            "images": f"{case['size']}²", "model": f"{case['backbone']}, {case['stem']} stem", "side": title,
            "steps": len(own), "images/s": format_mean(own, 1), "÷ ceiling": format_ratio(own, ceiling),
            "÷ plain loop": format_ratio(own, speeds["plain loop"]), "÷ stock": format_ratio(own, speeds["stock"]),
            "control": format_control(speeds["ours, again"], speeds["ours"]) if title == "ours" else ""})
    return rows


SPIN_SETTINGS = {   # name -> environment of a training
    "default": {}, "kernels": dict(GOMP_SPINCOUNT=SPIN_COUNT), "longer": dict(GOMP_SPINCOUNT="100000"),
    "passive": dict(OMP_WAIT_POLICY="PASSIVE"), "default, again": {}}


@contextmanager
def busy_processes(n: int) -> Iterator[None]:
    "Keep processors busy."
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(n)]
    try: yield
    finally:
        for process in processes: process.kill()


def beside(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Measure training alone and beside busy processes, with settings of OpenMP's waiting threads."
    case = CASES["64"]
    prepared = prepare_case(case, args.steps * case["batch_size"], args.sign_digits, folder)
    steps = len(list((prepared/"train").glob("*/*"))) // case["batch_size"]
    job = case | dict(folder=str(prepared), threads=args.threads, workers=args.threads, steps=steps)
    sides = {name: ("speed_ours", job | dict(environment=env)) for name, env in SPIN_SETTINGS.items()}
    alone = run_step_by_step(sides, folder)
    with busy_processes(args.busy): busy = run_step_by_step(sides, folder)
    columns = {"alone": alone, f"beside {args.busy} busy processes": busy}
    rows = []
    for name in SPIN_SETTINGS:
        if name == "default, again": continue
        row = {"setting": " ".join(f"{k}={v}" for k, v in SPIN_SETTINGS[name].items()) or name}
        for title, speeds in columns.items():
            control = format_control(speeds["default, again"], speeds["default"]) if name == "default" else ""
            row |= {f"images/s {title}": format_mean(speeds[name], 1),
                    f"÷ default, {title}": format_ratio(speeds[name], speeds["default"]), f"control, {title}": control}
        rows.append(row)
    return rows


def read_train_recipe(name: str, changes: list[str]) -> dict:   # parameter -> value
    "Read the train section of a recipe over the stage's defaults, with changes given as train.name=value."
    known = read_contracts()
    parsed = [parse_set_option(text, known) for text in changes]
    given = {key: value for stage, key, value in parsed if stage == "train"}
    if len(given) < len(changes): raise SystemExit(f"--set changes parameters of train, each once: {' '.join(changes)}")
    recipe = read_recipe(asset_folder("configs")/f"{name}.yaml", known)
    return known["train"].defaults() | recipe.get("train", {}) | given


def accuracy_job(name: str, side: str, prepared: Path, seed: int, args: argparse.Namespace) -> dict:
    "Describe one training."
    recipe = read_train_recipe(name, args.set if side == "ours" else [])
    epochs = dict(epochs=args.epochs) if args.epochs else {}
    table = read_manifest(prepared/"manifest.parquet")
    size = recipe["image_size"] or auto_image_size(table.width, table.height)
    common = dict(folder=str(prepared), size=size, threads=args.threads, workers=args.threads, seed=seed,
                  backbone=recipe["backbone"], stem=recipe["stem"], weights=recipe["weights"])
    if side == "ours": return common | dict(recipe=recipe | epochs | dict(seed=seed))
    return common | STOCK_RECIPES[name] | epochs


def minutes_to(target: float, result: dict) -> float | None:
    "Return the CPU minutes until an accuracy was reached, or None."
    reached = (s for s, a in zip(result["cpu_s"], result["accuracy"]) if a >= target)
    return next((s / 60 for s in reached), None)


def best_within(minutes: float, result: dict) -> float:   # percent
    "Return the best accuracy within some CPU minutes."
    return 100 * max((a for s, a in zip(result["cpu_s"], result["accuracy"]) if s <= 60 * minutes), default=0)


def accuracy_row(name: str, side: str, results: list[dict], changes: list[str]) -> dict:
    "Summarize the seeds of one side."
    target = TARGETS[name]
    ours = side == "ours"
    minutes = [m for m in map(partial(minutes_to, target), results) if m is not None]
    test = [estimate_proportion(result["right"], result["n"]) for result in results]
    worst: Estimate = min(test, key=lambda estimate: estimate.value)
    mirrored = ours and read_train_recipe(name, changes)["tta"] == "flip"
    return {
        "data": name, "side": ", ".join([side, *(c.removeprefix("train.") for c in changes if ours)]),
        "epochs": len(results[0]["accuracy"]), "target": f"{target:.1%}",
        "seeds that reached it": f"{len(minutes)} of {len(results)}",
        "CPU-minutes to it": format_mean(minutes, 2) if minutes else "",
        "CPU-minutes in all": format_mean([result["cpu_s"][-1] / 60 for result in results], 2),
        f"best validation within {SHORT_MINUTES} CPU-minutes":
            format_mean([best_within(SHORT_MINUTES, result) for result in results], 2, 100),
        "wall s": format_mean([result["wall_s"] for result in results]),
        "best validation": format_mean([100 * max(result["accuracy"]) for result in results], 2, 100),
        "tested": "mirrored too" if mirrored else "as it is",
        "test, mean of seeds": format_mean([100 * estimate.value for estimate in test], 2, 100),
        "worst seed's test": f"{100 * worst.value:.2f} [{100 * worst.low:.2f}, {100 * worst.high:.2f}] (n={worst.n})"}


def accuracy(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Train every seed of every side, several at once if there are enough cores."
    prepared, jobs = {}, []
    for name in args.data:
        source = str(args.sign_digits) if name == "sign-digits" else name.split("_")[0]
        if source not in prepared:
            share = 0.1 if source == "cifar10" else 0.15
            prepared[source] = prepare_folders(source, folder/f"images-{len(prepared)}", share, args.images)
        for seed, side in product(range(args.seeds), args.sides):
            jobs.append((name, side, accuracy_job(name, side, prepared[source], seed, args)))
    free: Queue = Queue()
    cores = sorted(os.sched_getaffinity(0))
    for i in range(args.jobs):
        free.put([cores[c % len(cores)] for c in range(i * args.threads, (i + 1) * args.threads)])

    def run_job(entry: tuple[str, str, dict]) -> dict:
        name, side, job = entry
        kept = args.keep and args.keep/f"{name}-{side}-{job['seed']}.json"
        same = {k: v for k, v in job.items() if k != "folder"}
        if kept and kept.exists() and (known := read_json(kept))["task"] == same: return known["answer"]
        own = free.get()
        try: result = run_side(f"accuracy_{side}", job, folder, own)
        finally: free.put(own)
        if kept: write_json(kept, dict(task=same, answer=result))
        return result

    with ThreadPoolExecutor(args.jobs) as pool: results = list(pool.map(run_job, jobs))
    rows = []
    for kind in dict.fromkeys((name, side) for name, side, _ in jobs):
        rows.append(accuracy_row(*kind, [r for r, job in zip(results, jobs) if job[:2] == kind], args.set))
    return rows


def watch_gpu(stop: threading.Event, used_mb: list[float]) -> None:
    "Record the GPU's memory in use until `stop` is set."
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    while not stop.is_set():
        used_mb.append(float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[0]))
        stop.wait(0.2)


def gpu_row(name: str, seed: int, args: argparse.Namespace) -> dict:
    "Run the train notebook with one recipe and one seed."
    import papermill
    known = read_contracts()
    recipe = read_recipe(asset_folder("configs")/f"{name}.yaml", known).get("train", {})
    params = recipe | dict(run=str(args.run.resolve()), seed=seed, tracking="disabled")
    used_mb: list[float] = []
    stop = threading.Event()
    watch = threading.Thread(target=watch_gpu, args=(stop, used_mb))
    if not args.no_gpu: watch.start()
    begin = time.perf_counter()
    out = args.run/f"train-{name}-{seed}.ipynb"
    try: papermill.execute_notebook(known["train"].path, out, params, kernel_name="python3", progress_bar=False)
    finally: stop.set()
    wall_s = time.perf_counter() - begin
    stage = read_json(args.run/"train/stage.json")
    metrics = stage["metrics"]
    test = metrics.get("accuracy_test_tta", metrics["accuracy_test"])
    epochs = len(read_json(args.run/"train/metrics.json")["history"])
    images_per_s = metrics["images_per_s"]["value"]
    n_train = len(read_manifest(args.run/"audit/manifest.parquet", "train"))
    return {"recipe": name, "seed": seed, "GPU": gpu_name(args.no_gpu), "epochs": epochs,
            "test": f"{100 * test['value']:.2f} [{100 * test['low']:.2f}, {100 * test['high']:.2f}] (n={test['n']})",
            f"at least {args.target:.0%}": "yes" if test["value"] >= args.target else "no", "images/s": images_per_s,
            "training s": n_train * epochs / images_per_s, "stage s": stage["seconds"], "notebook s": wall_s,
            "GPU memory MB": max(used_mb) - used_mb[0] if used_mb else ""}


def gpu(args: argparse.Namespace, folder: Path) -> list[dict]:
    "Run the train notebook on a run that has its audit, once per recipe and seed."
    rows = []
    for name, seed in product(args.config, range(args.seeds)):
        rows.append(gpu_row(name, seed, args))
        print(rows[-1], file=sys.stderr, flush=True)   # an interrupted call has printed what it measured
    return rows


def gpu_name(no_gpu: bool) -> str:
    "Name the GPU."
    import torch
    return "" if no_gpu else torch.cuda.get_device_name()


TITLES: dict[Callable, str] = {
    loader: "The loader alone", speed: "Training", accuracy: "Processor time to an accuracy",
    beside: "Training beside other work",
    gpu: "CIFAR-10 on a GPU, through the train notebook"}


def make_parser() -> argparse.ArgumentParser:
    "Make the parser of the command line, with one command per part of the benchmark."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="part", required=True)
    parts = {}
    for call, title in TITLES.items():
        part = commands.add_parser(call.__name__, help=title)
        parts[call] = part
        part.set_defaults(call=call, title=title)
        part.add_argument("--write", action="store_true", help=f"write benchmarks/results/train_{call.__name__}*.md")
        part.add_argument("--threads", type=int, default=n_cores(), help="threads of each side, and its workers")
        part.add_argument("--images", type=int, default=10_000 if call is loader else 0,
                          help="images per split; 0 takes what the case needs, or all")
        part.add_argument("--sign-digits", type=Path, help="the folder of the Sign Language Digits Dataset")
        part.add_argument("--work", type=Path, help="folder for prepared images, on a disk; a temporary one by default")
    parts[loader].add_argument("--rounds", type=int, default=5, help="turns of each side")
    parts[loader].add_argument("--repeats", type=int, default=3, help="timed epochs of a turn")
    parts[beside].add_argument("--busy", type=int, default=n_cores(), help="busy processes")
    for call in speed, beside:
        parts[call].add_argument("--steps", type=int, default=24,
                                 help=f"training steps of each side; the first {WARM_UP_STEPS} are not timed")
    for call, default in (loader, list(CASES)), (speed, ["32", "224"]):
        parts[call].add_argument("--cases", nargs="+", choices=list(CASES), default=default,
                                 help="image sizes in pixels; `crop` crops at random instead of an affine change")
    for call in accuracy, gpu: parts[call].add_argument("--seeds", type=int, default=3)
    part = parts[accuracy]
    part.add_argument("--data", nargs="+", choices=list(TARGETS), default=list(TARGETS), help="recipes")
    part.add_argument("--sides", nargs="+", choices=["ours", "stock"], default=["ours", "stock"])
    part.add_argument("--epochs", type=int, default=0, help="instead of the epochs of the recipes")
    part.add_argument("--set", action="append", default=[], metavar="train.NAME=VALUE",
                      help="changes our recipe; can be repeated")
    part.add_argument("--jobs", type=int, default=1, help="trainings at once, each on its own cores")
    part.add_argument("--keep", type=Path, help="folder for results, which a later call reads")
    part = parts[gpu]
    part.add_argument("--run", type=Path, required=True, help="a run directory with an audit")
    part.add_argument("--config", nargs="+", default=["cifar10_fast"], help="recipes")
    part.add_argument("--target", type=float, default=0.94)
    part.add_argument("--no-gpu", action="store_true", help="try it on a CPU")
    return parser


def main() -> None:
    "Measure, and print tables."
    parser = make_parser()
    args = parser.parse_args()
    cases = ["64"] if args.call is beside else getattr(args, "cases", [])
    sources = [CASES[c]["source"] for c in cases] + getattr(args, "data", [])
    if "sign-digits" in sources and not args.sign_digits:
        parser.error("sign-digits is not a named data set: give its folder with --sign-digits")
    with TemporaryDirectory(dir=args.work) as folder: rows = args.call(args, Path(folder))
    if args.call is not accuracy: return show(f"train_{args.part}", args.title, rows, args.write)
    how = f"{args.threads} cores each" + (f", {args.jobs} at a time" if args.jobs > 1 else "")
    for name in args.data:
        title = f"{args.title}: {name}, {how}"
        show(f"train_accuracy_{name}", title, [r for r in rows if r["data"] == name], args.write)


if __name__ == "__main__": main()
