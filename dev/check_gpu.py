"""Check on a machine with a GPU what tests on CPUs cannot show, and print a table: python dev/check_gpu.py."""
from __future__ import annotations

import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT/"tests")]

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from train_job import digits, fresh  # noqa: E402

from cvnb.core.errors import CvnbError  # noqa: E402
from cvnb.training.options import FitOptions
from cvnb.training.fit import fit  # noqa: E402

NET = "test_efficientnet"
PLAIN = FitOptions(epochs=3, batch_size=50, lr=5e-3, augment="light", device="gpu")
CHECKS: dict[str, Callable[[Path], str]] = {}


def check(name: str) -> Callable:
    "List a function among the checks."
    def add(function: Callable[[Path], str]) -> Callable[[Path], str]:
        CHECKS[name] = function
        return function
    return add


def accuracy(options: FitOptions, folder: Path, **more: object) -> tuple[torch.nn.Module, float, list[str]]:
    "Train, and give the model, its last validation accuracy and the notes."
    model = fresh(NET)
    history = fit(model, *digits(), options, folder, **more)
    return model, float(history.val_accuracy.iloc[-1]), history.attrs["notes"]


def learned(options: FitOptions, folder: Path) -> str:
    "Train with options and see that something was learned."
    model, share, _ = accuracy(options, folder)
    assert share > 0.5, f"only {share:.2f} of the validation images are right"
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())
    return f"accuracy {share:.2f}"


@check("forked, one device")
def forked(folder: Path) -> str:
    "Comes first: a fork can use the GPU only if this process has not."
    said = learned(replace(PLAIN, strategy="ddp_notebook"), folder)
    assert not torch.cuda.is_initialized()
    return said


@check("32-true")
def plain(folder: Path) -> str: return learned(PLAIN, folder)


@check("bf16-mixed")
def bf16(folder: Path) -> str: return learned(replace(PLAIN, precision="bf16-mixed"), folder)


@check("16-mixed, clip, average")
def fp16(folder: Path) -> str: return learned(replace(PLAIN, precision="16-mixed", clip=1.0, ema=0.9, keep="best"), folder)


@check("compile")
def compiled(folder: Path) -> str: return learned(replace(PLAIN, compile=True, precision="bf16-mixed"), folder)


@check("fsdp, one device")
def fsdp(folder: Path) -> str:
    options = replace(PLAIN, augment="none", weight_decay=0.5)
    (one, _, _), (two, share, _) = accuracy(options, folder/"one"), accuracy(replace(options, strategy="fsdp", keep="best"), folder/"two")
    apart = max(float((a - b).abs().max()) for a, b in zip(one.state_dict().values(), two.state_dict().values()))
    return f"accuracy {share:.2f}; weights differ from those without by {apart:.1e} at most"


class Saves(pl.Callback):
    "Save after every batch; at a step, end the training."
    def __init__(self, at: int): self.at = at

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.callbacks[-1].every_s = 0
        if trainer.global_step == self.at: raise SystemExit


def cut(options: FitOptions, folder: Path) -> tuple[float, float]:
    "Train whole and in two parts; give the largest difference of the weights, and of two trainings that are whole."
    whole, again = accuracy(options, folder/"whole")[0], accuracy(options, folder/"again")[0]
    try: accuracy(options, folder/"cut", callbacks=[Saves(8)])
    except SystemExit: resumed = accuracy(options, folder/"cut")[0]
    apart = lambda a, b: max(float((x - y).abs().max()) for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    return apart(whole, resumed), apart(whole, again)


@check("resume within an epoch")
def resume(folder: Path) -> str:
    parts, repeats = cut(replace(PLAIN, ema=0.9, mixup=0.2, erasing=0.2), folder)
    return f"weights differ by {parts:.1e} at most; two whole trainings by {repeats:.1e}"


@check("resume, fsdp")
def resume_fsdp(folder: Path) -> str:
    parts, repeats = cut(replace(PLAIN, strategy="fsdp"), folder)
    return f"weights differ by {parts:.1e} at most; two whole trainings by {repeats:.1e}"


@check("out of memory")
def memory(folder: Path) -> str:
    "Let torch have little memory, so that the whole data in one batch are too much for it."
    data, model = digits(160, 1024, 64), fresh("resnet10t", 160)
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / torch.cuda.get_device_properties(0).total_memory))
    try:
        with warnings.catch_warnings(record=True): history = fit(model, *data, replace(PLAIN, batch_size=1024, epochs=1), folder)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    assert history.attrs["notes"] and "out of memory" in history.attrs["notes"][-1], "there was enough of it"
    return history.attrs["notes"][-1]


@check("forked after that")
def fork_refused(folder: Path) -> str:
    try: accuracy(replace(PLAIN, strategy="ddp_notebook"), folder)
    except CvnbError as e: return f"refused: {e}"[:120]
    raise AssertionError("a process that used the GPU was forked")


def main() -> int:   # how many checks failed
    "Run the checks one after the other."
    failed = 0
    for name, function in CHECKS.items():
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try: state, said = "ok", function(Path(folder))
            except Exception as e:
                traceback.print_exc()
                state, said, failed = "FAILED", f"{type(e).__name__}: {e}".splitlines()[0][:120], failed + 1
        print(f"{state:<7}{time.perf_counter() - begin:6.1f} s  {name:<28} {said}", flush=True)
    print(f"{torch.cuda.get_device_name()} · torch {torch.__version__} · Lightning {pl.__version__}")
    return failed


if __name__ == "__main__": sys.exit(main())
