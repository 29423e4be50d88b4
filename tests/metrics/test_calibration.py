"""Calibration in words: the sign and size of the gap, what a temperature changes, and images in groups."""
from __future__ import annotations

import numpy as np
import pytest

import cvnb.metrics.calibration as calibration
from cvnb.metrics.calibration import apply_temperature, calibration_gap, describe_gap


def planted(temperature: float, n: int = 3000, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    "Probabilities that are too sure by a temperature (below 1: not sure enough), and the classes."
    rng = np.random.default_rng(seed)
    right = apply_temperature(np.exp(rng.normal(size=(n, 4))), 0.5)
    labels = (right.cumsum(1) > rng.random((n, 1))).argmax(1)
    return apply_temperature(right, 1 / temperature), labels


@pytest.mark.parametrize("temperature, kind", [(2.0, "overconfident"), (0.5, "underconfident")])
def test_planted_temperature_is_found_and_mends_the_gap(temperature, kind):
    probabilities, labels = planted(temperature)
    assert calibration.fit_temperature(probabilities, labels) == pytest.approx(temperature, rel=0.1)
    effect = calibration.measure_temperature(probabilities, labels)
    gap = calibration_gap(probabilities.max(1), probabilities.argmax(1) == labels)
    assert (gap.value > 0.05) == (kind == "overconfident") and abs(effect.after.value) < 0.025
    said = describe_gap(gap, effect)
    assert said.startswith(f"{kind} by {100 * abs(gap.value):.0f} points") and "mends it" in said


def test_temperature_changes_no_answer():
    probabilities, _ = planted(1.0, 200)
    for temperature in 0.3, 1.8:
        assert (apply_temperature(probabilities, temperature).argmax(1) == probabilities.argmax(1)).all()


def test_calibrated_model_is_called_so():
    probabilities, labels = planted(1.0, 20_000)
    gap = calibration_gap(probabilities.max(1), probabilities.argmax(1) == labels)
    assert gap.low < 0 < gap.high and describe_gap(gap).endswith("calibrated")


def test_gap_of_copies_has_the_interval_of_their_originals():
    probabilities, labels = planted(2.0, 300)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == labels
    alone = calibration_gap(confidence, correct)
    copies = calibration_gap(np.repeat(confidence, 4), np.repeat(correct, 4), np.repeat(np.arange(300), 4))
    assert copies.value == pytest.approx(alone.value) and copies.n_groups == 300
    assert copies.high - copies.low == pytest.approx(alone.high - alone.low, rel=0.1)


def test_groups_lie_in_one_half(monkeypatch):
    seen = []
    fit = calibration.fit_temperature
    note = lambda p: seen.append({tuple(row) for row in p})
    monkeypatch.setattr(calibration, "fit_temperature", lambda p, y: note(p) or fit(p, y))
    probabilities, labels = planted(2.0, 60)
    calibration.measure_temperature(np.repeat(probabilities, 3, 0), np.repeat(labels, 3), np.repeat(np.arange(60), 3))
    assert not seen[0] & seen[1] and len(seen[0] | seen[1]) == 60
