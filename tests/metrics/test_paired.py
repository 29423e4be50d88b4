"""The levels of the tests that accept a model, by simulation."""
from __future__ import annotations

import json

import numpy as np
import pytest
from scipy import stats

from cvnb.compress.error_budget import ERROR_BUDGET, level_for, read_tests, record_test
from cvnb.metrics.estimates import estimate_proportion
from cvnb.metrics.paired import (
    accuracy_given_acceptance,
    bounded_difference,
    images_needed,
    noninferiority,
    paired_difference,
    smallest_margin,
)


def at_the_margin(
    n: int,             # images
    margin: float,      # true loss of accuracy
    differing: float,   # share of the images on which the models differ
    accuracy: float,    # of the new model
) -> list[float]:       # probabilities: both right, only the new one, only the reference, neither
    "Describe two models of which the new one is worse by exactly the margin."
    only_new, only_reference = (differing - margin) / 2, (differing + margin) / 2
    return [accuracy - only_new, only_new, only_reference, 1 - accuracy - only_reference]


@pytest.mark.parametrize("n, margin, differing", [(100, 0.05, 0.05), (200, 0.05, 0.06), (400, 0.02, 0.02),
                                                  (1000, 0.01, 0.01), (1000, 0.01, 0.03), (3000, 0.02, 0.1)])
@pytest.mark.parametrize("level", [0.025, 0.0125])
def test_model_at_the_margin_is_accepted_no_more_often_than_the_level(n, margin, differing, level):
    draws = np.random.default_rng(0).multinomial(n, at_the_margin(n, margin, differing, 0.8), 20_000)
    kinds, counts = np.unique(draws[:, 1:3], axis=0, return_counts=True)
    accepted = [paired_difference(int(b), int(c), n, level).low > -margin for b, c in kinds]
    rate = (counts * np.array(accepted)).sum() / counts.sum()
    assert rate <= level + 3 * np.sqrt(level / 20_000)


@pytest.mark.parametrize("spread", [0.02, 0.3])
def test_bounded_statistic_keeps_its_level_where_most_differences_are_zero(spread):
    rng = np.random.default_rng(1)
    margin, wrong = 0.02, 0
    for _ in range(200):
        lost = rng.random(400) < margin / spread   # images that lose `spread`, so that the mean loss is the margin
        wrong += bounded_difference(-spread * lost, 0.025).low > -margin
    assert wrong <= 11   # of 200 at a level of 0.025: at most 11 in 99.4 % of all cases


def test_bounded_statistic_accepts_an_equal_model_and_rejects_a_worse_one():
    rng = np.random.default_rng(2)
    reference = rng.beta(8, 2, 2000)
    assert noninferiority(reference, np.clip(reference + rng.normal(0, 0.01, 2000), 0, 1), 0.02).accepted
    assert not noninferiority(reference, np.clip(reference - 0.03, 0, 1), 0.02).accepted
    with pytest.raises(ValueError, match="span"): bounded_difference(np.array([3.0]), span=1)


def test_model_is_accepted_if_the_lower_end_lies_above_minus_the_margin():
    right = np.arange(1000) < 950
    equal = noninferiority(right, right, 0.02)
    assert equal.accepted and -0.02 < equal.low < 0 and equal.difference == 0
    worse = noninferiority(right, np.arange(1000) < 936, 0.02)   # by less than the margin, and not proven
    assert worse.low < -0.02 < worse.difference and not worse.accepted
    assert not noninferiority(right[:100], right[:100], 0.02).accepted, "too few images prove nothing"


def test_images_needed_is_the_first_number_that_proves_the_margin():
    for margin, level in (0.01, 0.025), (0.02, 0.025), (0.02, 0.0125), (0.1, 0.025):
        n = images_needed(margin, level)
        assert paired_difference(0, 0, n, level).low > -margin >= paired_difference(0, 0, n - 1, level).low
        provable = smallest_margin(n, level)
        assert provable <= margin + 1e-4 and paired_difference(0, 0, n, level).low > -provable
    assert (images_needed(0.01), images_needed(0.02)) == (381, 189)


def try_again(
    p_values: np.ndarray,   # of one run's tries, all at the margin
    run,                    # run directory, new
) -> bool:
    "Try until a model is accepted, with the run's ledger."
    for k, p in enumerate(p_values):
        level = level_for(run, str(k))
        record_test(run, str(k), "compressed", level, bool(p < level), 0.02, 600)
        if p < level: return True
    return False


def test_twenty_tries_at_the_margin_stay_within_the_error_budget(tmp_path):
    rng = np.random.default_rng(3)
    p_values = rng.random((300, 20))
    runs = [tmp_path/str(i) for i in range(300)]
    for run in runs: run.mkdir()
    accepted = sum(try_again(p, run) for p, run in zip(p_values, runs))
    assert accepted <= stats.binom.ppf(0.999, 300, ERROR_BUDGET) < sum((p_values < 0.025).any(1))
    assert all(len(read_tests(run)) == 20 for run, p in zip(runs, p_values) if p.min() > ERROR_BUDGET)


def test_damaged_line_of_the_ledger_counts_as_a_failed_test(tmp_path):
    record_test(tmp_path, "a", "compressed", level_for(tmp_path, "a"), True, 0.02, 600)
    file = tmp_path/"acceptance.jsonl"
    file.write_text(file.read_text().replace("true", "7") + "\x00\n[]\n")
    assert [t["accepted"] for t in read_tests(tmp_path)] == [False, False, False]
    assert level_for(tmp_path, "b") == ERROR_BUDGET / 2**4


@pytest.mark.parametrize("n, accuracy, margin, loss", [(300, 0.9, 0.05, 0.02), (1000, 0.9, 0.02, 0.01),
                                                       (1000, 0.97, 0.02, 0.01), (1000, 0.7, 0.05, 0.04)])
def test_accuracy_of_accepted_models_is_covered_and_unbiased(n, accuracy, margin, loss):
    rng = np.random.default_rng(4)
    chances = at_the_margin(n, loss, loss + 0.02, accuracy)
    found, seen = [], {}
    while len(found) < 250:
        both, only_new, only_reference, _ = (int(x) for x in rng.multinomial(n, chances))
        key = both, only_new, only_reference
        if key not in seen:
            low = paired_difference(only_new, only_reference, n).low
            right = np.arange(n)
            seen[key] = None
            if low > -margin:
                reference = (right < both) | (right >= n - only_reference)
                new = right < both + only_new
                test = noninferiority(reference, new, margin)
                usual = estimate_proportion(both + only_new, n)
                seen[key] = accuracy_given_acceptance(test, usual), usual.value
        if seen[key]: found.append(seen[key])
    estimates, plain = zip(*found)
    coverage = np.mean([e.low <= accuracy <= e.high for e in estimates])
    bias = np.median([e.value for e in estimates]) - accuracy
    assert coverage >= 0.9
    assert abs(bias) < 0.007 and abs(bias) < max(abs(np.mean(plain) - accuracy), 0.002)


def clustered(rng: np.random.Generator, n_groups: int, size: int, icc: float, margin: float, gains: float):
    "Right answers of two models in groups whose loss varies; the new one is worse by the margin, or by a little more."
    strength, mean = 1 / icc - 1, margin + gains
    loss = np.repeat(rng.beta(strength * mean, strength * (1 - mean), n_groups), size)
    lost = rng.random(n_groups * size) < loss
    gained = ~lost & (rng.random(n_groups * size) < gains)
    return ~gained, ~lost


@pytest.mark.parametrize("n_groups, size, icc, margin, gains", [
    (12, 20, 0.5, 0.05, 0.02), (15, 20, 0.5, 0.05, 0.01), (30, 10, 0.9, 0.05, 0.02), (60, 10, 0.5, 0.03, 0.02),
    (100, 5, 0.5, 0.02, 0.01), (300, 5, 0.3, 0.05, 0)])
def test_grouped_images_at_the_margin_are_accepted_no_more_often_than_the_level(n_groups, size, icc, margin, gains):
    rng, accepted, repeats = np.random.default_rng(5), 0, 200
    groups = np.repeat(np.arange(n_groups), size)
    for _ in range(repeats):
        test = noninferiority(*clustered(rng, n_groups, size, icc, margin, gains), margin, groups=groups)
        accepted += test.accepted
        assert test.n_groups == n_groups and test.effect >= 1
    assert accepted <= stats.binom.ppf(0.999, repeats, 0.025), accepted


def test_equal_models_are_accepted_by_group():
    groups = np.repeat(np.arange(100), 6)
    right = np.random.default_rng(0).random(600) < 0.9
    test = noninferiority(right, right, 0.05, groups=groups)
    assert test.accepted and smallest_margin(600, n_groups=100) <= 0.05 < smallest_margin(600, n_groups=90)
    assert test.low == pytest.approx(-smallest_margin(600, n_groups=100), abs=1e-3)


def test_shortened_ledger_counts_the_tests_that_verdicts_stand_for(tmp_path):
    for claim, file in ("compressed", "compress/verdict.json"), ("trained INT8", "export/export.json"):
        record_test(tmp_path, claim, claim, level_for(tmp_path, claim), True, 0.02, 600)
        test = dict(model=claim)
        (tmp_path/file).parent.mkdir()
        (tmp_path/file).write_text(json.dumps(test if claim == "compressed" else dict(int8_test=test)))
    whole = [t["claim"] for t in read_tests(tmp_path)]
    assert whole == ["compressed", "trained INT8"]
    ledger = tmp_path/"acceptance.jsonl"
    ledger.write_text(ledger.read_text().splitlines()[0] + "\n")
    lost = read_tests(tmp_path)
    assert [t["accepted"] for t in lost] == [True, False] and "export/export.json" in lost[1]["claim"]
    record_test(tmp_path, "again", "again", level_for(tmp_path, "again"), False, 0.02, 600)
    (tmp_path/"export/export.json").unlink()   # as when the stage runs again
    assert [t["accepted"] for t in read_tests(tmp_path)] == [True, False, False]


def test_groups_of_one_image_change_nothing_and_four_groups_prove_nothing():
    rng = np.random.default_rng(6)
    reference, new = rng.random(1000) < 0.9, rng.random(1000) < 0.9
    alone, grouped = noninferiority(reference, new, 0.1), noninferiority(reference, new, 0.1, groups=np.arange(1000))
    assert (alone.low, alone.high, grouped.n_groups) == (grouped.low, grouped.high, 0)
    few = noninferiority(reference, reference, 0.1, groups=np.arange(1000) % 4)
    assert not few.accepted and (few.low, few.high) == (-1, 1)
    statistic = rng.random(1000)
    assert noninferiority(statistic, statistic, 0.1, groups=np.arange(1000) // 2).low < \
        noninferiority(statistic, statistic, 0.1).low
