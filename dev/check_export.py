"""Say how cvnb/ differs from what its notebooks generate, without changing anything."""
from __future__ import annotations

import difflib
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REMEDY = "Edit the notebook instead, run `nbdev_export`, and commit both."


def export_to(
    folder: Path,        # an empty folder
    root: Path = ROOT,   # the project
) -> Path:               # the generated package
    "Generate the package from the notebooks of `root` inside `folder`."
    shutil.copytree(root/"nbs", folder/"nbs", symlinks=True, ignore=shutil.ignore_patterns("images", "results", "_*"))
    (folder/"cvnb").mkdir()
    # nbdev writes the version into `__init__.py` and keeps the rest.
    for name in "settings.ini", "pyproject.toml", "cvnb/__init__.py": shutil.copy2(root/name, folder/name)
    env = {k: v for k, v in os.environ.items() if k != "IN_TEST"}   # nbdev exports nothing where it is set
    done = subprocess.run([sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export()"],
                          cwd=folder, env=env, capture_output=True, text=True)
    if done.returncode: raise RuntimeError(f"nbdev_export failed: {done.stderr.strip()}")
    return folder/"cvnb"


def differences(
    root: Path = ROOT,   # the project
) -> list[str]:          # one line per difference, none if all is well
    "Compare each module of cvnb/ with the one that its notebook generates."
    with tempfile.TemporaryDirectory(prefix="cvnb-export-") as temp:
        generated, kept = export_to(Path(temp), root), root/"cvnb"
        texts = {where: {p.relative_to(where).as_posix(): p.read_text(encoding="utf-8") for p in where.rglob("*.py")}
                 for where in (generated, kept)}
    new, old = texts[generated], texts[kept]
    found = [f"cvnb/{name} comes from no notebook" for name in sorted(old.keys() - new.keys())]
    found += [f"cvnb/{name} is missing" for name in sorted(new.keys() - old.keys())]
    for name in sorted(old.keys() & new.keys()):
        lines = difflib.unified_diff(old[name].splitlines(), new[name].splitlines(), n=0, lineterm="")
        changed = [s for s in lines if s[0] in "+-" and s[:3] not in ("+++", "---")]
        first = next((s for s in changed if s[1:].strip()), "blank")
        if changed: found.append(f"cvnb/{name} differs from its notebook in {len(changed)} lines, first: {first}")
    return found


if __name__ == "__main__":
    found = differences()
    if found: sys.exit("\n".join([*found, REMEDY]))
