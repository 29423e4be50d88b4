"""The table of planted faults fits the code, and the program that plants them finds out what its tests say."""
from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import mutants
import pytest
from mutant_table import MUTANTS, Mutant

KEY = next(m for m in MUTANTS if m.file == "cvnb/core/stage.py")


def test_every_mutant_can_be_planted_and_names_tests_that_exist() -> None:
    assert mutants.faults() == [] and len(MUTANTS) >= 23
    assert {"audit", "splits", "train", "metrics", "errors", "compress", "export", "benchmark", "runs", "predict"} == {
        m.stage for m in MUTANTS}


@pytest.mark.parametrize("change, said", [
    (dict(old="return digest(dict(inputs=inputs))"), "stage.py has the line 0 times"),
    (dict(old="self.inputs", new="self.input"), "times: self.inputs"),
    (dict(new="return digest(dict(parts=parts)"), "never closed"), (dict(new=KEY.old), "one line has to change"),
    (dict(tests=("tests/core/test_stage.py::test_gone",)), "there is no test tests/core/test_stage.py::test_gone"),
    (dict(tests=("tests/core/gone.py",)), "there is no test"), (dict(tests=()), "it names no test"),
    (dict(file="cvnb/core/gone.py"), "No such file")], ids=lambda value: str(value)[:40])
def test_mutant_that_does_not_fit_any_more_is_named(change: dict, said: str) -> None:
    found = mutants.faults((replace(KEY, **change),))
    assert len(found) == 1 and found[0].startswith(KEY.name) and said in found[0]


def test_notebook_of_a_module_is_patched_too() -> None:
    changed = {path.name: text for path, text in mutants.patches(KEY).items()}
    assert changed.keys() == {"stage.py", "06_stage.ipynb"}
    assert all(KEY.new in text and KEY.old not in text for text in changed.values())


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A copy of the project."
    return mutants.copy_project(tmp_path_factory.mktemp("copy"))


def test_tests_of_a_copy_import_its_cvnb(copy: Path, tmp_path: Path) -> None:
    mutants.check_copy(copy)
    with pytest.raises(RuntimeError, match="would import"): mutants.check_copy(tmp_path)


def test_mutant_is_killed_or_survives_and_the_copy_is_restored(copy: Path) -> None:
    before = (copy/KEY.file).read_bytes()
    test = "tests/pipeline/test_keys.py::test_key_of_a_stage_depends_on_every_part_and_on_its_inputs"
    killed = mutants.try_mutant(replace(KEY, tests=(test,)), copy, 300)
    assert killed.killed and killed.by == test
    harmless = replace(KEY, new="return digest(dict(inputs=inputs, parts=parts))", tests=(test,))
    survivor = mutants.try_mutant(harmless, copy, 300)
    assert not survivor.killed and (copy/KEY.file).read_bytes() == before
    table = mutants.as_markdown([killed, survivor])
    assert table.startswith("1 of 2 mutants are killed, 1 survive, 1 of them without a reason.")


def test_program_that_cannot_run_its_tests_says_so() -> None:
    with pytest.raises(RuntimeError, match="no tests ran"):
        mutants.failed_test([sys.executable, "-m", "pytest"], 5, "no tests ran in 0.1s")
    assert mutants.failed_test(["python", "-m", "pytest"], None, "") == "time"


@pytest.mark.long
@pytest.mark.timeout(4 * 3600)
def test_every_mutant_is_killed_or_has_a_reason(root: Path) -> None:
    done = subprocess.run([sys.executable, "dev/mutants.py", "--jobs", "2"], cwd=root, capture_output=True, text=True)
    assert not done.returncode, done.stdout[-5000:] + done.stderr[-2000:]


def test_mutants_need_one_line() -> None:
    two = Mutant("runs", "two lines", KEY.file, f"{KEY.old}\n", KEY.new, KEY.tests)
    assert mutants.faults((two,)) == ["two lines: two lines: one line has to change"]
