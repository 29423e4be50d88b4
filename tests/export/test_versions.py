"""A runtime of another version, one that is missing, and one that lacks an operator: one line each, the rest stays."""
from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import numpy as np
import onnxruntime
import pandas as pd
import pytest
import torch
from bundles import IMAGES, make_bundle
from PIL import Image

from cvnb.cli.app import main
from cvnb.core.errors import CvnbError
from cvnb.core.files import write_json
from cvnb.core.records import record_digest
from cvnb.export.bundle import Bundle, OtherVersion, verify_bundle
from cvnb.export.onnx import export_onnx
from cvnb.export.parity import check_parity
from cvnb.export.runtimes import RUNTIMES, Predict, Runtime
from cvnb.models.weights import create_model, save_model


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    "A bundle."
    return make_bundle(tmp_path)


def set_versions(bundle: Path, **versions: str) -> None:
    "Let a bundle say that it was checked with other versions."
    record = json.loads((bundle/"bundle.json").read_text()) | dict(checked_with=versions)
    write_json(bundle/"bundle.json", record | dict(digest=record_digest(record)))


def test_bundle_records_the_version_of_its_runtime(bundle: Path) -> None:
    assert json.loads((bundle/"bundle.json").read_text())["checked_with"] == dict(onnxruntime=onnxruntime.__version__)
    with warnings.catch_warnings(action="error"): Bundle.load(bundle)
    found = [r["found"] for r in verify_bundle(bundle) if r["check"] == "runtime"]
    assert found == [f"onnxruntime {onnxruntime.__version__}, as when it was exported"] * 2


def test_another_version_is_one_warning_that_names_both_and_what_checks_it(bundle: Path) -> None:
    set_versions(bundle, onnxruntime="1.20.1")
    with pytest.warns(OtherVersion) as found: opened = Bundle.load(bundle)
    assert [str(w.message) for w in found] == [
        f"{bundle} was checked with onnxruntime 1.20.1, and here is onnxruntime {onnxruntime.__version__}: "
        f"`cvnb verify {bundle}` checks it again"]
    assert opened.predict(IMAGES[0])[0]["label"]
    with warnings.catch_warnings(action="error"): rows = verify_bundle(bundle)
    assert [r["found"].endswith("it was exported with 1.20.1") for r in rows if r["check"] == "runtime"] == [True, True]


def test_bundle_of_an_earlier_version_loads_without_a_word(bundle: Path) -> None:
    set_versions(bundle)
    with warnings.catch_warnings(action="error"): Bundle.load(bundle)


def test_command_says_it_in_one_line_and_answers(bundle: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    set_versions(bundle, onnxruntime="9.9.9")
    Image.fromarray(IMAGES[0]).save(tmp_path/"x.png")
    monkeypatch.setattr(sys, "argv", ["cvnb", "predict", str(bundle), str(tmp_path/"x.png"), "--json"])
    with pytest.raises(SystemExit) as end: main()
    out, err = capsys.readouterr()
    assert not end.value.code and json.loads(out)["label"]
    assert err.startswith(f"! {bundle} was checked with onnxruntime 9.9.9, and here is ") and err.count("\n") == 1


def test_missing_runtime_is_refused_with_its_name(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cvnb.export.runtimes.find_spec", lambda name: None)
    with pytest.raises(CvnbError, match="model.onnx needs the package onnxruntime, and it is not installed"):
        Bundle.load(bundle)
    for name in RUNTIMES:
        with pytest.raises(CvnbError, match=f"package {RUNTIMES[name].package} is not installed"):
            print(RUNTIMES[name].version)


def test_runtime_without_an_operator_is_left_out_and_what_finished_stays(tmp_path: Path, monkeypatch) -> None:
    def load(path: Path, threads: int) -> Predict: raise RuntimeError("No kernel for Resize(18)\nat line 3")

    lacking = Runtime("other fp32", load, "{model}.onnx", "numpy", "fp32", metric_suffix="other", marker="P",
                      in_parity=True)
    torch.manual_seed(0)
    model = create_model("test_resnet", ["cat", "dog"], 24)
    save_model(model, tmp_path/"train")
    (tmp_path/"export").mkdir()
    export_onnx(model, tmp_path/"export/trained.onnx")
    Image.fromarray(np.full((30, 24, 3), 99, np.uint8)).save(tmp_path/"0.png")
    monkeypatch.setitem(RUNTIMES, lacking.name, lacking)
    test = pd.DataFrame(dict(path=["0.png"], label=["cat"]))
    report = check_parity(dict(trained=model), tmp_path, tmp_path, test, ["cat", "dog"])
    reason = "other fp32 cannot run trained.onnx (No kernel for Resize(18))"
    assert report.refused == {"trained, other fp32": reason} and "onnx fp32" in report.results["trained"]
    assert f"trained, other fp32 was left out: {reason}." in report.notes
    ships = Runtime(**vars(lacking) | dict(in_bundle=True))
    monkeypatch.setitem(RUNTIMES, lacking.name, ships)
    with pytest.raises(CvnbError, match="other fp32 cannot run trained.onnx"):
        check_parity(dict(trained=model), tmp_path, tmp_path, test, ["cat", "dog"])
