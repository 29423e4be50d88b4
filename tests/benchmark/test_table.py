"""What a benchmark classifies, what it leaves out, and what it does where a worker dies."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cvnb.benchmark.table as table
from cvnb.benchmark.timing import Measurements, Timings, measure_candidates
from cvnb.benchmark.workers import Candidate
from cvnb.core.errors import CvnbError
from cvnb.export.runtimes import MODELS, RUNTIMES
from cvnb.metrics.classification import accuracy


@pytest.fixture
def run(tmp_path: Path) -> Path:
    "A run whose model files are empty."
    for model, stage in MODELS.items():
        written = [f"export/{model}{end}.onnx" for end in ("", "_int8", "_openvino")]
        for file in f"{stage}/model.safetensors", *written, "benchmark/trained_openvino_int8.xml":
            (tmp_path/file).parent.mkdir(exist_ok=True)
            (tmp_path/file).write_bytes(b"")
    return tmp_path


def test_peers_run_the_trained_model_and_come_last(run: Path) -> None:
    candidates = table.list_candidates(run)
    peers = [c for c in candidates if c.runtime.is_peer]
    others = [c for c in candidates if not c.runtime.is_peer]
    assert candidates == others + peers and {c.model for c in peers} <= {"trained"}
    names = [name for name, r in RUNTIMES.items()
             if not r.is_peer and r.is_offered(run, "trained") and not r.missing_reason(run, "trained")]
    assert {"torch eager", "onnx fp32", "onnx int8"} <= {*names}
    assert [(c.model, c.runtime.name) for c in others] == [(model, name) for model in MODELS for name in names]
    assert not any(c.runtime.package == "openvino" for c in table.list_candidates(run, exclude=["openvino"]))


def test_benchmark_classifies_only_what_export_did_not_compare(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    peer = Candidate("trained", RUNTIMES["openvino int8"], str(run/"export/trained_int8.onnx"))
    candidates = [*table.list_candidates(run, exclude=["openvino"]), peer]

    def measure(candidates, images, n_calls, rounds, batch_size, classify, progress, decoding, seconds, rules, *more
                ) -> Measurements:
        assert rules is None and classify == {peer: ["a.png", "b.png"]}
        calls = rng.lognormal(-6, 0.1, (5, 4))
        timings = {c: Timings(calls, calls, np.full((3, 1), 0.1), 100.0) for c in candidates}
        return Measurements(timings, {}, {peer: [0, 0]}, (0.0, 0.0))

    monkeypatch.setattr(table, "measure_candidates", measure)
    exported = vars(accuracy(np.ones(50, bool)))
    parity = [dict(model=c.model, runtime=c.runtime.name, accuracy=exported) for c in candidates if c is not peer]
    result = table.run_benchmark(candidates, [], ["a.png", "b.png"], np.array([0, 1]), parity)
    rows = {f"{r['model']}, {r['runtime']}": r for r in result.rows}
    assert {name: r["n"] for name, r in rows.items()} == {c.name: 2 if c is peer else 50 for c in candidates}
    assert rows[peer.name]["accuracy"] == 0.5 and rows[peer.name]["vs_peer"] == 1
    assert all(r["vs_peer"] is not None for r in result.rows)


def test_dead_worker_is_named_with_its_last_words(run: Path) -> None:
    candidate = Candidate("trained", RUNTIMES["onnx fp32"], str(run/"export/trained.onnx"))
    message = r"worker for trained, onnx fp32 ended with code 1 \(.*cannot be opened.*Run the stage again"
    with pytest.raises(CvnbError, match=message):
        measure_candidates([candidate], [np.zeros((4, 4, 3), np.uint8)], n_calls=3, rounds=1)


def test_benchmark_without_its_control_is_refused(run: Path) -> None:
    (run/"export/trained.onnx").unlink()
    candidates = table.list_candidates(run)
    assert table.list_left_out(run)["trained, onnx fp32"] == "export/trained.onnx does not exist"
    with pytest.raises(CvnbError, match="the control, trained, onnx fp32, is not among the candidates"):
        measure_candidates(candidates, [np.zeros((4, 4, 3), np.uint8)], n_calls=3, rounds=1)


def measured_rows(run: Path, monkeypatch: pytest.MonkeyPatch, peer_classes: list[int], torch_parity: float = 0.0):
    "Make the table of a benchmark whose peers answer with these classes, where torch is sure of class 0."
    rng = np.random.default_rng(0)
    peers = [Candidate("trained", RUNTIMES[f"openvino {kind}"], str(run/f"export/{file}")) for kind, file in
             (("fp32", "trained.onnx"), ("int8", "trained_int8.onnx"))]
    candidates = [*table.list_candidates(run, exclude=["openvino"]), *peers]

    def measure(*args) -> Measurements:
        draws = {c: rng.lognormal(-6, 0.1, (5, 4)) for c in candidates}
        timings = {c: Timings(calls, calls, np.full((3, 1), 0.1), 100.0) for c, calls in draws.items()}
        control = dict(clock="wall", verdict="", wall=dict(valid=True), cpu=dict(valid=True))
        return Measurements(timings, control, {c: peer_classes for c in peers}, (0.0, 0.0))

    monkeypatch.setattr(table, "measure_candidates", measure)
    same = vars(accuracy(np.ones(4, bool)))
    parity = [dict(model=c.model, runtime=c.runtime.name, accuracy=same, same=same,
                   max_difference=torch_parity * (c.model == "compressed")) for c in candidates if c not in peers]
    expected = {"trained": np.tile([0.98, 0.02], (4, 1))}
    files = [f"{i}.png" for i in range(4)]
    return table.run_benchmark(candidates, [], files, np.zeros(4, int), parity, expected=expected)


def test_peer_with_torchs_answers_is_the_peer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured_rows(run, monkeypatch, [0, 0, 0, 0])
    assert all(r["agrees"] is True and r["vs_peer"] is not None for r in result.rows)
    assert table.benchmark_notes(result, {}) == [] and "other answers" not in repr(result)


def test_peer_with_other_answers_is_marked_and_nobodys_peer(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured_rows(run, monkeypatch, [0, 0, 0, 1])
    rows = {(r["model"], r["runtime"]): r for r in result.rows}
    marked = {name for name, r in rows.items() if r["agrees"] is False}
    assert marked == {("trained", "openvino fp32"), ("trained", "openvino int8")}
    assert all(r["vs_peer"] is None for r in result.rows)
    assert rows["trained", "openvino fp32"]["max_difference"] == pytest.approx(0.48)
    assert repr(result).count("(other answers)") == 2
    notes = table.benchmark_notes(result, {})
    assert len(notes) == 2 and all(note["exceeded"] and "nobody's peer" in note["text"] for note in notes)


def test_row_that_export_found_different_is_marked(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured_rows(run, monkeypatch, [0, 0, 0, 0], torch_parity=0.96)
    assert {r["model"] for r in result.rows if not r["agrees"]} == {"compressed"}
    assert all(r["vs_peer"] is not None for r in result.rows)


def test_headline_is_of_the_model_that_ships(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = measured_rows(run, monkeypatch, [0, 0, 0, 0])
    for model in MODELS:
        first = next(iter(result.metrics(model)))
        assert first.startswith(f"latency_p50_ms_{model}_") and "openvino" not in first


def test_size_of_a_model_counts_its_file_of_weights(tmp_path: Path) -> None:
    for name, size in ("model.xml", 1000), ("model.bin", 5000), ("model.onnx", 300):
        (tmp_path/name).write_bytes(bytes(size))
    assert table.model_size_mb(str(tmp_path/"model.xml")) == pytest.approx(0.006)
    assert table.model_size_mb(str(tmp_path/"model.onnx")) == pytest.approx(0.0003)
