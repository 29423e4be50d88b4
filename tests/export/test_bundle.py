"""Bundles from strangers and damaged ones: each fault is one line, and no answer changes without a word."""
from __future__ import annotations

import io
import json
import shutil
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from bundles import IMAGES, LABELS, make_bundle, write_graph
from onnx import TensorProto, helper
from PIL import Image

from cvnb.cli.app import main
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import file_record, write_json
from cvnb.core.records import record_digest
from cvnb.export.bundle import Bundle, UnacceptedFile, verify_bundle, write_bundle
from cvnb.export.bundle_format import BundleDescription
from cvnb.export.onnx_graph import read_graph
from cvnb.export.quantize import calibrate_ranges, quantize, quantize_nodes
from cvnb.models.vision_model import ModelSpec

ANSI = "\x1b[31mdog\x1b[0m"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    "A bundle."
    return make_bundle(tmp_path_factory.mktemp("run"))


@pytest.fixture
def bundle(whole: Path, tmp_path: Path) -> Path:
    "A copy of the bundle."
    return Path(shutil.copytree(whole, tmp_path/"bundle"))


def reseal(bundle: Path, **changes: object) -> None:
    "Change bundle.json, and compute all digests anew, as a stranger would."
    record = json.loads((bundle/"bundle.json").read_text())
    record["files"] = {name: file_record(bundle/name) for name in record["files"]}
    record |= changes
    write_json(bundle/"bundle.json", record | dict(digest=record_digest(record)))


def edit(bundle: Path, **changes: object) -> None:
    "Change bundle.json and leave its digest."
    write_json(bundle/"bundle.json", json.loads((bundle/"bundle.json").read_text()) | changes)


def replace_model(bundle: Path, *args: object, **options: object) -> None:
    "Put another graph into the bundle."
    write_graph(bundle/"model.onnx", *args, **options)
    reseal(bundle)


def flip(file: Path, at: int, bits: int = 1) -> None:
    "Change one byte."
    content = bytearray(file.read_bytes())
    content[at] ^= bits
    file.write_bytes(content)


def loop() -> list[onnx.NodeProto]:
    "A loop without an end."
    info = helper.make_tensor_value_info
    nodes = [helper.make_node("Identity", ["go"], ["on"]), helper.make_node("Softmax", ["x"], ["y"], axis=1)]
    values = {name: info(name, TensorProto.FLOAT, ["batch", 3]) for name in "xy"}
    given = [info("i", TensorProto.INT64, []), info("go", TensorProto.BOOL, []), values["x"]]
    body = helper.make_graph(nodes, "body", given, [info("on", TensorProto.BOOL, []), values["y"]])
    return [helper.make_node("Loop", ["", "", "logits"], ["probabilities"], body=body)]


def add_external_weights(bundle: Path) -> None:
    model = onnx.load(bundle/"model.onnx")
    tensor = model.graph.initializer[1]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value="../../secret.bin")
    (bundle/"model.onnx").write_bytes(model.SerializeToString())
    reseal(bundle)


def reverse_labels(bundle: Path) -> None:
    (bundle/"labels.txt").write_text("".join(f"{label}\n" for label in LABELS[::-1]))
    reseal(bundle, labels=LABELS[::-1])


def drop_files(bundle: Path) -> None:
    record = json.loads((bundle/"bundle.json").read_text())
    del record["files"]
    write_json(bundle/"bundle.json", record | dict(digest=record_digest(record)))


FAULTS = {   # what was damaged -> how, and a part of what is said
    "a byte of the model": (lambda b: flip(b/"model.onnx", 200), "model.onnx is missing or not the file that was"),
    "a byte of the labels": (lambda b: flip(b/"labels.txt", 0), "labels.txt is missing or not the file that was"),
    "a byte of a label in bundle.json": (
        lambda b: (b/"bundle.json").write_text((b/"bundle.json").read_text().replace('"cat"', '"bat"')),
        "bundle.json was changed after it was written: its digest does not fit"),
    "the model is cut off": (lambda b: (b/"model.onnx").write_bytes((b/"model.onnx").read_bytes()[:-9]),
                             "model.onnx is missing or not the file that was exported"),
    "the model is missing": (lambda b: (b/"model.onnx").unlink(), "model.onnx is missing or not the file"),
    "labels reversed": (lambda b: edit(b, labels=LABELS[::-1]), "bundle.json was changed after it was written"),
    "labels reversed, digests computed anew": (
        reverse_labels, "model.onnx was exported with other labels than bundle.json has, or in another order"),
    "labels reversed in labels.txt only": (
        lambda b: [(b/"labels.txt").write_text("owl\ndog\ncat\n"), reseal(b)], "labels.txt has other labels than"),
    "format 2": (lambda b: reseal(b, format=2), "bundle.json has format 2, and this cvnb reads formats up to 1"),
    "format is a word": (lambda b: reseal(b, format="one"), "bundle.json: format should be"),
    "no files": (drop_files, "bundle.json: files is missing"),
    "files without the model": (lambda b: reseal(b, files={"labels.txt": file_record(b/"labels.txt")}),
                                "bundle.json does not describe model.onnx"),
    "files outside of the folder": (lambda b: reseal(b, files={"../x": file_record(b/"labels.txt")}),
                                    "bundle.json: files"),
    "null among labels": (lambda b: reseal(b, labels=["cat", None, "owl"]), "bundle.json: labels[1] should be"),
    "escape sequences in a label": (lambda b: reseal(b, labels=["cat", ANSI, "owl"]),
                                    "bundle.json: labels[1] should match"),
    "a label twice": (lambda b: reseal(b, labels=["cat", "cat", "owl"]), "bundle.json: labels should not repeat 'cat'"),
    "no labels": (lambda b: reseal(b, labels=[]), "bundle.json: labels"),
    "unknown task": (lambda b: reseal(b, task="detection"), "bundle.json: task should be"),
    "other task": (lambda b: reseal(b, task="regression"), "model.onnx was exported for another task than regression"),
    "a list": (lambda b: (b/"bundle.json").write_text("[1]"), "bundle.json: the whole should be an object"),
    "no JSON": (lambda b: (b/"bundle.json").write_text("{"), "bundle.json is not JSON"),
    "nested deeply": (lambda b: (b/"bundle.json").write_text("[" * 100_000), "bundle.json"),
    "no text": (lambda b: (b/"bundle.json").write_bytes(b"\xff\xfe{}"), "bundle.json"),
    "loop without end": (lambda b: replace_model(b, loop), "it has the operator Loop, and no model of cvnb has that"),
    "operator of another domain": (
        lambda b: replace_model(b, lambda: [helper.make_node("Softmax", ["logits"], ["probabilities"], domain="evil")]),
        "it has the operator evil.Softmax"),
    "random operator": (
        lambda b: replace_model(b, lambda: [helper.make_node("RandomUniformLike", ["logits"], ["probabilities"])]),
        "it has the operator RandomUniformLike"),
    "weights outside of the folder": (add_external_weights, "it has weights in another file"),
    "other input": (lambda b: replace_model(b, given="photo"), "has the inputs and outputs"),
    "other output": (lambda b: reseal(b, output=dict(name="probabilities", dtype="float32", shape=["batch", 4])),
                     "has the inputs and outputs"),
    "no ONNX": (lambda b: [(b/"model.onnx").write_bytes(b"words"), reseal(b)], "model.onnx is not an ONNX file"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_of_a_bundle_is_one_line(fault, bundle, monkeypatch, capsys):
    damage, said = FAULTS[fault]
    damage(bundle)
    for command in ["predict", str(bundle), "x.png"], ["verify", str(bundle)]:
        monkeypatch.setattr(sys, "argv", ["cvnb", *command])
        with pytest.raises(SystemExit) as e: main()
        out, error = capsys.readouterr()
        assert e.value.code == 1 and not out and said in error and error.count("\n") == 1 and "\x1b" not in error


def test_loop_hidden_behind_another_name_is_refused(bundle):
    renamed = loop()
    renamed[0].op_type = "Softmax"
    replace_model(bundle, lambda: renamed)
    with pytest.raises(CvnbError, match="it has graphs inside of nodes"): Bundle.load(bundle)


def test_bundle_without_digest_of_an_earlier_version_is_read(bundle, whole):
    record = json.loads((bundle/"bundle.json").read_text())
    del record["digest"]
    write_json(bundle/"bundle.json", record)
    assert Bundle.load(bundle).predict(IMAGES) == Bundle.load(whole).predict(IMAGES)
    assert "earlier version" in verify_bundle(bundle)[0]["found"]


def test_fields_of_later_versions_are_ignored(bundle, whole):
    reseal(bundle, temperature=1.3, verdict=dict(ship=True), something_new=3)
    assert Bundle.load(bundle).predict(IMAGES) == Bundle.load(whole).predict(IMAGES)


def test_published_schema_of_bundles_is_that_of_the_model(root, whole):
    written = json.loads((root/"configs/schemas/bundle.schema.json").read_text(encoding="utf-8"))
    properties = BundleDescription.model_json_schema()["properties"]
    assert written["properties"].keys() == properties.keys() >= json.loads((whole/"bundle.json").read_text()).keys()


# Values, time and memory


def end_with(name: str, **options: object) -> Callable[[], list[onnx.NodeProto]]:
    return lambda: [helper.make_node(name, ["logits"], ["probabilities"], **options)]


@pytest.mark.parametrize("operator, said", [("Sigmoid", "probabilities that do not sum to one"),
                                            ("Identity", "probabilities outside of 0 … 1"),
                                            ("Log", "values that are no finite numbers")])
def test_values_that_the_task_does_not_promise_are_refused(operator, said, bundle):
    replace_model(bundle, end_with(operator))
    with pytest.raises(CvnbError, match=f"model.onnx returned {said}") as e: Bundle.load(bundle).predict(IMAGES)
    assert len(str(e.value).splitlines()) == 1


def widen(side: int, n_products: int) -> Callable[[], list[onnx.NodeProto]]:
    "Nodes that multiply large matrices."
    nodes = [helper.make_node("ReduceSum", ["logits", "axes"], ["one"], keepdims=0),
             helper.make_node("Expand", ["one", "shape"], ["x0"])]
    nodes += [helper.make_node("MatMul", [f"x{i}", f"x{i}"], [f"x{i + 1}"]) for i in range(n_products)]
    return lambda: [*nodes, helper.make_node("ReduceMean", [f"x{n_products}"], ["mean"], keepdims=0),
                    helper.make_node("Add", ["logits", "mean"], ["sum"]),
                    helper.make_node("Softmax", ["sum"], ["probabilities"], axis=1)]


def test_model_that_runs_for_too_long_is_stopped(bundle, capfd):
    replace_model(bundle, widen(1200, 200), weights=dict(axes=np.array([0, 1]), shape=np.array([1200, 1200])))
    with pytest.raises(CvnbError, match="model.onnx cannot be (run .it runs for|opened .it takes) more than 1 s") as e:
        Bundle.load(bundle, threads=1, max_seconds=1).predict(IMAGES[0])
    assert len(str(e.value).splitlines()) == 1 and capfd.readouterr() == ("", "")


def test_model_that_would_compute_while_it_is_opened_is_refused(bundle):
    products = [helper.make_node("MatMul", [f"x{i}", f"x{i}"], [f"x{i + 1}"]) for i in range(400)]
    end = [helper.make_node("ReduceMean", ["x400"], ["mean"], keepdims=0),
           helper.make_node("Add", ["logits", "mean"], ["sum"]),
           helper.make_node("Softmax", ["sum"], ["probabilities"], axis=1)]
    replace_model(bundle, lambda: [*products, *end], weights=dict(x0=np.zeros((900, 900), np.float32)))
    with pytest.raises(CvnbError, match="it has a MatMul of constants, and no model of cvnb has that"):
        Bundle.load(bundle)


def test_model_that_needs_too_much_memory_is_stopped(bundle, capfd):
    replace_model(bundle, widen(2**20, 0), weights=dict(axes=np.array([0, 1]), shape=np.array([2**20, 2**20])))
    with pytest.raises(CvnbError, match="model.onnx cannot be run .it needs more than .* GB of memory"):
        Bundle.load(bundle, threads=1).predict(IMAGES[0])
    assert capfd.readouterr() == ("", "")


# Verifying


def test_verify_reports_what_was_checked(bundle, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["cvnb", "verify", str(bundle), "--json"])
    (bundle/"notes.txt").write_text("mine")
    with pytest.raises(SystemExit) as e: main()
    found = json.loads(capsys.readouterr().out)
    assert not e.value.code and found["bundle"] == str(bundle)
    pairs = [(row["check"], row["subject"]) for row in found["checks"]]
    assert {("digest", "reference.npz"), ("reference images", "model_int8.onnx")} < {*pairs}
    assert ("other files", "notes.txt") in pairs


REFERENCES = {
    "other predictions": (lambda a: a | dict(model=a["model"][:, ::-1]), "predicts differently here"),
    "no predictions": (lambda a: {k: v for k, v in a.items() if k != "model"}, "reference.npz cannot be read"),
    "no images": (lambda a: a | dict(model=a["model"][:0]), "does not hold images"),
    "objects": (lambda a: a | dict(model=np.array([print])), "reference.npz cannot be read"),
    "floats": (lambda a: a | dict(image_0=a["image_0"] / 255), "does not hold images"),
}


@pytest.mark.parametrize("fault", REFERENCES)
def test_verify_refuses_other_references(fault, bundle):
    change, said = REFERENCES[fault]
    with np.load(bundle/"reference.npz") as stored: arrays = dict(stored)
    np.savez_compressed(bundle/"reference.npz", **change(arrays))
    reseal(bundle)
    with pytest.raises(CvnbError, match=said) as e: verify_bundle(bundle)
    assert len(str(e.value).splitlines()) == 1


def check_flips(
    bundle: Path,
    n: int,      # flips
    seed: int,
) -> dict[str, int]:   # file -> flips that were found
    "Change random bytes, one at a time; each is found by loading or by verifying, or changes no answer."
    generator = np.random.default_rng(seed)
    files = sorted(path for path in bundle.iterdir())
    content = {path: path.read_bytes() for path in files}
    images = [np.full((8, 8, 3), k * 60, np.uint8) for k in range(4)]
    expected = {p: Bundle.load(bundle, p, threads=1).predict(images) for p in ("fp32", "int8")}
    found = dict.fromkeys((path.name for path in files), 0)
    for _ in range(n):
        path = files[generator.integers(len(files))]
        at = int(generator.integers(len(content[path])))
        flip(path, at, int(generator.integers(1, 256)))
        for precision in expected:
            try: assert Bundle.load(bundle, precision, threads=1).predict(images) == expected[precision], (path, at)
            except CvnbError as e: assert len(str(e).splitlines()) == 1
        try: verify_bundle(bundle)
        except CvnbError as e:
            assert len(str(e).splitlines()) == 1
            found[path.name] += 1
        else: assert path.name == "bundle.json", f"byte {at} of {path.name}"   # such as a space for a line break
        path.write_bytes(content[path])
    return found


def test_flipped_bytes_are_found_or_change_no_answer(bundle):
    assert sum(check_flips(bundle, 200, seed=0).values()) > 190


@pytest.mark.long
def test_many_flipped_bytes_are_found_or_change_no_answer(bundle):
    assert sum(check_flips(bundle, 5000, seed=1).values()) > 4800


# Files that are written


def test_other_folder_is_not_replaced_by_a_bundle(whole, tmp_path):
    spec = ModelSpec("mean_colour", LABELS, 6, [0.5] * 3, [0.5] * 3)
    run = Path(shutil.copytree(whole.parent, tmp_path/"run"))
    (tmp_path/"thesis").mkdir()
    (tmp_path/"thesis/chapter.txt").write_text("precious")
    before = sorted(tmp_path.rglob("*"))
    for folder in tmp_path/"thesis", run, run/"export", tmp_path:
        with pytest.raises(UsageError, match="would be (replaced|written over)"):
            write_bundle(folder, run, "trained", spec, IMAGES, dict(run="x", shipped={}, metrics={}))
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(CvnbError, match=r"bundle.json: labels\[1\] should match"):
        spec = ModelSpec("mean_colour", ["cat", ANSI, "owl"], 6, [0.5] * 3, [0.5] * 3)
        write_bundle(tmp_path/"b", run, "trained", spec, IMAGES, {})
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture
def model(tmp_path: Path) -> Path:
    "An ONNX file."
    return write_graph(tmp_path/"model.onnx")


def test_calibration_keeps_its_source(model):
    before = model.read_bytes()
    calibrate_ranges(model, model.with_name("model.json"), np.stack([IMAGES[0]] * 4))
    assert model.read_bytes() == before
    assert sorted(p.name for p in model.parent.iterdir()) == ["model.json", "model.onnx"]


def test_quantization_does_not_write_over_its_inputs(model):
    pixels = np.stack([IMAGES[0]] * 4)
    ranges = calibrate_ranges(model, model.with_name("ranges.json"), pixels)
    link = model.with_name("link.onnx")
    link.symlink_to(model)
    before = model.read_bytes()
    for call in (lambda: quantize_nodes(model, model, ranges, ["x"]),
                 lambda: quantize_nodes(model, link, ranges, ["x"]),
                 lambda: quantize_nodes(model, ranges, ranges, ["x"]), lambda: calibrate_ranges(model, model, pixels),
                 lambda: calibrate_ranges(model, link, pixels),
                 lambda: quantize(model, link, pixels, pixels, np.zeros(4, int))):
        with pytest.raises(UsageError, match="would be written over .*, which is read"): call()
    assert model.read_bytes() == before and ranges.stat().st_size


def test_graph_is_read_as_onnx_reads_it(model):
    graph, whole = read_graph(model), onnx.load(model)
    assert graph.operators == {node.op_type for node in whole.graph.node}
    assert graph.metadata == {p.key: p.value for p in whole.metadata_props}


@pytest.mark.parametrize("given, said", [(None, "NoneType"), (3, "int"), ([None], "NoneType"), ("", "folder"),
                                         (bytearray(b"words"), "a file of 5 bytes"),
                                         (io.StringIO("words"), "open as text")])
def test_what_is_no_image_is_refused_in_one_line(whole: Path, given: object, said: str) -> None:
    bundle = Bundle.load(whole)
    with pytest.raises(UsageError) as caught: bundle.predict(given)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_open_file_and_unfitting_array_are_one_image(whole: Path) -> None:
    bundle = Bundle.load(whole)
    file = io.BytesIO()
    Image.fromarray(IMAGES[0]).save(file, "PNG")
    expected = bundle.predict(IMAGES[0])
    assert bundle.predict(io.BytesIO(file.getvalue()))[0]["probabilities"] == expected[0]["probabilities"]
    with pytest.raises(UsageError, match=r"uint8 \(8, 9\)"): bundle.predict(np.zeros((8, 9), np.uint8))


@pytest.mark.parametrize("precision, said", [
    ("openvino fp32", "runs ONNX Runtime, not openvino fp32"), ("litert", "not litert"), ("int4", "does not exist")])
def test_file_of_another_runtime_is_refused_with_what_to_use(whole: Path, precision: str, said: str) -> None:
    with pytest.raises(UsageError, match=said) as caught: Bundle.load(whole, precision)
    assert "'fp32' or 'int8'" in str(caught.value)


@pytest.mark.parametrize("accepted, warned", [(False, 1), (True, 0)])
def test_int8_that_the_test_images_refuse_is_warned_about(bundle: Path, accepted: bool, warned: int) -> None:
    reseal(bundle, int8=dict(ships=True, test=dict(accepted=accepted)))
    with warnings.catch_warnings(record=True, action="always") as found: Bundle.load(bundle, "int8")
    assert sum(issubclass(w.category, UnacceptedFile) for w in found) == warned
    with warnings.catch_warnings(record=True, action="always") as found: Bundle.load(bundle)
    assert not [w for w in found if issubclass(w.category, UnacceptedFile)]
