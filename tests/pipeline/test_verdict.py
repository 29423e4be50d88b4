"""The verdict on a run: each rule fires on its planted fault, an absent figure is not judged, wrong rules are refused.
"""
from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from projects import write_project

from cvnb.cli import app as cli
from cvnb.core.errors import UsageError
from cvnb.core.files import read_json, write_json
from cvnb.core.stage import Stage
from cvnb.export.bundle_format import read_description
from cvnb.metrics.estimates import Estimate
from cvnb.pipeline.run_figures import FIGURES
from cvnb.pipeline.verdict import EXIT_CODES, MAX_REASONS, PROJECT_RULES, judge_run, read_rules, verdict_json

ALL = Path("/")   # a folder without a project: its rules are those of the package
SHARE = dict(value=0.0, low=0.0, high=0.01, n=600)


def check(n: int = 0, limit: float | None = None, recall: float = 0.9) -> dict:
    "A check of audit.json that flags `n` of 600 images."
    proof = dict(recall=dict(value=recall, low=recall, high=recall, n=300))
    over = limit is not None and n / 600 > limit
    return dict(n=n, n_checked=600, share=SHARE, limit=limit, over=over, proof=proof)


def good_run() -> dict:
    "What the stages of a run without a fault measured."
    test = dict(difference=0.0, low=-0.01, high=0.01, margin=0.02, only_reference=1, only_new=1, n=600, accepted=True)
    row = dict(accuracy=0.9, accuracy_low=0.88, accuracy_high=0.92, size_mb=1.0, speedup=2.0, vs_peer=1.0)
    rows = [row | dict(model=model, runtime=runtime, p50_ms=ms) for model in ("trained", "compressed")
            for runtime, ms in (("onnx fp32", 2.0), ("onnx int8", 1.0))]
    return dict(
        checks=dict(leak=check(limit=0.0), drift=check(), label_error=check(limit=0.05)),
        train=dict(accuracy_val=0.9, accuracy_val_majority=0.1, accuracy_val_probe=0.8,
                   difference_val_majority=Estimate(0.8, 0.75, 0.85, 600),
                   difference_val_probe=Estimate(0.1, 0.07, 0.13, 600)),
        errors={"calibration_gap_test": 0.01}, test=test,
        **{"errors.json": dict(mistakes=[], kept_slices=[dict(name="cats", fell=False, fault="")])},
        export=dict(accepted_int8=1, difference_int8=0.0, max_difference_compressed_fp32=1e-6,
                    max_difference_trained_fp32=1e-6),
        shipped="compressed", rows=rows, control=dict(verdict="x", clock="wall"), looks=5, tests=2)


def write_stage(run: Path, name: str, measured: dict, inputs: tuple = (), **files: dict) -> None:
    "Write a finished stage."
    stage = Stage(name, run)
    for source, file in inputs: stage.input(source, file)
    for metric, value in measured.items(): stage.metric(metric, value, n=600)
    for file, content in files.items(): write_json(stage.path(f"{file}.json"), content)
    stage.finish()


@pytest.fixture
def write(tmp_path) -> Callable[..., Path]:
    "Write a run of small JSON files; `plant` changes what its stages measured."
    def write(plant: Callable[[dict], object] = lambda figures: None, skip: tuple = ()) -> Path:
        figures = copy.deepcopy(good_run())
        plant(figures)
        run = tmp_path/"run"
        shutil.rmtree(run, ignore_errors=True)
        names = ("audit", "train", "errors", "compress", "export", "benchmark")
        write_json(run/"run.json", dict(params={name: {} for name in names}))
        shipped = dict(model=figures["shipped"])
        exported = dict(shipped=shipped, bundle={}, parity=[], int8={}, int8_test=figures["test"])
        benchmark = dict(run="run", rows=figures["rows"], control=figures["control"], machine={})
        audit = dict(root="x", classes=["a", "b"], checks=figures["checks"], min_recall=0.8)
        parts = dict(audit=(({}), (), dict(audit=audit)),
                     train=(figures["train"], [("audit", "audit.json")],
                            dict(model={}) | ({"metrics": figures["metrics"]} if "metrics" in figures else {})),
                     errors=(figures["errors"], [("train", "model.json")], dict(errors=figures["errors.json"])),
                     compress=({}, [("train", "model.json")], dict(verdict=figures["test"])),
                     export=(figures["export"], [("compress", "verdict.json")], dict(export=exported)),
                     benchmark=({}, [("export", "export.json")], dict(benchmark=benchmark)))
        for name, (metrics, inputs, files) in parts.items():
            if name not in skip: write_stage(run, name, metrics, inputs, **files)
        look = json.dumps(dict(split="test", stage="train", n_images=600, when="x"))
        (run/"looks.jsonl").write_text("".join(f"{look}\n" for _ in range(figures["looks"])))
        (run/"acceptance.jsonl").write_text("{}\n" * figures["tests"])
        return run
    return write


def judge(run: Path, **rules: dict):
    "Judge a run by the package's rules, some of them changed."
    file = run.with_name("rules.yaml")
    write_json(file, rules)   # JSON is YAML
    return judge_run(run, read_rules(file, ALL))


def test_run_without_a_fault_ships(write):
    verdict = judge(write())
    assert verdict.level == "ship" and verdict.reasons == [] and verdict.not_judged == {} and verdict.exit_code == 0
    assert sorted(verdict.judged) == sorted(FIGURES)


def setter(*place: str) -> Callable[[dict, object], None]:
    "Make a function that changes one figure."
    def put(figures: dict, value: object) -> None:
        for key in place[:-1]: figures = figures[key]
        figures[place[-1]] = value
    return put


def slow_int8(figures: dict, ms: float) -> None:
    for row in figures["rows"]:
        if row["model"] == figures["shipped"] and row["runtime"] == "onnx int8": row["p50_ms"] = ms


def reject(figures: dict, difference: float) -> None:
    figures["test"] |= dict(accepted=False, difference=difference, low=difference - 0.02, high=difference + 0.02)


# rule -> how to plant, value for care, value for stop, a part of the reason. None: the table has no such threshold.
FAULTS = {
    "leak": (setter("checks", "leak"), check(3), check(12), "leak: {n} of 600 images"),
    "not_proven": (setter("checks", "leak"), check(limit=0.0, recall=0.4), check(limit=0.0, recall=0.01),
                   "not proven: leak; "),
    "drift": (setter("checks", "drift"), check(60), None, "drift: 60 of 600 images"),
    "limits": (setter("checks", "label_error"), check(60, limit=0.05), None, "1 limit of the audit exceeded: label"),
    "below_majority": (setter("train", "difference_val_majority"), Estimate(0.02, -0.01, 0.05, 600),
                       Estimate(-0.02, -0.06, 0.02, 600), "not shown to be better than always naming the most"),
    "below_probe": (setter("train", "difference_val_probe"), Estimate(-0.02, -0.03, -0.01, 600),
                    Estimate(-0.07, -0.09, -0.055, 600), "worse than a linear probe on the audit's embeddings"),
    "overconfident": (setter("errors", "calibration_gap_test"), 0.12, 0.3, "overconfident by"),
    "underconfident": (setter("errors", "calibration_gap_test"), -0.12, None, "underconfident by 12 points"),
    "slices_fell": (setter("errors.json", "kept_slices"), [dict(name="cats", fell=False, fault="no image")],
                    [dict(name="cats", fell=True, fault="")], "kept slice"),
    "parity": (setter("export", "max_difference_compressed_fp32"), None, 0.96, "differs from torch by 0.96"),
    "compression_rejected": (reject, -0.54, None, "accuracy -54.0 points [-56.0, -52.0]"),
    "int8_rejected": (setter("export", "accepted_int8"), 0, None, "use model.onnx"),
    "int8_slower": (slow_int8, 3.0, None, "INT8 is slower than FP32 on this machine: 150%"),
    "control_void": (setter("control", "clock"), "none", None, "the latencies are void"),
    "test_looks": (setter("looks"), 9, 31, "times"),
    "tests_repeated": (setter("tests"), 5, None, "5 tests for acceptance"),
}
LEVELS = "ship with care", "do not ship"


@pytest.mark.parametrize("rule, level", [(rule, level) for rule in FAULTS for level in LEVELS])
def test_planted_fault_is_a_reason_with_its_figure(write, rule, level):
    plant, *values, text = FAULTS[rule]
    value = values[LEVELS.index(level)]
    changed = {}
    if value is None:   # the table has one threshold: the other one is set for this call
        value = next(v for v in values if v is not None)
        (given,) = [r for r in read_rules(root=ALL) if r.name == rule]
        limit = given.care if given.stop is None else given.stop
        changed = {rule: dict(zip(("care", "stop"), (None, limit) if level == LEVELS[1] else (limit, None)))}
    verdict = judge(write(lambda figures: plant(figures, value)), **changed)
    (reason,) = [r for r in verdict.reasons if r.rule == rule]
    n = str(value["n"]) if isinstance(value, dict) else ""
    assert reason.level == level and text.replace("{n}", n) in reason.text
    assert reason.figure > reason.limit and "RUN" in reason.see
    assert verdict.level == level and verdict.exit_code == {"ship with care": 3, "do not ship": 4}[level]


def test_calibration_and_compression_are_told_in_the_words_of_their_stages(write):
    def plant(figures: dict) -> None:
        figures["errors"]["calibration_gap_test"] = 0.12
        figures["errors.json"]["calibration_words"] = "overconfident by 12 points (n=600); temperature 1.8 mends it"
        reject(figures, -0.54)
        figures["test"]["advice"] = "stop at 79% of the MACs (compress.macs_fraction=0.794)"
    texts = [r.text for r in judge(write(plant)).reasons]
    assert texts[0] == "overconfident by 12 points (n=600); temperature 1.8 mends it"
    assert texts[1].endswith("(limit -2 points; stop at 79% of the MACs (compress.macs_fraction=0.794))")


def test_unfinished_stage_stops_and_is_named(write):
    run = write(skip=("compress", "export", "benchmark"))
    write_json(run/"compress/stage.json", dict(stage="compress", status="failed"))
    verdict = judge(run)
    assert verdict.level == "do not ship" and verdict.reasons[0].rule == "unfinished"
    assert verdict.reasons[0].text.endswith("compress failed, export has not finished")
    assert verdict.not_judged["compression_rejected"] == "compress has not finished"


def test_run_without_its_benchmark_ships_with_care(write):
    verdict = judge(write(skip=("benchmark",)))
    assert [r.rule for r in verdict.reasons] == ["incomplete"] and verdict.level == "ship with care"
    assert verdict.reasons[0].text == "1 stage not finished: benchmark has not finished"
    assert verdict.not_judged["int8_slower"] == "benchmark has not finished"


def test_changed_file_stops_and_its_figures_are_not_judged(write):
    run = write()
    record = read_json(run/"compress/verdict.json")
    write_json(run/"compress/verdict.json", record | dict(difference=0.5))
    verdict = judge(run)
    assert verdict.level == "do not ship" and verdict.reasons[0].rule == "damaged"
    assert "compress/verdict.json was changed after compress wrote it" in verdict.reasons[0].text
    assert verdict.not_judged["compression_rejected"] == "compress/verdict.json is missing or damaged"


def test_damaged_manifest_stops(write):
    run = write()
    manifest = run/"train/stage.json"
    manifest.write_text(manifest.read_text().replace("0.9", "0.99"))
    verdict = judge(run)
    assert [r.rule for r in verdict.reasons[:2]] == ["damaged", "unfinished"]
    assert "train/stage.json" in verdict.reasons[0].text


def test_stage_of_an_earlier_result_stops(write):
    run = write()
    write_stage(run, "train", good_run()["train"], [("audit", "audit.json")], model=dict(changed=1))
    verdict = judge(run)
    assert verdict.level == "do not ship" and [r.rule for r in verdict.reasons] == ["mixed"]
    said = "errors used an earlier train/model.json, compress used an earlier train/model.json"
    assert said in verdict.reasons[0].text


def test_rejected_model_blocks_nothing(write):
    def plant(figures: dict) -> None:
        reject(figures, -0.54)
        figures["shipped"] = "trained"
        figures["export"]["max_difference_compressed_fp32"] = 0.96
    verdict = judge(write(plant))
    assert verdict.level == "ship with care" and [r.rule for r in verdict.reasons] == ["compression_rejected"]


def test_absent_figure_is_not_judged_and_said(write):
    def plant(figures: dict) -> None:
        del figures["train"]["accuracy_val_probe"], figures["errors"]["calibration_gap_test"]
        figures["checks"]["leak"]["proof"] = figures["checks"]["label_error"]["proof"] = None
        figures["control"]["clock"] = "none"
    run = write(plant)
    (run/"acceptance.jsonl").unlink()
    verdict = judge(run)
    assert verdict.not_judged == {
        "below_probe": "train recorded no accuracy_val_probe", "overconfident": "errors recorded no calibration_gap_*",
        "underconfident": "errors recorded no calibration_gap_*",
        "not_proven": "no check with a limit has planted faults", "int8_slower": "the benchmark's control is void",
        "tests_repeated": "the run has tested no model for acceptance"}
    assert not set(verdict.judged) & set(verdict.not_judged)
    assert "not judged: below_probe (train recorded no accuracy_val_probe); " in "\n".join(verdict.lines(run))
    assert "Not judged: below_probe" in verdict.to_html()


def test_figure_of_another_shape_is_not_judged(write):
    def plant(figures: dict) -> None:
        figures["checks"]["leak"]["proof"] = dict(recall="high")
    verdict = judge(write(plant))
    assert verdict.level == "ship"
    assert set(verdict.not_judged) == {"not_proven"}
    assert "another shape" in verdict.not_judged["not_proven"]


def test_check_without_a_planted_fault_is_not_proven(write):
    def plant(figures: dict) -> None: figures["checks"]["leak"]["proof"]["recall"] |= dict(value=None, n=0)
    assert judge(write(plant)).reasons[0].rule == "not_proven"


def test_five_reasons_at_most_the_worst_first(write):
    def plant(figures: dict) -> None:
        for rule in "drift", "limits", "below_probe", "overconfident", "control_void", "int8_rejected":
            FAULTS[rule][0](figures, FAULTS[rule][1])
        figures["export"]["max_difference_compressed_fp32"] = 0.96
    run = write(plant)
    verdict = judge(run)
    record = verdict.to_json()
    assert record["n_reasons"] == 7 and len(record["reasons"]) == MAX_REASONS == 5
    assert [r["rule"] for r in record["reasons"]] == ["parity", "below_probe", "drift", "limits", "overconfident"]
    lines = verdict.lines(run)
    assert lines[0] == "Verdict: do not ship" and lines[1].startswith("  ! parity")
    assert lines[6] == "  … and 2 more: int8_rejected, control_void"


WRONG_RULES = {
    "unknown rule": ("drfit: {care: 1}", "no rule 'drfit'. Did you mean 'drift'?"),
    "wrong type": ("drift: {care: many}", "drift: care should be a valid number, not 'many'"),
    "truth for a number": ("drift: {stop: true}", "drift: stop should be a valid number, not True"),
    "unknown key": ("drift: {cares: 1}", "drift: cares is not known"),
    "what a rule reads": ("drift: {reads: nothing}", "drift: reads is not known"),
    "no mapping": ("drift: 3", "drift should be a mapping"),
    "wrong order": ("leak: {care: 0.5}", "leak: care (0.5) lies above stop (0.01)"),
    "a list": ("[1, 2]", "holds no rules"),
    "no YAML": ("a: [", "is not YAML"),
    "given twice": ("drift: {care: 1}\ndrift: {care: 2}", "key 'drift' is given twice"),
}


@pytest.mark.parametrize("case", WRONG_RULES)
def test_wrong_rules_are_refused_in_one_line(tmp_path, case):
    text, message = WRONG_RULES[case]
    file = tmp_path/"rules.yaml"
    file.write_text(text)
    with pytest.raises(UsageError) as error: read_rules(file, ALL)
    assert message in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


def test_rules_of_the_call_come_after_those_of_the_project(tmp_path):
    (tmp_path/PROJECT_RULES).write_text("drift: {care: 0.1, stop: 0.5}\nleak: {words: 'copies: {figure}'}")
    (tmp_path/"call.yaml").write_text("drift: {care: 0.2}")
    found = {r.name: r for r in read_rules(tmp_path/"call.yaml", tmp_path)}
    assert (found["drift"].care, found["drift"].stop, found["leak"].words) == (0.2, 0.5, "copies: {figure}")
    assert (found["leak"].care, found["leak"].stop) == (0, 0.01)


@pytest.fixture
def gate(monkeypatch, capsys, tmp_path):
    "Run `cvnb gate` in this process; return exit code, standard output and standard error."
    def call(*args: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["cvnb", "gate", *map(str, args)])
        with pytest.raises(SystemExit) as end: cli.main()
        return end.value.code or 0, *capsys.readouterr()
    return call


def test_gate_ends_with_the_verdict(gate, write, tmp_path):
    code, out, _ = gate(write())
    assert code == 0 and out == "Verdict: ship\n"
    run = write(lambda figures: setter("checks", "drift")(figures, check(60)))
    code, out, _ = gate(run)
    assert code == 3 and out.startswith("Verdict: ship with care\n  - drift: 60 of 600 images")
    assert f"{run}/audit/report.html" in out
    (tmp_path/"strict.yaml").write_text("drift: {stop: 0.05}")
    code, out, _ = gate(run, "--rules", tmp_path/"strict.yaml", "--json")
    record = json.loads(out)
    assert code == record["exit_code"] == 4 and record["level"] == "do not ship"
    assert record["reasons"][0]["rule"] == "drift"
    assert verdict_json(run, read_rules(root=ALL))["level"] == "ship with care"


def test_gate_refuses_wrong_calls_with_code_2(gate, write, tmp_path):
    run = write()
    (tmp_path/"bad.yaml").write_text("drfit: {}")
    for file, said in ("none.yaml", "is not a file"), ("bad.yaml", "drfit"):
        code, out, error = gate(run, "--rules", tmp_path/file)
        assert code == 2 and not out and said in error and len(error.splitlines()) == 1


def test_whole_run_ends_with_a_verdict_in_its_files(smoke_run):
    known = read_json(smoke_run/"run.json")["verdict"]
    assert known["level"] in ("ship", "ship with care", "do not ship") and len(known["judged"]) >= 13
    assert not {"unfinished", "mixed", "damaged", "parity"} & {r["rule"] for r in known["reasons"]}
    assert verdict_json(smoke_run) == known | dict(exit_code=EXIT_CODES[known["level"]])
    bundled = read_description(smoke_run/"export/bundle")["verdict"]
    assert bundled["stage"] == "export" and bundled["not_judged"]["control_void"] == "benchmark has not finished"
    assert "int8_rejected" in bundled["judged"] and "incomplete" in bundled["judged"]
    page = (smoke_run/"benchmark/report.html").read_text()
    assert f"Verdict: {known['level']}" in page and page.index("Verdict:") < page.index("against itself")
    command = [Path(sys.executable).with_name("cvnb"), "status", smoke_run]
    status = subprocess.run(command, capture_output=True, text=True)
    assert f"Verdict: {known['level']}" in status.stdout


BODY = 'assert not fail, "planted"\nstage.path("n.txt").write_text("x")'


def test_run_that_fails_gets_a_verdict_and_one_that_ships_nothing_none(tmp_path):
    cvnb = Path(sys.executable).with_name("cvnb")
    parameters = "fail: bool = False"
    project = write_project(tmp_path/"ships", parameters, audit=BODY, export=BODY)
    call = lambda *args: subprocess.run([cvnb, *args], capture_output=True, text=True, cwd=project)
    done = call("run", "--run", "runs/a", "--set", "export.fail=true")
    assert done.returncode == 1
    verdict = read_json(project/"runs/a/run.json")["verdict"]
    assert verdict["level"] == "do not ship" and "export failed" in verdict["reasons"][0]["text"]
    (project/PROJECT_RULES).write_text("drfit: {care: 1}")
    done = call("run", "--run", "runs/b")
    assert done.returncode == 2 and "no rule 'drfit'" in done.stderr and not (project/"runs/b").exists()
    project = write_project(tmp_path/"other", parameters, only=BODY)
    done = call("run", "--run", "runs/a")
    assert done.returncode == 0 and "Verdict" not in done.stdout
    assert not read_json(project/"runs/a/run.json").get("verdict")


def test_differences_are_those_of_the_objective_that_training_went_by(write):
    objective = dict(name="balanced", key="balanced_accuracy", words="balanced accuracy", classes=["a", "b"])

    def plant(figures: dict) -> None:
        figures["train"] |= dict(balanced_accuracy_val=0.6, balanced_accuracy_val_majority=0.5,
                                 balanced_accuracy_val_probe=0.7,
                                 difference_val_probe=Estimate(-0.1, -0.13, -0.07, 600))
        figures["metrics"] = dict(history=[], figures={}, objective=objective)
        reject(figures, -0.54)
        figures["test"]["objective"] = objective

    texts = [reason.text for reason in judge(write(plant)).reasons]
    assert "balanced accuracy -10.0 points [-13.0, -7.0] on 600 validation images (60.0% and 70.0%)" in texts[0]
    assert any("balanced accuracy -54.0 points [-56.0, -52.0] on 600 test images" in text for text in texts)
