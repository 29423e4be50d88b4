"""A stage notebook touches test images only after it has said so, and fits nothing on them."""
from __future__ import annotations

import ast
from pathlib import Path

import nbformat
import pytest

ACCESS = 'stage.log_access("test"'


def code_of(root: Path, stage: str) -> list[str]:
    "The code cells of a stage notebook."
    nb = nbformat.read(root/f"nbs/stages/{stage}.ipynb", 4)
    return [cell.source for cell in nb.cells if cell.cell_type == "code" and "tags" not in cell.metadata]


def names_test_images(source: str) -> bool:
    "Whether a cell reads something of the test split besides its length."
    class Visitor(ast.NodeVisitor):
        found = False

        def visit_Call(self, node: ast.Call) -> None:
            if isinstance(node.func, ast.Name) and node.func.id == "len": return
            self.generic_visit(node)

        def visit_Constant(self, node: ast.Constant) -> None: self.found |= node.value == "test"

    visitor = Visitor()
    visitor.visit(ast.parse(source))
    return visitor.found


def early_uses(cells: list[str]) -> list[str]:
    "The cells before the logged access that read test images."
    first = next(i for i, source in enumerate(cells) if ACCESS in source)
    return [source for source in cells[:first] if names_test_images(source)]


@pytest.mark.parametrize("stage", ["train", "compress", "export"])
def test_test_images_are_read_after_their_access_is_logged(root: Path, stage: str) -> None:
    assert early_uses(code_of(root, stage)) == []


@pytest.mark.parametrize("stage, place, fault", [
    ("train", 'data.images["val"], tuned.options', 'data.images["test"], tuned.options'),   # chooses the epoch
    ("train", 'fit(model, data.images["train"]', 'fit(model, data.images["test"]'),
    ("train", 'decide_on_validation(model, data.images["val"]', 'decide_on_validation(model, data.images["test"]'),
    ("compress", 'load("val")', 'load("test")'),
    ("compress", 'decide_on_validation, val=val, rows=rows["val"]',
     'decide_on_validation, val=val, rows=rows["test"]')])
def test_planted_use_of_test_images_is_found(root: Path, stage: str, place: str, fault: str) -> None:
    cells = code_of(root, stage)
    assert sum(place in source for source in cells) == 1, "the notebook has changed: plant the fault elsewhere"
    assert early_uses([source.replace(place, fault) for source in cells])


def test_temperature_is_fitted_on_validation_images(root: Path) -> None:
    (assigned,) = [s for source in code_of(root, "errors") for s in ast.parse(source).body
                   if isinstance(s, ast.Assign) and ast.unparse(s.targets[0]) == "validation"]
    assert {n.value for n in ast.walk(assigned) if isinstance(n, ast.Constant)} == {"val"}
