"""Labels, losses, metrics and prediction tables of the tasks, compared with scikit-learn and torch; invalid labels."""
from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import (
    average_precision_score,
    balanced_accuracy_score,
    f1_score,
    mean_absolute_error,
    r2_score,
    root_mean_squared_error,
)

from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import write_json
from cvnb.data.columns import LABEL_SEPARATOR
from cvnb.data.splits import assign_splits
from cvnb.data.tables import write_table
from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import ModelSpec, task_of
from cvnb.models.weights import create_model, load_classifier, load_model, save_model
from cvnb.pipeline.params import read_contract
from cvnb.tasks.labels import TASKS, get_task, replace_labels_by_strata

LABELS = dict(classification=["cat", "dog", "cat", "eel"] * 5, multilabel=["red|big", "red", "blue", "big|blue"] * 5,
              regression=["1.5", "2", "-3e1", "40"] * 5)


STAGES = Path(__file__).parents[2]/"nbs"/"stages"


def make_example(name: str) -> tuple:
    "Make a task with labels, their targets and logits that are partly right."
    labels, task = pd.Series(LABELS[name]), get_task(name)
    classes = task.classes(labels)
    targets = task.encode(labels, classes)
    noise = np.random.default_rng(0).normal(0, 1, (len(labels), task.n_outputs(classes))).astype(np.float32)
    task = get_task(name, task.target_scale(targets).get("target_std", ()))
    perfect = dict(classification=lambda: np.eye(len(classes), dtype=np.float32)[targets],
                   multilabel=lambda: 2 * targets - 1, regression=lambda: targets)[name]()
    return task, labels, classes, targets, perfect + noise


def test_labels_of_equal_meaning_are_written_alike() -> None:
    labels = pd.Series([" b|a", "a|b", "a", "1.0", "1", "x", "12_5"])
    assert get_task("multilabel").normalize_labels(labels).nunique() == 6
    assert get_task("regression").normalize_labels(labels[3:]).tolist() == ["1", "1", "x", "12_5"]
    assert get_task("classification").normalize_labels(labels).equals(labels)


def test_unknown_task_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(UsageError, match="Did you mean 'multilabel'"): get_task("multilable")


def test_stages_offer_every_task() -> None:
    parameters = {f.stem: {p.name: p for p in read_contract(f).params} for f in STAGES.glob("*.ipynb")}
    offered = {stage: get_args(params["task"].type) for stage, params in parameters.items() if "task" in params}
    assert offered == dict.fromkeys(["audit", "train"], tuple(TASKS))


@pytest.mark.parametrize("name", TASKS)
def test_task_describes_its_outputs(name: str) -> None:
    task, _, classes, targets, logits = make_example(name)
    assert task.name == name and logits.shape == (len(targets), task.n_outputs(classes))
    predictions = task.predict(torch.from_numpy(logits))
    assert task.output_shape(classes) == ["batch", *predictions.shape[1:]]
    assert task.output_name == ("probabilities" if task.has_classes else "values")
    assert not task.has_classes or 0 <= predictions.min() < predictions.max() <= 1
    counts = task.class_counts(targets, classes)
    assert len(counts) == (len(classes) if task.has_classes else 0)


@pytest.mark.parametrize("name", TASKS)
def test_batches_of_targets_are_collated_and_joined(name: str) -> None:
    task, _, classes, targets, logits = make_example(name)
    order = np.random.default_rng(0).permutation(len(targets))
    parts = [task.collate_targets(targets, torch.from_numpy(index)) for index in np.split(order, 2)]
    assert task.concatenate(parts).equal(torch.from_numpy(targets[order]))
    soft = task.soft_targets(parts[0], task.n_outputs(classes))
    assert soft.dtype == torch.float32 and soft.shape == (len(targets) // 2, len(classes))
    assert np.array_equal(task.average_mirrored(logits, logits[:, ::-1]), (logits + logits[:, ::-1]) / 2)


@pytest.mark.parametrize("name", TASKS)
def test_score_is_the_main_metric(name: str) -> None:
    task, _, _, targets, logits = make_example(name)
    metrics = task.metrics(logits, targets)
    assert next(iter(metrics)) == task.main_metric
    score = task.score(torch.from_numpy(logits), torch.from_numpy(targets))
    assert score == pytest.approx(metrics[task.main_metric].value, abs=1e-6)
    assert all(m.low <= m.value <= m.high and m.n == len(targets) for m in metrics.values())


def test_metrics_agree_with_scikit_learn() -> None:
    _, _, _, targets, logits = make_example("classification")
    found = get_task("classification").metrics(logits, targets)
    assert found["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(targets, logits.argmax(1)))
    _, _, _, targets, logits = make_example("multilabel")
    found, claimed = get_task("multilabel").metrics(logits, targets), logits > 0
    assert found["f1"].value == pytest.approx(f1_score(targets, claimed, average="micro"))
    assert found["f1_macro"].value == pytest.approx(f1_score(targets, claimed, average="macro"))
    assert found["mean_average_precision"].value == pytest.approx(average_precision_score(targets, logits))
    equal = logits.round()     # many scores are equal
    tied = get_task("multilabel").metrics(equal, targets)["mean_average_precision"]
    assert tied.value == pytest.approx(average_precision_score(targets, equal))
    assert found["all_labels_right"].value == pytest.approx((targets == claimed).all(1).mean())
    _, _, _, targets, logits = make_example("regression")
    found = get_task("regression").metrics(logits, targets)
    for name, theirs in dict(r2=r2_score, mae=mean_absolute_error, rmse=root_mean_squared_error).items():
        assert found[name].value == pytest.approx(theirs(targets, logits), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_class_index_and_one_hot_row_have_the_same_loss(smoothing: float, weighted: bool) -> None:
    task, _, classes, targets, logits = make_example("classification")
    weights = torch.tensor([1.0, 2.0, 5.0]) if weighted else None
    logits, targets = torch.from_numpy(logits), torch.from_numpy(targets)
    hard = task.loss(logits, targets, smoothing, weights).item()
    expected = F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="none").mean().item()
    assert hard == pytest.approx(expected)
    one_hot = task.soft_targets(targets, len(classes))
    assert task.loss(logits, one_hot, smoothing, weights).item() == pytest.approx(hard, rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_loss_of_a_batch_is_the_mean_of_its_parts(name: str) -> None:
    "Processes, accumulated batches and halved batches each see a part; here one has common and one has rare labels."
    task, _, classes, targets, logits = make_example(name)
    order = np.argsort(targets.reshape(len(targets), -1)[:, 0], kind="stable")[:len(targets) // 2 * 2]
    logits, targets = torch.from_numpy(logits[order]), torch.from_numpy(targets[order])
    weights = None if name == "regression" else torch.arange(1.0, len(classes) + 1)
    half = len(order) // 2
    loss = lambda part: task.loss(logits[part], targets[part], 0.1, weights).item()
    first, second = loss(slice(half)), loss(slice(half, None))
    assert loss(slice(None)) == pytest.approx((first + second) / 2, rel=1e-5)
    assert first != pytest.approx(second, rel=1e-2)


def test_r2_of_several_numbers_is_their_mean() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal([0, 500], [1, 20], (30, 2)).astype(np.float32)
    logits = targets + rng.normal(0, [0.5, 15], (30, 2)).astype(np.float32)
    found = get_task("regression").metrics(logits, targets)
    score = get_task("regression").score(torch.from_numpy(logits), torch.from_numpy(targets))
    assert score == pytest.approx(r2_score(targets, logits), rel=1e-4)
    assert found["r2"].value == pytest.approx(r2_score(targets, logits))
    assert list(found) == ["r2", "mae_1", "rmse_1", "mae_2", "rmse_2"]


@pytest.mark.parametrize("name, label, names", [
    ("classification", "red|big", ["red|big"]), ("multilabel", "red| big", ["big", "red"]),
    ("regression", "1.5|-2e1", []), ("regression", "1.5|red", ["1.5|red"])])
def test_label_names_its_classes(name: str, label: str, names: list[str]) -> None:
    assert get_task(name).names_in(label) == names


@pytest.mark.parametrize("name", TASKS)
def test_metrics_lie_in_their_range(name: str) -> None:
    task, _, _, targets, logits = make_example(name)
    for metric, estimate in task.metrics(logits, targets).items():
        low, high = task.metric_range(metric)
        assert low <= estimate.low <= estimate.value <= estimate.high <= high


def test_multilabel_smoothing_moves_both_targets_to_one_half() -> None:
    p = torch.sigmoid(torch.tensor(2.0))
    for sure, target in (2.0, 1.0), (-2.0, 0.0):     # separately: in one mean a one-sided error could cancel out
        loss = get_task("multilabel").loss(torch.tensor([[sure]]), torch.tensor([[target]]), 0.2)
        assert loss.item() == pytest.approx((-0.9 * p.log() - 0.1 * (1 - p).log()).item())


def test_regression_loss_is_measured_in_standard_deviations() -> None:
    task = get_task("regression", (2.0, 50.0))
    predicted = torch.tensor([[1.0, 25.0], [4.0, 100.0]])     # errors of 0.5 and 2 standard deviations
    assert task.loss(predicted, torch.zeros(2, 2)).item() == pytest.approx((0.5 * 0.25 + 1.5) / 2)


@pytest.mark.parametrize("name, label, message", [
    ("classification", "cow", "'cow' of 1.png is not among the 3 classes"),
    ("multilabel", "red|cow", "'cow' of 1.png"),
    ("multilabel", "red||big", "of 1.png has an empty part"), ("multilabel", "red|", "empty part"),
    ("regression", "heavy", "'heavy' of 1.png is not a number"),
    ("regression", "1e39", "'1e39' of 1.png is not a number, or too large for 32 bits"),
    ("regression", "inf", "not a number"), ("regression", "nan", "not a number"), ("regression", "1,5", "not a number"),
    ("regression", "1_000", "not a number"), ("regression", "1|2", "of 1.png has 2 parts where 1 were expected")])
def test_invalid_label_is_refused_with_its_image(name: str, label: str, message: str) -> None:
    task, labels, classes, _, _ = make_example(name)
    with pytest.raises(CvnbError) as e:
        task.encode(pd.Series([labels[0], label]), classes, pd.Series(["0.png", "1.png"]))
    assert message in str(e.value) and e.value.remedy


def test_constant_regression_label_is_refused() -> None:
    task = get_task("regression")
    targets = task.encode(pd.Series(["1|7", "2|7"]), ["value_1", "value_2"])
    with pytest.raises(CvnbError, match="number 2 of the label is the same"): task.target_scale(targets)


@pytest.mark.parametrize("name", TASKS)
def test_prediction_table_survives_parquet(name: str, tmp_path: Path) -> None:
    task, labels, classes, _, logits = make_example(name)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(len(labels))], split="test", label=labels.to_numpy()))
    rows.index += 5
    table = task.prediction_table(classes, rows, logits)
    assert {"path", "split", "label", "predicted"} <= set(table) and table.path.tolist() == rows.path.tolist()
    back = pd.read_parquet(write_table(tmp_path/"predictions.parquet", table))
    assert back.predicted.tolist() == table.predicted.tolist()
    assert task.rank_predictions(back).tolist() == task.rank_predictions(table).tolist()


def test_multilabel_predictions_are_labels_above_one_half() -> None:
    task, labels, classes, targets, logits = make_example("multilabel")
    rows = pd.DataFrame(dict(path="x.png", split="test", label=labels))
    table = task.prediction_table(classes, rows, logits)
    for claimed, text in zip(logits > 0, table.predicted):
        assert [c for c, yes in zip(classes, claimed) if yes] == (text.split(LABEL_SEPARATOR) if text else [])
    assert table.correct.tolist() == (targets == (logits > 0)).all(1).tolist() and table.correct.nunique() == 2
    assert 1 > table.confidence.max() and table.confidence.min() >= 0.5 ** len(classes)


@pytest.mark.parametrize("name", TASKS)
def test_worst_prediction_ranks_first(name: str) -> None:
    task, labels, classes, _, _ = make_example(name)
    logits = dict(classification=[[9, 0, 0], [9, 0, 0]], multilabel=[[9, -9, 9], [9, -9, -9]],
                  regression=[[1.5], [9]])[name]
    rows = pd.DataFrame(dict(path=["0", "1"], split="val", label=labels[:2]))
    table = task.prediction_table(classes, rows, np.array(logits, np.float32))   # the second is wrong
    assert task.rank_predictions(table)[0] == 1


@pytest.mark.parametrize("name, titles", [
    ("classification", ["cat", "dog", "cat:0.2 eel:0.8"]), ("multilabel", ["big red", "red", "big:0.2 red"]),
    ("regression", ["1", "0", "-2.35"])])
def test_target_is_formatted_by_its_task(name: str, titles: list[str]) -> None:
    task = get_task(name)
    classes = dict(classification=["cat", "dog", "eel"], multilabel=["big", "red"], regression=["value"])[name]
    targets = dict(classification=[0, 1, [0.2, 0, 0.8]], multilabel=[[1.0, 1], [0, 1], [0.2, 1]],
                   regression=[[1.0], [0.0], [-2.345678]])[name]
    assert [task.format_target(torch.tensor(target), classes) for target in targets] == titles


@pytest.mark.parametrize("name", TASKS)
def test_predictions_of_one_class_per_image_have_confusion_counts(name: str) -> None:
    task, labels, classes, _, logits = make_example(name)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(len(labels))], split="val", label=labels.to_numpy()))
    table = task.prediction_table(classes, rows, logits)
    counts = task.confusion_counts(table)
    assert (counts is None) == (name != "classification")
    if counts is not None: assert counts.n.sum() == len(table) and list(counts) == ["label", "predicted", "n"]


def test_several_numbers_rank_by_euclidean_error() -> None:
    task, labels = get_task("regression"), pd.Series(["1|2", "3|4", "5|6"])
    logits = np.array([[1, 2.5], [9, 4], [5, 6]], np.float32)
    rows = pd.DataFrame(dict(path=["0", "1", "2"], split="val", label=labels))
    table = task.prediction_table(task.classes(labels), rows, logits)
    assert task.rank_predictions(table).tolist() == [1, 0, 2]


def test_balancing_gives_classes_equal_weight() -> None:
    targets = np.repeat([0, 1], [30, 10])
    task = get_task("classification")
    assert task.class_weights(targets, ["a", "b"]) @ np.bincount(targets) == pytest.approx(40)
    assert np.bincount(targets, task.sampling_weights(targets, ["a", "b"])).tolist() == pytest.approx([0.5, 0.5])
    for balance in get_task("regression").class_weights, get_task("regression").sampling_weights:
        with pytest.raises(UsageError, match="regression has no classes"): balance(np.zeros((4, 1)), ["value"])


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_splits_have_their_share_of_labels_that_occur_once(name: str) -> None:
    numbers = [f"{v}" for v in np.random.default_rng(0).normal(0, 1, 200)]
    labels = pd.Series(numbers if name == "regression" else [f"{'red' if i % 4 else 'blue'}|{i}" for i in range(200)])
    if name == "multilabel":
        labels = labels.str.replace(r"\d+", lambda m: f"k{int(m[0]) % 20}|n{int(m[0]) % 7}", regex=True)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(200)], label=labels, split="", ok=True,
                             pixel_sha256=[f"{i:03}" for i in range(200)]))
    broken = pd.DataFrame(dict(path=["cut.png"], label="n/a|", split="", ok=False, pixel_sha256="", kind="cut"))
    table = pd.concat([rows, broken], ignore_index=True)   # the unreadable image's label may be invalid
    split = assign_splits(replace_labels_by_strata(get_task(name), table)).split[:200]
    assert 20 <= (split == "val").sum() <= 40 and 20 <= (split == "test").sum() <= 40
    if name == "regression":
        assert (assign_splits(rows).split == "train").all()     # without strata
        values = labels.astype(float)
        assert abs(values[split == "test"].mean() - values.mean()) < 0.25


def draw_images(n: int, size: int = 16) -> np.ndarray:
    "Draw noise whose red channel is bright in every second image and whose blue channel is bright in the second half."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (n, size, size, 3), dtype=np.uint8)
    images[::2, ..., 0] += 120
    images[n // 2:, ..., 2] += 120
    return images


@pytest.mark.parametrize("name", TASKS)
def test_small_model_learns_each_task(name: str, tmp_path: Path) -> None:
    images = draw_images(48)
    red = images[..., 0].mean((1, 2)).tolist()
    blue = (images[..., 2].mean((1, 2)) > 100).tolist()
    colours = list(zip(red, blue))
    labels = pd.Series(dict(classification=["red" if r > 100 else "dark" for r in red],
                            multilabel=["|".join(["any"] + ["red"] * (r > 100) + ["blue"] * b) for r, b in colours],
                            regression=[f"{1000 + 10 * r:.3f}|{float(b)}" for r, b in colours])[name])
    task = get_task(name)
    classes = task.classes(labels)
    targets = torch.from_numpy(task.encode(labels, classes))
    torch.manual_seed(0)
    model = create_model("resnet10t", classes, 16, "full", task=name, **task.target_scale(targets.numpy()))
    task = task_of(model.spec)
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    pixels = torch.from_numpy(images)
    for _ in range(12):
        for part in torch.randperm(48).split(16):
            optimizer.zero_grad()
            task.loss(model.train()(pixels[part]), targets[part], 0.05).backward()
            optimizer.step()
    save_model(model, tmp_path)
    logits = torch.from_numpy(predict_logits(load_model(tmp_path), images))
    assert task.score(logits, targets) > 0.85


def test_model_of_another_task_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    spec = ModelSpec("resnet10t", ["value"], 32, [.5] * 3, [.25] * 3, task="regression")
    write_json(tmp_path/"model.json", vars(spec))
    with pytest.raises(CvnbError, match="compress is made for classification.*regression"):
        load_classifier(tmp_path, "compress")
