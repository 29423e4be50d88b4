"""Stage keys follow code into sub-packages: a module that no key covers would make every stage look fresh for ever."""
from __future__ import annotations

from pathlib import Path

import pytest

from cvnb.core.errors import CvnbError
from cvnb.core.fingerprint import code_fingerprint, imported_packages, reached_code

CELL = "from cvnb.high.first import train\ntrain()"
MODULES = {
    "high/__init__.py": "", "low/__init__.py": "",
    "high/first.py": "import torch\nfrom ..low.second import helper\ndef train(): return helper()\n",
    "low/second.py": "def helper(): return 1\ndef unused(): return 2\n",
    "flat.py": "def f(): return 3\n",
}


@pytest.fixture
def package(tmp_path: Path) -> Path:
    "A package with two sub-packages."
    for name, source in MODULES.items():
        (tmp_path/name).parent.mkdir(exist_ok=True)
        (tmp_path/name).write_text(source)
    return tmp_path


def changed(package: Path, name: str, old: str, new: str) -> set[str]:
    "Name the functions whose digest differs after a change to a module."
    before = reached_code([CELL], package)
    (package/name).write_text(MODULES[name].replace(old, new))
    after = reached_code([CELL], package)
    return {key for key in before.keys() | after.keys() if before.get(key) != after.get(key)}


def test_function_in_a_sub_package_is_reached(package: Path) -> None:
    assert {"high.first.train", "low.second.helper"} <= reached_code([CELL], package).keys()
    assert "torch" in imported_packages([CELL], package)


def test_change_in_a_sub_package_is_noticed(package: Path) -> None:
    assert changed(package, "low/second.py", "return 1", "return 7") == {"low.second.helper"}


def test_change_to_an_unused_function_is_not_noticed(package: Path) -> None:
    assert changed(package, "low/second.py", "return 2", "return 8") == set()


def test_code_of_a_package_init_is_reached(package: Path) -> None:
    assert changed(package, "low/__init__.py", "", "print('imported')") == {"low"}


UNKNOWN = ["from cvnb.train import fit", "import cvnb.train", "from cvnb.high.frist import train"]


@pytest.mark.parametrize("cell", UNKNOWN)
def test_import_of_an_unknown_module_is_refused(cell: str, package: Path) -> None:
    with pytest.raises(CvnbError, match="a cell imports cvnb.*, which is no module of cvnb"):
        reached_code([cell], package)


def test_training_code_is_part_of_a_checkpoints_identity() -> None:
    "Before, a cell whose modules were not found had the digest of nothing, which fits any code."
    fit = "from cvnb.training.fit import fit\nfit"
    assert {"training.fit.fit", "training.module.TrainingModule"} <= reached_code([fit]).keys()
    assert code_fingerprint(fit) != code_fingerprint("1 + 1")
