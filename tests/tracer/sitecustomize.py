"""Python reads this at its start where PYTHONPATH names this folder: note which functions of cvnb a stage calls.

Every function and method of cvnb gets a first statement that notes its name. A profiler, which is called for each call
of every library, would make a stage take several times as long. The changed code is not written to disk.
"""
import ast
import atexit
import builtins
import json
import os
import sys
from importlib.machinery import SourceFileLoader

_package, _out = os.environ.get("CVNB_TRACED", ""), os.environ.get("CVNB_TRACE", "")
_seen, _code = set(), SourceFileLoader.get_code


def _mark(body, module, outer=""):
    for node in body:
        if isinstance(node, ast.ClassDef): _mark(node.body, module, f"{outer}{node.name}.")
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
        at = int(ast.get_docstring(node, clean=False) is not None)
        note = ast.parse(f"__cvnb_seen__(({module!r}, {outer + node.name!r}))").body[0]
        for part in ast.walk(note):   # line numbers stay
            ast.copy_location(part, node.body[min(at, len(node.body) - 1)])
        node.body.insert(at, note)


def _marked(loader, name):
    path = loader.get_filename(name)
    if not path.startswith(_package): return _code(loader, name)
    tree = ast.parse(loader.get_data(path))
    module = os.path.relpath(path, _package)[:-3].replace(os.sep, ".")   # audit.duplicates
    _mark(tree.body, module.removesuffix(".__init__"))
    return compile(tree, path, "exec", dont_inherit=True)


def _leave():
    stage = os.path.basename(os.path.dirname(os.environ.get("CVNB_PROGRESS", "none/x")))
    with open(os.path.join(_out, f"{stage}-{os.getpid()}.json"), "w") as f: json.dump(sorted(_seen), f)


def _start():
    _seen.clear()   # what the server imported is no stage's call
    atexit.register(_leave)


_argv = " ".join(sys.orig_argv)
_server = "serve_forks" in _argv
_stage = "CVNB_PROGRESS" in os.environ and "keep_database" not in _argv   # the database's keeper belongs to no stage
if _package and _out and (_server or _stage):
    builtins.__cvnb_seen__, SourceFileLoader.get_code = _seen.add, _marked
    if _server: os.register_at_fork(after_in_child=_start)
    else: _start()
