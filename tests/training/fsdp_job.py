"""train_job.py with FSDP on CPUs, which torch can do and Lightning refuses: its two checks are taken away, the rest is what a GPU would run."""
from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import FSDPStrategy
from torch.distributed.fsdp import FullyShardedDataParallel
from train_job import main

from cvnb.training import fit


class OnCpu(FSDPStrategy):
    "Not FSDPStrategy itself, which Lightning looks for."


class Trainer(pl.Trainer):
    def __init__(self, strategy: str, **more: Any): super().__init__(strategy=OnCpu(process_group_backend="gloo"), **more)


def on_cpu(self: FullyShardedDataParallel, *args: Any, **more: Any) -> None: begin(self, *args, **more | dict(device_id=torch.device("cpu")))


if __name__ == "__main__":
    begin, FullyShardedDataParallel.__init__ = FullyShardedDataParallel.__init__, on_cpu
    fit.pl = type("Lightning", (), vars(pl) | dict(Trainer=Trainer))
    fit.accelerator_for = lambda options: "cpu"
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
