"""A deadline: what is planned for it, how a training meets it, and what a resumed one has left."""
from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from fit_helpers import BATCHNORM, NO_BATCHNORM, PLAIN, Interrupts, SpoilsThirdEpoch, curves, same_weights
from train_job import fresh

from cvnb.core.errors import CvnbError, UsageError
from cvnb.data.dataset import locate_data, scan_dataset
from cvnb.data.images import inspect_images
from cvnb.data.splits import assign_splits
from cvnb.metrics.objective import Objective
from cvnb.models.inference import predict_logits
from cvnb.models.weights import create_model
from cvnb.training import callbacks, plan
from cvnb.training.fit import fit
from cvnb.training.options import FitOptions
from cvnb.training.plan import plan_training
from cvnb.training.tuning import autotune

OPTIONS = FitOptions(tune="auto", batch_size=32, device="cpu")


@pytest.fixture(scope="module")
def digits_audit(tmp_path_factory):
    "What the plan reads of an audit of 1,797 digits."
    root = locate_data("digits")
    table = assign_splits(inspect_images(root, scan_dataset(root))).assign(excluded=False)
    path = tmp_path_factory.mktemp("audit")/"manifest.parquet"
    table.to_parquet(path)
    audit = dict(root=str(root), classes=sorted(table.label.unique()), task="classification", decoding={})
    return path, audit, table.split.value_counts()


@pytest.fixture
def planned(digits_audit, tmp_path, monkeypatch):
    "Plan with given seconds per image instead of measured ones; they grow with the image size."
    path, audit, counts = digits_audit
    monkeypatch.setattr(plan, "read_clock", lambda: 0.0)

    def run(minutes, step_s, predict_s=0.0, options=OPTIONS, image_size=0, largest=224, folder=tmp_path):
        def speeds(model, *_):
            scale = (model.spec.image_size / 64)**2
            return step_s * scale, predict_s * scale

        monkeypatch.setattr(plan, "_measure_speeds", speeds)
        return plan_training(minutes, path, audit, "classification", partial(create_model, NO_BATCHNORM), image_size,
                             options, folder, largest)
    run.counts = counts
    return run


def test_without_a_deadline_nothing_is_measured_or_changed(planned):
    found = planned(0, 1.0, image_size=48)
    assert found.options == OPTIONS and found.image_size == 48 and not found.describe()


def test_the_largest_size_at_which_enough_epochs_fit_is_planned(planned, tmp_path):
    n = int(planned.counts["train"])
    for minutes, sides in (10, {160}), (2, {64}), (500, {224}):
        # 100 images/s at 64 pixels
        found = planned(minutes, 1 / 100, options=replace(OPTIONS, tune="head_first"), folder=tmp_path/str(minutes))
        cost = n / 100 * (found.image_size / 64)**2
        assert found.image_size in sides
        assert cost * found.options.epochs <= plan.PLANNED_SHARE * 60 * minutes
        assert 0 < found.options.minutes <= minutes
    assert found.options.epochs == plan.MOST_EPOCHS and "fewer are enough" in found.describe()


def test_validation_and_final_predictions_cost_time_too(planned, tmp_path):
    options = replace(OPTIONS, tune="head_first")
    fast = planned(4, 1 / 100, options=options, folder=tmp_path/"fast")
    slow = planned(4, 1 / 100, 1 / 200, options, folder=tmp_path/"slow")
    assert slow.options.epochs < fast.options.epochs and slow.options.minutes < fast.options.minutes


def test_a_given_image_size_and_tuning_are_kept(planned):
    found = planned(10, 1 / 100, options=replace(OPTIONS, tune="full"), image_size=160)
    assert found.image_size == 160 and found.options.tune == "full"
    assert set(found.picked.option) == {"epochs", "minutes"}


def test_the_head_alone_is_planned_where_the_network_has_too_few_epochs_or_much_smaller_images(planned, tmp_path):
    found = planned(1, 1 / 10, 1 / 100)
    assert found.options.tune == "probe" and "the head alone" in found.describe()
    fast = planned(2, 1 / 100, 1 / 1000, folder=tmp_path/"fast")   # enough epochs at 64 pixels, the head at 224
    assert fast.options.tune == "probe" and fast.image_size == 224 and "only at 64 pixels" in fast.describe()
    assert planned(10, 1 / 100, 1 / 1000, folder=tmp_path/"long").options.tune == "auto"


def test_few_epochs_behind_the_head_are_planned_because_the_better_one_is_kept(planned):
    found = planned(3, 1 / 20, 1 / 400, image_size=64)
    assert 1 <= found.options.epochs < plan.ENOUGH_EPOCHS and found.options.tune == "auto"
    assert "what validates better is kept" in found.describe()


@pytest.mark.parametrize("minutes", [1, 2, 10, 60])
def test_few_sizes_are_timed_and_the_chosen_one_is_among_them(planned, monkeypatch, tmp_path, minutes):
    timed: list[set[int]] = []
    scaled = plan._scale_speed
    monkeypatch.setattr(plan, "_scale_speed", lambda speeds, side: timed.append(set(speeds)) or scaled(speeds, side))
    found = planned(minutes, 1 / 100, 1 / 1000)
    assert len(timed[-1]) <= plan._TIMED_SIDES
    assert found.image_size in timed[-1] or len(timed[-1]) == plan._TIMED_SIDES


def test_a_plan_draws_no_random_numbers_of_the_training(digits_audit, tmp_path):
    "A resumed stage reads its plan: with other random numbers its model would begin with other weights."
    path, audit, _ = digits_audit
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    plan_training(0.5, path, audit, "classification", partial(create_model, NO_BATCHNORM), 16, OPTIONS, tmp_path)
    assert torch.equal(before, torch.random.get_rng_state())


def test_time_that_the_stage_has_spent_is_not_planned_again(digits_audit, tmp_path, monkeypatch):
    path, audit, _ = digits_audit
    monkeypatch.setattr(plan, "read_clock", lambda: 0.0)
    monkeypatch.setattr(plan, "_measure_speeds", lambda *_: (1 / 100, 0.0))
    make = partial(create_model, NO_BATCHNORM)
    plans = [plan_training(4, path, audit, "classification", make, 64, OPTIONS, tmp_path/str(spent), spent=spent)
             for spent in (0.0, 60.0)]
    assert plans[0].options.minutes - plans[1].options.minutes == pytest.approx(1, abs=0.01)


def test_a_deadline_that_is_too_short_names_the_time_that_is_needed(planned, tmp_path):
    with pytest.raises(UsageError, match="minutes=0.1 is too short for a training. Use 0.5 or more"):
        planned(0.1, 1 / 100)
    for name, options, speeds in ("head", OPTIONS, (1.0, 0.1)), ("full", replace(OPTIONS, tune="full"), (0.1, 0.0)):
        with pytest.raises(CvnbError, match=r"minutes=1 is too short.*take.*about .* minutes here. Use minutes=") as e:
            planned(1, *speeds, options=options, folder=tmp_path/name)
        needed = float(str(e.value).split("Use minutes=")[1].split()[0])
        assert planned(needed, *speeds, options=options, folder=tmp_path/f"{name} again").options.minutes >= 0


def test_a_repeated_call_keeps_its_plan_although_speeds_differ(planned):
    first = planned(10, 1 / 100)
    again = planned(10, 1 / 20)
    assert again.options == first.options and again.image_size == first.image_size
    other = planned(5, 1 / 20)
    assert other.options != first.options


def test_speeds_are_measured(digits_audit, tmp_path):
    path, audit, _ = digits_audit
    make = partial(create_model, NO_BATCHNORM)
    found = plan_training(20, path, audit, "classification", make, 16, OPTIONS, tmp_path)
    assert found.options.epochs >= 1 and "training images/s at 16 pixels" in found.describe()


@pytest.mark.parametrize("task", ["multilabel", "regression"])
def test_other_tasks_can_be_planned(digits_audit, tmp_path, task):
    path, audit, _ = digits_audit
    manifest = tmp_path/"manifest.parquet"
    pd.read_parquet(path).to_parquet(manifest)
    make = partial(create_model, NO_BATCHNORM, task=task)
    classes = audit["classes"] if task == "multilabel" else []
    found = plan_training(0.5, manifest, audit | dict(classes=classes), task, make, 16, OPTIONS, tmp_path)
    assert found.options.epochs >= 1


@pytest.fixture
def clock(monkeypatch):
    "A clock that stands still; `step` is added at each batch."
    now = dict(time=0.0, step=0.0)

    def read():
        now["time"] += now["step"]
        return now["time"]

    monkeypatch.setattr(callbacks, "read_clock", read)
    return now


def test_a_training_that_keeps_to_its_plan_is_that_without_a_deadline(data, tmp_path, clock):
    models = fresh(NO_BATCHNORM), fresh(NO_BATCHNORM)
    without = fit(models[0], *data, PLAIN, tmp_path/"without")
    clock["step"] = 0.01
    within = fit(models[1], *data, replace(PLAIN, minutes=1.0), tmp_path/"within")
    assert same_weights(*models) and curves(within).equals(curves(without)) and not within.attrs["notes"]


def test_a_slow_training_ends_in_time_with_a_rate_that_has_fallen(data, tmp_path, clock):
    clock["step"] = 1.0
    options = replace(PLAIN, epochs=50, minutes=1.0)
    history = fit(fresh(NO_BATCHNORM), *data, options, tmp_path)
    assert len(history) < 10 and clock["time"] < 70
    assert history.lr.iloc[-1] < 0.1 * options.lr
    assert history.attrs["notes"][-1] == f"stopped in epoch {len(history)} of 50: its 1 minutes were over"


def test_a_resumed_training_has_the_time_that_is_left(data, tmp_path, clock):
    clock["step"] = 1.0
    options = replace(PLAIN, epochs=50, minutes=1.0)
    whole = fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"whole")
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"cut", callbacks=[Interrupts(2)])
    clock["time"] += 1e6   # the pause does not count
    resumed = fit(fresh(NO_BATCHNORM), *data, options, tmp_path/"cut")
    assert abs(len(resumed) - len(whole)) <= 1 and "minutes were over" in resumed.attrs["notes"][-1]


def test_a_deadline_is_for_one_device(data, tmp_path):
    with pytest.raises(UsageError, match="minutes=1 works on one device"):
        fit(fresh(NO_BATCHNORM), *data, replace(PLAIN, minutes=1.0, devices=2), tmp_path)


def test_fine_tuning_never_ends_below_the_probe_that_it_began_with(data, tmp_path):
    "The third epoch is spoiled: with keep=last the probe is better, with keep=best an epoch before."
    options = replace(PLAIN, tune="head_first", epochs=3, lr=1e-4)
    model = fresh(NO_BATCHNORM)
    probe = fit(fresh(NO_BATCHNORM), *data, replace(options, tune="probe"), tmp_path/"probe").val_accuracy[0]
    history = fit(model, *data, options, tmp_path/"last", callbacks=[SpoilsThirdEpoch()])
    accuracy = (predict_logits(model, data[1].images).argmax(1) == data[1].targets).mean()
    assert accuracy == pytest.approx(probe) and history.val_accuracy.iloc[-1] < probe
    assert "the probe's weights are kept" in history.attrs["notes"][-1]
    assert history.attrs["changed"] == [dict(option="tune", picked="probe", why=history.attrs["changed"][0]["why"])]


def test_the_probe_is_held_against_fine_tuning_by_the_objective(data, tmp_path):
    "Balanced accuracy is another column of the history than accuracy."
    objective = Objective("balanced", tuple("0123456789"))
    options = replace(PLAIN, tune="head_first", epochs=3, lr=1e-4, objective=objective)
    history = fit(fresh(NO_BATCHNORM), *data, options, tmp_path, callbacks=[SpoilsThirdEpoch()])
    assert "fine-tuning ended at val_balanced_accuracy" in history.attrs["notes"][-1]


def test_a_resumed_fine_tuning_knows_its_probe(data, tmp_path):
    options = replace(PLAIN, tune="head_first", epochs=3, lr=1e-4)
    with pytest.raises(SystemExit): fit(fresh(NO_BATCHNORM), *data, options, tmp_path, callbacks=[Interrupts(1)])
    model = fresh(NO_BATCHNORM)
    history = fit(model, *data, options, tmp_path, callbacks=[SpoilsThirdEpoch()])
    assert len(history) == 3 and "the probe's weights are kept" in history.attrs["notes"][-1]


def test_auto_fits_a_head_first_only_where_weights_are_trained(data, tmp_path):
    options = replace(PLAIN, tune="auto")
    picks = [autotune(options, fresh(NO_BATCHNORM), data[0], tmp_path, pretrained=known) for known in (True, False)]
    assert [p.options.tune for p in picks] == ["head_first", "full"]
    assert picks[0].picked.why[0].startswith("the weights are trained")
    with pytest.raises(UsageError, match="tune=auto is not resolved"):
        fit(fresh(NO_BATCHNORM), *data, options, tmp_path)


def test_auto_trains_the_whole_network_where_its_head_is_not_linear(data, tmp_path):
    model = fresh(NO_BATCHNORM)
    model.net.get_classifier = lambda: torch.nn.Identity()
    found = autotune(replace(PLAIN, tune="auto"), model, data[0], tmp_path, pretrained=True)
    assert found.options.tune == "full" and "no linear head" in found.picked.why[0]


def test_epochs_of_small_data_sets_make_enough_steps():
    assert plan._limit_epochs(40, replace(OPTIONS, batch_size=20)) == plan.LEAST_STEPS // 2
    assert plan._limit_epochs(10_000, OPTIONS) == plan.MOST_EPOCHS
    assert np.isfinite(plan._limit_epochs(3, OPTIONS))


def test_a_larger_network_is_planned_where_enough_epochs_of_it_fit(digits_audit, tmp_path, monkeypatch):
    path, audit, _ = digits_audit
    monkeypatch.setattr(plan, "read_clock", lambda: 0.0)
    larger = BATCHNORM
    cost = {NO_BATCHNORM: 1.0, larger: 1.3}
    speed = lambda model, *_: (cost[model.spec.backbone] * (model.spec.image_size / 64)**2 / 100, 0.0)
    monkeypatch.setattr(plan, "_measure_speeds", speed)
    make = {name: partial(create_model, name) for name in cost}

    def find(minutes: float, tune: str = "head_first", image_size: int = 0) -> plan.TrainingPlan:
        return plan_training(minutes, path, audit, "classification", make[NO_BATCHNORM], image_size,
                             replace(OPTIONS, tune=tune), tmp_path/f"{minutes}-{tune}-{image_size}", 224,
                             larger={larger: make[larger]})
    long = find(60)
    assert long.backbone == larger and long.image_size == 224
    assert long.describe().startswith(f"planned for the deadline: {larger}")
    assert long.options.epochs >= plan.ENOUGH_EPOCHS and "fit at 224 pixels" in long.picked.why[0]
    again = find(60)
    assert again.backbone == larger and again.options == long.options, "a resumed training reads its plan"
    small = find(60, image_size=64)
    assert small.backbone == "" and small.image_size == 64, "at small sizes a larger network was not better"
    assert find(60, "probe").backbone == ""
    # the given network has just enough epochs at this size, the larger one has too few
    n = int(digits_audit[2]["train"])
    tight = (plan.ENOUGH_EPOCHS + 0.5) * n * (160 / 64)**2 / 100 / plan.PLANNED_SHARE / 60 + plan.OTHER_S / 60
    found = find(tight, image_size=160)
    assert found.backbone == "" and found.options.epochs == plan.ENOUGH_EPOCHS
