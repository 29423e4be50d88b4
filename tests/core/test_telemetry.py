"""Importing cvnb turns off what other packages report, wherever cvnb is imported."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cvnb.core.telemetry import TELEMETRY_SWITCHES

SET = f"import os; print(*sorted(k for k in os.environ if k in {list(TELEMETRY_SWITCHES)}))"


def python(code: str, home: Path, **variables: str) -> subprocess.CompletedProcess:
    "Run code in a process of a user who has set nothing else."
    env = {k: v for k, v in os.environ.items() if k not in TELEMETRY_SWITCHES and k not in ("CI", "PYTEST_VERSION")}
    env |= dict(HOME=str(home)) | variables
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def test_any_module_of_cvnb_sets_every_switch_for_child_processes(tmp_path: Path) -> None:
    code = f"import subprocess, sys; from cvnb.core import files; subprocess.run([sys.executable, '-c', {SET!r}])"
    assert python(code, tmp_path).stdout.split() == sorted(TELEMETRY_SWITCHES)


def test_what_the_user_has_set_stays(tmp_path: Path) -> None:
    code = "import os, cvnb; print(os.environ['ORT_DISABLE_TELEMETRY'], os.environ['RAY_USAGE_STATS_ENABLED'])"
    assert python(code, tmp_path, ORT_DISABLE_TELEMETRY="0", RAY_USAGE_STATS_ENABLED="1").stdout == "0 1\n"


def test_openvino_reports_only_for_a_user_who_has_agreed(tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    code = "import sys, cvnb, openvino; print(openvino.tools.ovc.telemetry_utils.tm.__name__)"
    assert python(code, tmp_path).stdout == "openvino.tools.ovc.telemetry_stub\n" and [*tmp_path.iterdir()] == []
    (tmp_path/"intel").mkdir()
    (tmp_path/"intel/openvino_telemetry").write_text("1")
    # The import of OpenVINO itself would report.
    code = "import sys, cvnb; print('openvino_telemetry' in sys.modules)"
    assert python(code, tmp_path).stdout == "False\n"


@pytest.mark.parametrize("set_before, n", [({}, 1), (dict(ORT_DISABLE_TELEMETRY="1"), 0)])
def test_a_runtime_that_came_first_is_reported_once(tmp_path: Path, set_before: dict[str, str], n: int) -> None:
    code = """import sys, types
sys.modules["onnxruntime"] = types.ModuleType("onnxruntime")
import cvnb.core.files, cvnb.core.errors"""
    assert python(code, tmp_path, **set_before).stderr.count("onnxruntime came before cvnb") == n


def test_forked_kernels_say_nothing_and_have_every_switch(tmp_path: Path) -> None:
    "They import cvnb again, after onnxruntime."
    code = f"""
import asyncio, cvnb
from cvnb.pipeline.kernels import ForkKernelManager, start_fork_server
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook
start_fork_server({{"onnxruntime"}})
code = {SET!r}
cells = [new_code_cell(f"import sys\\nassert 'onnxruntime' in sys.modules\\nimport cvnb\\n{{code}}")]
nb = new_notebook(cells=cells)
NotebookClient(nb, kernel_manager_class=ForkKernelManager).execute()
print([(o.get("name"), o["text"]) for o in nb.cells[0].outputs])"""
    said = python(code, tmp_path, CVNB_FORK_SERVER="").stdout
    assert said.strip() == str([("stdout", " ".join(sorted(TELEMETRY_SWITCHES)) + "\n")])
