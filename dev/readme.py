"""Write README.md from nbs/index.ipynb, or check with --check that it is in step. Needs no Quarto and runs no cell."""
from __future__ import annotations

import argparse
import posixpath
import re
import sys
from pathlib import Path

import nbformat
from execnb.nbio import NbCell, mk_cell, nb2str
from nbconvert import MarkdownExporter
from nbdev.process import NBProcessor
from nbdev.processors import FilterDefaults

ROOT = Path(__file__).resolve().parent.parent
_LINK = re.compile(r"(!?\[[^\]]*\])\((?!\w+:|#|/)([^)\s]+)\)")


def relink(
    text: str,     # Markdown whose links are relative to `base`
    base: str,     # folder of the notebook, relative to the README
) -> str:          # the same with links relative to the README
    "Point a page's links to where they lie as seen from the README."
    return _LINK.sub(lambda m: f"{m[1]}({posixpath.normpath(posixpath.join(base, m[2]))})", text)


def shown(
    cell: NbCell,   # a processed cell
) -> NbCell:        # the same, or its outputs as Markdown where the page shows only those
    "Put a cell's result in the place of its code where `#| echo: false` asks for that."
    if cell.cell_type != "code" or cell.directives_.get("echo:") != ["false"]: return cell
    return mk_cell("\n\n".join("".join(o["data"]["text/markdown"]) for o in cell.outputs if "data" in o), "markdown")


def render(
    notebook: Path,   # the index, with its outputs
) -> str:             # README text
    "Render a notebook as the Markdown page that a repository shows first."
    procs = [p for p in FilterDefaults().procs() if p.__name__ != "add_links"]   # those point into the built site
    processor = NBProcessor(notebook, procs=procs)
    processor.process()
    front = processor.nb.frontmatter_
    cells = [shown(c) for c in processor.nb.cells if c.get("source") and c.cell_type != "raw"]
    processor.nb.cells = cells
    text, resources = MarkdownExporter().from_notebook_node(nbformat.reads(nb2str(processor.nb), as_version=4))
    if resources["outputs"]: raise ValueError(f"{notebook.name} draws in a cell; keep pictures in nbs/images")
    text = relink(text, notebook.parent.relative_to(ROOT).as_posix())
    return re.sub(r"\n{3,}", "\n\n", f"# {front['title']}\n\n> {front['description']}\n\n{text}").strip() + "\n"


def main() -> None:
    "Write README.md, or with --check fail if it is out of step."
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing, fail if README.md is out of step")
    check, readme = parser.parse_args().check, ROOT/"README.md"
    text = render(ROOT/"nbs"/"index.ipynb")
    if not check: readme.write_text(text, encoding="utf-8")
    elif not readme.exists() or readme.read_text(encoding="utf-8") != text:
        sys.exit("README.md is out of step with nbs/index.ipynb. Run `python dev/readme.py` and commit both.")


if __name__ == "__main__": main()
