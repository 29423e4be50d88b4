"""Class weights are suggested where they help a linear probe on the validation images, and only there."""
from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from cvnb.metrics.objective import Objective
from cvnb.tasks.labels import get_task
from cvnb.training.balancing import describe_class_weights, try_class_weights
from cvnb.training.baselines import Baselines, fit_baselines
from cvnb.training.loaders import LabelledImages, SplitImages

NAMES = ["ok", "defect"]


def probe(rare: float, objective: Objective, signal: float = 1.5) -> tuple[Baselines, dict[str, np.ndarray]]:
    "A probe on embeddings that overlap, and a share of rare images."
    rng, vectors, rows, images = np.random.default_rng(0), {}, {}, {}
    for split, n in dict(train=1000, val=600, test=60).items():
        targets = (np.arange(n) < rare * n).astype(np.int64)
        vectors[split] = (rng.normal(size=(n, 4)) + signal * targets[:, None]).astype(np.float32)
        paths = [f"{split}/{i}" for i in range(n)]
        rows[split] = pd.DataFrame(dict(path=paths, pixel_sha256=paths, label=np.array(NAMES)[targets]))
        images[split] = LabelledImages(np.zeros((n, 1, 1, 3), np.uint8), targets)
    data = SplitImages("", get_task("classification"), NAMES, 1, rows, images, [])
    return fit_baselines(vectors, data, objective=objective), vectors


def test_weights_are_suggested_for_a_rare_class_and_not_where_nothing_tells_it():
    objective = Objective("balanced", tuple(NAMES))
    gain = try_class_weights(*probe(0.08, objective, 0.7))
    assert gain.low > 0 and describe_class_weights(gain, objective).startswith("train.balance=weights may help")
    none = try_class_weights(*probe(0.08, objective, 0.0))
    assert none.low <= 0 and describe_class_weights(none, objective).startswith("train.balance=none stays")


@pytest.mark.parametrize("rare, name, balance", [(0.45, "balanced", "none"), (0.08, "accuracy", "none"),
                                                 (0.08, "balanced", "weights")])
def test_nothing_is_tried_where_weights_are_no_question(rare, name, balance):
    objective = Objective(name, tuple(NAMES))
    baselines, vectors = probe(rare, objective)
    assert try_class_weights(baselines, vectors, balance) is None
    assert describe_class_weights(None, objective).startswith("no class weights were tried")


def test_probe_has_thresholds_as_the_model_has():
    "Otherwise thresholds alone would make a model better than the probe."
    objective = Objective("balanced", tuple(NAMES))
    baselines, _ = probe(0.08, objective, 0.7)
    plain = baselines.logits["probe"]["val"].argmax(1)
    score = lambda answers: objective.score(baselines.data.images["val"].targets, answers)
    assert score(baselines.answers("probe", "val")) > score(plain) + 0.1
    found = baselines.metrics("val")
    assert found["balanced_accuracy_val_probe"].value == score(baselines.answers("probe", "val"))
    assert found["accuracy_val_probe"].value < (plain == baselines.data.images["val"].targets).mean()
