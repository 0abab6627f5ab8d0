"""Tables, as text and as Markdown."""

from collections.abc import Mapping, Sequence
from typing import Any


def text_table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows of cells as lines with aligned columns."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return '\n'.join(map(str.rstrip, lines))


def markdown_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return rows of the same columns as a Markdown table."""
    lines = [list(rows[0]), ['---'] * len(rows[0]), *([str(cell) for cell in row.values()] for row in rows)]
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
