"""Simulated data whose true figures are known, on which the coverage of cvnb's intervals is measured."""
from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from zlib import crc32

import numpy as np

from cvnb.audit.coverage import auc_interval
from cvnb.benchmark import timing
from cvnb.metrics import classification, estimates, regression

Draw = Callable[[np.random.Generator], dict]   # one data set: arguments of an estimate; `groups` is left out if unknown


@dataclass(frozen=True)
class Point:
    "A point of the grid: an estimate and a way to draw data whose true figure is known."
    estimate: str   # key of `ESTIMATES`
    name: str       # what is special
    draw: Draw
    truth: float
    short: bool = False   # whether CI simulates it

    @property
    def at_bound(self) -> bool:
        "Say whether the truth is so near to a bound that an interval can miss on one side only."
        unbounded = self.estimate in ("mae", "rmse", "latency_p50", "latency_p99", "speed_ratio")
        return not unbounded and not 0 < self.truth < .985


@dataclass(frozen=True)
class Coverage:
    "How often an interval held."
    point: Point
    shown: int       # data sets with an interval
    n: int           # data sets
    below: float     # share of the intervals that lie below the truth
    above: float     # share of the intervals that lie above the truth
    width: float     # median

    @property
    def covered(self) -> float: return 1 - self.below - self.above


ESTIMATES: dict[str, Callable] = dict(
    accuracy=classification.accuracy, balanced_accuracy=classification.balanced_accuracy,
    f1_micro=classification.f1, f1_macro=lambda truth, predicted, groups=None: _call(
        classification.f1, dict(truth=truth, predicted=predicted, average="macro", groups=groups)),
    mean_average_precision=classification.mean_average_precision,
    calibration_error=classification.calibration_error,
    mae=regression.mae, rmse=regression.rmse, r2=regression.r2, auc=auc_interval, mean_of_runs=estimates.estimate_mean,
    latency_p50=timing.median_latency, latency_p99=timing.tail_latency,
    speed_ratio=timing.speed_ratio)


def _call(function: Callable, arguments: dict) -> estimates.Estimate:
    "Call an estimate, without groups where it knows none."
    if "groups" not in inspect.signature(function).parameters: arguments.pop("groups", None)
    return function(**arguments)


def measure_coverage(point: Point, repeats: int) -> Coverage:
    "Draw data sets and count the intervals that contain the truth."
    rng = np.random.default_rng(crc32(f"{point.estimate} {point.name}".encode()))
    found = [_call(ESTIMATES[point.estimate], point.draw(rng)) for _ in range(repeats)]
    low, high = (np.array([np.nan if v is None else v for v in values], float)
                 for values in ([e.low for e in found], [e.high for e in found]))
    shown = np.isfinite(low)
    n = max(int(shown.sum()), 1)
    tiny = 1e-9
    below = float((high[shown] < point.truth - tiny).sum() / n)
    above = float((low[shown] > point.truth + tiny).sum() / n)
    width = float(np.median((high - low)[shown])) if shown.any() else np.nan
    return Coverage(point, int(shown.sum()), repeats, below, above, width)


# groups -------------------------------------------------------------------------------------------------------------

def _beta(rng: np.random.Generator, mean: float, icc: float, size: int) -> np.ndarray:
    "Draw a share for each group; `icc` is the correlation of two images of a group."
    strength = 1 / icc - 1
    return rng.beta(strength * mean, strength * (1 - mean), size)


def _group_sizes(kind: str) -> np.ndarray:
    "Count the images of each group."
    number, size = map(int, kind.split()[0].split("x"))
    if kind.endswith("uneven"): return np.maximum(1, np.round(size * np.linspace(0.2, 1.8, number)).astype(int))
    return np.full(number, size)


def _grouped_correct(kind: str, mean: float, icc: float) -> Draw:
    "Draw right and wrong predictions of images in groups."
    groups = np.repeat(np.arange(len(_group_sizes(kind))), _group_sizes(kind))
    def draw(rng: np.random.Generator) -> dict:
        share = _beta(rng, mean, icc, groups.max() + 1)
        return dict(correct=rng.random(len(groups)) < share[groups], groups=groups)
    return draw


def _accuracy_points() -> list[Point]:
    points = []
    for n in (20, 50, 100, 500):
        for p in (0.7, 0.9, 0.97, 0.995):
            draw = lambda rng, n=n, p=p: dict(correct=rng.random(n) < p)
            points.append(Point("accuracy", f"{n} images, {p:.1%}", draw, p, (n, p) in ((50, 0.97), (100, 0.995))))
    for kind, mean, icc in (("30x5", .9, .3), ("10x10", .8, .3), ("40x5 uneven", .9, .5), ("100x3", .97, .5),
                            ("15x8 uneven", .85, .2), ("6x20", .8, .1)):
        points.append(Point("accuracy", f"groups {kind}, {mean:.0%}, ICC {icc}", _grouped_correct(kind, mean, icc),
                            mean, kind in ("30x5", "40x5 uneven")))
    return points


# classes ------------------------------------------------------------------------------------------------------------

def _class_points() -> list[Point]:
    def make(name: str, sizes: np.ndarray, recalls: np.ndarray, short: bool = False) -> Point:
        labels = np.repeat(np.arange(len(sizes)), sizes)
        draw = lambda rng: dict(labels=labels, correct=rng.random(len(labels)) < np.asarray(recalls)[labels])
        return Point("balanced_accuracy", name, draw, float(np.mean(recalls)), short)

    spread = lambda k, mean, icc: _beta(np.random.default_rng(7), mean, icc, k)
    rare = np.round(np.geomspace(100, 4, 10)).astype(int)
    points = [
        make("2 classes of 90 and 10, 95 % and 60 %", [90, 10], [.95, .6], True),
        make("3 classes of 90, 8 and 2; 95, 90 and 50 %", [90, 8, 2], [.95, .9, .5]),
        make("3 classes of 90, 8 and 2; 99, 99 and 50 %", [90, 8, 2], [.99, .99, .5]),
        make("3 classes of 90, 8 and 2; 95, 90 and 90 %", [90, 8, 2], [.95, .9, .9]),
        make("10 classes of 10, 90 %", [10] * 10, [.9] * 10, True),
        make("10 classes of 10, 98 %", [10] * 10, [.98] * 10),
        make("10 classes of 4 … 100, 90 %", rare, [.9] * 10, True),
        make("10 classes of 4 … 100, rare ones worse", rare, np.linspace(.97, .6, 10), True),
        make("10 classes of 100, 99 %", [100] * 10, [.99] * 10),
        make("10 classes of 1 … 3, 80 %", [1, 1, 2, 2, 2, 3, 3, 3, 3, 3], [.8] * 10),
        make("100 classes of 3, 97 %", [3] * 100, [.97] * 100),
        make("100 classes of 5, 90 ± 13 %", [5] * 100, spread(100, .9, .2)),
        make("100 classes of 2 … 40, 85 ± 11 %", np.round(np.geomspace(2, 40, 100)).astype(int), spread(100, .85, .1)),
        make("1000 classes of 10, 90 ± 9 %", [10] * 1000, spread(1000, .9, .1))]
    for kind, icc in (("40x5", .3), ("25x8 uneven", .2), ("100x3", .5)):
        sizes = _group_sizes(kind)
        groups = np.repeat(np.arange(len(sizes)), sizes)
        def draw(rng: np.random.Generator, groups: np.ndarray = groups, icc: float = icc) -> dict:
            labels = (np.arange(groups.max() + 1) % 5)[groups]   # a group has one class
            return dict(labels=labels, correct=rng.random(len(groups)) < _beta(rng, .9, icc, groups.max() + 1)[groups],
                        groups=groups)
        name = f"5 classes, groups {kind}, 90 %, ICC {icc}"
        points.append(Point("balanced_accuracy", name, draw, .9, kind == "40x5"))
    return points


# several labels -------------------------------------------------------------------------------------------------------

def _labels(n: int, share: np.ndarray, miss: float, alarm: float, copies: float = 0.0, group: int = 1) -> Draw:
    "Draw labels with missed and false ones; in a share `copies` of the images, all errors happen together."
    def draw(rng: np.random.Generator, n: int = n) -> dict:
        truth = rng.random((n, len(share))) < share
        units = -(-n // group)
        u = np.repeat(rng.random((units, len(share))), group, 0)[:n] if group > 1 else rng.random((n, len(share)))
        together = rng.random(n) < copies
        u[together] = u[together, :1]
        predicted = np.where(truth, u >= miss, u < alarm)
        found = dict(truth=truth, predicted=predicted)
        return found | dict(groups=np.arange(n) // group) if group > 1 else found
    return draw


@cache
def _true_f1(share: tuple, miss: float, alarm: float) -> tuple[float, float]:
    "Compute F1 over all labels and its mean over classes."
    p = np.array(share)
    hits, total = p * (1 - miss), p + p * (1 - miss) + (1 - p) * alarm
    return float(2 * hits.sum() / total.sum()), float(np.mean(2 * hits / total))


def _f1_points() -> list[Point]:
    points = []
    ten, rare = (.2,) * 10, tuple(np.geomspace(.5, .02, 10))
    one = (.9,)
    grid = [("near 1, 30 images", 30, ten, .01, .001, 0, 1, False),
            ("near 1, 100 images", 100, ten, .005, .0005, 0, 1, True),
            ("99 %, 100 images", 100, ten, .01, .001, 0, 1, True),
            ("95 %, 100 images", 100, ten, .05, .005, 0, 1, False),
            ("80 %, 100 images", 100, ten, .2, .05, 0, 1, False), ("80 %, 30 images", 30, ten, .2, .05, 0, 1, False),
            ("rare classes, 100 images", 100, rare, .1, .01, 0, 1, True),
            ("rare classes, 400 images", 400, rare, .1, .01, 0, 1, False),
            ("rare classes, 50 images", 50, rare, .2, .02, 0, 1, False),
            ("errors together, 100 images", 100, ten, .05, .05, .7, 1, True),
            ("errors together, 500 images", 500, ten, .02, .02, 1., 1, False),
            ("one label, 50 images", 50, one, .05, .1, 0, 1, False),
            ("groups of 4, 200 images", 200, ten, .1, .02, 0, 4, True),
            ("groups of 10, 300 images", 300, ten, .1, .02, 0, 10, False)]
    for name, n, share, miss, alarm, copies, group, short in grid:
        draw = _labels(n, np.array(share), miss, alarm, copies, group)
        for kind, truth in zip(("f1_micro", "f1_macro"), _true_f1(share, miss, alarm)):
            points.append(Point(kind, name, draw, truth, short))
    return points


def _scores(n: int, share: np.ndarray, shift: float, group: int = 1) -> Draw:
    "Draw labels and scores that are `shift` standard deviations higher for images with the label."
    def draw(rng: np.random.Generator, n: int = n) -> dict:
        truth = np.repeat(rng.random((-(-n // group), len(share))) < share, group, 0)[:n]
        noise = rng.normal(0, 1, truth.shape)
        common = np.repeat(rng.normal(0, 1, (-(-n // group), len(share))), group, 0)[:n]
        if group > 1: noise = .7 * common + .714 * noise
        found = dict(truth=truth, scores=shift * truth + noise)
        return found | dict(groups=np.arange(n) // group) if group > 1 else found
    return draw


@cache
def _true_average_precision(share: tuple, shift: float) -> float:
    "Integrate precision over recall for normal scores."
    from scipy.stats import norm
    t = np.linspace(-9, 9 + shift, 200_001)
    found = []
    for p in share:
        recall, alarm = norm.sf(t - shift), norm.sf(t)
        precision = p * recall / np.maximum(p * recall + (1 - p) * alarm, 1e-300)
        found.append(-np.trapezoid(precision, recall))
    return float(np.mean(found))


def _map_points() -> list[Point]:
    four, rare, two = (.5, .3, .1, .05), tuple(np.geomspace(.3, .03, 20)), (.3, .1)
    grid = [("4 classes, 400 images", 400, four, 1.5, 1, True), ("4 classes, 100 images", 100, four, 1.5, 1, True),
            ("4 classes, 1000 images", 1000, four, 1.5, 1, False), ("near 1, 200 images", 200, four, 4., 1, True),
            ("near 1, 1000 images", 1000, four, 4., 1, False), ("20 classes, 300 images", 300, rare, 2., 1, False),
            ("20 classes, 1000 images", 1000, rare, 2., 1, False), ("2 classes, 60 images", 60, two, 2., 1, False),
            ("weak, 200 images", 200, four, .5, 1, False), ("groups of 4, 400 images", 400, four, 1.5, 4, False)]
    return [Point("mean_average_precision", name, _scores(n, np.array(share), shift, group),
                  _true_average_precision(share, shift), short) for name, n, share, shift, group, short in grid]


# calibration ----------------------------------------------------------------------------------------------------------

def _calibration_points() -> list[Point]:
    points = []
    def add(name: str, n: int, confidence: Callable, excess: Callable, truth: float, short: bool = False) -> None:
        def draw(rng: np.random.Generator) -> dict:
            c = confidence(rng, n)
            return dict(confidence=c, correct=rng.random(n) < c - excess(c))
        points.append(Point("calibration_error", name, draw, truth, short))

    wide = lambda rng, n: rng.uniform(.5, 1, n)
    sure = lambda rng, n: rng.beta(40, 1, n)
    lower = lambda rng, n: rng.uniform(.3, .9, n)
    for n in (30, 100, 500, 2000): add(f"calibrated, {n} images", n, wide, lambda c: 0, 0., n in (100, 500))
    for n in (100, 1000): add(f"calibrated near 1, {n} images", n, sure, lambda c: 0, 0., n == 1000)
    for n in (100, 500, 2000):
        for excess in (.02, .05, .2): add(f"{excess:.0%} too sure, {n} images", n, wide, lambda c, e=excess: e, excess,
                                          (n, excess) in ((500, .05), (100, .2)))
    swing = lambda c: np.where(c < .6, .1, -.1)
    for n in (100, 500, 2000): add(f"too sure and too unsure, {n} images", n, lower, swing, .1, n == 500)
    half = lambda c: np.where(c > .75, .1, 0)
    for n in (100, 500, 2000): add(f"top half too sure, {n} images", n, wide, half, .05, False)
    def grouped(rng: np.random.Generator) -> dict:
        groups = np.repeat(np.arange(100), 5)
        c = wide(rng, 100)[groups]
        return dict(confidence=c, correct=np.repeat(rng.random(100), 5) < c, groups=groups)
    points.append(Point("calibration_error", "calibrated, 100 groups of 5", grouped, 0., True))
    return points


# numbers --------------------------------------------------------------------------------------------------------------

def _number_points() -> list[Point]:
    points = []
    from scipy.special import gamma
    noises = dict(normal=(lambda rng, s: rng.normal(0, 1, s), np.sqrt(2 / np.pi), 1.),
                  exponential=(lambda rng, s: rng.exponential(1, s), 1., 2.),
                  heavy=(lambda rng, s: rng.standard_t(5, s), None, 5 / 3),
                  lognormal=(lambda rng, s: rng.lognormal(0, .75, s), np.exp(.75**2 / 2), np.exp(2 * .75**2)),
                  infinite=(lambda rng, s: rng.standard_t(3, s), 2 * np.sqrt(3) / np.pi, 3.))
    # the mean of the absolute value of Student's t
    mean_t = lambda v: 2 * np.sqrt(v) * gamma((v + 1) / 2) / ((v - 1) * np.sqrt(np.pi) * gamma(v / 2))
    for name, (noise, mean, square) in noises.items():
        if name in ("heavy", "infinite"): mean = mean_t(5 if name == "heavy" else 3)
        for n in (20, 50, 200, 1000):
            def draw(rng: np.random.Generator, n: int = n, noise: Callable = noise) -> dict:
                truth = rng.normal(3, 2, n)
                return dict(truth=truth, predicted=truth - noise(rng, n))
            short = n == 50 and name in ("normal", "heavy", "lognormal")
            points += [Point("mae", f"{name} errors, {n} images", draw, float(mean), short),
                       Point("rmse", f"{name} errors, {n} images", draw, float(np.sqrt(square)), short),
                       Point("r2", f"{name} errors, {n} images", draw, float(1 - square / 4), short)]
    def grouped(rng: np.random.Generator) -> dict:
        groups = np.repeat(np.arange(40), 5)
        truth = rng.normal(3, 2, 40)[groups]
        errors = .8 * rng.normal(0, 1, 40)[groups] + .6 * rng.normal(0, 1, 200)
        return dict(truth=truth, predicted=truth + errors, groups=groups)
    for kind, truth in dict(mae=np.sqrt(2 / np.pi), rmse=1., r2=.75).items():
        points.append(Point(kind, "40 groups of 5", grouped, float(truth), kind == "rmse"))
    for n in (3, 5, 10):
        draw = lambda rng, n=n: dict(values=rng.normal(.9, .01, n))
        points.append(Point("mean_of_runs", f"{n} runs", draw, .9, n == 3))
    return points


def _auc_points() -> list[Point]:
    from scipy.stats import norm
    points = []
    for m, n in ((10, 40), (50, 50), (30, 300), (5, 100)):
        for auc in (.7, .9, .99):
            shift = norm.ppf(auc) * np.sqrt(2)
            draw = lambda rng, m=m, n=n, s=shift: dict(positive=rng.normal(s, 1, m), negative=rng.normal(0, 1, n))
            points.append(Point("auc", f"{m} against {n}, AUC {auc}", draw, auc, (m, n, auc) == (10, 40, .9)))
    return points


# timings --------------------------------------------------------------------------------------------------------------

def _noise(rng: np.random.Generator, n: int, phi: float) -> np.ndarray:
    "Draw autocorrelated noise, whose variance is 1."
    from scipy.signal import lfilter
    e = rng.normal(0, np.sqrt(1 - phi**2), n + 50)
    return lfilter([1], [1, -phi], e)[50:] if phi else e[50:]


def _timings(rounds: int, calls: int, phi: float, candidates: int) -> Callable:
    "Draw the timings of candidates that take turns on one machine; `phi` is the correlation of successive calls."
    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        slow = _noise(rng, rounds * candidates * calls, phi).reshape(rounds, candidates, calls)
        own = rng.exponential(.3, slow.shape)
        return [1e-3 * np.exp(.1 * slow[:, i] + .1 * own[:, i]) for i in range(candidates)]
    return draw


@cache
def _true_percentile(q: float) -> float:
    "Compute a percentile of a call in milliseconds from four million of them."
    rng = np.random.default_rng(1)
    return float(np.percentile(np.exp(.1 * rng.normal(0, 1, 4_000_000) + .1 * rng.exponential(.3, 4_000_000)), q))


def _timing_points() -> list[Point]:
    points = []
    for rounds, calls, phi, short in ((10, 10, 0., True), (10, 10, .9, True), (10, 30, .95, False), (20, 10, .9, False),
                                      (30, 30, .95, False), (6, 10, .9, False)):
        for others in (2, 8):
            name = f"{rounds} rounds of {calls}, {others} candidates, correlation {phi}"
            both = _timings(rounds, calls, phi, others)
            points += [
                Point("latency_p50", name, lambda rng, b=both: dict(seconds=b(rng)[0]), _true_percentile(50), short),
                Point("speed_ratio", name, lambda rng, b=both: dict(zip(("reference", "other"), b(rng))), 1., short)]
    for rounds, calls, phi in ((10, 10, 0.), (10, 60, 0.), (10, 100, 0.), (20, 100, .5), (30, 100, .9)):
        both = _timings(rounds, calls, phi, 2)
        points.append(Point("latency_p99", f"{rounds} rounds of {calls}, correlation {phi}",
                            lambda rng, b=both: dict(seconds=b(rng)[0]), _true_percentile(99), rounds * calls == 600))
    return points


POINTS = [*_accuracy_points(), *_class_points(), *_f1_points(), *_map_points(), *_calibration_points(),
          *_number_points(), *_auc_points(), *_timing_points()]
