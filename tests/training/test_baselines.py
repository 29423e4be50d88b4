"""A training stands beside what takes seconds, and says where it is worse."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from cvnb.core.errors import CvnbError
from cvnb.metrics.estimates import Estimate
from cvnb.metrics.objective import Objective
from cvnb.tasks.labels import get_task
from cvnb.training import baselines as module
from cvnb.training.baselines import (
    WatchCurves,
    baseline_differences,
    compare_with_baselines,
    fit_baselines,
    read_split_embeddings,
)
from cvnb.training.loaders import LabelledImages, SplitImages

SIZES = dict(train=120, val=60, test=60)
LABELS = {"classification": ["a", "b", "c"], "multilabel": ["a|b", "b", "c"], "regression": ["1", "2.5", "9"]}


def split_data(task: str) -> tuple[SplitImages, dict[str, np.ndarray]]:
    "Images of three labels with embeddings that tell the label; half of the images have the first one."
    kind, rng = get_task(task), np.random.default_rng(0)
    rows, vectors, images, classes = {}, {}, {}, None
    for split, n in SIZES.items():
        which = np.where(np.arange(n) % 2 == 0, 0, rng.integers(1, 3, n))
        labels = pd.Series([LABELS[task][i] for i in which])
        rows[split] = pd.DataFrame(dict(path=[f"{split}/{i}.png" for i in range(n)], label=labels, split=split))
        classes = classes or kind.classes(labels)
        pixels = np.zeros((n, 4, 4, 3), np.uint8)
        images[split] = LabelledImages(pixels, kind.encode(labels, classes))
        vectors[split] = (np.eye(3)[which] + 0.1 * rng.normal(size=(n, 3))).astype(np.float32)
    return SplitImages("", kind, classes, 4, rows, images, []), vectors


@pytest.mark.parametrize("task", LABELS)
def test_probe_learns_what_embeddings_tell_and_the_constant_answer_does_not(task):
    data, vectors = split_data(task)
    metrics = fit_baselines(vectors, data).metrics("val", "test")
    main = data.task.main_metric
    assert metrics[f"{main}_test_probe"].value > 0.9
    assert metrics[f"{main}_val_majority"].value < 0.7
    if task == "classification": assert metrics["accuracy_val_majority"].value == 0.5


def test_baselines_draw_no_random_numbers_of_the_training():
    data, vectors = split_data("classification")
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    fit_baselines(vectors, data)
    assert torch.equal(before, torch.random.get_rng_state())


def test_large_training_set_is_sampled_and_that_is_said(monkeypatch):
    monkeypatch.setattr(module, "MAX_PROBE_IMAGES", 50)
    data, vectors = split_data("classification")
    baselines = fit_baselines(vectors, data)
    assert baselines.notes == ["the probe has learned from 50 of 120 training images"]
    assert baselines.notes[0] in baselines._repr_html_()


def test_embeddings_belong_to_their_images_also_with_quarantine_and_broken_files(tmp_path: Path):
    manifest = pd.DataFrame(dict(path=list("abcdef"), kind=["", "truncated", "", "", "", ""],
                                 ok=[True, False, False, True, False, True],   # c: quarantine, e: dropped
                                 excluded=[False, False, False, False, True, False]))
    manifest.to_parquet(tmp_path/"manifest.parquet")
    np.save(tmp_path/"embeddings.npy", np.array([[0], [2], [3], [5]], np.float32))   # a c d f
    rows = dict(train=pd.DataFrame(dict(path=["f", "a"])), val=pd.DataFrame(dict(path=["d"])))
    found = read_split_embeddings(tmp_path/"embeddings.npy", tmp_path/"manifest.parquet", rows)
    assert found["train"].tolist() == [[5], [0]] and found["val"].tolist() == [[3]]
    np.save(tmp_path/"embeddings.npy", np.zeros((6, 1), np.float32))
    with pytest.raises(CvnbError, match="6 rows for 4 readable images. Run the audit again"):
        read_split_embeddings(tmp_path/"embeddings.npy", tmp_path/"manifest.parquet", rows)


def test_model_is_called_worse_only_by_the_paired_test():
    data, vectors = split_data("classification")
    baselines = fit_baselines(vectors, data)
    compare = lambda right: compare_with_baselines(
        baselines, pd.DataFrame(dict(correct=np.arange(60) < right)),
        dict(accuracy_val=Estimate(right / 60, 0, 1, 60)), {})
    assert compare(60) == [] and compare(57) == []
    (note,) = compare(45)
    assert "a linear probe on the audit's embeddings is better than the model" in note and "train.weights" in note
    assert len(compare(10)) == 2, "worse than the constant answer, too"


def test_model_is_held_against_the_classifier_of_the_audit():
    data, vectors = split_data("classification")
    baselines = fit_baselines(vectors, data)
    right = pd.DataFrame(dict(correct=np.ones(60, bool)))
    own = dict(accuracy_val=Estimate(0.9, 0.85, 0.94, 60))
    compare = lambda low: compare_with_baselines(
        baselines, right, own, dict(classifier_accuracy=dict(value=0.97, low=low, high=0.99, n=240)))
    (note,) = compare(0.95)
    assert "the audit's label check is better than the model: accuracy 0.9700 on 240 images" in note
    assert compare(0.93) == [] and compare(None) == []


def test_difference_of_few_groups_has_no_interval():
    data, vectors = split_data("classification")
    data.rows["val"]["pixel_sha256"] = data.rows["val"].path
    data.rows["val"]["group"] = [f"g{i % 4}" for i in range(60)]
    baselines = fit_baselines(vectors, data)
    (d, _) = baseline_differences(baselines, pd.DataFrame(dict(correct=np.arange(60) < 50))).values()
    assert np.isnan(d.low) and np.isnan(d.high) and d.n_groups == 4


@pytest.mark.parametrize("losses, said", [
    ([0.9, 0.8, 0.7], ""), ([1.2], "above that of the same answer"), ([float("nan")], "above that of the same answer"),
    ([0.7, 0.8, 0.9], "rises from the first epoch"), ([0.7, 0.9, 0.8], "")])
def test_curves_of_a_training_that_goes_wrong_are_reported_once(losses, said):
    found = []
    watch = WatchCurves(lambda *_, **__: None, 1.0, found.append)
    for i in range(len(losses)): watch(0.1, "epoch", loss_val=losses[:i + 1])
    watch(0.2, "epoch", loss_val=losses)
    assert len(found) == bool(said) and all(said in text for text in found)


def test_thresholds_of_the_probe_are_measured_on_images_that_did_not_fit_them():
    "Thresholds fitted on the validation images flatter them: the comparison takes answers by fits on other images."
    data, vectors = split_data("classification")
    noisy = {split: 0.3 * v + np.random.default_rng(1).normal(size=v.shape).astype(np.float32)
             for split, v in vectors.items()}
    objective = Objective("balanced", tuple(data.classes))
    baselines = fit_baselines(noisy, data, objective=objective)
    crossed = baselines.decision.answers
    assert crossed is not None and (baselines.answers("probe", "val") == crossed).all()
    assert len(baselines.answers("probe", "test")) == 60
    table = pd.DataFrame(dict(correct=np.zeros(60, bool)))
    same = baseline_differences(baselines, table, crossed)
    assert same["difference_val_probe"].value == 0


def test_advice_to_a_fine_tuned_model_is_not_to_fine_tune():
    data, vectors = split_data("classification")
    baselines = fit_baselines(vectors, data)
    wrong = pd.DataFrame(dict(correct=np.arange(60) < 45))
    own = dict(accuracy_val=Estimate(0.75, 0.6, 0.85, 60))
    (note,) = compare_with_baselines(baselines, wrong, own, {}, pretrained=True)
    assert "--minutes" in note and "weights=imagenet" not in note


def test_fewer_right_answers_than_the_majority_are_said_where_another_figure_is_optimised():
    "The recall of one class is highest where every image gets its name."
    data, vectors = split_data("classification")
    objective = Objective("recall", tuple(data.classes), data.classes[1])
    baselines = fit_baselines(vectors, data, objective=objective)
    table = pd.DataFrame(dict(correct=np.arange(60) < 12))
    own = dict(recall_val=Estimate(1.0, 0.9, 1.0, 15), accuracy_val=Estimate(0.2, 0.12, 0.32, 60))
    notes = compare_with_baselines(baselines, table, own, {}, np.ones(60, int))
    assert any("the same answer for every image is right more often than the model" in note for note in notes)
