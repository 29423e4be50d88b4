"""A model is accepted by the paired test, by group where images come in groups."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd

from cvnb.compress.acceptance import check_acceptance, confirm_acceptance, margin_notes
from cvnb.compress.error_budget import read_tests
from cvnb.core.files import to_plain
from cvnb.core.output_formats import VerdictRecord
from cvnb.core.records import check_record
from cvnb.core.stage import Stage
from cvnb.metrics.classification import accuracy
from cvnb.metrics.objective import Objective

NAMES = ("ok", "defect")
BALANCED, RECALL = Objective("balanced", NAMES), Objective("recall", NAMES, "defect")
F1 = Objective("f1", NAMES, "defect")
COST = Objective("cost", NAMES, costs=((0.0, 0.1), (10.0, 0.0)))


def tables(n_groups: int, size: int) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    "Predictions of two models, of which the new one loses two whole groups, and the images with their groups."
    group = np.repeat(np.arange(n_groups), size)
    paths = [f"{i}.png" for i in range(len(group))]
    images = pd.DataFrame(dict(path=paths, pixel_sha256=paths, group=[f"g{i}" for i in group]))
    return images, pd.DataFrame(dict(path=paths, correct=True)), pd.DataFrame(dict(path=paths, correct=group > 1))


def test_images_of_one_group_count_as_few():
    images, reference, new = tables(60, 10)
    alone = check_acceptance(reference, new.sample(frac=1, random_state=0), 0.06)
    grouped = check_acceptance(reference, new, 0.06, images=images)
    assert alone.accepted and not grouped.accepted and grouped.low < alone.low
    assert (alone.n_groups, grouped.n_groups, grouped.n) == (0, 60, 600) and grouped.effect > 5
    expected = accuracy(new.correct, np.repeat(np.arange(60), 10))
    assert (grouped.plain_accuracy.low, grouped.plain_accuracy.n_groups) == (expected.low, 60)
    assert grouped.to_json()["accuracy"]["n_groups"] == 60


def test_four_groups_prove_nothing():
    images, reference, _ = tables(4, 200)
    result = check_acceptance(reference, reference, 0.06, images=images)
    assert not result.accepted and "4 groups of images prove nothing" in result.notes[0]


def rare_class(lost: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    "Predictions of a model that is always right, and of one that misses some of the 200 defects among 3000 images."
    label = np.array(["ok"] * 2800 + ["defect"] * 200, dtype=object)
    predicted = label.copy()
    predicted[3000 - lost:] = "ok"
    paths = [f"{i:04}.png" for i in range(3000)]
    right = pd.DataFrame(dict(path=paths, label=label, predicted=label, correct=True))
    return right, right.assign(predicted=predicted, correct=predicted == label)


def test_loss_of_a_rare_class_is_rejected_by_the_objective_and_accepted_by_accuracy():
    reference, new = rare_class(30)
    for objective, accepted in ((None, True), (BALANCED, False), (RECALL, False), (F1, False), (COST, True)):
        result = check_acceptance(reference, new, 0.03, objective=objective)
        assert result.accepted == accepted, result.objective.words
    assert not check_acceptance(reference, new, 0.005, objective=COST).accepted
    assert "its F1 of defect differs by -8.1" in check_acceptance(reference, new, 0.03, objective=F1).notes[0]
    balanced = check_acceptance(reference, new, 0.03, objective=BALANCED)
    record = check_record(to_plain(balanced.to_json()), VerdictRecord, "verdict.json")
    assert record["difference"] == -0.075 and record["accuracy_difference"]["value"] == -0.01
    assert record["objective_value"]["value"] == 0.925 and record["smallest_margin"] < 0.02
    assert record["accuracy_given_acceptance"] == record["accuracy"], "no correction is known for other objectives"


def test_objective_that_holds_is_accepted_and_says_what_it_is():
    reference, new = rare_class(0)
    result = check_acceptance(reference, new, 0.03, objective=BALANCED)
    assert result.accepted and result.notes == [] and "balanced accuracy" in result._repr_markdown_()
    by_f1 = check_acceptance(reference, new, 0.03, objective=F1)
    assert "accuracy accepts, and the bootstrap" in by_f1._repr_markdown_()


def test_too_few_images_of_a_class_are_named_before_and_after():
    reference, new = rare_class(0)
    some = reference.index >= 2000
    result = check_acceptance(reference[some], new[some], 0.005, objective=BALANCED)
    assert not result.accepted and "the smallest limit that these images can prove is -1.0" in result.notes[0]
    counts = dict(test=dict(ok=800, defect=20))
    (note,) = margin_notes(820, 0.02, objective=BALANCED, counts=counts)
    assert "cannot prove a margin of 0.02 of balanced accuracy" in note
    assert margin_notes(820, 0.2, objective=BALANCED, counts=counts) == []
    assert margin_notes(820, 0.02, counts=counts) == [], "accuracy needs 189 images of any class"


def test_questions_of_different_objectives_are_different_tests(tmp_path):
    reference, new = rare_class(0)
    stage = Stage("compress", tmp_path)
    for _ in range(2):
        for objective in (None, BALANCED, replace(BALANCED, why="other words")):
            confirm_acceptance(stage, reference, new, 0.05, objective=objective)
    assert len(read_tests(tmp_path)) == 2
