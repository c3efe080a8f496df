"""One page that compares methods: means with intervals, pictures, speed and quality, failures, published numbers."""

from __future__ import annotations

import base64
import html
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from avatars.errors import UserError
from avatars.files import write_whole
from eval.compare import FEWEST, Difference
from eval.failures import Failure, read_failures
from eval.hashing import short_hash
from eval.metrics import DEFINITIONS
from eval.published import PublishedTable, published
from eval.rows import TURNTABLE, Row, protocol_people, row_folder
from eval.sheets import comparison_sheet
from eval.tables import (
    Comparison,
    NothingComparesError,
    by_protocol,
    compared,
    comparison_table,
    decimals,
    heading,
    markdown,
    rounded,
)

__all__ = ["write_report"]

SIDE_BY_SIDE = 4
"""Subjects that are shown side by side over all methods."""
RUNS_WITH_PICTURES = 8
"""Runs, the best first, whose best and worst subject are shown: a page of hundreds of checkpoints must still open."""
SHEETS = 48
"""Contact sheets that a section carries; the others are told and lie beside their rows."""
TURNTABLES = 16


def write_report(rows: Sequence[Row], results: Path, folder: Path) -> Path:
    """Writes `report.html` (one file with everything in it), `report.md` and `comparison-<id>.png`.

    A section a protocol, then the failures, then what papers print, in tables of their own.

    Args:
        rows: rows of any number of protocols.
        results: the folder that holds the rows' pictures and the list of failures.
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
    failures = read_failures(results)
    text = ["# headsplat: comparison", ""]
    links = "".join(f"<a href='#{_anchor(mine)}'>{html.escape(name)}</a>" for name, mine in groups.items())
    body = [f"<nav>{links}<a href='#failures'>failures</a><a href='#published'>published numbers</a></nav>"]
    for name, mine in groups.items():
        try:
            comparison = compared(mine, protocol_people(results, mine[0]))
        except NothingComparesError as reason:
            text += [f"## {name}", "", str(reason), ""]
            body.append(
                f"<section id='{_anchor(mine)}'><h2>{html.escape(name)}</h2><p>{html.escape(str(reason))}</p></section>"
            )
            continue
        best_first = [row for run in comparison.runs for row in run.rows]
        subjects = len(comparison.runs[0].rows)
        sheet = comparison_sheet(
            best_first,
            results,
            subjects=SIDE_BY_SIDE,
            pictures=max(1, SIDE_BY_SIDE // subjects),
        )
        picture = folder / f"comparison-{_anchor(mine)}.png"
        sheet.save(picture)
        text += [f"## {name}", "", comparison_table(comparison, full=True), ""]
        text += _differences_text(comparison)
        text += [f"![methods side by side]({picture.name})", ""]
        body.append(_section(name, comparison, sheet, results))
    text += _failures_text(failures) + _published_text(published())
    write_whole(folder / "report.md", "\n".join(text))
    body += [_failures(failures), _published(published())]
    body.append(f"<p class='note'>Written {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.</p>")
    page = folder / "report.html"
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    write_whole(page, template.replace("{{body}}", "\n".join(body)))
    return page


def _anchor(rows: Sequence[Row]) -> str:
    """What the part of a page about rows of one protocol and variant is called."""
    variant = rows[0].variant
    return rows[0].protocol_id + (f"-{short_hash(variant, 6)}" if variant else "")


def _section(name: str, comparison: Comparison, sheet: Image.Image, results: Path) -> str:
    """Everything about one protocol."""
    alt = html.escape(f"methods side by side under {name}")
    parts = [
        f"<section id='{_anchor(comparison.runs[0].rows)}'><h2>{html.escape(name)}</h2>",
        _means(comparison),
        "<ul>" + "".join(f"<li>{html.escape(note)}</li>" for note in comparison.notes) + "</ul>",
        _differences(comparison),
        f"<h3>On the same targets</h3><img alt='{alt}' src='{_jpeg(sheet)}'>",
        _speed_and_quality(comparison),
        _best_and_worst(comparison, results),
        _turntables(comparison, results),
        _sheets(comparison, results),
        "</section>",
    ]
    return "\n".join(part for part in parts if part)


def _means(comparison: Comparison) -> str:
    """The table: means over subjects with their intervals, the best of each column in bold."""
    columns = {key: [run.values(key) for run in comparison.runs] for key in comparison.keys}
    best = {key: _best(key, values) for key, values in columns.items()}
    lines = []
    for number, run in enumerate(comparison.runs):
        cells = []
        for key in comparison.keys:
            mark = " class='best'" if number == best[key] else ""
            cell = _two_lines(comparison.cell(run, key, with_interval=True))
            cells.append(f"<td{mark}>{cell}</td>")
        cells += [f"<td>{rounded(run.create_seconds)}</td>", f"<td>{rounded(run.drive_fps)}</td>"]
        lines.append(f"<tr><th scope='row'>{html.escape(run.name)}</th>{''.join(cells)}</tr>")
    heads = ["method", *map(heading, comparison.keys), "seconds to create", "frames a second"]
    told = (
        "Means over subjects; below them 95 % intervals, from resampling subjects."
        if len(comparison.runs[0].rows) >= FEWEST
        else f"Means over subjects; fewer than {FEWEST} subjects carry no interval."
    )
    return _table(heads, lines, "means") + f"<p class='note'>{told}</p>"


def _two_lines(cell: str) -> str:
    """A number with its interval below it."""
    number, _, limits = cell.partition(" (")
    return html.escape(number) + (f"<small>{html.escape(limits.rstrip(')'))}</small>" if limits else "")


def _best(key: str, columns: list[list[float] | None]) -> int | None:
    """Which run has the best mean of a metric whose better direction is known."""
    means = {i: statistics.fmean(values) for i, values in enumerate(columns) if values is not None}
    if key not in DEFINITIONS or len(means) < 2:
        return None
    sign = 1 if DEFINITIONS[key].higher_is_better else -1
    return max(means, key=lambda i: sign * means[i])


def _table(heads: Iterable[str], lines: Iterable[str], what: str) -> str:
    head = "".join(f"<th scope='col'>{html.escape(cell)}</th>" for cell in heads)
    return (
        f"<div class='wide' tabindex='0' role='region' aria-label='{html.escape(what)}'>"
        f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table></div>"
    )


def _difference_cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Headings and lines of the table of paired differences from the first run."""
    found = comparison.differences
    keys = list(found)
    lines = []
    for run in comparison.runs[1:]:
        lines.append(
            [run.name, *(_difference(key, found[key].get(run.name)) for key in keys)],
        )
    return ["method", *map(heading, keys)], lines


def _difference(key: str, difference: Difference | None) -> str:
    """Mean, p and interval, for example "-1.55, p 0.008 (-1.93 to -1.19)"."""
    if difference is None:
        return "n/a"
    digits = decimals(key)
    limits = ""
    if difference.low is not None and difference.high is not None:
        limits = f" ({difference.low:+.{digits}f} to {difference.high:+.{digits}f})"
    return f"{difference.mean:+.{digits}f}, p {_p(difference.p)}{limits}"


def _p(p: float) -> str:
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def _differences_told(comparison: Comparison) -> str:
    subjects = len(comparison.runs[0].rows)
    return (
        f"Differences from {comparison.runs[0].name}, subject by subject, with 95 % intervals and the two-sided p of "
        f"the paired sign-flip test. With {subjects} subjects no p can be below {_p(2 / 2 ** min(subjects, 60))}; "
        "the p are not corrected for the number of comparisons."
    )


def _differences(comparison: Comparison) -> str:
    heads, lines = _difference_cells(comparison)
    if not lines or len(heads) == 1:
        return ""
    rows = (
        f"<tr><th scope='row'>{html.escape(line[0])}</th>"
        + "".join(f"<td>{_two_lines(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in lines
    )
    told = html.escape(_differences_told(comparison))
    return f"<h3>Differences</h3>{_table(heads, rows, 'differences')}<p class='note'>{told}</p>"


def _differences_text(comparison: Comparison) -> list[str]:
    heads, lines = _difference_cells(comparison)
    return (
        [markdown([heads, *lines]), "", _differences_told(comparison), ""] if lines and len(heads) > 1 else []
    )


def _speed_and_quality(comparison: Comparison) -> str:
    """A drawing of frames a second (logarithmic) against mean PSNR, a dot a run."""
    dots = [
        (run.name, run.drive_fps, statistics.fmean(values))
        for run in comparison.runs
        if (values := run.values("psnr")) is not None
    ]
    if len(dots) < 2:
        return ""
    width, height, left, bottom, top = 640, 330, 56, 40, 30
    decades = [math.log10(fps) for _, fps, _ in dots]
    x_low, x_high = math.floor(min(decades)), max(math.ceil(max(decades)), math.floor(min(decades)) + 1)
    psnrs = [psnr for *_, psnr in dots]
    step = next(s for s in (0.5, 1, 2, 5, 10, 20) if (max(psnrs) - min(psnrs)) / s <= 6)
    y_low = math.floor(min(psnrs) / step) * step
    y_high = max(math.ceil(max(psnrs) / step) * step, y_low + step)

    def x(fps: float) -> float:
        return left + (math.log10(fps) - x_low) / (x_high - x_low) * (width - left - 130)

    def y(psnr: float) -> float:
        return height - bottom - (psnr - y_low) / (y_high - y_low) * (height - bottom - top)

    drawn = []
    for tick in range(x_low, x_high + 1):
        at = x(10.0**tick)
        drawn.append(f"<line x1='{at:.1f}' y1='{top}' x2='{at:.1f}' y2='{height - bottom}'/>")
        drawn.append(f"<text x='{at:.1f}' y='{height - 22}' text-anchor='middle'>{10.0**tick:g}</text>")
    for count in range(round((y_high - y_low) / step) + 1):
        value = y_low + count * step
        drawn.append(f"<line x1='{left}' y1='{y(value):.1f}' x2='{width - 130}' y2='{y(value):.1f}'/>")
        drawn.append(f"<text x='{left - 8}' y='{y(value) + 4:.1f}' text-anchor='end'>{value:g}</text>")
    taken: list[tuple[float, float]] = []
    for name, fps, psnr in dots:
        label = y(psnr) + 4
        while any(abs(label - other) < 14 and abs(x(fps) - at) < 120 for at, other in taken) or any(
            abs(label - 4 - y(other)) < 11 and 5 < x(at) - x(fps) < 12 + 7 * len(name)
            for _, at, other in dots
        ):
            label += 14  # below the label or the dot that would be covered
        taken.append((x(fps), label))
        drawn.append(f"<circle cx='{x(fps):.1f}' cy='{y(psnr):.1f}' r='5'/>")
        drawn.append(f"<text x='{x(fps) + 9:.1f}' y='{label:.1f}'>{html.escape(name)}</text>")
    drawn.append(
        f"<text x='{(left + width - 130) / 2}' y='{height - 4}' text-anchor='middle'>frames a second</text>"
    )
    drawn.append("<text x='4' y='12'>PSNR [dB]</text>")
    told = html.escape(
        "; ".join(f"{name}: {rounded(fps)} frames a second, {psnr:.2f} dB" for name, fps, psnr in dots)
    )
    return (
        "<h3>Speed and quality</h3>"
        "<div class='wide' tabindex='0' role='region' aria-label='speed and quality'>"
        f"<svg viewBox='0 0 {width} {height}' role='img' aria-label='{told}'>{''.join(drawn)}</svg></div>"
    )


def _best_and_worst(comparison: Comparison, results: Path) -> str:
    """Each run's best and worst subject by PSNR, as contact sheets."""
    if len(comparison.runs[0].rows) < 2:
        return ""
    tiles = []
    for run in comparison.runs[:RUNS_WITH_PICTURES]:
        ranked = sorted((row for row in run.rows if "psnr" in row.values), key=lambda row: row.values["psnr"])
        if len(ranked) < 2:
            continue
        for which, row in (("best", ranked[-1]), ("worst", ranked[0])):
            caption = f"{run.name}, {which}: {row.subject}, {row.values['psnr']:.2f} dB"
            tiles.append(
                f"<figure><img loading='lazy' alt='{html.escape(caption)}' src='{_sheet(row, results)}'>"
                f"<figcaption>{html.escape(caption)}</figcaption></figure>"
            )
    return f"<h3>Best and worst subjects</h3><div class='tiles'>{''.join(tiles)}</div>" if tiles else ""


def _turntables(comparison: Comparison, results: Path) -> str:
    """Moving pictures, where the evaluation left some: subjects in turn over the runs."""
    turns: list[str] = []
    for rows in zip(*(run.rows for run in comparison.runs), strict=True):
        for run, row in zip(comparison.runs, rows, strict=True):
            path = _folder(row, results) / TURNTABLE
            if path.is_file() and len(turns) < TURNTABLES:
                caption = html.escape(f"{run.name}: {row.subject}")
                data = base64.b64encode(path.read_bytes()).decode()
                turns.append(
                    f"<figure><img loading='lazy' alt='{caption}' src='data:image/webp;base64,{data}'>"
                    f"<figcaption>{caption}</figcaption></figure>"
                )
    return f"<h3>Turntables</h3><div class='turns'>{''.join(turns)}</div>" if turns else ""


def _sheets(comparison: Comparison, results: Path) -> str:
    """Contact sheets behind folds, subjects in turn over the runs, as many as a page should carry."""
    folds = []
    pairs = [
        (run, row)
        for rows in zip(*(run.rows for run in comparison.runs), strict=True)
        for run, row in zip(comparison.runs, rows, strict=True)
    ]
    for run, row in pairs[:SHEETS]:
        title = html.escape(f"{run.method} {run.checkpoint} · {row.subject}")
        folds.append(
            f"<details><summary>{title}</summary>"
            f"<img loading='lazy' alt='{title}' src='{_sheet(row, results)}'></details>"
        )
    left = len(pairs) - len(folds)
    more = f"<p class='note'>{left} more lie beside their rows as sheet.png.</p>" if left else ""
    return f"<h3>Contact sheets</h3>{''.join(folds)}{more}"


def _failure_lines(failures: list[Failure]) -> list[list[str]]:
    """Headings and lines; what a fit has no use for has a column only where an evaluation failed."""
    lines = [[f.method, f.checkpoint, f.protocol, f.subject, f.reason] for f in failures]
    heads = ["method", "checkpoint", "protocol", "subject", "reason"]
    shown = [
        i for i, head in enumerate(heads) if head[:2] not in ("ch", "pr") or any(line[i] for line in lines)
    ]
    return [[line[i] for i in shown] for line in (heads, *lines)]


def _failures(failures: list[Failure]) -> str:
    heads, *rest = _failure_lines(failures)
    lines = (
        f"<tr><th scope='row'>{html.escape(line[0])}</th>"
        + "".join(f"<td class='words'>{html.escape(cell)}</td>" for cell in line[1:])
        + "</tr>"
        for line in rest
    )
    shown = _table(heads, lines, "failures") if failures else "<p>None.</p>"
    return f"<section id='failures'><h2>Failures</h2>{shown}</section>"


def _failures_text(failures: list[Failure]) -> list[str]:
    _, *lines = _failure_lines(failures)
    return [
        "## Failures",
        "",
        *([f"- {', '.join(line[:-1])}: {line[-1]}" for line in lines] or ["None."]),
        "",
    ]


PUBLISHED = (
    "As the papers print them: other data, other people, other crops and other metric networks than above. They tell "
    "what the field reports, and do not compare with a measured number."
)


def _published(tables: Sequence[PublishedTable]) -> str:
    parts = [f"<section id='published'><h2>Published numbers</h2><p>{PUBLISHED}</p>"]
    for one in tables:
        lines = (
            f"<tr><th scope='row'>{html.escape(name)}</th>"
            + "".join(f"<td>{'–' if number is None else f'{number:g}'}</td>" for number in numbers)
            + "</tr>"
            for name, numbers in one.rows
        )
        parts.append(
            f"<h3>{html.escape(one.title)}</h3>{_table(('method', *one.columns), lines, one.title)}"
            f"<p class='note'>{html.escape(one.source)}. {html.escape(one.protocol)}.</p>"
        )
    return "".join(parts) + "</section>"


def _published_text(tables: Sequence[PublishedTable]) -> list[str]:
    text = ["## Published numbers", "", PUBLISHED, ""]
    for one in tables:
        lines = [["method", *one.columns]]
        lines += [[name, *("–" if n is None else f"{n:g}" for n in numbers)] for name, numbers in one.rows]
        text += [f"### {one.title}", "", markdown(lines), "", f"{one.source}. {one.protocol}.", ""]
    return text


def _folder(row: Row, results: Path) -> Path:
    return row_folder(results, row.method, row.checkpoint, row.subject, row.protocol, row.protocol_id)


def _sheet(row: Row, results: Path) -> str:
    """A row's contact sheet as a data address.

    Raises:
        UserError: it is gone.
    """
    path = _folder(row, results) / "sheet.png"
    try:
        with Image.open(path) as image:
            return _jpeg(image.convert("RGB"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}). Evaluate {row.subject} again.") from error


def _jpeg(image: Image.Image) -> str:
    """A picture as a data address: JPEG 92, for a page of sheets in PNG would be many megabytes."""
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=92, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
