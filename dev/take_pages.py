"""Copy executed stage notebooks of a run as pages: `python dev/take_pages.py runs/groceries compress export benchmark`.

Pages go to benchmarks/results/pages/RUN/STAGE.ipynb. Folders of this machine become `runs/RUN` and `data`; a page that
still names one is refused.
"""
from __future__ import annotations

import json
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT/"benchmarks/results/pages"
MAX_MB = 1.5
KEPT_METADATA = ("kernelspec", "language_info")


def places(
    run: Path,   # a finished run
) -> dict[str, str]:   # folder of this machine -> what a page says instead, the longest first
    "List the folders that a run's notebooks may name."
    root = json.loads((run/"audit/audit.json").read_text())["root"]
    found = {str(run.resolve()): f"runs/{run.name}", str(run): f"runs/{run.name}", root: "data", str(ROOT): ".",
             str(Path.home()): "~"}
    return dict(sorted(found.items(), key=lambda item: -len(item[0])))


def clean(
    notebook: dict,          # an executed notebook; changed
    names: dict[str, str],   # from `places`
) -> str:                    # JSON
    "Remove what belongs to one machine."
    notebook["metadata"] = {key: value for key, value in notebook["metadata"].items() if key in KEPT_METADATA}
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tags"}
    text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"
    for folder, name in names.items(): text = text.replace(folder, name)
    return text


def take(
    run: Path,     # a finished run
    stage: str,    # of it
) -> Path:         # the page
    "Copy one notebook."
    text = clean(json.loads((run/stage/"notebook.ipynb").read_text()), places(run))
    left = [part for part in text.split('"') if part.startswith("/") and os.path.exists(part) and part.count("/") > 1]
    if left: raise SystemExit(f"{stage} names folders of this machine: {left[:3]}")
    if len(text) > 1e6 * MAX_MB: raise SystemExit(f"{stage} has {len(text) / 1e6:.1f} MB, more than {MAX_MB}")
    target = PAGES/run.name/f"{stage}.ipynb"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


if __name__ == "__main__":
    for name in sys.argv[2:]: print(take(Path(sys.argv[1]), name).relative_to(ROOT))
