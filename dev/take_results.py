"""Copy what the README shows from a run into nbs/results/: `python dev/take_results.py runs/mnist5k`."""
from __future__ import annotations

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# Nothing that names a folder of this machine.
KEPT = ("run", "updated", "git", "lock", "machine", "seeds", "seconds", "cvnb")


def take(
    run: Path,   # a finished run
) -> Path:       # where its results are now
    "Copy a run's table, and from run.json what says where and when it was made."
    target = ROOT/"nbs"/"results"/run.name
    target.mkdir(parents=True, exist_ok=True)
    (target/"benchmark.json").write_bytes((run/"benchmark"/"benchmark.json").read_bytes())
    record = json.loads((run/"run.json").read_text())
    (target/"run.json").write_text(json.dumps({k: record[k] for k in KEPT}, indent=1) + "\n")
    return target


if __name__ == "__main__": print(take(Path(sys.argv[1])))
