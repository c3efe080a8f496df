"""Tables and a page that compare methods; rows of different protocols never share a table."""

from __future__ import annotations

import base64
import html
import io
import statistics
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from avatars.errors import UserError
from avatars.files import write_whole
from eval.metrics import DEFINITIONS
from eval.rows import Row, check_one_protocol, mean_values, row_folder
from eval.sheets import comparison_sheet

__all__ = ["by_protocol", "table", "write_report"]

IN_MASK = ("psnr_masked", "ssim_masked")
DECIMALS = {"psnr": 2, "psnr_masked": 2, "akd": 2}


def table(rows: Sequence[Row], *, full: bool = False) -> str:
    """A Markdown table, one line a method and checkpoint, best PSNR first, with notes on what has no number.

    A metric's mean runs over the subjects and stands only where every subject has a number; seconds to
    create and pictures a second are medians over subjects.

    Args:
        rows: rows of one protocol.
        full: also the metrics inside the mask.

    Raises:
        UserError: no rows, rows of several protocols, or methods that were measured on different subjects.
    """
    rows = list(rows)
    check_one_protocol(rows)
    runs = _runs(rows)
    keys = [
        key for key in _keys(rows) if (full or key not in IN_MASK) and any(key in row.values for row in rows)
    ]
    lines = [["method", *(_heading(key) for key in keys), "seconds to create", "frames a second"]]
    for (method, checkpoint), mine in runs.items():
        name = method if sum(other == method for other, _ in runs) == 1 else f"{method} {checkpoint}"
        cells = [name]
        for key in keys:
            mean = mean_values(mine, key)
            cells.append("n/a" if mean is None else f"{mean:.{DECIMALS.get(key, 3)}f}")
        cells.append(_rounded(statistics.median(row.create_seconds for row in mine)))
        cells.append(_rounded(statistics.median(row.drive_fps for row in mine)))
        lines.append(cells)
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    text = [_line(lines[0], widths), "| " + " | ".join(_rule(i, w) for i, w in enumerate(widths)) + " |"]
    text += [_line(line, widths) for line in lines[1:]]
    return "\n".join([*text, "", *_notes(rows, runs)])


def by_protocol(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows grouped by "<protocol> <id>", in order of first appearance."""
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(f"{row.protocol} {row.protocol_id}", []).append(row)
    return groups


def write_report(rows: Sequence[Row], results: Path, folder: Path) -> Path:
    """Writes `report.html` (one file with everything in it), `report.md` and `comparison-<id>.png`.

    A section a protocol: the table, the methods side by side on the same targets, and every subject's contact
    sheets behind a fold.

    Args:
        rows: rows of any number of protocols.
        results: the folder that holds the rows' pictures.
        folder: where the page goes.

    Returns:
        The path of `report.html`.

    Raises:
        UserError: no rows, or pictures that are gone.
    """
    groups = by_protocol(rows)
    if not groups:
        raise UserError("There are no result rows to report. Run `headsplat eval` first.")
    folder.mkdir(parents=True, exist_ok=True)
    markdown = ["# headsplat: comparison", ""]
    body = []
    for name, mine in groups.items():
        compared = table(mine, full=True)
        best_first = [row for run in _runs(mine).values() for row in run]
        subjects = len({row.subject for row in mine})
        sheet = comparison_sheet(best_first, results, pictures=max(1, 4 // subjects))
        picture = folder / f"comparison-{mine[0].protocol_id}.png"
        sheet.save(picture)
        markdown += [f"## {name}", "", compared, "", f"![methods side by side]({picture.name})", ""]
        body.append(_section(name, mine, compared, sheet, results))
    write_whole(folder / "report.md", "\n".join(markdown))
    page = folder / "report.html"
    write_whole(page, PAGE.replace("{{body}}", "\n".join(body)))
    return page


def _runs(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows by method and checkpoint, best mean PSNR first.

    Raises:
        UserError: one run was measured on other subjects than another.
    """
    runs: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        runs.setdefault((row.method, row.checkpoint), []).append(row)
    everyone = {row.subject for row in rows}
    for (method, checkpoint), mine in runs.items():
        measured = [row.subject for row in mine]
        if sorted(measured) != sorted(everyone):
            absent = ", ".join(sorted(everyone - set(measured))) or "none, but some are there twice"
            raise UserError(
                f"{method} {checkpoint} was measured on {len(measured)} rows for {len(everyone)} subjects "
                f"(missing: {absent}), so its means do not compare. Evaluate it on all subjects."
            )
    return dict(sorted(runs.items(), key=lambda run: -(mean_values(run[1], "psnr") or -1.0)))


def _notes(rows: list[Row], runs: dict[tuple[str, str], list[Row]]) -> list[str]:
    subjects = len({row.subject for row in rows})
    pictures = sum(row.counts["pictures"] for row in next(iter(runs.values())))
    notes = [f"{rows[0].protocol} {rows[0].protocol_id}: {subjects} subjects, {pictures} pictures a method."]
    machines = sorted({f"{row.hardware}, {row.threads} threads" for row in rows})
    notes.append(f"Timed on {'; '.join(machines)}.")
    for key in _keys(rows):
        name = DEFINITIONS[key].label if key in DEFINITIONS else key
        reasons = sorted({row.missing[key] for row in rows if key in row.missing})
        if reasons:
            notes.append(f"{name}: {'; '.join(reasons)}.")
        dropped = {
            method: sum(row.counts.get(f"{key}_left_out", 0) for row in mine)
            for (method, _), mine in runs.items()
        }
        if any(dropped.values()) and any(key in row.values for row in rows):
            told = ", ".join(f"{method} {count}" for method, count in dropped.items())
            notes.append(f"{name}: pictures left out, of {pictures}: {told}.")
    return notes


def _keys(rows: list[Row]) -> list[str]:
    """Metrics that rows have or miss, in the order of `DEFINITIONS`, unknown ones last."""
    found = dict.fromkeys(key for row in rows for key in (*row.values, *row.missing))
    return [key for key in DEFINITIONS if key in found] + [key for key in found if key not in DEFINITIONS]


def _heading(key: str) -> str:
    if key not in DEFINITIONS:
        return key
    metric = DEFINITIONS[key]
    unit = f" [{metric.unit}]" if metric.unit else ""
    return f"{metric.label} {'↑' if metric.higher_is_better else '↓'}{unit}"


def _rounded(value: float) -> str:
    """Three significant digits, without an exponent."""
    if value >= 100:
        return f"{value:.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"


def _line(cells: list[str], widths: list[int]) -> str:
    padded = [
        cells[0].ljust(widths[0]),
        *(cell.rjust(w) for cell, w in zip(cells[1:], widths[1:], strict=True)),
    ]
    return "| " + " | ".join(padded) + " |"


def _rule(column: int, width: int) -> str:
    return "-" * width if column == 0 else "-" * (width - 1) + ":"


def _section(name: str, rows: list[Row], compared: str, sheet: Image.Image, results: Path) -> str:
    lines = compared.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    notes = [line for line in lines if line and not line.startswith("|")]
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in cells[0])
    content = "".join(
        "<tr>"
        + "".join(
            f"<{t}>{html.escape(cell)}</{t.split()[0]}>" for t, cell in zip(_tags(line), line, strict=True)
        )
        + "</tr>"
        for line in cells[2:]
    )
    folds = []
    for row in rows:
        path = row_folder(results, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)
        try:
            with Image.open(path / "sheet.png") as image:
                embedded = _embedded(image.convert("RGB"))
        except OSError as error:
            raise UserError(
                f"{path / 'sheet.png'} cannot be read ({error}). Evaluate {row.subject} again."
            ) from error
        title = html.escape(f"{row.method} {row.checkpoint} · {row.subject}")
        folds.append(
            f"<details><summary>{title}</summary>"
            f"<img loading='lazy' alt='{title}' src='{embedded}'></details>"
        )
    alt = html.escape(f"methods side by side under {name}")
    told = "".join(f"<li>{html.escape(note)}</li>" for note in notes)
    return (
        f"<section><h2>{html.escape(name)}</h2><div class='wide'><table><thead><tr>{head}</tr></thead>"
        f"<tbody>{content}</tbody></table></div><ul>{told}</ul>"
        f"<img alt='{alt}' src='{_embedded(sheet)}'><h3>Contact sheets</h3>{''.join(folds)}</section>"
    )


def _tags(cells: list[str]) -> list[str]:
    return ["th scope='row'", *(["td"] * (len(cells) - 1))]


def _embedded(image: Image.Image) -> str:
    """A picture as a data address: JPEG 92, for a page of sheets in PNG would be many megabytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>headsplat: comparison</title>
<style>
:root { color-scheme: light dark; --line: #8884; --soft: #777; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 76rem; margin: 2rem auto;
       padding: 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .8rem; text-align: right; border-bottom: 1px solid var(--line); white-space:
nowrap; } th:first-child { text-align: left; } .wide { overflow-x: auto; } ul { color: var(--soft);
font-size: .9rem; padding-left: 1.2rem; } img { max-width: 100%; height: auto; background: #000;
border-radius: 6px; } details { margin: .5rem 0; } summary { cursor: pointer; padding: .25rem 0; } </style>
</head> <body> <h1>headsplat: comparison</h1> {{body}} </body> </html>
"""
