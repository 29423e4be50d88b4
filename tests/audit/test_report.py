"""A limit says that a data set is clean only where the check has found its planted faults."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.audit import duplicates
from cvnb.audit.checks import Check, CheckValidation, make_findings
from cvnb.audit.duplicates import PlantedCopies, check_duplicates, mark_duplicates, pair_table
from cvnb.audit.report import AuditReport, audit_notes, enforce_limits
from cvnb.core.errors import CvnbError
from cvnb.metrics.estimates import estimate_proportion

NOTHING = estimate_proportion(0, 0)
MANIFEST = pd.DataFrame(dict(path=["a"], label=["x"], split=["train"], ok=[True], error=[""], kind=[""]))


def report(found: int, planted: int, policy: str = "report", **limits: float) -> AuditReport:
    "A report of three checks that share their planted faults, and of one that needs none."
    proof = CheckValidation(estimate_proportion(found, planted), NOTHING)
    shared = [Check(name, make_findings(), 100, 0.9, proof) for name in ("near_duplicate", "leak", "two_labels")]
    return AuditReport("x", 100, 100, [*shared, Check("animated", make_findings(), 100)], limits, policy)


@pytest.mark.parametrize("found, planted, said", [
    (79, 100, "NOT PROVEN: leak, two_labels found 0.7900"), (0, 0, "NOT PROVEN: leak, two_labels had no planted")])
def test_limit_on_a_check_that_finds_too_few_planted_faults_counts_as_exceeded(found, planted, said):
    limits = dict(leak=0, two_labels=0, animated=0)
    blind = report(found, planted, "fail", **limits)
    assert [c.name for c in blind.not_proven] == ["leak", "two_labels"] and not blind.exceeded
    assert "NOT PROVEN: leak, two labels. The run ends here." in blind.verdict
    assert blind.table.limit.tolist() == ["", "0 NOT PROVEN", "0 NOT PROVEN", "0"]
    notes = [note for note in audit_notes(blind, MANIFEST) if note.get("exceeded")]
    assert len(notes) == 1 and notes[0]["text"].startswith(said)
    with pytest.raises(CvnbError, match="NOT PROVEN: leak, two_labels"): enforce_limits(blind)
    checks = blind.to_json()["checks"]
    assert [checks[name]["proven"] for name in ("leak", "animated")] == [False, True]


def test_proven_limit_without_findings_is_clean():
    proven = report(80, 100, "fail", leak=0, two_labels=0)
    assert not proven.not_proven and "No limit is exceeded. The run continues." in proven.verdict
    enforce_limits(proven)


def test_unproven_check_without_a_limit_is_a_note_and_ends_no_run():
    blind = report(0, 100, "fail", animated=0)
    enforce_limits(blind)
    notes = audit_notes(blind, MANIFEST)
    assert [note["text"] for note in notes] == [
        "not proven, so no finding does not mean no fault: near_duplicate, leak, two_labels"]


def test_check_that_no_copy_can_reach_is_switched_off_with_a_recall_of_zero(monkeypatch):
    monkeypatch.setattr(duplicates, "pick_threshold", lambda *_: 50.0)   # as where relatives score above every copy
    images = np.random.default_rng(0).integers(0, 255, (120, 32, 32, 3), np.uint8)
    copies = np.clip(images[:80] * 0.7, 0, 255).astype(np.uint8)
    planted = PlantedCopies(copies, np.arange(80), np.array(["brightness"] * 80), np.ones(80),
                            np.arange(80) // 20 % 2 == 0)
    near = duplicates.find_near_duplicates(images, copies, planted, 0.95)
    assert near.off == "no similarity that copies reach keeps the precision of 0.95"
    assert near.validation.recall.value == 0 and near.pairs.empty
    table = pd.DataFrame(dict(path=[f"{i}.png" for i in range(120)], label="x", split="train", ok=True, width=64,
                              height=64, pixel_sha256=[str(i) for i in range(120)]))
    table = mark_duplicates(table)
    _, check, leak, _ = check_duplicates(table, pair_table(near.pairs, table), near)
    assert check.off and leak.off and check.row["images"] == "0 (switched off)"
    blind = AuditReport("x", 120, 120, [check, leak], dict(leak=0))
    texts = [note["text"] for note in audit_notes(blind, MANIFEST)]
    assert texts[0].startswith("NOT PROVEN: leak found 0") and any("leak is switched off: no simil" in t for t in texts)
