"""The house rules: what generates what, who imports whom, and what the package brings along."""
from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from configparser import ConfigParser
from pathlib import Path

import check_export
import conftest
import house
import nbformat as nbf
import pytest
import readme
import run_tests
import schemas

from cvnb.cli.doctor import INSTALLED_PARTS
from cvnb.pipeline.params import read_contracts
from cvnb.pipeline.recipes import recipe_schema

ROOT = house.ROOT
MODULES = house.modules()
SOURCES = {name: path.read_text(encoding="utf-8") for name, path in MODULES.items() if path.exists()}
NOTEBOOKS = [p for p in house.tracked() if p.suffix == ".ipynb"]
STAGES = [p for p in NOTEBOOKS if p.parent == ROOT/"nbs"/"stages"]
PURE = [m for m in MODULES if m.split(".")[0] in ("core", "metrics", "tasks", "models", "benchmark")]
TRAINERS = {"lightning", "pytorch_lightning", "fiftyone"}
INDEX_RESULTS = [ROOT/"nbs"/"results"/"mnist5k"/name for name in ("benchmark.json", "run.json")]


def ids(path: Path) -> str: return path.relative_to(ROOT).as_posix()


def python(code: str, **env: str) -> str:
    "Run code in a fresh process and return what it prints."
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=os.environ | env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture
def project(tmp_path: Path) -> Path:
    "A copy of what the notebooks and the package are made from."
    for file in house.tracked():
        target = tmp_path/file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        if file.suffix in (".ipynb", ".py", ".ini", ".toml", ".yml", ".yaml", ".in", ".md") or file.name == "LICENSE":
            shutil.copy2(file, target)
    return tmp_path


# What is generated


def test_package_matches_notebooks() -> None:
    assert check_export.differences() == []


def test_difference_from_notebooks_is_found(project: Path) -> None:
    files = project/"cvnb/core/files.py"
    files.write_text(files.read_text() + "\nPLANTED = 1\n")
    for name in "audit.py", "core/stray.py": (project/"cvnb"/name).write_text("")   # audit.py: beside the package audit
    found = check_export.differences(project)
    assert [f.split(" ")[0] for f in found] == ["cvnb/audit.py", "cvnb/core/stray.py", "cvnb/core/files.py"]
    assert "comes from no notebook" in found[0] and "PLANTED" in found[2]


def test_init_holds_the_version_and_applies_the_switches() -> None:
    "No notebook generates the file."
    version, *rest, last = map(ast.unparse, ast.parse((ROOT/"cvnb/__init__.py").read_text()).body)
    assert re.fullmatch(r"__version__ = '[\d.]+'", version)
    assert rest == ["from .core.telemetry import disable_telemetry as _disable_telemetry", "_disable_telemetry()"]
    assert last.startswith("def __getattr__(name: str)") and "from .export.bundle import Bundle" in last


def test_readme_matches_index() -> None:
    assert (ROOT/"README.md").read_text(encoding="utf-8") == readme.render(ROOT/"nbs"/"index.ipynb")


def test_readme_links_exist() -> None:
    links = re.findall(r"\]\((?!\w+:|#)([^)\s]+)\)", (ROOT/"README.md").read_text(encoding="utf-8"))
    assert links and [p for p in links if not (ROOT/p).exists()] == []


def test_readme_links_are_relative_to_the_readme() -> None:
    page = "![a](images/a.png) [b](../LICENSE) [c](https://x.org/y) [d](#e)"
    assert readme.relink(page, "nbs") == "![a](nbs/images/a.png) [b](LICENSE) [c](https://x.org/y) [d](#e)"


def test_readme_table_is_that_of_the_run() -> None:
    rows = json.loads(INDEX_RESULTS[0].read_text())["rows"]
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    for row in rows: assert f"| {row['model']} | {row['runtime']} | {row['accuracy']:.2%} " in text


def test_clean_keeps_the_parameters_tag(project: Path) -> None:
    tagged = {p: [c["tags"] for c in house.cells(p)] for p in (project/"nbs"/"stages").glob("*.ipynb")}
    assert tagged and all(["parameters"] in tags for tags in tagged.values())
    clean = "from nbdev.clean import nbdev_clean; nbdev_clean()"
    subprocess.run([sys.executable, "-c", clean], cwd=project, check=True)
    assert tagged == {p: [c["tags"] for c in house.cells(p)] for p in tagged}


# Documentation


PAGES = ["index.ipynb", "core/01_errors.ipynb", "stages/train.ipynb", "tutorials/distributed.ipynb"]


@pytest.mark.slow
def test_one_page_of_each_kind_is_processed(project: Path) -> None:
    for page in (project/"nbs").rglob("*.ipynb"):
        if page.relative_to(project/"nbs").as_posix() not in PAGES: page.unlink()
    code = "from nbdev.serve import proc_nbs\nif __name__ == '__main__': proc_nbs(n_workers=0)"
    (project/"proc.py").write_text(code)
    env = os.environ | {"PYTHONPATH": str(project)}
    done = subprocess.run([sys.executable, "proc.py"], cwd=project, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    processed = {p.relative_to(project/"_proc").as_posix() for p in (project/"_proc").rglob("*.ipynb")}
    assert processed == set(PAGES)
    assert (project/"_proc"/"_quarto.yml").read_text() == (ROOT/"_quarto.yml").read_text()
    for page in processed: assert house.cells(project/"_proc"/page)[0]["source"].startswith("---\n"), page
    errors = "".join(c["source"] for c in house.cells(project/"_proc/core/01_errors.ipynb"))
    assert "show_doc(CvnbError)" in errors and "class CvnbError" not in errors
    cells = house.cells(project/"_proc/stages/train.ipynb")
    train = "\n".join(c["source"] for c in cells if c["cell_type"] == "markdown")
    assert "name | type | default | values | meaning" in train and "`epochs` | `int` |" in train


def test_sidebar_names_every_page() -> None:
    assert house.sidebar_faults(house.sidebar()) == []


def test_sidebar_faults_are_found() -> None:
    found = house.sidebar_faults((house.sidebar() - {"tasks/*.ipynb"}) | {"no_such/*.ipynb"})
    assert found == ["no page no_such/*.ipynb", "the sidebar does not name tasks/01_labels.ipynb"]


def test_nbs_links_to_the_one_quarto_file() -> None:
    link = ROOT/"nbs"/"_quarto.yml"
    assert link.is_symlink() and os.readlink(link) == "../_quarto.yml"


def test_the_recipe_schema_is_that_of_the_notebooks() -> None:
    written = json.loads((ROOT/"configs/recipe.schema.json").read_text(encoding="utf-8"))
    assert written == recipe_schema(read_contracts()), "write it anew: cvnb params --json > configs/recipe.schema.json"
    for recipe in (ROOT/"configs").glob("*.yaml"):
        first = recipe.read_text(encoding="utf-8").partition("\n")[0]
        assert first == "# yaml-language-server: $schema=recipe.schema.json", recipe


def test_published_schemas_are_those_of_the_formats() -> None:
    files = schemas.schema_files()
    assert sorted(files) == sorted((ROOT/"configs/schemas").iterdir()), "write them anew: python dev/schemas.py"
    for path, text in files.items():
        assert path.read_text(encoding="utf-8") == text, f"write {path.name} anew: python dev/schemas.py"


# Notebooks


def test_every_room_of_the_design_is_there() -> None:
    rooms = {m.split(".")[0] for m in MODULES}
    assert rooms == set(house.PACKAGES) - {"monitor"}
    assert {p.name for p in (ROOT/"cvnb").iterdir() if (p/"__init__.py").exists()} == rooms
    assert {p.stem for p in STAGES} == {"audit", "train", "errors", "compress", "export", "benchmark"}


def test_each_notebook_lies_in_the_folder_of_its_package() -> None:
    module = lambda p: ROOT/"cvnb"/p.parent.name/f"{p.stem.partition('_')[2]}.py"
    assert [ids(p) for p in NOTEBOOKS if p.name[0].isdigit() and not module(p).exists()] == []


@pytest.mark.parametrize("notebook", [p for p in NOTEBOOKS if p.name[0].isdigit()], ids=ids)
def test_library_notebook_can_be_documented(notebook: Path) -> None:
    assert house.docs_faults(notebook) == []


def test_docs_faults_are_found(tmp_path: Path) -> None:
    sources = ["#| export\nif TYPE_CHECKING:\n    import numpy as np\n    import pandas as pd", "import numpy as np",
               "import os\nx = 1", "#| export\ndef f(a: np.ndarray) -> list[pd.DataFrame]: pass", "import pandas as pd"]
    cells = [dict(cell_type="code", metadata={}, source=s) for s in sources]
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=cells)))
    mixed, typed = house.docs_faults(tmp_path/"a.ipynb")
    assert mixed == "cell 2 mixes imports with other code" and typed.startswith("cell 3 is annotated with pd, ")


@pytest.mark.parametrize("notebook", STAGES, ids=ids)
def test_stage_notebook_keeps_the_rules(notebook: Path) -> None:
    assert house.stage_faults(notebook) == []


@pytest.mark.parametrize("title, tags, code, fault", [
    ("# A\n\n> B.\n\n- needs: []", ["parameters"], "x: int = 1", None),
    ("# A\n\n> B.", ["parameters"], "x: int = 1", "no `- needs: [...]`"),
    ("A", ["parameters"], "x: int = 1", "first cell is not"),
    ("# A\n\n> B.\n\n- needs: []", [], "x: int = 1", "0 cells are tagged"),
    ("# A\n\n> B.\n\n- needs: []", ["parameters"], "def f(): pass", "cell 1 defines f"),
    ("# A\n\n> B.\n\n- needs: []", ["parameters"], "#| export\nx = 1", "cell 1 exports"),
])
def test_stage_faults_are_found(title: str, tags: list[str], code: str, fault: str | None, tmp_path: Path) -> None:
    cells = [dict(cell_type="markdown", metadata={}, source=title),
             dict(cell_type="code", metadata=dict(tags=tags), source=code)]
    (tmp_path/"a.ipynb").write_text(json.dumps(dict(cells=cells)))
    found = house.stage_faults(tmp_path/"a.ipynb")
    assert (fault in "; ".join(found)) if fault else found == []


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=ids)
def test_notebook_is_short_and_light(notebook: Path) -> None:
    assert len(house.cells(notebook)) <= house.MOST_CELLS
    images = re.findall(r'"image/\w+": (?:"([^"]*)"|\[([^\]]*)\])', notebook.read_text(encoding="utf-8"))
    assert all(len("".join(i)) < 200_000 for i in images), "an output holds an image of more than about 100 kB"


# Code


@pytest.mark.parametrize("bad,said", [
    ("1 / 0", "ZeroDivisionError: division by zero"),
    ("import os; os._exit(3)", "terminated abruptly"),
])
def test_failed_notebook_is_named(tmp_path: Path, bad: str, said: str) -> None:
    for name, code in dict(good="1 + 1", bad=bad).items():
        nbf.write(nbf.v4.new_notebook(cells=[nbf.v4.new_code_cell(code)]), tmp_path/f"{name}.ipynb")
    def run(*names: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT/"dev/run_notebooks.py", *(tmp_path/f"{n}.ipynb" for n in names)]
        return subprocess.run(command, capture_output=True, text=True)

    assert run("good", "good").returncode == 0
    done = run("good", "bad")
    (line,) = [n for n in run_tests.FAILED_NOTEBOOK.findall(done.stdout) if "bad.ipynb" in n]
    assert done.returncode == 1 and said in line


def test_slow_tests_run_apart_unless_they_share_a_fixture_of_their_file(tmp_path: Path) -> None:
    (tmp_path/"test_x.py").write_text("""import pytest
@pytest.fixture(scope="module")
def shared(): pass
@pytest.fixture
def own(): pass
@pytest.mark.slow
def test_alone(own): pass
@pytest.mark.slow
def test_sharing(shared): pass
def test_quick(): pass
""")
    assert conftest.find_independent_slow_tests(tmp_path) == {f"{tmp_path.name}/test_x.py::test_alone"}
    found = conftest.find_independent_slow_tests(ROOT/"tests")
    assert "tests/pipeline/test_kill.py::test_training_and_bundle_survive_kills" in found


def test_failed_test_is_named(tmp_path: Path) -> None:
    (tmp_path/"test_x.py").write_text("def test_good(): pass\ndef test_bad(): assert 1 == 2\n")
    for color in "yes", "no":
        command = [sys.executable, "-m", "pytest", tmp_path, "-ra", "-p", "no:cacheprovider", f"--color={color}"]
        (line,) = run_tests.FAILED_TEST.findall(subprocess.run(command, capture_output=True, text=True).stdout)
        assert "test_bad" in line


def test_imports_run_down_the_packages_without_a_circle() -> None:
    assert house.upward_imports(SOURCES) + house.circles(SOURCES) + house.unknown_imports(SOURCES) == []


def test_import_faults_are_found() -> None:
    planted = {"core.files": "def f():\n    from cvnb.data import tables", "core.errors": "import cvnb.core.system",
               "core.system": "from .stage import now", "core.stage": "from . import errors\nfrom .gone import f",
               "data.tables": "from ..core.files import f\nimport cvnb"}
    assert house.upward_imports(planted) == ["core.files imports data.tables, which is in a higher package"]
    assert {f.split(" ")[0] for f in house.circles(planted)} == set(planted)
    assert house.unknown_imports(planted) == ["core.stage imports cvnb.core.gone.f, which does not exist"]
    del planted["core.files"]
    assert house.circles(planted)[0].startswith("core.errors imports itself through core.")


def test_no_public_name_stands_in_two_modules() -> None:
    assert house.repeated_names(SOURCES) == {}


def test_repeated_public_name_is_found() -> None:
    planted = {"core.a": "def f(): pass\n_g = 1", "data.b": "f = 1\n_g = 2",
               "data.c": "@patch\ndef f(self: A): pass\ndef h(): pass"}
    assert house.repeated_names(planted) == {"f": ["core.a", "data.b"]}


def test_pure_modules_reach_no_trainer() -> None:
    assert house.forbidden_imports(SOURCES, PURE, TRAINERS) == []


def test_reached_trainer_is_found() -> None:
    planted = {"data.tables": "def f(): import fiftyone as fo", "models.weights": "from ..data.tables import f"}
    found = house.forbidden_imports(planted, ["models.weights"], TRAINERS)
    assert found == ["models.weights reaches fiftyone, imported by data.tables"]


@pytest.mark.slow
def test_pure_modules_import_no_trainer() -> None:
    names = ", ".join(f"cvnb.{name}" for name in PURE)
    assert python(f"import sys, {names}; print({TRAINERS} & sys.modules.keys())") == "set()\n"


def test_light_packages_import_base_requirements_only() -> None:
    config = ConfigParser(delimiters=["="])
    config.read(ROOT/"settings.ini", encoding="utf-8")
    base = {re.match(r"[\w-]+", r)[0] for r in config["DEFAULT"]["requirements"].split()}
    named = {"PIL": "pillow", "yaml": "pyyaml"}
    light = ("core", "data", "pipeline", "export", "benchmark", "cli")
    for module in [m for m in SOURCES if m.split(".")[0] in light and m != "pipeline.kernels"]:
        outside = house.reached(SOURCES, module, top_only=True)
        missing = {p: m for p, m in outside.items() if p not in sys.stdlib_module_names and named.get(p, p) not in base}
        assert missing == {}, f"cvnb.{module} needs packages outside `requirements` to be imported"


def test_doctor_knows_every_imported_package() -> None:
    known = {module for modules, _ in INSTALLED_PARTS.values() for module in modules.split()}
    # These come with dependencies.
    known |= {"pymongo", "hypercorn", "starlette", "threadpoolctl", "IPython", "zmq", "jupyter_client", "click"}
    known |= {"huggingface_hub", "jupyter_server", "tornado"}
    known |= {"cvnb", "openvino", "nncf", "ai_edge_litert"} | set(sys.stdlib_module_names)   # used where installed
    for module, source in SOURCES.items():
        unknown = {found.split(".")[0] for found in house.imports(source, around=module.rpartition(".")[0])} - known
        assert not unknown, f"cvnb.{module}: `cvnb doctor` does not know {unknown}, nor which extra brings it"


def test_help_imports_no_torch() -> None:
    code = """import sys
import cvnb
assert len(cvnb.__version__.split(".")) == 3
sys.argv = ["cvnb", "--help"]
from cvnb.cli.app import main
try: main()
except SystemExit as e: assert not e.code, e.code
print({"torch", "pandas", "fiftyone", "pytorch_lightning"} & sys.modules.keys())"""
    assert python(code).endswith("set()\n")


@pytest.mark.parametrize("name", SOURCES)
def test_code_is_documented_and_functions_are_short(name: str) -> None:
    source = SOURCES[name]
    faults = house.undocumented(source) + house.long_functions(source) + house.star_imports(source)
    assert faults + house.packed_assignments(source) == []


def test_code_faults_are_found() -> None:
    planted = "class A:\n    'A.'\n    def f(self, a, *, b: int): pass\ndef g() -> None: pass\ndef _h(x): pass"
    assert house.undocumented(planted) == [
        "A.f: parameter a has no annotation", "A.f: result has no annotation", "g has no docstring"]
    assert house.long_functions("def f():\n" + "    1\n" * 60) == ["f has 61 lines"]
    assert house.star_imports("from os import *") == ["line 1: from os import *"]


@pytest.mark.parametrize("line", [
    "g, h = 1, a", "self.x, self.y = 1, 2", "a, b = [a for a in x], 1", "n, total = 0, total + 1",
    "now, (x, y) = f(), g()", "a[0], a[1] = 1, 2", "n += 1; continue"])
def test_assignments_that_share_a_line_are_found(line: str) -> None:
    found = house.packed_assignments(f"for i in j:\n    {line}")
    assert len(found) == 1 and found[0].startswith("line 2: ")


@pytest.mark.parametrize("line", [
    "a, b = b, a", "now.n, before = m, now.n", "x[0], x[1] = x[1], x[0]", "c, d = f()", "a = b = 0", "if a: b = 1",
    "try: a = 1\nexcept: b = 2"])
def test_swaps_and_unpackings_are_no_faults(line: str) -> None:
    assert house.packed_assignments(line) == []


# Files


def test_no_machine_paths() -> None:
    found = {ids(p): house.machine_paths(p.read_text(encoding="utf-8", errors="replace")) for p in house.tracked()}
    assert {p: paths for p, paths in found.items() if paths} == {}


def test_machine_path_is_found() -> None:
    planted = "".join(["at ", "/ro", "ot/project/x.py, see https://x.org", "/ho", "me/page and ~", "/wo", "rk/a"])
    assert house.machine_paths(planted) == ["/ro" + "ot/project"]


def test_lock_names_no_index() -> None:
    lock = (ROOT/"requirements.lock").read_text()
    assert "://" not in lock and "--index" not in lock
    packages = re.findall(r"^[\w.-]+==.*$", lock, re.M)
    assert len(packages) > 250 and len(packages) == len(re.findall(r"^[\w.-]+==.*\\\n    --hash=sha256:", lock, re.M))


# The wheel


@pytest.fixture
def contents(wheel: Path) -> zipfile.ZipFile:
    "What the wheel holds."
    return zipfile.ZipFile(wheel)


def test_wheel_holds_stages_recipes_rules_templates_and_dashboards(contents: zipfile.ZipFile) -> None:
    brought = {n.removeprefix("cvnb/_project/") for n in contents.namelist() if n.startswith("cvnb/_project/")}
    globs = dict(stages="nbs/stages/*.ipynb", configs="configs/*.*", rules="configs/rules/*.yaml",
                 serving="configs/serving/*", converters="configs/converters/*", dashboards="dashboards/*.*")
    wanted = {f"{kind}/{p.name}" for kind, glob in globs.items() for p in ROOT.glob(glob)}
    assert {f"stages/{p.name}" for p in STAGES} | {"configs/recipe.schema.json"} <= brought == wanted
    assert {"configs/mnist5k.yaml", "rules/verdict.yaml", "dashboards/errors.ipynb", "dashboards/errors.js"} <= brought


def test_wheel_holds_package_only(contents: zipfile.ZipFile) -> None:
    brought = ("cvnb/_project/serving/", "cvnb/_project/converters/")
    modules = {n for n in contents.namelist() if n.endswith(".py") and not n.startswith(brought)}
    assert modules == {f"cvnb/{p.relative_to(ROOT/'cvnb').as_posix()}" for p in (ROOT/"cvnb").rglob("*.py")}
    assert "cvnb/audit/duplicates.py" in modules


def test_wheel_names_extras_requirements_and_entry_points(contents: zipfile.ZipFile) -> None:
    text = lambda name: contents.read(next(n for n in contents.namelist() if n.endswith(f".dist-info/{name}"))).decode()
    metadata = text("METADATA")
    extras = set(re.findall(r"^Provides-Extra: (\w+)$", metadata, re.M))
    assert extras == {"train", "audit", "notebooks", "serve", "grpc", "sign", "sweep", "hf", "heif", "ray", "all",
                      "dev"}
    base = re.findall(r"^Requires-Dist: ([\w-]+)[^;\n]*$", metadata, re.M)
    assert "onnxruntime" in base and not {"torch", "fiftyone", "pandas"} & set(base)
    assert "Requires-Python: >=3.11" in metadata and "make test" in metadata
    entries = text("entry_points.txt")
    for entry in "cvnb = cvnb.cli.app:main", "cvnb = cvnb._modidx:d", "cvnb = cvnb.pipeline.kernels:ForkEngine":
        assert entry in entries
