"""The page of a run: every figure with its cell, what the notebooks showed, and no code that runs."""
from __future__ import annotations

import html
import json
import re
import shutil
import sys
from pathlib import Path

import pytest

from cvnb.benchmark.run_report import run_report_html
from cvnb.cli.app import main
from cvnb.core.stage import format_metric


@pytest.fixture(scope="module")
def page(smoke_run: Path) -> str:
    "The page of a whole run."
    return run_report_html(smoke_run)


@pytest.fixture
def copied(smoke_run: Path, tmp_path: Path) -> Path:
    "A copy of a whole run."
    return Path(shutil.copytree(smoke_run, tmp_path/"copied", symlinks=True))


def test_every_figure_of_every_stage_is_there_with_its_value(page: str, smoke_run: Path) -> None:
    for file in smoke_run.glob("*/stage.json"):
        manifest = json.loads(file.read_text())
        assert manifest["metrics"]
        for name, metric in manifest["metrics"].items():
            value = "–" if metric["value"] is None else html.escape(format_metric(metric))
            assert f"<td>{name}</td><td>{value}</td>" in page, (file.parent.name, name)


def test_every_source_is_a_cell_on_the_page(page: str) -> None:
    sources = re.findall(r'<td><a href="#([^"]+)">cell \d+</a></td>', page)
    assert len(sources) > 50 and "<td>stage.json</td>" not in page
    assert {s for s in sources if f'id="{s}"' not in page} == set()


def test_matrix_of_runtimes_and_precisions_is_on_the_page(page: str, smoke_run: Path) -> None:
    matrix = page.partition('id="matrix"')[2].partition("</table>")[0]
    parity = json.loads((smoke_run/"export/export.json").read_text())["parity"]
    measured = json.loads((smoke_run/"benchmark/benchmark.json").read_text())["rows"]
    names = {(r["model"], r["runtime"]) for r in [*parity, *measured]}
    assert matrix.count("<tr>") == 1 + len(names)
    assert all(r["size_mb"] and r["max_difference"] is not None for r in parity)
    assert "<th>equal answers</th><th>max |Δp|</th><th>MB</th><th>" in matrix


def test_page_needs_nothing_else_and_runs_nothing(page: str) -> None:
    assert not re.search(r"<script|<iframe|https?://(?!www\.w3\.org)[^<]*\.(js|css)|url\(", page)
    assert "data:image/webp;base64," in page
    assert all(len(png) < 20_000 for png in re.findall(r"image/png;base64,([^\"']+)", page))
    assert page.index("Verdict") < page.index('<h2 id="audit">') < page.index('<h2 id="benchmark">')


def test_script_in_an_output_is_text(copied: Path) -> None:
    notebook = copied/"train/notebook.ipynb"
    content = json.loads(notebook.read_text())
    cell = next(cell for cell in content["cells"] if cell["cell_type"] == "code" and cell["outputs"])
    cell["outputs"] = [dict(output_type="display_data", metadata={},
                            data={"text/html": "<b>x</b><script>evil()</script>", "text/plain": "plain <b>"})]
    notebook.write_text(json.dumps(content))
    page = run_report_html(copied)
    assert "evil()" not in page and "<pre>plain &lt;b&gt;</pre>" in page


def test_half_a_run_and_a_damaged_notebook_are_said(copied: Path) -> None:
    shutil.rmtree(copied/"benchmark")
    (copied/"errors/notebook.ipynb").write_text("{")
    page = run_report_html(copied)
    assert "This stage has not finished." in page.partition('id="benchmark">')[2]
    assert "notebook is missing or damaged" in page.partition('id="errors">')[2].partition('id="compress">')[0]


def test_command_writes_the_page_and_overwrites_no_other_file(copied: Path, monkeypatch, capsys) -> None:
    def call(*args: object) -> int:
        monkeypatch.setattr(sys, "argv", ["cvnb", "report", *map(str, args)])
        with pytest.raises(SystemExit) as end: main()
        return end.value.code or 0
    assert call(copied) == 0
    assert capsys.readouterr().out.strip() == str(copied/"report.html")
    assert (copied/"report.html").stat().st_size > 10_000
    assert call(copied) == 0, "its own page is written anew"
    (copied/"mine.html").write_text("mine")
    assert call(copied, "--out", copied/"mine.html") == 2
    assert (copied/"mine.html").read_text() == "mine" and "exists" in capsys.readouterr().err
    assert call(copied, "--out", copied/"no/page.html") == 2
    assert call(copied/"absent") != 0
