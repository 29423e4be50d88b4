"""What the command line prints while a run is at work."""
from __future__ import annotations

import io

from cvnb.cli.console import ProgressLines


def test_file_gets_progress_lines_at_intervals():
    out = io.StringIO()
    with ProgressLines(out) as lines:
        lines("train", "start", 0, "it failed")
        lines("train", "progress", 0.4, "epoch 2/5")   # the interval has not passed
        lines.pause = 0
        lines("train", "progress", 0.6, "epoch 3/5")
        lines("train", "done", 1, "98 % right")
    start, progress, done = out.getvalue().splitlines()
    assert start.split() == ["…", "train", "it", "failed"]
    assert progress.split()[:5] == ["…", "train", "60%", "epoch", "3/5"]
    assert progress.endswith(" left")
    assert done.startswith("✓ train") and done.endswith("98 % right")


class Written(io.StringIO):
    "Count what is written in one call."
    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def write(self, text: str) -> int:
        self.calls.append(text)
        return super().write(text)


def test_notes_are_printed_with_their_result():
    "In one call, so that the notes of two trials that end at once do not mix."
    out = Written()
    with ProgressLines(out) as lines:
        lines("a", "start", 0, "")
        lines("b", "start", 0, "")
        lines("b", "done", 1, "98 % right\n! one\n- two")
        lines("a", "done", 1, "97 % right\n- three")
    shown = [line[:5].rstrip() for line in out.getvalue().splitlines()]
    assert shown == ["… a", "… b", "✓ b", "  ! o", "  - t", "✓ a", "  - t"]
    assert any("✓ b" in text and "- two" in text for text in out.calls)


def test_urgent_note_is_printed_at_once_and_begins_no_line():
    out = io.StringIO()
    with ProgressLines(out) as lines:
        lines("train", "start", 0, "")
        lines("train", "note", 0.1, "training begins anew [1]")
        assert out.getvalue().splitlines()[-1].split() == ["!", "train", "training", "begins", "anew", "[1]"]
        lines("other", "note", 0, "of no line")
        assert list(lines.tasks) == ["train"]
