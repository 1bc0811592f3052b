"""Tables of text."""

from __future__ import annotations

from collections.abc import Sequence


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the head; columns are padded, so that the source can be read too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[text.ljust(width) for text, width in zip(row, widths, strict=True)] for row in rows]
    padded.insert(1, ["-" * width for width in widths])
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def aligned(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """For a terminal: columns end below each other."""
    widths = [max(len(line[n]) for line in [head, *lines]) for n in range(len(head))]
    rows = ("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in [head, *lines])
    return "\n".join(f"  {row}" for row in rows)
