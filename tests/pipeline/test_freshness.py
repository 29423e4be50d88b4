"""Freshness: each of hundreds of changes makes exactly the stages stale that depend on it."""
from __future__ import annotations

import ast
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import house
import pytest

import cvnb
from cvnb.core.files import read_json
from cvnb.data.dataset import locate_data, read_dataset
from cvnb.pipeline import freshness
from cvnb.pipeline.freshness import key_parts
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.runner import read_run_parameters, stage_states

STAGES = ["audit", "train", "errors", "compress", "export", "benchmark"]
LIBRARY = [m for m in house.modules() if m.split(".")[0] not in ("pipeline", "cli") or m == "pipeline.params"]


def file_of(module: str) -> str: return f"cvnb/{module.replace('.', '/')}.py"


class Copy:
    "A run and copies of all that it depends on, to change one thing at a time."
    def __init__(self, folder: Path, run: Path, root: Path):
        self.root, self.run = folder, Path(shutil.copytree(run, folder/"runs/smoke"))
        shutil.copytree(root/"nbs/stages", folder/"nbs/stages")
        shutil.copytree(root/"cvnb", folder/"cvnb", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(root/"requirements.lock", folder)
        self.data = Path(shutil.copytree(locate_data("digits"), folder/"data"))

    def states(self) -> dict[str, str]:
        return {r["stage"]: r["state"] for r in stage_states(self.run, read_run_parameters(self.run), self.root)}

    def stale(self) -> set[str]: return {s for s, state in self.states().items() if state == "stale"}

    def reasons(self, stage: str) -> list[str]:
        rows = stage_states(self.run, read_run_parameters(self.run), self.root)
        return next(r["reasons"] for r in rows if r["stage"] == stage)

    def after(self, path: Path | list[Path], change: Callable[[str], str]) -> set[str]:
        "List the stages that are stale after a change to text files, and revert the change."
        before = {p: p.read_text(encoding="utf-8") for p in ([path] if isinstance(path, Path) else path)}
        for p, text in before.items():
            assert (after := change(text)) != text, p
            p.write_text(after, encoding="utf-8")
        try: return self.stale()
        finally:
            for p, text in before.items(): p.write_text(text, encoding="utf-8")

    def cells(self, stage: str, kind: str, tag: str | None = None) -> list[int]:
        "List the indices of cells of a kind: the parameters cell if a tag is given, or all others."
        cells = read_json(self.root/f"nbs/stages/{stage}.ipynb")["cells"]
        tagged = lambda c: "parameters" in c["metadata"].get("tags", [])
        return [i for i, c in enumerate(cells) if c["cell_type"] == kind and tagged(c) == (tag is not None)]

    def after_cell(self, stage: str, number: int | list[int], change: Callable[[dict], None]) -> set[str]:
        "List the stages that are stale after a change to one or more cells, and revert the change."
        def edit(text: str) -> str:
            notebook = json.loads(text)
            for i in [number] if isinstance(number, int) else number: change(notebook["cells"][i])
            return json.dumps(notebook, indent=1)
        return self.after(self.root/f"nbs/stages/{stage}.ipynb", edit)


@pytest.fixture(scope="module")
def copy(tmp_path_factory, traced_run, root) -> Iterator[Copy]:
    made = Copy(tmp_path_factory.mktemp("keys"), traced_run[0], root)
    patch = pytest.MonkeyPatch()
    patch.chdir(made.root)
    patch.setattr(cvnb, "__file__", str(made.root/"cvnb/__init__.py"))
    patch.setattr(freshness, "open_dataset", lambda *args: read_dataset(made.data))
    yield made
    patch.undo()


def add(text: str) -> Callable[[dict], None]:
    "Add text to a cell."
    return lambda cell: cell.update(source="".join(cell["source"]) + text)


def test_unchanged_run_is_fresh(copy): assert copy.states() == dict.fromkeys(STAGES, "fresh")


def test_prose_outputs_and_comments_make_no_stage_stale(copy):
    "Change all cells of a stage at once."
    output = dict(outputs=[dict(output_type="stream", name="stdout", text="x")], execution_count=7)
    for stage in STAGES:
        prose, code = copy.cells(stage, "markdown"), copy.cells(stage, "code")
        assert len(prose) > 3 and copy.after_cell(stage, prose, add("\nMore prose.")) == set()
        assert len(code) > 5 and copy.after_cell(stage, code, add("   # a comment\n\n# another")) == set()
        assert copy.after_cell(stage, code, lambda cell: cell.update(output)) == set()


def test_changed_code_makes_its_stage_stale(copy):
    for stage in STAGES:
        for i in copy.cells(stage, "code"): assert copy.after_cell(stage, i, add("\nmutant = 1")) == {stage}
        magic = add("\n%time 1")   # no longer plain Python
        assert copy.after_cell(stage, copy.cells(stage, "code")[-1], magic) == {stage}


def test_changed_default_makes_its_stage_stale(copy):
    n = 0
    for stage, contract in read_contracts().items():
        (cell,) = copy.cells(stage, "code", "parameters")
        for p in contract.params:
            if p.name in ("run", "data") or isinstance(p.default, (str, Path)): continue
            if isinstance(p.default, bool): new = not p.default
            elif isinstance(p.default, float): new = (p.default or 1) * 0.5
            elif isinstance(p.default, list): new = p.default[1:] if p.default else ["x"]
            else: new = p.default + 1
            before, after = f"{p.name}: {p.type_name} = ", f"{p.name}: {p.type_name} = {new!r}   # "
            change = lambda c, a=before, b=after: c.update(source="".join(c["source"]).replace(a, b, 1))
            assert copy.after_cell(stage, cell, change) == {stage}, p
            n += 1
        assert copy.after_cell(stage, cell, add("\n# a comment")) == set()
    assert n > 20


def test_content_of_named_file_is_part_of_the_key(tmp_path, root):
    contract, file = read_contracts()["audit"], tmp_path/"mine.csv"
    parts = lambda: key_parts(contract, contract.defaults() | dict(corrections=file), root)
    file.write_text("path,pixel_sha256,was,action,label\n")
    first = parts()
    os.utime(file, (1, 1))
    assert parts() == first != key_parts(contract, contract.defaults(), root)
    file.write_text("path,pixel_sha256,was,action,label\n\n")
    assert [k for k, v in parts().items() if v != first[k]] == ["files"]


def test_image_bytes_and_paths_matter_and_times_do_not(copy):
    some = random.Random(0).sample(sorted(copy.data.rglob("*.png")), 6)
    for path in some:
        before, stat = path.read_bytes(), path.stat()
        path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        assert copy.stale() == {"audit"}
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))   # the same size and time as before
        assert copy.stale() == {"audit"} and copy.reasons("audit") == ["the data changed"]
        path.write_bytes(before)
        os.utime(path, (1, 1))
        assert copy.stale() == set()
    moved = some[0].with_name("moved.png")
    some[0].rename(moved)
    assert copy.stale() == {"audit"}
    moved.rename(some[0])
    extra = Path(shutil.copy(some[0], some[0].with_name("extra.png")))
    assert copy.stale() == {"audit"}
    extra.unlink()
    assert copy.states() == dict.fromkeys(STAGES, "fresh")


def test_changed_output_makes_its_stage_stale(copy):
    for stage in STAGES:
        record = read_json(copy.run/stage/"stage.json")
        for out in sorted(record["outputs"])[:4]:
            path = copy.run/record["outputs"][out]["path"]
            before = path.read_bytes()
            path.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
            assert copy.stale() == {stage} and f"output {out} is missing or was changed" in copy.reasons(stage)
            path.write_bytes(before)
            os.utime(path, (1, 1))
            assert copy.stale() == set()


def test_changed_lock_makes_every_stage_stale(copy):
    assert copy.after(copy.root/"requirements.lock", lambda text: text + "\n# x") == set(STAGES)


def test_stages_wait_for_a_stale_stage(copy):
    path = copy.run/"train/predictions.parquet"
    hidden = path.rename(path.with_suffix(".hidden"))
    states = copy.states()
    hidden.rename(path)
    waiting = dict.fromkeys(("errors", "compress", "export", "benchmark"), "waits")
    assert states == dict(audit="fresh", train="stale", **waiting)


# Functions: a change of a function that a traced run called must be noticed, a change outside of a stage's modules not.

def functions(module: Path) -> dict[str, str]:
    "List the functions and methods of a module: qualified name -> the symbol that a stage depends on."
    found = {}
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef):
            patched = any(ast.unparse(d).split("(")[0] == "patch" for d in node.decorator_list)
            found[node.name] = ast.unparse(node.args.args[0].annotation) if patched else node.name
        elif isinstance(node, ast.ClassDef):
            methods = [f for f in node.body if isinstance(f, ast.FunctionDef)]
            found |= {f"{node.name}.{f.name}": node.name for f in methods}
    return found


def mutated(name: str) -> Callable[[str], str]:
    "Make a change that adds a statement to a function and drops layout and comments."
    def change(text: str) -> str:
        tree = ast.parse(text)
        *owner, last = name.split(".")
        body = tree.body
        if owner: body = next(n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == owner[0]).body
        function = next(n for n in body if isinstance(n, ast.FunctionDef) and n.name == last)
        function.body.append(ast.parse("mutant = 1").body[0])
        return ast.unparse(tree)
    return change


def test_layout_of_modules_makes_no_stage_stale(copy):
    files = [copy.root/file_of(module) for module in LIBRARY]
    assert copy.after(files, lambda text: ast.unparse(ast.parse(text))) == set()


def test_changed_function_makes_only_stages_stale_that_reach_it(copy, traced_run):
    called, sources = traced_run[1], {m: path.read_text() for m, path in house.modules().items()}
    modules = {}
    for s in STAGES:
        cells = [c for c in house.cells(copy.root/f"nbs/stages/{s}.ipynb") if c["cell_type"] == "code"]
        imported = house.inner("\n".join(c["source"] for c in cells), sources)
        modules[s] = set().union(*(house.closure(sources, m) for m in imported))
    everything = [(m, name) for m in LIBRARY for name in functions(copy.root/file_of(m))]
    ran = [(m, f) for m, f in everything if any((m, f) in called[s] for s in STAGES)]
    tried = random.Random(1).sample(ran, 40) + random.Random(2).sample(everything, 40)
    spared = Counter()
    for module, name in tried:
        stale = copy.after(copy.root/file_of(module), mutated(name))
        need, may = {s for s in STAGES if (module, name) in called[s]}, {s for s in STAGES if module in modules[s]}
        assert need <= stale <= may, (module, name, need, stale, may)
        spared.update(by_function=len(may - stale), by_module=len(may), called=len(need))
    by_function = spared["by_module"] - spared["by_function"]
    print(f"{len(tried)} functions: {spared['by_module']} stages by module, {by_function} by function, "
          f"{spared['called']} that called them")
    assert spared["by_function"] > 0


def test_function_three_imports_away_makes_stage_stale(copy):
    # benchmark.report → export.runtimes → data.images → core.files
    assert "benchmark" in copy.after(copy.root/"cvnb/core/files.py", mutated("write_json"))
    assert copy.reasons("benchmark") == []


def test_key_holds_every_called_function(copy, traced_run):
    known = {m: functions(copy.root/file_of(m)) for m in LIBRARY}
    for stage in STAGES:
        parts = read_json(copy.run/stage/"stage.json")["environment"]["parts"]["functions"]
        called = {f"{m}.{known[m][f]}" for m, f in traced_run[1][stage] if m in known and f in known[m]}
        missing = {name for name in called - parts.keys() if not name.startswith("core.telemetry.")}   # sets switches
        assert not missing, (stage, missing)
