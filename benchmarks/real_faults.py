"""Real faults that the audit finds in public data sets: names, pictures, and the verdict of a reviewer for each.

    cvnb run audit --data cifar10 --run runs/cifar10
    python benchmarks/real_faults.py cifar10=runs/cifar10 … [--write]

`real_faults.csv` holds the verdicts: `fault`, `no fault` or `unclear`, and a comment. The script reads them and
computes none. The page lists the findings with a verdict and draws some of them beside the image that they refer to. It
states how many findings of each check were reviewed.
"""
from __future__ import annotations

import argparse
import io
from pathlib import Path

import pandas as pd
from PIL import Image

from cvnb.audit.checks import CHECKS, Check
from cvnb.audit.pictures import plot_findings
from cvnb.core.files import read_json
from cvnb.metrics.estimates import Estimate, estimate_proportion

HERE = Path(__file__).parent
PAGE = HERE/"results"/"real_faults.md"
VERDICTS = ("fault", "unclear", "no fault")


def small(figure: object, path: Path, limit: int = 100_000) -> None:
    "Save a figure as a PNG of few colours, below a size in bytes."
    for dpi, colours in ((90, 256), (90, 64), (72, 64), (60, 32)):
        figure.savefig(buffer := io.BytesIO(), format="png", dpi=dpi)
        Image.open(buffer).convert("RGB").quantize(colours).save(out := io.BytesIO(), "PNG", optimize=True)
        if len(out.getvalue()) <= limit: break
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(out.getvalue())


def count(seen: pd.Series) -> str:   # verdicts, '' for findings without review
    "Count the verdicts of the reviewed findings."
    reviewed = seen[seen != ""]
    if reviewed.empty: return "None reviewed"
    share = estimate_proportion(int((reviewed == "fault").sum()), len(reviewed))
    counts = ", ".join(f"{(reviewed == v).sum()} {v}" for v in VERDICTS if (reviewed == v).any())
    return f"{len(reviewed)} reviewed: {counts}; share of faults {share}"


def section(
    name: str, run: Path, audit: dict, check: str, rows: pd.DataFrame, n: int, write: bool,
) -> list[str]:   # lines
    "Show what one check found."
    result = audit["checks"][check]
    given = (result["proof"] or {}).get("precision") or dict(n=0)
    number = lambda key: float("nan") if given.get(key) is None else given[key]
    predicted = Estimate(**{k: number(k) for k in ("value", "low", "high", "n")})
    prediction = f" Predicted precision {predicted}." if predicted.n else ""
    title = check.replace("_", " ").capitalize()
    found = f"{result['n']:,} of {result['n_checked']:,} images.{prediction} {count(rows.seen)}."
    lines = [f"### {title}", "", found, ""]
    reviewed = rows[rows.seen != ""]
    if reviewed.empty: return lines
    table = pd.read_parquet(run/"audit/manifest.parquet", columns=["path", "label", "split"])
    reviewed = reviewed.assign(order=reviewed.seen.map(VERDICTS.index))
    reviewed = reviewed.sort_values(["order", "score"], ascending=[True, False])
    drawn = pd.concat([part.head(n // 2) for _, part in reviewed.groupby("order")])
    drawn = drawn[["path", "score", "reason", "other"]]
    picture = PAGE.with_suffix("")/f"{name}-{check}.png"
    if write: small(plot_findings(audit["root"], Check(check, drawn, result["n_checked"]), table, n), picture)
    head = ["| file | finding | compared with | verdict |", "|---|---|---|---|"]
    lines += [f"![{check} in {name}]({picture.relative_to(PAGE.parent).as_posix()})", "", *head]
    for r in reviewed.itertuples():
        seen = f"{r.seen}: {r.comment}" if r.comment else r.seen
        lines.append(f"| {r.path} | {r.reason} | {r.other} | {seen} |")
    return [*lines, ""]


def main() -> None:
    "Draw and print."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", help="NAME=RUN of finished audits")
    parser.add_argument("-n", type=int, default=16, help="findings drawn of each check")
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/real_faults.md and its pictures")
    args, lines = parser.parse_args(), ["# Real faults that the audit finds in public data sets", ""]
    verdicts = pd.read_csv(HERE/"real_faults.csv", dtype=str, keep_default_na=False)
    assert set(verdicts.seen) <= set(VERDICTS), "real_faults.csv knows fault, unclear and no fault"
    for given in args.runs:
        name, run = given.split("=", 1)
        audit, found = read_json(Path(run)/"audit/audit.json"), pd.read_parquet(Path(run)/"audit/findings.parquet")
        found = found.merge(verdicts[verdicts.data == name].drop(columns="data"), "left", ["check", "path"])
        found = found.fillna(dict(seen="", comment=""))
        left_out = "Checks of the set as a whole and of files' metadata are left out."
        lines += [f"## {name}", "", f"{audit['n_images']:,} images. {left_out}", ""]
        of_images = [name for name, info in CHECKS.items() if not info.dataset_level]
        for check, rows in found[found.check.isin(of_images)].groupby("check", sort=False):
            lines += section(name, Path(run), audit, check, rows.drop_duplicates("path"), args.n, args.write)
    print("\n".join(lines))
    if args.write: PAGE.write_text("\n".join(lines).rstrip() + "\n", encoding="utf-8")


if __name__ == "__main__": main()
