"""Tables that compare methods under one protocol; rows of different protocols never share a table."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from avatars.errors import UserError
from eval.compare import Difference, differences, intervals
from eval.metrics import DEFINITIONS
from eval.rows import Row, check_one_protocol, mean_values

__all__ = [
    "Comparison",
    "NothingComparesError",
    "Run",
    "by_protocol",
    "compared",
    "comparison_table",
    "markdown",
    "rounded",
    "table",
]

IN_MASK = ("psnr_masked", "ssim_masked")
DECIMALS = {"psnr": 2, "psnr_masked": 2} | {key: 2 for key in DEFINITIONS if key.startswith("akd/")}


class NothingComparesError(UserError):
    """No method was measured on all subjects, so there is no table."""


@dataclass(frozen=True)
class Run:
    """One method's checkpoint on all subjects.

    Attributes:
        method: its name.
        checkpoint: its checkpoint.
        name: what tables call it: the method, with the checkpoint where the method has several.
        rows: a row a subject, ordered by subject.
    """

    method: str
    checkpoint: str
    name: str
    rows: tuple[Row, ...]

    def values(self, key: str) -> list[float] | None:
        """A metric's number for every subject in order, or None where one has none."""
        found = [row.values[key] for row in self.rows if key in row.values]
        return found if len(found) == len(self.rows) else None

    @property
    def create_seconds(self) -> float:
        """Median over subjects."""
        return statistics.median(row.create_seconds for row in self.rows)

    @property
    def drive_fps(self) -> float:
        """Median over subjects."""
        return statistics.median(row.drive_fps for row in self.rows)


@dataclass(frozen=True)
class Comparison:
    """Methods under one protocol, measured on the same subjects.

    Attributes:
        runs: the best mean PSNR first.
        keys: metrics that at least one row has a number for, in the order of `DEFINITIONS`.
        notes: sentences on what the table stands on and what has no number.
    """

    runs: tuple[Run, ...]
    keys: tuple[str, ...]
    notes: tuple[str, ...]

    @cached_property
    def limits(self) -> dict[tuple[str, str], tuple[float, float] | None]:
        """(run's name, metric) to the 95 % interval of its mean, where it has a number for every subject."""
        found = {
            (run.name, key): values
            for run in self.runs
            for key in self.keys
            if (values := run.values(key)) is not None
        }
        return dict(zip(found, intervals(list(found.values())), strict=True))

    @cached_property
    def differences(self) -> dict[str, dict[str, Difference]]:
        """Metric to every other run's name to its paired difference from the first run.

        Only metrics that the first and another run have numbers for.
        """
        pairs = {
            (key, run.name): (values, reference)
            for key in self.keys
            if (reference := self.runs[0].values(key)) is not None
            for run in self.runs[1:]
            if (values := run.values(key)) is not None
        }
        computed = differences([one for one, _ in pairs.values()], [other for _, other in pairs.values()])
        found: dict[str, dict[str, Difference]] = {}
        for (key, name), difference in zip(pairs, computed, strict=True):
            found.setdefault(key, {})[name] = difference
        return found

    def cell(self, run: Run, key: str, *, with_interval: bool) -> str:
        """A mean with the metric's decimals and its interval where there is one; "n/a" without a number."""
        values = run.values(key)
        if values is None:
            return "n/a"
        digits = decimals(key)
        mean = f"{statistics.fmean(values):.{digits}f}"
        limits = self.limits[run.name, key] if with_interval else None
        return mean if limits is None else f"{mean} ({limits[0]:.{digits}f} to {limits[1]:.{digits}f})"


def compared(rows: Sequence[Row], people: int = 0) -> Comparison:
    """Sorts rows of one protocol and variant into runs.

    A run that lacks subjects is left out, and a note says so: a mean over the subjects that worked would flatter it.

    Args:
        rows: the rows.
        people: how many subjects the protocol has, 0 where that is not known; a note tells when rows are of fewer.

    Raises:
        NothingComparesError: no run was measured on all subjects that any has.
        UserError: no rows, or rows of several protocols or variants.
    """
    rows = list(rows)
    check_one_protocol(rows)
    if len(variants := sorted({row.variant for row in rows})) > 1:
        told = "; ".join(f"{variant!r}" for variant in variants)
        raise UserError(
            f"These rows are of {len(variants)} variants ({told}), which are never ranked with each other. "
            "Make one table a variant."
        )
    by_run: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        by_run.setdefault((row.method, row.checkpoint), []).append(row)
    everyone = {row.subject for row in rows}
    runs, left_out = [], []
    for (method, checkpoint), mine in by_run.items():
        measured = [row.subject for row in mine]
        if sorted(measured) != sorted(everyone):
            absent = ", ".join(sorted(everyone - set(measured))) or "none, but some are there twice"
            left_out.append(
                f"{method} {checkpoint} is left out: it has {len(measured)} rows for {len(everyone)} subjects "
                f"(missing: {absent}), so its means do not compare."
            )
            continue
        alone = sum(other == method for other, _ in by_run) == 1
        ordered = tuple(sorted(mine, key=lambda row: row.subject))
        runs.append(Run(method, checkpoint, method if alone else f"{method} {checkpoint}", ordered))
    if not runs:
        raise NothingComparesError(f"{' '.join(left_out)} Evaluate at least one method on all subjects.")
    runs.sort(key=lambda run: -(mean_values(list(run.rows), "psnr") or -1.0))
    shown = [row for run in runs for row in run.rows]
    keys = tuple(key for key in _keys(shown) if any(key in row.values for row in shown))
    return Comparison(tuple(runs), keys, (*_notes(shown, runs, people), *left_out))


def table(rows: Sequence[Row], *, full: bool = False, people: int = 0) -> str:
    """A Markdown table, one line a method and checkpoint, best PSNR first, with notes on what has no number.

    A metric's mean runs over the subjects and stands only where every subject has a number; seconds to
    create and pictures a second are medians over subjects.

    Args:
        rows: rows of one protocol.
        full: also the metrics inside the mask, and 95 % intervals of the means.
        people: how many subjects the protocol has, as for `compared`.

    Raises:
        UserError: as `compared`.
    """
    return comparison_table(compared(rows, people), full=full)


def comparison_table(comparison: Comparison, *, full: bool = False) -> str:
    """`table` of rows that were sorted already."""
    keys = [key for key in comparison.keys if full or key not in IN_MASK]
    lines = [["method", *map(heading, keys), "seconds to create", "frames a second"]]
    for run in comparison.runs:
        numbers = [comparison.cell(run, key, with_interval=full) for key in keys]
        lines.append([run.name, *numbers, rounded(run.create_seconds), rounded(run.drive_fps)])
    return "\n".join([markdown(lines), "", *comparison.notes])


def markdown(lines: list[list[str]]) -> str:
    """Cells as a Markdown table whose columns also align where Markdown is not rendered."""
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]

    def padded(cells: list[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "| " + " | ".join([cells[0].ljust(widths[0]), *rest]) + " |"

    rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join([padded(lines[0]), "| " + " | ".join(rule) + " |", *map(padded, lines[1:])])


def by_protocol(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows that share a table: grouped by "<protocol> <id>", and rows of a variant by "<protocol> <id> · <variant>".

    In order of first appearance, the variants of a protocol after the protocol itself.
    """
    groups: dict[tuple[str, str], dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault((row.protocol, row.protocol_id), {}).setdefault(row.variant, []).append(row)
    return {
        " · ".join(filter(None, (f"{protocol} {protocol_id}", variant))): mine
        for (protocol, protocol_id), variants in groups.items()
        for variant, mine in sorted(variants.items())
    }


def heading(key: str) -> str:
    """A metric's column heading: label, which way is better, unit."""
    if key not in DEFINITIONS:
        return key
    metric = DEFINITIONS[key]
    unit = f" [{metric.unit}]" if metric.unit else ""
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}{unit}"


def decimals(key: str) -> int:
    """Digits after the point that a metric is told with."""
    return DECIMALS.get(key, 3)


def rounded(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _notes(rows: list[Row], runs: list[Run], people: int) -> list[str]:
    subjects = len({row.subject for row in rows})
    of = f" of the protocol's {people}" if people > subjects else ""
    pictures = sum(row.counts["pictures"] for row in runs[0].rows)
    notes = [
        f"{rows[0].protocol} {rows[0].protocol_id}: {subjects}{of} subjects, {pictures} pictures a method."
    ]
    machines = sorted({_machine(row) for row in rows})
    notes.append(f"Timed on {'; '.join(machines)}.")
    for key in _keys(rows):
        name = DEFINITIONS[key].label if key in DEFINITIONS else key
        reasons = sorted({row.missing[key] for row in rows if key in row.missing})
        if reasons:
            notes.append(f"{name}: {'; '.join(reasons)}.")
        dropped = {run.name: sum(row.counts.get(f"{key}_left_out", 0) for row in run.rows) for run in runs}
        if any(dropped.values()) and any(key in row.values for row in rows):
            told = ", ".join(f"{method} {count}" for method, count in dropped.items())
            notes.append(f"{name}: pictures left out, of {pictures}: {told}.")
    return notes


def _machine(row: Row) -> str:
    """What a row's timings were taken on."""
    threads = f"{row.hardware}, {row.threads} thread{'s' if row.threads > 1 else ''}"
    return threads if row.at_a_time == 1 else f"{threads}, {row.at_a_time} rows at a time"


def _keys(rows: list[Row]) -> list[str]:
    """Metrics that rows have or miss, in the order of `DEFINITIONS`, unknown ones last."""
    found = dict.fromkeys(key for row in rows for key in (*row.values, *row.missing))
    return [key for key in DEFINITIONS if key in found] + [key for key in found if key not in DEFINITIONS]
