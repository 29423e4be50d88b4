"""Build the documentation: `make docs`. Without Quarto it still writes README.md and the processed pages in _proc/."""
from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from nbdev.quarto import refresh_quarto_yml
from nbdev.serve import proc_nbs

ROOT = Path(__file__).resolve().parent.parent
MISSING = """Quarto is not on PATH, so the site was not rendered. It is at https://quarto.org/docs/get-started/;
with it installed, `make docs` renders the pages in _proc/ into _docs/."""


def main() -> None:
    "Write the README, process the pages, and render them where Quarto is installed."
    os.chdir(ROOT)
    # First, and so newer than its notebook: nbdev would otherwise render the README again with Quarto, and differently.
    subprocess.run([sys.executable, "dev/readme.py"], check=True)
    if shutil.which("quarto"):
        subprocess.run([Path(sys.executable).parent/"nbdev_docs"], check=True)
        print("The site is in _docs/.")
        return
    refresh_quarto_yml()
    pages = sorted(proc_nbs().rglob("*.ipynb"))
    print(f"{len(pages)} processed pages are in _proc/.\n{MISSING}")


if __name__ == "__main__": main()
