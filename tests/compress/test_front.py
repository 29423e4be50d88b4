"""The front: levels, what ends it, the order of the tests, and a candidate that a person chooses."""
from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from cvnb.benchmark.int8_trial import measure_int8, sample_calibration
from cvnb.compress import front as module
from cvnb.compress.distill import DistillationLoss, DistillationResult
from cvnb.compress.error_budget import read_tests
from cvnb.compress.front import (
    Front,
    FrontPlan,
    accept_fastest,
    build_front,
    candidates_to_test,
    few_images_notes,
    find_candidate,
    front_note,
    measure_front,
    plot_front,
    save_front,
)
from cvnb.compress.int8_point import Int8Point
from cvnb.compress.prune import compare_layers
from cvnb.core.errors import CvnbError, UsageError
from cvnb.core.stage import Stage
from cvnb.export.parity import ParityReport, choose_shipped_model, confirm_candidate, open_models
from cvnb.metrics.estimates import Estimate
from cvnb.models.cost import count_macs
from cvnb.models.inference import predict_logits
from cvnb.models.vision_model import VisionModel
from cvnb.models.weights import create_model, load_model, save_model
from cvnb.training.loaders import LabelledImages
from cvnb.training.options import FitOptions

CLASSES = list("abcdefghij")


@pytest.fixture(scope="module")
def sure() -> tuple[VisionModel, LabelledImages]:
    "A network, and images whose labels are its own answers: it is always right."
    torch.manual_seed(0)
    model = create_model("test_resnet", CLASSES, 16, "full").eval()
    images = np.random.default_rng(0).integers(0, 256, (100, 16, 16, 3), dtype=np.uint8)
    return model, LabelledImages(images, predict_logits(model, images).argmax(1))


@pytest.fixture
def make(sure, monkeypatch, tmp_path) -> Callable[..., tuple[Front, list[VisionModel]]]:
    "Build a front whose distillations change nothing; return the models that were distilled too."
    started = []

    def distill(pruned: VisionModel, *args: object) -> DistillationResult:
        started.append(pruned)
        history = pd.DataFrame(dict(epoch=[1], train_loss=[0.0]))
        history.attrs["notes"] = ["a note of the training"]
        return DistillationResult(copy.deepcopy(pruned), copy.deepcopy(pruned), history)

    monkeypatch.setattr(module, "distill", distill)
    trained, data = sure

    def build(plan: FrontPlan, **options: object) -> tuple[Front, list[VisionModel]]:
        return build_front(DistillationLoss(trained), data, data, FitOptions(), tmp_path, plan, **options), started

    return build


def test_each_level_is_pruned_from_the_one_before(make, sure):
    decided = []
    front, started = make(FrontPlan(0.25, levels=2), decide=decided.append)
    full = count_macs(sure[0])
    shares = [count_macs(model) / full for model in front.models.values()]
    assert len(shares) == 2 and shares[0] <= 0.5 and shares[1] <= 0.25
    assert list(front.models) == [f"macs-{100 * share:.0f}" for share in shares]
    assert decided == list(front.models.values()), "each candidate gets its own temperature and thresholds"
    assert front.training_notes == ["a note of the training"] and front.notes == []
    kept = {name: w.shape for name, w in started[0].state_dict().items()}
    assert all(w.shape <= kept[name] for name, w in started[1].state_dict().items()), "channels do not come back"
    assert front.table.candidate.tolist() == ["trained", *front.models]
    assert front.history.candidate.tolist() == list(front.models)


def test_level_out_of_reach_ends_the_front_and_what_finished_stays(make):
    front, started = make(FrontPlan(0.01, levels=4))
    assert 1 <= len(front.models) < 4 and len(started) == len(front.models)
    (note,) = front.notes
    assert note.startswith("the front ends before") and "cannot be pruned to" in note


def test_first_level_out_of_reach_is_refused_before_any_training(make):
    with pytest.raises(CvnbError, match="cannot be pruned to"): make(FrontPlan(0.0001))
    with pytest.raises(UsageError, match="hessian"): make(FrontPlan(0.5, importance="hesian"))


def test_network_without_prunable_parts_is_refused_before_any_training(sure, make, tmp_path):
    model = create_model("convnextv2_atto", CLASSES, 32, "full").eval()
    with pytest.raises(CvnbError, match="convnextv2_atto cannot be pruned"):
        build_front(DistillationLoss(model), sure[1], sure[1], FitOptions(), tmp_path)


def test_level_beyond_repair_ends_the_front(make):
    front, _ = make(FrontPlan(0.05, levels=4, margin=0.0, repair=0.02))
    assert len(front.models) < 4 and any("beyond repair" in note for note in front.notes)
    worst = front.table.difference.min()
    assert worst > -0.5, "the level that lost more is no candidate"


def test_no_level_begins_after_the_time_is_over(make, monkeypatch):
    clock = count(0, 61)  # seconds; of this module alone, other threads read the real one
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    front, started = make(FrontPlan(0.25, levels=3, minutes=1, student="test_vit"), announce=list)
    assert len(started) == 1 and len(front.models) == 1
    assert "compress.minutes=1 are over" in front.notes[0] and "test_vit was not distilled" in front.notes[1]


def test_student_of_another_architecture_is_a_candidate(sure, make):
    front, started = make(FrontPlan(0.5, student="test_convnext"), announce=list)
    assert list(front.models)[1] == "student" and started[1].spec.backbone == "test_convnext"
    assert front.models["student"].spec.classes == CLASSES
    macs = front.tradeoffs.step.eq(front.steps["student"])
    least = replace(front, tradeoffs=front.tradeoffs.assign(macs=front.tradeoffs.macs.mask(macs, 1)))
    assert least.smallest is not front.models["student"], "its layers are others than the trained model's"
    assert len(compare_layers(sure[0], least.smallest))


def test_larger_student_is_announced_before_pruning(make, monkeypatch):
    def stop(*args: object) -> None: raise CvnbError("stop", "")

    monkeypatch.setattr(module, "prune_in_steps", stop)
    said = []
    with pytest.raises(CvnbError, match="stop"): make(FrontPlan(0.5, student="test_vit"), announce=said.append)
    assert len(said) == 1 and "test_vit takes 3.63 times the multiply-accumulates" in said[0]
    with pytest.raises(CvnbError, match="stop"): make(FrontPlan(0.5, student="lcnet_035"), announce=said.append)
    assert len(said) == 1


def test_front_that_prunes_nothing_says_so(make):
    front, _ = make(FrontPlan(1))
    assert any("prunes nothing, so INT8 alone" in note for note in front.notes)


class Times:
    "Latencies by name."
    def __init__(self, **milliseconds: float): self.milliseconds = milliseconds
    def latency(self, name: str) -> Estimate: return Estimate(self.milliseconds[name], 0, 9, 1)


def planted(n: int = 400, **wrong: int) -> Front:
    "A front whose candidates answer some validation images wrongly; the first ones are slower."
    targets = np.arange(n) % 10
    answers = {name: np.where(np.arange(n) < lost, (targets + 1) % 10, targets) for name, lost in wrong.items()}
    rows = [dict(step=name, macs=100 - i, objective=1 - lost / n) for i, (name, lost) in enumerate(wrong.items())]
    torch.manual_seed(0)
    models = {name: create_model("test_resnet", CLASSES, 16, "full").eval() for name in wrong}
    points = pd.DataFrame([dict(step="trained", macs=200, objective=1.0), *rows]).assign(chosen=True)
    front = Front(models, {name: name for name in wrong}, dict(trained=targets) | answers, targets, points,
                  pd.DataFrame(dict(epoch=[1], candidate=list(wrong)[-1])), [], [])
    times = Times(trained=9, **{name: 5.0 - i for i, name in enumerate(wrong)})
    return measure_front(front, lambda models: times, models[next(iter(models))], 0.02, 800)


def test_candidates_are_tested_from_the_fastest_that_should_be_accepted():
    front = planted(slow=0, middle=1, fast=100)
    assert front.expected == dict(slow=True, middle=True, fast=False)
    assert candidates_to_test(front, 5) == ["middle", "slow"] and candidates_to_test(front, 1) == ["middle"]
    assert front.speed == dict(slow=9 / 5, middle=9 / 4, fast=3)
    assert candidates_to_test(planted(slow=100, fast=200), 5) == ["slow"], "the best of those without a chance"


def test_candidate_that_is_not_faster_is_tested_only_where_none_is():
    front = planted(slow=0, fast=1)
    late = replace(front, latency=front.latency | dict(slow=Estimate(9.5, 0, 9, 1)))
    assert late.expected == dict(slow=True, fast=True) and candidates_to_test(late, 5) == ["fast"]
    inaccurate = replace(late, expected=dict(slow=True, fast=False))
    assert candidates_to_test(inaccurate, 5) == ["fast"], "it is tested: the other would make nothing faster"
    none = replace(front, latency=dict.fromkeys(["trained", "slow", "fast"], Estimate(9.0, 0, 9, 1)))
    assert candidates_to_test(none, 1) == ["slow"]


def test_few_test_images_let_no_candidate_be_expected():
    front = planted(same=0)
    again = measure_front(front, lambda models: Times(trained=1, same=1), front.models["same"], 0.01, 100)
    assert not again.expected["same"], "100 images cannot prove a margin of one point"


def predictions(n: int, lost: int) -> pd.DataFrame:
    return pd.DataFrame(dict(path=[f"{i:04}" for i in range(n)], correct=np.arange(n) >= lost))


def test_fastest_accepted_candidate_ships_and_each_test_spends_from_the_budget(tmp_path):
    front = planted(slow=0, middle=1, fast=2)
    lost = {id(front.models[name]): k for name, k in dict(fast=80, middle=2, slow=0).items()}
    predict = lambda model: predictions(800, lost[id(model)])
    tested = accept_fastest(Stage("compress", tmp_path), front, 5, predictions(800, 0), predict, 0.02)
    assert tested.candidate == "middle" and tested.acceptance.accepted
    assert [(name, test.accepted) for name, test in tested.tests] == [("fast", False), ("middle", True)]
    assert [t["level"] for t in read_tests(tmp_path)] == [0.025, 0.0125]
    record = tested.to_json()
    assert record["candidate"] == "middle" and [t["candidate"] for t in record["tests"]] == ["fast", "middle"]
    assert choose_shipped_model(record)["model"] == "compressed"
    none = accept_fastest(Stage("compress", tmp_path/"none"), front, 2, predictions(800, 0),
                          lambda model: predictions(800, 80), 0.02)
    assert not none.acceptance.accepted and choose_shipped_model(none.to_json())["model"] == "trained"


def test_every_candidate_is_kept_and_an_unknown_one_is_named(tmp_path):
    front = planted(slow=0, fast=1)
    save_front(Stage("compress", tmp_path), front)
    assert load_model(find_candidate(tmp_path, "slow")).spec.backbone == "test_resnet"
    table = pd.read_parquet(tmp_path/"compress/front.parquet")
    assert table.candidate.tolist() == ["trained", "slow", "fast"] and "latency_ms" in table
    with pytest.raises(UsageError, match="no candidate 'slw'.*slow"): find_candidate(tmp_path, "slw")
    with pytest.raises(UsageError, match="has no front"): find_candidate(tmp_path/"other", "slow")
    save_front(Stage("compress", tmp_path), planted(other=0))
    with pytest.raises(UsageError, match="no candidate 'slow'.*other"): find_candidate(tmp_path, "slow")
    assert [p.name for p in (tmp_path/"compress/front").iterdir()] == ["other"]


def test_note_says_what_became_of_each_candidate(tmp_path):
    front = planted(slow=0, middle=1, fast=100)
    predict = lambda model: predictions(800, 0)
    tested = accept_fastest(Stage("compress", tmp_path), front, 1, predictions(800, 0), predict, 0.02)
    (note,) = front_note(front, tested)
    assert "trained 9; slow 5 (not tested); middle 4 (accepted); fast 3 (not tested: by the validation images" in note
    alone = planted(only=0)
    tested = accept_fastest(Stage("compress", tmp_path/"alone"), alone, 1, predictions(800, 0), predict, 0.02)
    assert front_note(alone, tested) == []


def test_wrong_choice_by_hand_leaves_the_earlier_one(tmp_path):
    front = planted(slow=0, fast=1)
    stage = Stage("compress", tmp_path)
    save_front(stage, front)
    for other in stage, Stage("train", tmp_path):
        for name in "model.safetensors", "model.json": other.path(name)
        save_model(front.models["slow"], other.dir)
        other.finish()
    open_models(Stage("export", tmp_path), "fast")
    with pytest.raises(UsageError, match="no candidate 'fst'"): open_models(Stage("export", tmp_path), "fst")
    assert (tmp_path/"export/compressed/model.safetensors").is_file()


def test_intervals_of_int8_points_end_at_one():
    front = planted(larger=0, smaller=0)
    point = Int8Point(Estimate(1.0, 0, 9, 1), 0.0, -0.01, 0.05, True)
    front = replace(front, int8=dict.fromkeys(["trained", "larger", "smaller"], point))
    ends = [line.get_ydata().max() for line in plot_front(front).axes[0].lines]
    assert ends and max(ends) <= 1


def test_choice_by_hand_takes_the_same_test_and_is_recorded(tmp_path):
    front = planted(slow=0, fast=1)
    stage = Stage("compress", tmp_path)
    first = accept_fastest(stage, front, 1, predictions(800, 0), lambda model: predictions(800, 1), 0.02)
    images = predictions(800, 0).assign(pixel_sha256=lambda t: t.path, group=None)

    def report(lost: int) -> ParityReport:
        correct = {name: {"torch eager": np.arange(800) >= k} for name, k in (("trained", 0), ("compressed", lost))}
        return ParityReport({}, correct, {}, None)

    same = confirm_candidate(stage, report(1), "fast", 0.02, images)
    assert same["level"] == first.acceptance.level and len(read_tests(tmp_path)) == 1, "the same answers are one test"
    other = confirm_candidate(stage, report(100), "slow", 0.02, images)
    assert len(read_tests(tmp_path)) == 2 and not other["accepted"]
    for verdict, ships in (same, "compressed"), (other, "trained"):
        shipped = choose_shipped_model(verdict)
        assert shipped["model"] == ships and shipped["by_hand"] and "was chosen by hand" in shipped["why"]
    assert first.candidate == "fast" and not choose_shipped_model(first.to_json())["by_hand"]


def test_splits_without_images_are_refused_and_few_images_are_noted(sure, tmp_path):
    model, data = sure
    none = LabelledImages(data.images[:0], data.targets[:0])
    for splits, name in ((data, none), "validation"), ((none, data), "training"):
        with pytest.raises(UsageError, match=f"there are no {name} images"):
            build_front(DistillationLoss(model), *splits, FitOptions(), tmp_path)
    assert few_images_notes(100) == [] and "20 validation images choose" in few_images_notes(20)[0]


def test_gpu_that_is_absent_is_refused_before_pruning(sure, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "prune_in_steps", lambda *args: pytest.fail("pruning began"))
    with pytest.raises(CvnbError, match="torch finds no GPU"):
        build_front(DistillationLoss(sure[0]), sure[1], sure[1], FitOptions(device="gpu"), tmp_path)


def int8_point(milliseconds: float, within: bool = True) -> Int8Point:
    "A candidate in INT8."
    return Int8Point(Estimate(milliseconds, 0, 9, 1), 0.0, 0.0, 0.0, within)


def test_order_of_the_tests_goes_by_int8_where_that_is_faster():
    front = planted(larger=0, smaller=0)
    assert candidates_to_test(front, 2) == ["smaller", "larger"]
    points = dict(trained=int8_point(0.5, within=False), larger=int8_point(1.0), smaller=int8_point(8.0))
    front = replace(front, int8=points)
    assert candidates_to_test(front, 2) == ["larger", "smaller"]
    assert front.best_latency("smaller") == 4.0, "INT8 is slower, so FP32 would ship"
    table = front.table.set_index("candidate")
    assert table.int8_latency_ms["larger"] == 1.0 and table.int8_within.tolist() == [False, True, True]
    assert front.best_latency("trained") == 9.0, "INT8 loses more than export accepts"


def test_int8_of_a_real_candidate_is_measured(sure):
    model, images = sure
    data, chosen = sample_calibration(images, images)
    assert len(chosen) == len(data.calibration) == 100
    point = measure_int8(dict(trained=model), data, tolerance=1.0)["trained"]
    assert point.latency.value > 0 and point.within and point.low <= point.difference <= point.high
    assert not measure_int8(dict(trained=model), data, tolerance=-2.0)["trained"].within
