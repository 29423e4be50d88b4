"""What the command line prints while a run is at work."""
from __future__ import annotations

import io

from cvnb.cli.console import ProgressLines


def test_file_gets_progress_lines_at_intervals():
    out = io.StringIO()
    with ProgressLines(out) as lines:
        lines("train", "start", 0, "it failed")
        lines("train", "progress", 0.4, "epoch 2/5")   # the interval has not passed
        lines.pause = 0
        lines("train", "progress", 0.6, "epoch 3/5")
        lines("train", "done", 1, "98 % right")
    start, progress, done = out.getvalue().splitlines()
    assert start.split() == ["…", "train", "it", "failed"] and progress.split() == ["…", "train", "60%", "epoch", "3/5"]
    assert done.startswith("✓ train") and done.endswith("98 % right")
