"""How well the audit finds what it looks for: near duplicates and label errors beside the tools that people use, in one run.

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
    for name, *part in (["audit_duplicates"], ["audit_duplicates", "--million"], ["audit_labels"], ["audit_labels", "--intervals"]):
        subprocess.run([sys.executable, Path(__file__).with_name(f"{name}.py"), *part, *["--write"] * args.write], check=True)


if __name__ == "__main__": main()
