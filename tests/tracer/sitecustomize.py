"""Python reads this at its start where PYTHONPATH names this folder: note which functions of cvnb a stage calls."""
import atexit
import json
import os
import sys
import threading

_package, _out = os.environ.get("CVNB_TRACED", ""), os.environ.get("CVNB_TRACE", "")
_seen = set()


def _look(frame, event, arg):
    code = frame.f_code
    if event == "call" and code.co_filename.startswith(_package): _seen.add((os.path.basename(code.co_filename)[:-3], code.co_qualname))


def _leave():
    stage = os.path.basename(os.path.dirname(os.environ.get("CVNB_PROGRESS", "none/x")))
    with open(os.path.join(_out, f"{stage}-{os.getpid()}.json"), "w") as f: json.dump(sorted(_seen), f)


def _start():
    atexit.register(_leave)
    sys.setprofile(_look)
    threading.setprofile(_look)


_argv = " ".join(sys.orig_argv)
if _package and _out and "serve_forks" in _argv: os.register_at_fork(after_in_child=_start)   # what the server imports is no stage's call
elif _package and _out and "CVNB_PROGRESS" in os.environ and "keep_database" not in _argv: _start()   # the database's keeper belongs to no stage
