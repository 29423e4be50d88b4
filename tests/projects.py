"""Small projects for tests."""
from __future__ import annotations

from pathlib import Path

import nbformat as nbf


def write_project(folder: Path, parameters: str = "seed: int = 0", **bodies: str) -> Path:
    "A project of quick stages: each body is a cell, and each stage needs the one before."
    before = ""
    (folder/"nbs/stages").mkdir(parents=True)
    for name, body in bodies.items():
        code = [nbf.v4.new_code_cell("from cvnb.pipeline.params import open_stage"),
                # A cell with `run` alone would be an IPython magic.
                nbf.v4.new_code_cell(f'{parameters}\nrun: str = "runs/x"', metadata=dict(tags=["parameters"])),
                nbf.v4.new_code_cell(f'stage = open_stage("{name}", globals())\nprint("begun")'),
                nbf.v4.new_code_cell(body), nbf.v4.new_code_cell("stage.finish()")]
        head = nbf.v4.new_markdown_cell(f"# {name}\n\n> A stage.\n\n- needs: [{before}]")
        nbf.write(nbf.v4.new_notebook(cells=[head, *code]), folder/f"nbs/stages/{name}.ipynb")
        before = name
    return folder
