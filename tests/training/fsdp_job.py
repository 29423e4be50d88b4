"""train_job.py with FSDP on CPUs: torch supports it and Lightning does not, so Lightning's two checks are removed."""
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
    "A subclass, because Lightning refuses FSDPStrategy itself on a CPU."


class Trainer(pl.Trainer):
    def __init__(self, strategy: str, **more: Any):
        super().__init__(strategy=OnCpu(process_group_backend="gloo"), **more)


def init_on_cpu(self: FullyShardedDataParallel, *args: Any, **more: Any) -> None:
    init(self, *args, **more | dict(device_id=torch.device("cpu")))


if __name__ == "__main__":
    init = FullyShardedDataParallel.__init__
    FullyShardedDataParallel.__init__ = init_on_cpu
    fit.pl = type("Lightning", (), vars(pl) | dict(Trainer=Trainer))
    fit.select_accelerator = lambda options: "cpu"
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), sys.argv[3])
