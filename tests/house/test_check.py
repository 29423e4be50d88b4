"""`make check`: what it runs for which change."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import check


def test_notebooks_and_tests_follow_the_changed_packages() -> None:
    files = ["nbs/audit/02_duplicates.ipynb", "cvnb/audit/duplicates.py", "nbs/stages/train.ipynb", "README.md",
             "tests/data/test_named.py"]
    assert check.notebooks(files) == ["nbs/audit/02_duplicates.ipynb"]
    assert check.notebooks(["nbs/audit/99_gone.ipynb"]) == []
    assert check.test_folders(files) == ["tests/audit", "tests/data", "tests/pipeline"]
    assert check.test_folders(["README.md", "dev/house.py", "tests/house/test_house.py"]) == []
    assert [name for name, _ in check.steps(files)][:2] == ["lint", "house rules"]


def test_uncommitted_changes_count_else_the_last_commit(tmp_path: Path) -> None:
    who = ["-c", "user.name=n", "-c", "user.email=e@x.org"]
    git = lambda *args: subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)
    git("init")
    for name in "a.py", "gone.py": (tmp_path/name).touch()
    git("add", "."), git("commit", "-m", "first")
    assert check.changed(tmp_path) == ["a.py", "gone.py"]
    (tmp_path/"a.py").write_text("x = 1")
    (tmp_path/"new.py").touch()
    (tmp_path/"gone.py").unlink()
    assert check.changed(tmp_path) == ["a.py", "gone.py", "new.py"]


def test_failed_and_unfinished_steps_are_named() -> None:
    python = lambda code: [sys.executable, "-c", code]
    what = [("good", python("")), ("bad", python("raise SystemExit(1)")), ("no tests", python("raise SystemExit(5)")),
            ("endless", python("import time; time.sleep(60)"))]
    assert check.run(what, seconds=3) == (["bad"], ["endless"])
