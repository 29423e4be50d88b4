"""Print a benchmark's table, with the date and the machine, and write it down where asked."""
from __future__ import annotations

import os
from datetime import UTC, datetime
from pathlib import Path

from cvnb.core.system import machine_info


def show(
    name: str,           # the benchmark's, and its result file's
    title: str,          # what was measured
    rows: list[dict],    # column -> value
    write: bool = False, # whether to write benchmarks/results/NAME.md
) -> None:
    "Print rows as a Markdown table."
    here = machine_info()
    text = lambda v: f"{v:.3g}" if isinstance(v, float) and v < 10 else f"{v:.1f}" if isinstance(v, float) else str(v)
    machine = (f"{here['cores']} cores, {here['cpu']['model']} ({' '.join(here['cpu']['flags'])}), "
               f"{here['memory_gb']} GB · Python {here['python']} · load at the end {os.getloadavg()[0]:.1f}")
    line = lambda cells: "| " + " | ".join(cells) + " |"
    lines = [f"# {title}", "", f"{datetime.now(UTC):%Y-%m-%d} · {machine}", "", line(rows[0])]
    lines.append("|" + "---|" * len(rows[0]))
    lines += [line(map(text, r.values())) for r in rows]
    print("\n".join(lines))
    if write: (Path(__file__).parent/"results"/f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
