"""A damaged or foreign file of a run: one line, or the same answer as before, and never a traceback."""
from __future__ import annotations

import contextlib
import copy
import io
import json
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cvnb.audit.review import read_audit
from cvnb.cli.runs import _print_result, _result_record
from cvnb.core.errors import CvnbError
from cvnb.core.files import digest, read_json, sha256_file
from cvnb.core.formats import RunManifest, StageManifest
from cvnb.core.output_formats import FORMATS
from cvnb.core.records import read_record, record_digest, write_record
from cvnb.core.stage import ACCESS_LOG, find_output, format_notes, read_stage_manifest, split_accesses
from cvnb.data.images import Decoding
from cvnb.evaluate.dashboard_data import read_dashboard_data
from cvnb.models.inference import weights_sha256
from cvnb.models.weights import load_model
from cvnb.pipeline import runner
from cvnb.pipeline.runner import StageResult, read_run_parameters, stage_states
from cvnb.pipeline.verdict import judge_run

STAGES = ("audit", "train", "errors", "compress", "export", "benchmark")
JUNK = [None, [], {}, 3, -1, 1e308, "", "x", "\x1b[2J", True, [1], {"a": 1}, [[]], "../../x", "9" * 400]


class Run:
    "A copy of a run, and what cvnb answers about it."
    def __init__(self, source: Path, folder: Path):
        self.folder = Path(shutil.copytree(source, folder/"run"))
        records = [read_stage_manifest(self.folder, s) for s in STAGES]
        outputs = [self.folder/o["path"] for record in records
                   for o in [*record["outputs"].values(), record["notebook"]]]
        manifests = [self.folder/s/"stage.json" for s in STAGES]
        self.outputs = [p for p in outputs if "bundle" not in p.parts]
        self.files = [self.folder/"run.json", self.folder/ACCESS_LOG, *manifests, *self.outputs]
        self.before = {name: reading() for name, reading in self.readings().items()}

    def readings(self) -> dict[str, Callable[[], Any]]:
        "List what reads the files of a run: name -> function without arguments."
        run = self.folder
        read = {"status": self.states, "parameters": lambda: read_run_parameters(run).given,
                "accesses": lambda: [split_accesses(run, split) for split in ("val", "test")],
                "audit": lambda: (read_audit(run), Decoding.from_audit(read_audit(run)[1])),
                "dashboard": lambda: self.dashboard(), "result": lambda: self.result(),
                "verdict": lambda: judge_run(run).lines(run)}
        for s in "train", "compress": read[f"model of {s}"] = lambda s=s: weights_sha256(load_model(run/s))
        return read

    def states(self) -> list[dict]:
        rows = stage_states(self.folder, read_run_parameters(self.folder))
        for r in rows: format_notes(self.folder, r["notes"])
        return rows

    def dashboard(self) -> Any:
        data = read_dashboard_data(self.folder)
        return digest([data.root, data.classes, data.backbone, data.saliency]), data.table.to_json()

    def result(self) -> str:
        rows = [StageResult(s, "fresh", "", 0.0, read_stage_manifest(self.folder, s)) for s in STAGES]
        if not all(r.record for r in rows): return "not finished"
        with contextlib.redirect_stdout(io.StringIO()) as printed: _print_result(self.folder, rows)
        return printed.getvalue() + json.dumps(_result_record(self.folder, rows) | dict(verdict=None))   # asked apart

    def answers(self, *names: str) -> dict[str, Any]:
        "Answer some questions, by default all; an error that cvnb explains is an answer, any other is raised."
        found = {}
        for name, reading in self.readings().items():
            if names and name not in names: continue
            try: found[name] = reading()
            except CvnbError as e: found[name] = e
        return found


@pytest.fixture(scope="module")
def run(smoke_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    "A copy of the smoke run to damage; code and data do not change here, so they are read once."
    with pytest.MonkeyPatch.context() as patch: yield damaged_run(smoke_run, tmp_path_factory.mktemp("damage"), patch)


def damaged_run(source: Path, folder: Path, patch: pytest.MonkeyPatch) -> Run:
    "Copy a run whose stages are up to date."
    parts, known = runner.key_parts, {}

    def key_parts(contract: Any, params: dict, root: Path, like: dict | None = None) -> dict:
        plain = {k: str(v) for k, v in params.items() if k != "run"}
        key = digest([contract.stage, plain])
        if key not in known: known[key] = parts(contract, params, root, like)
        return known[key]
    patch.setattr(runner, "key_parts", key_parts)
    return Run(source, folder)


@contextlib.contextmanager
def changed(path: Path, content: bytes) -> Iterator[None]:
    "Write another content, and restore the file afterwards."
    before = path.read_bytes()
    path.write_bytes(content)
    try: yield
    finally: path.write_bytes(before)


def flip(content: bytes, rng: random.Random) -> bytes:
    "Flip one bit."
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1:]


def one_line(error: CvnbError) -> bool: return "\n" not in str(error) and "\x1b" not in str(error)


def said(run: Run, path: Path) -> list[str]:
    "Compare the answers with those before the damage; list what tells the user of it."
    found = []
    after = run.answers()
    for name, answer in after.items():
        if isinstance(answer, CvnbError):
            assert one_line(answer), (path, name, answer)
            found.append(str(answer))
        elif name == "status":
            rows = {r["stage"]: r for r in answer}
            found += [f"{s}: {r['state']}, {r['why']}" for s, r in rows.items() if r not in run.before[name]]
        elif name == "verdict":
            assert all("\n" not in line and "\x1b" not in line for line in answer), (path, name)
            found += [line for line in answer if line not in run.before[name]]
        elif name == "accesses":
            found += [f"{n} damaged line" for n in [answer[0].get("damaged line")] if n]
            assert found or answer == run.before[name], (path, name)
        elif name == "result" and path.name == "notebook.ipynb": assert "notebook.ipynb was changed" in answer
        else: assert answer == run.before[name], (path, name)
    return found


def flip_bytes(run: Run, n: int, seed: int) -> list[tuple[str, str]]:
    "Flip a bit `n` times, each in another file, and list the file and what was said first."
    rng, rows = random.Random(seed), []
    folders = sorted({p.parent for p in run.files})   # one with many pictures counts as much as another
    for _ in range(n):
        folder = rng.choice(folders)
        path = rng.choice([p for p in run.files if p.parent == folder])
        content = flip(path.read_bytes(), rng)
        with changed(path, content): found = said(run, path)
        if path in run.outputs: assert found, f"nobody noticed the damage of {path}"
        rows.append((path.relative_to(run.folder).as_posix(), found[0] if found else "the same answers as before"))
    return rows


def test_flipped_byte_is_noticed_or_changes_no_answer(run):
    assert {r["state"] for r in run.before["status"]} == {"fresh"}
    flip_bytes(run, 12, seed=0)


@pytest.mark.long
def test_hundred_flipped_bytes_are_noticed_or_change_no_answer(run):
    rows = flip_bytes(run, 100, seed=1)
    assert len({file for file, _ in rows}) > 15


def test_edited_figure_is_noticed(run):
    path = run.folder/"train/stage.json"
    record = read_json(path)
    record["metrics"]["accuracy_test"]["value"] = 0.999
    with changed(path, json.dumps(record).encode()):
        row = next(r for r in run.states() if r["stage"] == "train")
        assert row["state"] == "stale" and "was changed after it was written" in row["why"] and not row["headline"]
        with pytest.raises(CvnbError, match="was changed after it was written") as error:
            read_stage_manifest(run.folder, "train")
    assert "cvnb run train --run" in str(error.value)


def test_changed_output_is_not_read(run):
    path = run.folder/"audit/manifest.parquet"
    with changed(path, flip(path.read_bytes(), random.Random(0))):
        with pytest.raises(CvnbError, match="manifest.parquet was changed after audit wrote it"):
            find_output(run.folder, "audit", "manifest.parquet")


def test_later_format_is_refused_by_name(run):
    path = run.folder/"train/stage.json"
    record = read_json(path) | dict(format=2)
    with changed(path, json.dumps(record | dict(digest=record_digest(record))).encode()):
        with pytest.raises(CvnbError, match="format 2, and this cvnb reads formats up to 1. Update cvnb"):
            read_stage_manifest(run.folder, "train")
        with pytest.raises(CvnbError, match="Update cvnb, or give --force"):
            runner.refuse_newer_format(run.folder, "train")
        assert "has format 2" in next(r for r in run.states() if r["stage"] == "train")["why"]


# Valid JSON of another shape


def places(value: Any, where: tuple = ()) -> Iterator[tuple]:
    "List the places in a JSON value, at most some in each list."
    yield where
    if isinstance(value, dict): items = list(value.items())
    else: items = list(enumerate(value))[:3] if isinstance(value, list) else []
    for key, v in items: yield from places(v, (*where, key))


def replaced(value: Any, where: tuple, new: Any) -> Any:
    "Copy a JSON value with another one at a place; without the place if `new` is `places`."
    if not where: return None if new is places else new
    found = copy.deepcopy(value)
    inner = found
    for key in where[:-1]: inner = inner[key]
    if new is places: del inner[where[-1]]
    else: inner[where[-1]] = new
    return found


def shapes(value: Any, n: int, rng: random.Random) -> Iterator[Any]:
    "Make JSON values of other shapes: whole ones, and `n` with a wrong or missing part."
    yield from JUNK
    known = list(places(value))
    top = [p for p in known if len(p) == 1]
    for p in top: yield replaced(value, p, places)
    for _ in range(n): yield replaced(value, rng.choice(known), rng.choice([*JUNK, places]))


def write_consistently(run: Run, path: Path, value: Any) -> None:
    "Write a file as a stranger would who knows the digests, so that only the schema can refuse it."
    if path.name in ("run.json", "stage.json") and isinstance(value, dict):
        write_record(path, value, RunManifest if path.name == "run.json" else StageManifest)
        return
    path.write_text(json.dumps(value))
    if path.name in ("run.json", "stage.json"): return
    manifest = run.folder/path.relative_to(run.folder).parts[0]/"stage.json"
    record = read_json(manifest)
    out = next(o for o in record["outputs"].values() if run.folder/o["path"] == path)
    out |= dict(sha256=sha256_file(path), bytes=path.stat().st_size)
    write_record(manifest, record, StageManifest)


READERS = {"run.json": ["status", "verdict"], "stage.json": ["status", "result", "verdict"],
           "audit.json": ["audit", "dashboard", "result", "verdict"], "export.json": ["verdict"],
           "model.json": ["dashboard", "model of train", "model of compress"], "errors.json": ["dashboard", "verdict"],
           "benchmark.json": ["result", "verdict"], "verdict.json": ["result", "verdict"]}   # stages alone read others


def misshape(run: Run, n: int, seed: int) -> dict[str, int]:
    "Give each JSON file of a run other shapes; count those that were refused."
    rng, counts = random.Random(seed), {}
    for path in [p for p in run.files if p.name in READERS]:
        manifest = run.folder/path.relative_to(run.folder).parts[0]/"stage.json"
        kept = manifest.read_bytes() if manifest.exists() else b""
        value = read_json(path)
        for shape in shapes(value, n, rng):
            with changed(path, b""):
                write_consistently(run, path, shape)
                try: errors = [a for a in run.answers(*READERS[path.name]).values() if isinstance(a, CvnbError)]
                finally:
                    if kept: manifest.write_bytes(kept)
            assert all(map(one_line, errors)), (path, shape, errors)
            counts[path.name] = counts.get(path.name, 0) + 1
    return counts


@pytest.mark.long
@pytest.mark.timeout(1800)   # beside other work
def test_json_of_another_shape_never_ends_in_a_traceback(run):
    counts = misshape(run, 40, seed=0)
    assert all(n >= 40 for n in counts.values())
    assert {"run.json", "stage.json", "audit.json", "model.json", "benchmark.json"} <= set(counts)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "sweep.json"])
def test_schema_refuses_other_shapes(run, name):
    path = next(p for p in run.files if p.name == name)
    value, model, rng = read_json(path), FORMATS[name], random.Random(0)
    assert read_record(path, model) == value
    refused = 0
    for shape in shapes(value, 200, rng):
        with changed(path, json.dumps(shape).encode()):
            try: read_record(path, model)
            except CvnbError as e: refused += one_line(e)
    assert refused > 20
