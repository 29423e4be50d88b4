"""Recall and precision of the audit's near duplicates and label errors beside other tools, in one run.

    python benchmarks/audit.py [--write]

Runs the parts of `audit_duplicates.py` and `audit_labels.py`, which say what they measure and take more options.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path


def main() -> None:
    "Run all parts."
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write the tables to benchmarks/results/")
    args = parser.parse_args()
    parts = [["audit_duplicates"], ["audit_duplicates", "--million"], ["audit_labels"], ["audit_labels", "--intervals"]]
    for name, *part in parts:
        script = Path(__file__).with_name(f"{name}.py")
        subprocess.run([sys.executable, script, *part, *["--write"] * args.write], check=True)


if __name__ == "__main__": main()
