"""Copy executed stage notebooks of a run as pages: `python dev/take_pages.py runs/groceries compress export benchmark`.

Pages go to benchmarks/results/pages/RUN/STAGE.ipynb; the stage `report` is the page of `cvnb report`, and `card` the
model card. Folders of this machine become `runs/RUN` and `data`; a page that still names one is refused.
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


def read_page(
    run: Path,     # a finished run
    stage: str,    # of it, or "report" or "card"
) -> tuple[str, str]:   # name of the page, its text
    "Read a page, without what belongs to one machine in a notebook."
    if stage == "report":
        from cvnb.benchmark.run_report import run_report_html
        return "report.html", run_report_html(run)
    if stage == "card":
        from cvnb.benchmark.model_card import model_card
        return "card.md", model_card(run)
    notebook = json.loads((run/stage/"notebook.ipynb").read_text())
    notebook["metadata"] = {key: value for key, value in notebook["metadata"].items() if key in KEPT_METADATA}
    for cell in notebook["cells"]:
        cell["metadata"] = {key: value for key, value in cell["metadata"].items() if key == "tags"}
    return f"{stage}.ipynb", json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True) + "\n"


def take(
    run: Path,     # a finished run
    stage: str,    # of it, or "report" or "card"
) -> Path:         # the page
    "Copy one page."
    name, text = read_page(run, stage)
    for folder, instead in places(run).items(): text = text.replace(folder, instead)
    left = [part for part in text.split('"') if part.startswith("/") and os.path.exists(part) and part.count("/") > 1]
    if left: raise SystemExit(f"{stage} names folders of this machine: {left[:3]}")
    if len(text) > 1e6 * MAX_MB: raise SystemExit(f"{stage} has {len(text) / 1e6:.1f} MB, more than {MAX_MB}")
    target = PAGES/run.name/name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text, encoding="utf-8")
    return target


if __name__ == "__main__":
    for name in sys.argv[2:]: print(take(Path(sys.argv[1]), name).relative_to(ROOT))
