"Processes that tests have started, after a kill."
from __future__ import annotations

import time

import psutil


def left_after(
    processes: list[psutil.Process],
    seconds: float = 20,
) -> list[psutil.Process]:
    "Wait until processes have ended, and return those that have not."
    end = time.monotonic() + seconds

    def runs(p: psutil.Process) -> bool:
        try: return p.status() != psutil.STATUS_ZOMBIE   # of which nobody has read the exit code
        except psutil.NoSuchProcess: return False

    while (left := [p for p in processes if runs(p)]) and time.monotonic() < end: time.sleep(0.05)
    return left
