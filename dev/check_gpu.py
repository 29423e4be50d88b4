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
sys.path[:0] = [str(ROOT), str(ROOT/"tests/training")]

import pytorch_lightning as pl  # noqa: E402
import torch  # noqa: E402
from fit_helpers import largest_difference  # noqa: E402
from train_job import digits, fresh  # noqa: E402

from cvnb.core.errors import CvnbError  # noqa: E402
from cvnb.models.vision_model import VisionModel  # noqa: E402
from cvnb.training.fit import fit  # noqa: E402
from cvnb.training.options import FitOptions  # noqa: E402

BACKBONE = "test_efficientnet"
PLAIN = FitOptions(epochs=3, batch_size=50, lr=5e-3, augment="light", device="gpu")
CHECKS: dict[str, Callable[[Path], str]] = {}


def check(name: str) -> Callable:
    "Add a function to the checks."
    def add(function: Callable[[Path], str]) -> Callable[[Path], str]:
        CHECKS[name] = function
        return function

    return add


def train(options: FitOptions, folder: Path, **more: object) -> tuple[VisionModel, float]:
    "Train, and return the model and its last validation accuracy."
    model = fresh(BACKBONE)
    history = fit(model, *digits(), options, folder, **more)
    return model, float(history.val_accuracy.iloc[-1])


def check_learning(options: FitOptions, folder: Path) -> str:
    "Train with options, and check that the model has learned."
    model, accuracy = train(options, folder)
    assert accuracy > 0.5, f"the validation accuracy is only {accuracy:.2f}"
    assert all(p.device.type == "cpu" and p.isfinite().all() for p in model.parameters())
    return f"accuracy {accuracy:.2f}"


@check("forked, one device")
def check_fork(folder: Path) -> str:
    "This check is the first, because a fork can use the GPU only if this process has not used it."
    result = check_learning(replace(PLAIN, strategy="ddp_notebook"), folder)
    assert not torch.cuda.is_initialized()
    return result


@check("32-true")
def check_32_bits(folder: Path) -> str: return check_learning(PLAIN, folder)


@check("bf16-mixed")
def check_bfloat16(folder: Path) -> str: return check_learning(replace(PLAIN, precision="bf16-mixed"), folder)


@check("16-mixed, clip, average")
def check_float16(folder: Path) -> str:
    return check_learning(replace(PLAIN, precision="16-mixed", clip=1.0, ema=0.9, keep="best"), folder)


@check("compile")
def check_compile(folder: Path) -> str:
    return check_learning(replace(PLAIN, compile=True, precision="bf16-mixed"), folder)


@check("fsdp, one device")
def check_fsdp(folder: Path) -> str:
    options = replace(PLAIN, augment="none", weight_decay=0.5)
    plain, _ = train(options, folder/"plain")
    sharded, accuracy = train(replace(options, strategy="fsdp", keep="best"), folder/"fsdp")
    difference = largest_difference(plain, sharded)
    return f"accuracy {accuracy:.2f}; largest difference of the weights to a training without FSDP {difference:.1e}"


class KillAtStep(pl.Callback):
    "Save after every batch, and end the training at a step."
    def __init__(self, step: int): self.step = step

    def on_train_batch_start(self, trainer: pl.Trainer, *_: object) -> None:
        trainer.callbacks[-1].every_s = 0
        if trainer.global_step == self.step: raise SystemExit


def check_resume(options: FitOptions, folder: Path) -> str:
    "Train twice without interruption and once with one, and compare the weights."
    whole, _ = train(options, folder/"whole")
    again, _ = train(options, folder/"again")
    try: train(options, folder/"cut", callbacks=[KillAtStep(8)])
    except SystemExit: resumed, _ = train(options, folder/"cut")
    return (f"largest difference of the weights {largest_difference(whole, resumed):.1e}; "
            f"of two trainings without interruption {largest_difference(whole, again):.1e}")


@check("resume within an epoch")
def check_resume_within_epoch(folder: Path) -> str:
    return check_resume(replace(PLAIN, ema=0.9, mixup=0.2, erasing=0.2), folder)


@check("resume, fsdp")
def check_resume_fsdp(folder: Path) -> str: return check_resume(replace(PLAIN, strategy="fsdp"), folder)


@check("out of memory")
def check_out_of_memory(folder: Path) -> str:
    "Limit torch's memory, so that one batch of all images does not fit."
    data, model = digits(160, 1024, 64), fresh("resnet10t", 160)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, 1.5e9 / total))
    try:
        with warnings.catch_warnings(record=True):
            history = fit(model, *data, replace(PLAIN, batch_size=1024, epochs=1), folder)
    finally: torch.cuda.set_per_process_memory_fraction(1.0)
    notes = history.attrs["notes"]
    assert notes and "out of memory" in notes[-1], "the batch fitted"
    return notes[-1]


@check("forked after that")
def check_fork_refused(folder: Path) -> str:
    try: train(replace(PLAIN, strategy="ddp_notebook"), folder)
    except CvnbError as e: return f"refused: {e}"[:120]
    raise AssertionError("a process that used the GPU was forked")


def main() -> int:   # number of checks that failed
    "Run the checks in their order."
    failed = 0
    for name, function in CHECKS.items():
        begin = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            try: state, result = "ok", function(Path(folder))
            except Exception as e:
                traceback.print_exc()
                failed += 1
                state, result = "FAILED", f"{type(e).__name__}: {e}".splitlines()[0][:120]
        print(f"{state:<7}{time.perf_counter() - begin:6.1f} s  {name:<28} {result}", flush=True)
    print(f"{torch.cuda.get_device_name()} · torch {torch.__version__} · Lightning {pl.__version__}")
    return failed


if __name__ == "__main__": sys.exit(main())
