"""Numbers that papers print: beside measured ones for orientation, never in one table with them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

__all__ = ["PublishedTable", "published"]


@dataclass(frozen=True)
class PublishedTable:
    """One table of one paper.

    Attributes:
        title: data and setting.
        source: who printed it.
        protocol: what is known of how it was measured.
        columns: names of the numbers.
        rows: a method's name and its numbers, None where the source has none.
    """

    title: str
    source: str
    protocol: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float | None, ...]], ...]


@cache
def published() -> tuple[PublishedTable, ...]:
    """All tables, in the order of the report."""
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    return tuple(
        PublishedTable(
            table["title"],
            table["source"],
            table["protocol"],
            tuple(table["columns"]),
            tuple((name, tuple(numbers)) for name, *numbers in table["rows"]),
        )
        for table in content
    )
