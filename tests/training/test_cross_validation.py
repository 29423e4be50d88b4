"""Cross-validation: no image influences the model that predicts it, and finished folds are kept."""
from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from fit_helpers import BATCHNORM, NO_BATCHNORM, PLAIN, Recorder, manifest_rows
from train_job import CLASSES, fresh

from cvnb.core.errors import UsageError
from cvnb.data.splits import assign_folds
from cvnb.metrics.estimates import estimate_mean
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model
from cvnb.tasks.labels import get_task
from cvnb.training import cross_validation
from cvnb.training.cross_validation import count_folds, cross_validate
from cvnb.training.fit import fit
from cvnb.training.loaders import LabelledImages


def test_image_does_not_influence_the_model_that_predicts_it(data, tmp_path, monkeypatch):
    "Neither by training nor by choosing the epoch; equal pixels are one image."
    train, seen = data[0], []
    targets = train.targets.copy()
    targets[1] = targets[0]
    train = replace(train, targets=targets)
    rows = manifest_rows(train)
    rows.loc[1, "pixel_sha256"] = rows.loc[0, "pixel_sha256"]

    def recording_fit(model, trained, holdout, *args, **more):
        seen.append((set(trained.names), set(holdout.names)))
        return fit(model, trained, holdout, *args, **more)

    monkeypatch.setattr(cross_validation, "fit", recording_fit)
    crossed = cross_validate(lambda: fresh(NO_BATCHNORM), rows, train, replace(PLAIN, keep="best"), tmp_path, 3)
    assert len(seen) == 3
    for i, (trained, holdout) in enumerate(seen):
        predicted = set(crossed.predictions.path[crossed.predictions.fold == i])
        assert predicted and holdout and not trained & holdout and not predicted & (trained | holdout)
        assert len(trained | holdout | predicted) == 300
    assert crossed.predictions.fold[0] == crossed.predictions.fold[1]
    values = crossed.table.accuracy.to_list()
    assert crossed.metrics["accuracy"] == estimate_mean(values, 1 / 2, (0, 1)) != estimate_mean(values, 0, (0, 1))


def test_fold_measures_each_distinct_image_once(data, tmp_path):
    "Twenty copies of one image weigh as one."
    train = data[0]
    index = np.concatenate([np.arange(100), np.zeros(20, int)])
    train = LabelledImages(train.images[index], train.targets[index], [f"{i:03}.png" for i in range(120)])
    rows = manifest_rows(train).assign(pixel_sha256=[str(i) for i in index])
    crossed = cross_validate(lambda: fresh(NO_BATCHNORM), rows, train, replace(PLAIN, epochs=1), tmp_path, 3)
    once = crossed.predictions.drop_duplicates("pixel_sha256")
    assert len(crossed.predictions) == 120 and len(once) == 100
    assert crossed.table.accuracy.to_list() == pytest.approx(once.groupby("fold").correct.mean().to_list())
    assert crossed.table.accuracy.to_list() != crossed.predictions.groupby("fold").correct.mean().to_list()


def test_folds_of_another_training_say_why_they_are_trained_again(data, tmp_path):
    train, said = data[0].take(np.arange(60)), []
    rows = manifest_rows(train)
    train_folds = lambda **changes: cross_validate(
        lambda: fresh(NO_BATCHNORM), rows, train, replace(PLAIN, batch_size=20, epochs=1, **changes), tmp_path, 2,
        announce=said.append)
    train_folds()
    train_folds()
    assert said == []
    train_folds(lr=0.001)
    assert said == ["finished folds are trained again: lr changed from 0.005 to 0.001"] * 2


def test_interrupted_fold_gives_the_same_result_as_without_interruption(data, tmp_path):
    "The fold has the same starting weights, whether the folds before were trained or read."
    train, rows = data[0], manifest_rows(data[0])
    make_model = lambda: create_model(BATCHNORM, CLASSES, 16)   # without a seed of its own
    progress = Recorder()

    def kill_in_second_epoch(done: float, text: str, **_: object) -> None:
        if text.startswith("fold 2/3") and done > 0.5: raise SystemExit("killed")

    expected = cross_validate(make_model, rows, train, PLAIN, tmp_path/"whole", 3)
    with pytest.raises(SystemExit):
        cross_validate(make_model, rows, train, PLAIN, tmp_path/"cut", 3, kill_in_second_epoch)
    torch.rand(7)
    found = cross_validate(make_model, rows, train, PLAIN, tmp_path/"cut", 3, progress)
    assert min(progress.done) > 0.45, "it started anew"
    pd.testing.assert_frame_equal(found.predictions, expected.predictions)
    assert found.table.equals(expected.table) and list(found.predictions.pixel_sha256) == train.names


def test_other_starting_weights_train_all_folds(data, tmp_path):
    train, rows, progress = data[0], manifest_rows(data[0]), Recorder()

    def other_model() -> VisionModel:
        model = fresh(NO_BATCHNORM)
        model.net.get_classifier().bias.data += 1
        return model

    cross_validate(lambda: fresh(NO_BATCHNORM), rows, train, replace(PLAIN, epochs=1), tmp_path, 3)
    cross_validate(other_model, rows, train, replace(PLAIN, epochs=1), tmp_path, 3, progress)
    assert min(progress.done) < 0.35, "folds of other starting weights were read"


@pytest.mark.parametrize("seed", range(6))
def test_holdout_is_about_a_tenth_for_any_groups(seed):
    "One group is as large as all others; copies count once; too few images are an error."
    names = [str(i) for i in range(60)]
    rows = pd.DataFrame(dict(path=names, label="a", ok=True, pixel_sha256=names,
                             group=["large"] * 30 + [f"small {i}" for i in range(30)]))
    options = replace(PLAIN, keep="best", seed=seed)
    assert cross_validation._select_holdout(rows, PLAIN) is None
    assert 3 <= cross_validation._select_holdout(rows, options).sum() <= 12
    copies = rows.assign(pixel_sha256=[str(i % 9) for i in range(60)], group=None)
    with pytest.raises(UsageError, match="too few images per fold"): cross_validation._select_holdout(copies, options)


def test_each_fold_selects_its_images_twice(data, tmp_path, monkeypatch):
    "Once for training and once for prediction, because a selection copies the images."
    taken, take = [], LabelledImages.take
    monkeypatch.setattr(LabelledImages, "take", lambda self, index: taken.append(len(index)) or take(self, index))
    rows = manifest_rows(data[0])
    cross_validate(lambda: fresh(NO_BATCHNORM), rows, data[0], replace(PLAIN, epochs=1), tmp_path, 3)
    assert len(taken) == 6 and sum(taken) == 900


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_other_tasks_are_cross_validated(data, tmp_path, name):
    train, task = data[0], get_task(name)
    if name == "multilabel":
        labels = pd.Series([f"{'odd' if d % 2 else 'even'}{'|large' * (d in (6, 8))}" for d in train.targets])
    else: labels = pd.Series([f"{ink:.3f}" for ink in train.images.mean((1, 2, 3)) / 100])
    classes = task.classes(labels)
    train = replace(train, targets=task.encode(labels, classes))
    rows = pd.DataFrame(dict(path=train.names, split="train", label=labels, pixel_sha256=train.names))
    make_model = lambda: create_model(NO_BATCHNORM, classes, 16, task=name, **task.target_scale(train.targets))
    crossed = cross_validate(make_model, rows, train, replace(PLAIN, epochs=1), tmp_path, 3)
    assert crossed.table.n_val.max() - crossed.table.n_val.min() < 30 and len(crossed.predictions) == len(rows)


def test_rare_labels_are_merged_and_spread_over_folds(data, tmp_path):
    "Three images have a label of their own, beside a label of a hundred images."
    labels = pd.Series(["any|rare"] * 3 + ["any"] * 97 + ["other", "any|even"] * 100)
    task = get_task("multilabel")
    classes = task.classes(labels)
    train = replace(data[0], targets=task.encode(labels, classes))
    rows = pd.DataFrame(dict(path=train.names, split="train", label=labels, pixel_sha256=train.names))
    make_model = lambda: create_model(NO_BATCHNORM, classes, 16, task="multilabel")
    crossed = cross_validate(make_model, rows, train, replace(PLAIN, epochs=1), tmp_path, 5)
    assert crossed.table.n_val.tolist() == [60] * 5 and len(crossed.predictions) == 300


def test_fold_without_an_image_of_a_class_is_refused(data, tmp_path):
    labels = pd.Series(["any|rare"] + ["any"] * 99 + ["other", "any|even"] * 100)
    task = get_task("multilabel")
    classes = task.classes(labels)
    train = replace(data[0], targets=task.encode(labels, classes))
    rows = pd.DataFrame(dict(path=train.names, split="train", label=labels, pixel_sha256=train.names))
    make_model = lambda: create_model(NO_BATCHNORM, classes, 16, task="multilabel")
    with pytest.raises(UsageError, match=r"fold \d has no training image of rare"):
        cross_validate(make_model, rows, train, PLAIN, tmp_path, 5)
    one_class = rows.assign(label=np.where(rows.index == 0, "rare", "b"), ok=True)
    with pytest.raises(UsageError, match="5 folds are not possible: 'rare' has 1 images.*Add images, or leave it out"):
        assign_folds(one_class, 5)


def grouped_rows(values: list[str]) -> pd.DataFrame:
    n = len(values)
    return pd.DataFrame(dict(path=[f"{i}.png" for i in range(n)], label=["a", "b"] * (n // 2), split="train", ok=True,
                             pixel_sha256=[f"{i:064x}" for i in range(n)], meta_site=values))


def plan(rows: pd.DataFrame, k: int, by: str) -> list[set[str]]:
    "Return the values that each fold predicts."
    folds = cross_validation._plan_folds(rows, get_task("classification"), PLAIN, k, by)
    assert sorted(np.concatenate([f.val for f in folds])) == list(range(len(rows)))
    assert all(not set(f.val) & set(f.train) for f in folds)
    return [set(rows.meta_site.iloc[f.val]) for f in folds]


def test_leave_one_group_out_has_a_fold_for_each_value():
    rows = grouped_rows([*"xxyyzz"] * 6)
    assert plan(rows, 0, "site") == [{"x"}, {"y"}, {"z"}]
    assert count_folds(dict(train=rows[:20], val=rows[20:]), 0, "site") == 3


def test_copies_in_two_groups_are_predicted_by_one_fold():
    rows = grouped_rows([*"xxyyzz"] * 6)
    rows.loc[2, "pixel_sha256"] = rows.pixel_sha256[0]   # an x and a y
    assert sorted(map(sorted, plan(rows, 0, "site"))) == [["x", "y"], ["z"]]


def test_folds_by_a_column_keep_its_values_together():
    rows = grouped_rows([f"patient {i // 4}" for i in range(80)])
    folds = plan(rows, 4, "site")
    assert len(folds) == 4 and sum(map(len, folds)) == 20 and len(set.union(*folds)) == 20


@pytest.mark.parametrize(("values", "by", "message"), [
    ([*"xyz"] * 12, "sight", "Did you mean 'site'"), (["x", ""] * 12, "site", "12 of 24 .* have no site"),
    (["x"] * 12, "site", "are of one site"),
    ([f"p{i // 2}" for i in range(60)], "site", "has 30 groups, .* 20 at most")])
def test_a_column_that_makes_no_folds_is_refused(values, by, message):
    rows = grouped_rows(values)
    with pytest.raises(UsageError, match=message): count_folds(dict(train=rows[:9], val=rows[9:]), 0, by)
