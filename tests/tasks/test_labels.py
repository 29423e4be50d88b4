"""Labels, losses, figures and tables of the three tasks, against scikit-learn and torch, and labels that are refused."""
from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score, balanced_accuracy_score, f1_score, mean_absolute_error, r2_score, root_mean_squared_error

from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.files import write_json
from cvnb.data.tables import write_table
from cvnb.data.splits import assign_splits
from cvnb.models.vision_model import ModelSpec, build, task_of
from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model, load_classifier, load_model, save_model
from cvnb.tasks.labels import SEPARATOR, TASKS, class_weights, get_task, sampling_weights, with_strata
from cvnb.training.tracking import rank_answers

LABELS = dict(classification=["cat", "dog", "cat", "eel"] * 5, multilabel=["red|big", "red", "blue", "big|blue"] * 5,
              regression=["1.5", "2", "-3e1", "40"] * 5)


def known(name: str) -> tuple:
    "A task with labels, their targets and logits that are partly right."
    labels, kind = pd.Series(LABELS[name]), get_task(name)
    classes = kind.classes(labels)
    targets = kind.encode(labels, classes)
    noise = np.random.default_rng(0).normal(0, 1, (len(labels), len(classes))).astype(np.float32)
    kind = get_task(name, kind.scale(targets).get("target_std", ()))
    near = np.eye(len(classes), dtype=np.float32)[targets] if name == "classification" else targets if name == "regression" else 2 * targets - 1
    return kind, labels, classes, targets, near + noise


def model_for(name: str, classes: list[str], **units: list[float]):
    return build(ModelSpec("resnet10t", classes, 32, [.5] * 3, [.25] * 3, task=name, **units))


def test_names() -> None:
    labels = pd.Series([" b|a", "a|b", "a", "1.0", "1", "x", "12_5"])
    assert get_task("multilabel").plain(labels).nunique() == 6 and get_task("regression").plain(labels[3:]).tolist() == ["1", "1", "x", "12_5"]
    assert TASKS == ("classification", "multilabel", "regression")
    with pytest.raises(UsageError, match="Did you mean 'multilabel'"): get_task("multilable")


@pytest.mark.parametrize("name", TASKS)
def test_score_is_the_headline_figure(name: str) -> None:
    kind, _, _, targets, logits = known(name)
    figures = kind.figures(logits, targets)
    assert next(iter(figures)) == kind.metric
    assert kind.score(torch.from_numpy(logits), torch.from_numpy(targets)) == pytest.approx(figures[kind.metric].value, abs=1e-6)
    assert all(f.low <= f.value <= f.high and f.n == len(targets) for f in figures.values())


def test_figures_are_those_of_scikit_learn() -> None:
    _, _, _, targets, logits = known("classification")
    found = get_task("classification").figures(logits, targets)
    assert found["balanced_accuracy"].value == pytest.approx(balanced_accuracy_score(targets, logits.argmax(1)))
    _, _, _, targets, logits = known("multilabel")
    found, claimed = get_task("multilabel").figures(logits, targets), logits > 0
    assert found["f1"].value == pytest.approx(f1_score(targets, claimed, average="micro"))
    assert found["f1_macro"].value == pytest.approx(f1_score(targets, claimed, average="macro"))
    assert found["mean_average_precision"].value == pytest.approx(average_precision_score(targets, logits))
    equal = logits.round()     # many scores are equal
    assert get_task("multilabel").figures(equal, targets)["mean_average_precision"].value == pytest.approx(average_precision_score(targets, equal))
    assert found["all_labels_right"].value == pytest.approx((targets == claimed).all(1).mean())
    _, _, _, targets, logits = known("regression")
    found = get_task("regression").figures(logits, targets)
    for name, theirs in dict(r2=r2_score, mae=mean_absolute_error, rmse=root_mean_squared_error).items():
        assert found[name].value == pytest.approx(theirs(targets, logits), rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("weighted", [False, True])
def test_hard_and_soft_labels_cost_the_same(smoothing: float, weighted: bool) -> None:
    kind, _, classes, targets, logits = known("classification")
    weights = torch.tensor([1.0, 2.0, 5.0]) if weighted else None
    logits, targets = torch.from_numpy(logits), torch.from_numpy(targets)
    hard = kind.loss(logits, targets, smoothing, weights)
    assert hard.item() == pytest.approx(F.cross_entropy(logits, targets, weights, label_smoothing=smoothing, reduction="none").mean().item())
    assert kind.loss(logits, F.one_hot(targets, len(classes)).float(), smoothing, weights).item() == pytest.approx(hard.item(), rel=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_the_loss_of_a_batch_is_the_mean_of_its_shares(name: str) -> None:
    "Processes, accumulated batches and halved ones each see a share, here one of common and one of rare labels."
    kind, _, classes, targets, logits = known(name)
    order = np.argsort(targets.reshape(len(targets), -1)[:, 0], kind="stable")[:len(targets) // 2 * 2]
    logits, targets = torch.from_numpy(logits[order]), torch.from_numpy(targets[order])
    weights = None if name == "regression" else torch.arange(1.0, len(classes) + 1)
    half, loss = len(order) // 2, lambda part: kind.loss(logits[part], targets[part], 0.1, weights).item()
    first, second = loss(slice(half)), loss(slice(half, None))
    assert loss(slice(None)) == pytest.approx((first + second) / 2, rel=1e-5) and first != pytest.approx(second, rel=1e-2)


def test_score_of_several_numbers_is_the_mean_over_them() -> None:
    rng = np.random.default_rng(0)
    targets = rng.normal([0, 500], [1, 20], (30, 2)).astype(np.float32)
    logits = targets + rng.normal(0, [0.5, 15], (30, 2)).astype(np.float32)
    found = get_task("regression").figures(logits, targets)
    assert get_task("regression").score(torch.from_numpy(logits), torch.from_numpy(targets)) == pytest.approx(r2_score(targets, logits), rel=1e-4)
    assert found["r2"].value == pytest.approx(r2_score(targets, logits)) and list(found) == ["r2", "mae_1", "rmse_1", "mae_2", "rmse_2"]


def test_smoothing_of_several_labels_pulls_both_ways() -> None:
    p = torch.sigmoid(torch.tensor(2.0))
    for sure, target in (2.0, 1.0), (-2.0, 0.0):     # each alone: together a one-sided pull could cancel out
        loss = get_task("multilabel").loss(torch.tensor([[sure]]), torch.tensor([[target]]), 0.2)
        assert loss.item() == pytest.approx((-0.9 * p.log() - 0.1 * (1 - p).log()).item())


def test_loss_of_numbers_is_measured_in_their_spread() -> None:
    spread = (2.0, 50.0)
    kind, off = get_task("regression", spread), torch.tensor([[1.0, 25.0], [4.0, 100.0]])     # half a spread, and two
    assert kind.loss(off, torch.zeros(2, 2)).item() == pytest.approx((0.5 * 0.25 + 1.5) / 2)


@pytest.mark.parametrize("name, label, said", [
    ("classification", "cow", "'cow' of 1.png is not among the 3 classes"), ("multilabel", "red|cow", "'cow' of 1.png"),
    ("multilabel", "red||big", "of 1.png has an empty part"), ("multilabel", "red|", "empty part"),
    ("regression", "heavy", "'heavy' of 1.png is not a number"), ("regression", "1e39", "'1e39' of 1.png is not a number, or too large for 32 bits"),
    ("regression", "inf", "not a number"), ("regression", "nan", "not a number"), ("regression", "1,5", "not a number"),
    ("regression", "1_000", "not a number"), ("regression", "1|2", "of 1.png has 2 parts where 1 were expected")])
def test_label_is_refused_with_its_image(name: str, label: str, said: str) -> None:
    kind, labels, classes, _, _ = known(name)
    with pytest.raises(CvnbError) as e: kind.encode(pd.Series([labels[0], label]), classes, pd.Series(["0.png", "1.png"]))
    assert said in str(e.value) and e.value.remedy


def test_labels_that_are_all_equal_are_refused() -> None:
    kind = get_task("regression")
    targets = kind.encode(pd.Series(["1|7", "2|7"]), ["value_1", "value_2"])
    with pytest.raises(CvnbError, match="number 2 of the label is the same"): kind.scale(targets)


@pytest.mark.parametrize("name", TASKS)
def test_table_can_be_written_and_read(name: str, tmp_path: Path) -> None:
    kind, labels, classes, _, logits = known(name)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(len(labels))], split="test", label=labels.to_numpy()), index=range(5, 5 + len(labels)))
    table = kind.table(classes, rows, logits)
    assert {"path", "split", "label", "predicted"} <= set(table) and table.path.tolist() == rows.path.tolist()
    back = pd.read_parquet(write_table(tmp_path/"predictions.parquet", table))
    assert back.predicted.tolist() == table.predicted.tolist() and rank_answers(back).tolist() == rank_answers(table).tolist()


def test_table_of_several_labels() -> None:
    kind, labels, classes, targets, logits = known("multilabel")
    rows = pd.DataFrame(dict(path="x.png", split="test", label=labels))
    table = kind.table(classes, rows, logits)
    for claimed, text in zip(logits > 0, table.predicted):
        assert [c for c, yes in zip(classes, claimed) if yes] == (text.split(SEPARATOR) if text else [])
    assert table.correct.tolist() == (targets == (logits > 0)).all(1).tolist() and table.correct.nunique() == 2
    assert 1 > table.confidence.max() and table.confidence.min() >= 0.5 ** len(classes)


def test_the_worst_answer_of_every_task_comes_first() -> None:
    for name in TASKS:
        kind, labels, classes, _, _ = known(name)
        right = {"classification": [[9, 0, 0], [0, 9, 0]], "multilabel": [[9, -9, 9], [-9, -9, 9]], "regression": [[1.5], [2]]}[name]
        logits = np.array([right[0], right[1][::-1] if name != "regression" else [9]], np.float32)
        if name == "classification": logits[1] = [9, 0, 0]
        table = kind.table(classes, pd.DataFrame(dict(path=["0", "1"], split="val", label=labels[:2])), logits)
        assert rank_answers(table)[0] == 1


def test_several_numbers_are_ranked_by_their_distance_from_the_truth() -> None:
    kind, labels = get_task("regression"), pd.Series(["1|2", "3|4", "5|6"])
    logits = np.array([[1, 2.5], [9, 4], [5, 6]], np.float32)
    table = kind.table(kind.classes(labels), pd.DataFrame(dict(path=["0", "1", "2"], split="val", label=labels)), logits)
    assert rank_answers(table).tolist() == [1, 0, 2]


def test_balancing() -> None:
    targets = np.repeat([0, 1], [30, 10])
    kind = get_task("classification")
    assert class_weights(kind, targets, ["a", "b"]) @ np.bincount(targets) == pytest.approx(40)
    assert np.bincount(targets, sampling_weights(kind, targets, ["a", "b"])).tolist() == pytest.approx([0.5, 0.5])
    for balance in class_weights, sampling_weights:
        with pytest.raises(UsageError, match="no classes"): balance(get_task("regression"), np.zeros((4, 1)), ["value"])


@pytest.mark.parametrize("name", ["multilabel", "regression"])
def test_splits_have_their_share_of_labels_that_are_there_once(name: str) -> None:
    numbers = [f"{v}" for v in np.random.default_rng(0).normal(0, 1, 200)]
    labels = pd.Series(numbers if name == "regression" else [f"{'red' if i % 4 else 'blue'}|{i}" for i in range(200)])
    if name == "multilabel": labels = labels.str.replace(r"\d+", lambda m: f"k{int(m[0]) % 20}|n{int(m[0]) % 7}", regex=True)
    rows = pd.DataFrame(dict(path=[f"{i}.png" for i in range(200)], label=labels, split="", ok=True, pixel_sha256=[f"{i:03}" for i in range(200)]))
    broken = pd.DataFrame(dict(path=["cut.png"], label="n/a|", split="", ok=False, pixel_sha256="", kind="cut"))   # needs no sensible label
    split = assign_splits(with_strata(get_task(name), pd.concat([rows, broken], ignore_index=True))).split[:200]
    assert 20 <= (split == "val").sum() <= 40 and 20 <= (split == "test").sum() <= 40
    if name == "regression":
        assert (assign_splits(rows).split == "train").all()     # as it was without
        values = labels.astype(float)
        assert abs(values[split == "test"].mean() - values.mean()) < 0.25


def scenes(n: int, size: int = 16) -> np.ndarray:
    "Noise whose red is bright in half of the images, and its blue in another half."
    rng = np.random.default_rng(0)
    images = rng.integers(0, 80, (n, size, size, 3), dtype=np.uint8)
    images[::2, ..., 0] += 120
    images[n // 2:, ..., 2] += 120
    return images


@pytest.mark.parametrize("name", TASKS)
def test_a_small_model_learns_each_task(name: str, tmp_path: Path) -> None:
    images = scenes(48)
    red, blue = images[..., 0].mean((1, 2)).tolist(), (images[..., 2].mean((1, 2)) > 100).tolist()
    labels = pd.Series(dict(classification=["red" if r > 100 else "dark" for r in red],
                            multilabel=["|".join(["any"] + ["red"] * (r > 100) + ["blue"] * b) for r, b in zip(red, blue)],
                            regression=[f"{1000 + 10 * r:.3f}|{float(b)}" for r, b in zip(red, blue)])[name])
    kind = get_task(name)
    classes = kind.classes(labels)
    targets = torch.from_numpy(kind.encode(labels, classes))
    torch.manual_seed(0)
    model = create_model("resnet10t", classes, 16, "full", task=name, **kind.scale(targets.numpy()))
    kind, optimizer = task_of(model.spec), torch.optim.AdamW(model.parameters(), 2e-3)
    pixels = torch.from_numpy(images)
    for _ in range(12):
        for part in torch.randperm(48).split(16):
            optimizer.zero_grad()
            kind.loss(model.train()(pixels[part]), targets[part], 0.05).backward()
            optimizer.step()
    save_model(model, tmp_path)
    logits = torch.from_numpy(predict_logits(load_model(tmp_path), images))
    assert kind.score(logits, targets) > 0.85


def test_model_of_another_task_is_refused_before_its_weights_are_read(tmp_path: Path) -> None:
    write_json(tmp_path/"model.json", vars(ModelSpec("resnet10t", ["value"], 32, [.5] * 3, [.25] * 3, task="regression")))
    with pytest.raises(CvnbError, match="compress is made for classification.*regression"): load_classifier(tmp_path, "compress")
