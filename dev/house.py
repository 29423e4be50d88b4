"""The rules that the house keeps: each check returns one line per fault, and none if all is well."""
from __future__ import annotations

import ast
import json
import re
import subprocess
from collections.abc import Iterable
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
LONGEST_FUNCTION, MOST_CELLS = 60, 80
# From the lowest to the highest: a module imports from its own package and from those before it.
PACKAGES = ("core", "metrics", "data", "tasks", "models", "pipeline", "audit", "training", "evaluate", "compress",
            "export", "benchmark", "serve", "monitor", "cli")
# Folders that exist on one machine only.
MACHINE_PATH = re.compile(r"(?<![\w.~/-])/(?:work|root|home|Users|workspace|mnt)/[\w.-]+")
Definition = ast.FunctionDef | ast.AsyncFunctionDef


def modules(root: Path = ROOT) -> dict[str, Path]:
    "List the package's modules from the notebooks: packages from the lowest to the highest, modules by their number."
    numbered = {}
    for notebook in sorted((root/"nbs").rglob("[0-9]*.ipynb"), key=lambda p: (_room(p.parent.name), p.name)):
        name = re.search(r"#\|\s*default_exp\s+([\w.]+)", notebook.read_text(encoding="utf-8"))
        if name: numbered[name[1]] = root/"cvnb"/f"{name[1].replace('.', '/')}.py"
    return numbered


def _room(package: str) -> int: return PACKAGES.index(package) if package in PACKAGES else len(PACKAGES)


def imports(
    source: str,             # Python source
    top_only: bool = False,  # only what is imported when the module is, not what a function imports
    around: str = "",        # the sub-package that the source lies in, "audit"; from it relative imports count
) -> list[str]:              # dotted names of modules, or of names in them; those inside the package begin with "cvnb."
    "List what a module of the package imports."
    found, todo = [], list(ast.parse(source).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.Import): found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, around)
            found += [f"{base}.{a.name}" for a in node.names] if base.split(".")[0] == "cvnb" else [base]
        elif top_only and (isinstance(node, Definition) or _for_types_only(node)): continue
        else: todo += ast.iter_child_nodes(node)
    return found


def _absolute(node: ast.ImportFrom, around: str) -> str:
    if not node.level: return node.module
    parents = ["cvnb", *filter(None, around.split("."))]
    return ".".join([*parents[:len(parents) - node.level + 1], *filter(None, [node.module])])


def _for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def inner(
    source: str,               # Python source
    known: Iterable[str],      # modules of the package
    top_only: bool = False,    # only what is imported when the module is
    around: str = "",          # the sub-package that the source lies in
) -> set[str]:                 # modules of the package
    "List the modules of the package that a piece of code imports."
    known, found = set(known), set()
    for name in imports(source, top_only, around):
        parts = name.split(".")[1:] if name.startswith("cvnb.") else []
        longest = [m for k in range(len(parts), 0, -1) if (m := ".".join(parts[:k])) in known]
        found |= set(longest[:1])
    return found


def unknown_imports(
    sources: dict[str, str],   # module -> source
) -> list[str]:                # faults
    "Find imports of modules that the package does not have."
    return [f"{name} imports {found}, which does not exist" for name, source in sources.items()
            for found in imports(source, around=_package(name)) if found.startswith("cvnb.")
            and not inner(f"import {found}", sources) and found.split(".")[1] not in ("__version__", "_modidx")]


def _package(module: str) -> str: return module.rpartition(".")[0]


def upward_imports(
    sources: dict[str, str],   # module -> source
) -> list[str]:                # faults
    "Find imports of a module that is in a higher package."
    found = []
    for name, source in sources.items():
        room = _room(name.split(".")[0])
        higher = [m for m in sorted(inner(source, sources, around=_package(name))) if _room(m.split(".")[0]) > room]
        found += [f"{name} imports {other}, which is in a higher package" for other in higher]
    return found


def circles(
    sources: dict[str, str],   # module -> source
) -> list[str]:                # faults
    "Find modules that import themselves through others."
    return [f"{name} imports itself through {', '.join(sorted(around))}" for name in sources
            if name in (around := closure(sources, name, first=False))]


def closure(
    sources: dict[str, str],   # module -> source
    name: str,                 # where to begin
    top_only: bool = False,    # only what is loaded together with it
    first: bool = True,        # whether the module itself counts, or only if it is imported
) -> set[str]:                 # modules of the package
    "Follow a module's imports through the package."
    seen, todo = {name} if first else set(), [name]
    while todo:
        module = todo.pop()
        new = inner(sources[module], sources, top_only, _package(module)) - seen
        seen |= new
        todo += new
    return seen


def reached(
    sources: dict[str, str],   # module -> source
    name: str,                 # where to begin
    top_only: bool = False,    # only what is loaded together with it
) -> dict[str, str]:           # package imported from outside -> module that imports it
    "Follow a module's imports through the package and list what they need from outside."
    return {found.split(".")[0]: module for module in sorted(closure(sources, name, top_only))
            for found in imports(sources[module], top_only, _package(module)) if found.split(".")[0] != "cvnb"}


def forbidden_imports(sources: dict[str, str], names: Iterable[str], forbidden: set[str]) -> list[str]:
    "Find modules that reach a package which they must do without."
    return [f"{name} reaches {package}, imported by {module}" for name in names if name in sources
            for package, module in reached(sources, name).items() if package in forbidden]


def public_names(source: str) -> set[str]:
    "List a module's functions, classes and constants without underscore; patched methods belong to their class."
    found = set()
    for node in ast.parse(source).body:
        if isinstance(node, (Definition, ast.ClassDef)):
            patched = any("patch" in ast.unparse(d) for d in node.decorator_list)
            if not patched: found.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    return {name for name in found if not name.startswith("_")}


def repeated_names(
    sources: dict[str, str],     # module -> source
) -> dict[str, list[str]]:       # name -> the modules that define it
    "Find public names that stand in more than one module."
    where: dict[str, list[str]] = {}
    for module, source in sources.items():
        for name in public_names(source): where.setdefault(name, []).append(module)
    return {name: modules for name, modules in sorted(where.items()) if len(modules) > 1}


def star_imports(source: str) -> list[str]:
    "Find `from x import *`."
    return [f"line {n.lineno}: from {n.module} import *" for n in ast.walk(ast.parse(source))
            if isinstance(n, ast.ImportFrom) and any(a.name == "*" for a in n.names)]


def undocumented(source: str) -> list[str]:
    "Find public functions and classes without docstring, and public parameters and results without annotation."
    found = []
    for node in ast.parse(source).body:
        if not isinstance(node, (Definition, ast.ClassDef)) or node.name.startswith("_"): continue
        if not ast.get_docstring(node): found.append(f"{node.name} has no docstring")
        inside = node.body if isinstance(node, ast.ClassDef) else [node]
        public = [f for f in inside if isinstance(f, Definition) and (f.name[0] != "_" or f.name == "__init__")]
        for f in public: found += _bare(f, node)
    return found


def _bare(f: Definition, owner: ast.AST) -> list[str]:
    a, name = f.args, f.name if f is owner else f"{owner.name}.{f.name}"
    params = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, [a.vararg, a.kwarg])]
    found = [f"{name}: parameter {p.arg} has no annotation" for p in params
             if not p.annotation and p.arg not in ("self", "cls")]
    return found + ([f"{name}: result has no annotation"] if not f.returns and f.name != "__init__" else [])


def packed_assignments(source: str) -> list[str]:
    "Find assignments and statements that share a line: `a, b = x, y` is for a swap, `a, b = f()` unpacks one value."
    found = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Assign) and _splits(node)]
    found += [second for first, second in _neighbours(source) if second.lineno <= first.end_lineno]
    return [f"line {n.lineno}: {ast.unparse(n)[:60]}" for n in sorted(found, key=lambda n: (n.lineno, n.col_offset))]


def _splits(node: ast.Assign) -> bool:
    "Tell whether an assignment of several values could be written as one line for each."
    several = (ast.Tuple, ast.List)
    if not isinstance(node.value, several): return False
    packed = [[ast.unparse(e) for e in t.elts] for t in node.targets if isinstance(t, several)]
    return any(not any({*names[:i]} & _read(value) for i, value in enumerate(node.value.elts)) for names in packed)


def _read(node: ast.AST) -> set[str]:
    "List the names, attributes and items that an expression reads, without the variables of its comprehensions."
    found = {ast.unparse(node)} if isinstance(node, (ast.Name, ast.Attribute, ast.Subscript)) else set()
    for child in ast.iter_child_nodes(node): found |= _read(child)
    own = [n for g in getattr(node, "generators", []) for n in ast.walk(g.target)]
    return found - {n.id for n in own if isinstance(n, ast.Name)}


def _neighbours(source: str) -> Iterable[tuple[ast.stmt, ast.stmt]]:
    "Pair each statement with the next one of its block."
    for node in ast.walk(ast.parse(source)):
        for block in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            if isinstance(block, list): yield from zip(block, block[1:])


def long_functions(source: str) -> list[str]:
    "Find functions that have too many lines."
    lengths = {n.name: n.end_lineno - n.lineno + 1 for n in ast.walk(ast.parse(source)) if isinstance(n, Definition)}
    return [f"{name} has {n} lines" for name, n in lengths.items() if n > LONGEST_FUNCTION]


def machine_paths(text: str) -> list[str]:
    "Find paths that exist on one machine only."
    return sorted(set(MACHINE_PATH.findall(text)))


def tracked(root: Path = ROOT) -> list[Path]:
    "List the files that git has or would take."
    listed = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root,
                            capture_output=True, text=True, check=True).stdout
    return [root/p for p in listed.split("\0") if p and (root/p).is_file()]


def cells(notebook: Path) -> list[dict]:
    "Read a notebook's cells, each source as one string."
    read = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [c | {"source": "".join(c["source"]), "tags": c["metadata"].get("tags", [])} for c in read]


def stage_faults(notebook: Path) -> list[str]:
    "Find faults of a stage notebook."
    read = cells(notebook)
    code = [c for c in read if c["cell_type"] == "code"]
    found = [f"cell {i} defines {n.name}" for i, c in enumerate(read) if c["cell_type"] == "code"
             for n in ast.walk(ast.parse(c["source"])) if isinstance(n, (Definition, ast.ClassDef))]
    found += [f"cell {i} exports" for i, c in enumerate(read) if re.search(r"^#\|\s*export", c["source"], re.M)]
    n = sum("parameters" in c["tags"] for c in code)
    if n != 1: found.append(f"{n} cells are tagged parameters")
    title = read[0]["source"] if read and read[0]["cell_type"] == "markdown" else ""
    if not re.match(r"# \S.*\n+> \S", title): found.append("the first cell is not `# Title` and `> one sentence`")
    if not re.search(r"^- needs: \[[\w, ]*\]$", title, re.M): found.append("the title cell has no `- needs: [...]`")
    return found


def docs_faults(notebook: Path) -> list[str]:
    """Find what nbdev stumbles over when it processes a library notebook for the documentation.

    It runs the exported cells and every cell that holds an import, and no other, and looks up the annotations of a
    public name right after the cell that defines it.
    """
    found, typed, loaded = [], set(), set()
    for i, cell in enumerate(cells(notebook)):
        skipped = re.search(r"nbdev_export\(\)|^#\|\s*eval:\s*false", cell["source"], re.M)
        if cell["cell_type"] != "code" or skipped: continue
        tree = ast.parse(cell["source"])
        imported = [n for n in ast.walk(tree) if isinstance(n, (ast.Import, ast.ImportFrom))]
        if re.search(r"^#\|\s*export", cell["source"], re.M):
            for block in filter(_for_types_only, tree.body): typed |= {_bound(a) for n in block.body for a in n.names}
            found += [f"cell {i} is annotated with {name}, imported for types only: import it in a hidden cell above"
                      for name in sorted((typed - loaded) & _annotations(tree))]
            continue
        loaded |= {_bound(a) for n in imported for a in n.names}
        if imported and len(imported) != len(tree.body): found.append(f"cell {i} mixes imports with other code")
    return found


def _annotations(tree: ast.Module) -> set[str]:
    public = [n for n in tree.body if isinstance(n, (Definition, ast.ClassDef)) and n.name[0] != "_"]
    functions = [f for n in public for f in ast.walk(n) if isinstance(f, Definition)]
    shown = [f.returns for f in functions]
    for f in functions: shown += [a.annotation for a in ast.walk(f.args) if isinstance(a, ast.arg)]
    return {n.id for a in shown if a for n in ast.walk(a) if isinstance(n, ast.Name)}


def _bound(alias: ast.alias) -> str: return alias.asname or alias.name.split(".")[0]


def sidebar(config: Path = ROOT/"_quarto.yml") -> set[str]:
    "List the pages that the site's sidebar names, relative to nbs/."
    def pages(item: object) -> Iterable[str]:
        if isinstance(item, str): yield item
        elif isinstance(item, list): yield from (p for i in item for p in pages(i))
        elif isinstance(item, dict): yield from pages([item[k] for k in ("href", "file", "contents") if k in item])
    return set(pages(yaml.safe_load(config.read_text(encoding="utf-8"))["website"]["sidebar"]["contents"]))


def sidebar_faults(named: set[str], nbs: Path = ROOT/"nbs") -> list[str]:
    "Find pages that the sidebar names and that do not exist, and pages that it does not name."
    exist = {p.relative_to(nbs).as_posix() for p in nbs.rglob("*.ipynb")
             if not any(part.startswith((".", "_")) for part in p.relative_to(nbs).parts)}
    found = {glob: {p.relative_to(nbs).as_posix() for p in nbs.glob(glob)} for glob in named}
    listed = set().union(*found.values())
    return [f"no page {g}" for g, pages in sorted(found.items()) if not pages] + \
           [f"the sidebar does not name {p}" for p in sorted(exist - listed)]
