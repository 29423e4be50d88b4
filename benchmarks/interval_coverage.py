"""Coverage of cvnb's 95 % intervals over the grid of tests/metrics/coverage_grid.py.

    python benchmarks/interval_coverage.py [--repeats 1000] [--estimate NAME ...] [--json FILE] [--before FILE]

Every point of the grid draws data sets whose true figure is known, and counts the intervals that contain it. The table
has a row per estimate: the mean coverage and the lowest one over its points, and the share of data sets that got an
interval at all. --json keeps the rows per point. --before takes such a file of another version, which adds its columns
for the points that both measured.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import table

sys.path.insert(0, str(Path(__file__).parents[1]/"tests"))
from metrics.coverage_grid import ESTIMATES, POINTS, Point, measure_coverage  # noqa: E402


def measure(
    point: Point,   # of the grid
    repeats: int,   # data sets
) -> dict[str, Any]:
    "Measure the coverage of a point."
    c = measure_coverage(point, repeats)
    return dict(estimate=point.estimate, point=point.name, covered=c.covered, below=c.below, above=c.above,
                width=c.width, shown=c.shown, n=c.n)


def summarize(
    estimate: str,                 # key of `ESTIMATES`
    rows: list[dict[str, Any]],    # of its points, from `measure`
    before: list[dict[str, Any]],  # of another version
) -> dict[str, Any]:               # a row of the table
    "Summarize the points of an estimate."
    percent = lambda x: f"{100 * x:.1f}"
    shown = [r for r in rows if r["shown"] >= 0.2 * r["n"]]
    worst = min(shown, key=lambda r: r["covered"])
    known = {r["point"]: r for r in before if r["estimate"] == estimate}
    both = [(known[r["point"]], r) for r in shown if r["point"] in known]
    wider = sorted(r["width"] / old["width"] for old, r in both if old["width"])
    old = [o["covered"] for o, _ in both]
    return {"estimate": estimate, "points": len(rows), "repeats": min(r["n"] for r in rows),
            "mean %": percent(sum(r["covered"] for r in shown) / len(shown)), "lowest %": percent(worst["covered"]),
            "lowest at": worst["point"], "median width": " … ".join(
                f"{w:.3g}" for w in (min(r["width"] for r in shown), max(r["width"] for r in shown))),
            "without interval %": percent(1 - sum(r["shown"] for r in rows) / sum(r["n"] for r in rows)),
            "before: points": len(old), "mean % ": percent(sum(old) / len(old)) if old else "",
            "lowest % ": percent(min(old)) if old else "",
            "width now ÷ before": f"{wider[len(wider) // 2]:.2f}" if wider else ""}


def main() -> None:
    "Measure and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=1000)
    parser.add_argument("--estimate", nargs="*", default=list(ESTIMATES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--measured", type=Path, help="a file of --json, which is not measured again")
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    rows = json.loads(args.measured.read_text()) if args.measured else [
        measure(p, args.repeats) for p in POINTS if p.estimate in args.estimate]
    if args.json: args.json.write_text(json.dumps(rows))
    before = json.loads(args.before.read_text()) if args.before else []
    found = [summarize(e, own, before) for e in args.estimate if (own := [r for r in rows if r["estimate"] == e])]
    table.show("interval_coverage", "Coverage of 95 % intervals, simulated", found, args.write)


if __name__ == "__main__": main()
