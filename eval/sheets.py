"""Pictures of results: a contact sheet a subject, and a sheet that puts methods side by side.

Everything is drawn with Pillow and its built-in font on black: a sheet looks the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from avatars.errors import UserError
from eval.rows import Row, check_one_protocol, mean_values, row_folder

__all__ = ["SheetColumn", "comparison_sheet", "contact_sheet", "error_map", "error_picture", "save_picture"]

CELL = 224
GAP = 10
MARGIN = 24
GUTTER = 104  # left of the pictures, for the names of the rows
CAPTION = 24
HEADER = 58
BACKGROUND = (0, 0, 0)
BRIGHT, SOFT, FAINT = (240, 240, 240), (165, 165, 170), (70, 70, 75)
EDGE = (38, 38, 42)
ERROR_FULL = 0.25
# Dark to bright by lightness alone, so that it reads in grey and to colour-blind eyes.
ERROR_COLORS = (
    (0, 0, 0),
    (46, 12, 88),
    (120, 28, 109),
    (188, 55, 84),
    (237, 105, 37),
    (251, 180, 26),
    (252, 255, 164),
)


@dataclass(frozen=True)
class SheetColumn:
    """One target picture of a contact sheet.

    Attributes:
        target: (3, H, W) in [0, 1].
        prediction: (3, H, W) in [0, 1].
        label: what is shown: timestep and camera.
        psnr: dB written below, or None.
    """

    target: Tensor
    prediction: Tensor
    label: str
    psnr: float | None = None


def contact_sheet(
    inputs: Sequence[Tensor],
    input_labels: Sequence[str],
    columns: Sequence[SheetColumn],
    *,
    title: str,
    note: str = "",
) -> Image.Image:
    """One subject: the input pictures above, then a column a target with prediction and error.

    Args:
        inputs: N pictures (3, H, W).
        input_labels: N labels.
        columns: the targets.
        title: heading, left.
        note: smaller text at the right of the heading, for example the protocol.
    """
    across = max(len(inputs), len(columns))
    sheet, draw = _blank(across, 4, title, note)
    lines = [list(inputs), [c.target for c in columns], [c.prediction for c in columns]]
    lines.append([error_picture(c.prediction, c.target) for c in columns])
    captions = [list(input_labels), [c.label for c in columns], ["" for _ in columns]]
    captions[2] = ["" if c.psnr is None else f"{c.psnr:.1f} dB" for c in columns]
    captions.append(["" for _ in columns])
    for line, (name, pictures, texts) in enumerate(
        zip(("inputs", "target", "prediction", "error"), lines, captions, strict=True)
    ):
        _row_name(draw, line, name)
        for column, (picture, text) in enumerate(zip(pictures, texts, strict=True)):
            _place(sheet, draw, picture, column, line, text)
    _error_scale(sheet, draw, across, 4)
    return sheet


def comparison_sheet(
    rows: Sequence[Row], out: Path, *, subjects: int = 3, pictures: int = 1, title: str = ""
) -> Image.Image:
    """Methods side by side on the same targets: inputs, target, then a column a method and checkpoint.

    Args:
        rows: rows of one protocol, whose kept pictures lie under `out`.
        out: the folder of results.
        subjects: how many subjects to show at most.
        pictures: target pictures a subject.
        title: heading; a general one where empty.

    Raises:
        UserError: rows of several protocols, no subject that all methods have, or pictures that are gone.
    """
    rows = list(rows)
    check_one_protocol(rows)
    runs = list(dict.fromkeys((row.method, row.checkpoint) for row in rows))
    by_run = {run: {row.subject: row for row in rows if (row.method, row.checkpoint) == run} for run in runs}
    shared = [name for name in by_run[runs[0]] if all(name in found for found in by_run.values())][:subjects]
    if not shared:
        raise UserError("No subject has results of every method, so there is nothing to put side by side.")
    lines = [(name, index) for name in shared for index in range(pictures)]
    sheet, draw = _blank(
        2 + len(runs),
        len(lines),
        title or "Methods on the same targets",
        f"{rows[0].protocol} {rows[0].protocol_id}",
        HEADER,
    )
    for column, heading in enumerate(("inputs", "target")):
        _column_name(draw, column, heading, "")
    for column, run in enumerate(runs, start=2):
        mean = mean_values(list(by_run[run].values()), "psnr")
        method, checkpoint = run
        same = [other for other, _ in runs].count(method) > 1
        heading = f"{method} {checkpoint}" if same else method
        _column_name(draw, column, heading, "" if mean is None else f"mean {mean:.1f} dB")
    for line, (subject, index) in enumerate(lines):
        _row_name(draw, line, subject, HEADER)
        for column, run in enumerate(runs, start=2):
            row = by_run[run][subject]
            folder = row_folder(out, row.method, row.checkpoint, subject, row.protocol, row.protocol_id)
            shown = sorted((e for e in row.pictures if "file" in e), key=lambda e: str(e["file"]))
            entry = shown[index % len(shown)]
            if column == 2:
                inputs = sorted(folder.glob("input-*.png"))
                if not inputs:
                    raise UserError(f"{folder} holds no pictures. Evaluate {row.method} on {subject} again.")
                mosaic = _mosaic([_load(path) for path in inputs])
                _place(sheet, draw, mosaic, 0, line, "", HEADER)
                label = f"t {entry['timestep']} · {entry['camera']}"
                _place(sheet, draw, _load(folder / f"{entry['file']}-target.png"), 1, line, label, HEADER)
            value = entry.get("psnr")
            caption = "" if value is None else f"{value:.1f} dB"
            picture = _load(folder / f"{entry['file']}-prediction.png")
            _place(sheet, draw, picture, column, line, caption, HEADER)
    return sheet


def error_picture(prediction: Tensor, target: Tensor) -> Tensor:
    """(3, H, W) colours of the mean absolute error over channels: black 0, pale yellow 0.25 and above."""
    error = (prediction - target).abs().mean(dim=0).clamp(max=ERROR_FULL) / ERROR_FULL  # (H, W)
    colors = torch.tensor(ERROR_COLORS, dtype=torch.float32) / 255
    position = error * (len(colors) - 1)
    low = position.floor().long().clamp(max=len(colors) - 2)
    weight = (position - low)[..., None]
    return (colors[low] * (1 - weight) + colors[low + 1] * weight).permute(2, 0, 1)


def error_map(prediction: Tensor, target: Tensor) -> Image.Image:
    """The error of (3, H, W) pictures in the colours of `error_picture`, over a legend that says what they mean."""
    pixels = _to_image(error_picture(prediction, target))
    scale = max(1, -(-CELL // max(pixels.size)))  # the legend's words need some width
    pixels = pixels.resize((pixels.width * scale, pixels.height * scale), Image.Resampling.NEAREST)
    legend = 40
    whole = Image.new("RGB", (pixels.width, pixels.height + legend), BACKGROUND)
    whole.paste(pixels)
    draw = ImageDraw.Draw(whole)
    left, right, top = 16, whole.width - 36, pixels.height + 8
    ramp = torch.linspace(0, ERROR_FULL, right - left).expand(3, 10, right - left)
    whole.paste(_to_image(error_picture(ramp, torch.zeros_like(ramp))), (left, top))
    draw.rectangle((left - 1, top - 1, right, top + 10), outline=FAINT)
    draw.text((left - 4, top + 5), "0", fill=SOFT, font=_font(12), anchor="rm")
    draw.text((right + 4, top + 5), f"{ERROR_FULL:g}", fill=SOFT, font=_font(12), anchor="lm")
    words, size = _fit(draw, "mean error of channels, of 1", 12, right - left)
    draw.text(((left + right) / 2, top + 21), words, fill=SOFT, font=_font(size), anchor="mm")
    return whole


def save_picture(picture: Tensor, path: Path) -> None:
    """Writes (3, H, W) in [0, 1] as an 8-bit PNG."""
    _to_image(picture).save(path)


def _load(path: Path) -> Tensor:
    try:
        with Image.open(path) as image:
            pixels = np.array(image.convert("RGB"))
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error}). Evaluate the subject again to get its pictures."
        ) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255


def _to_image(picture: Tensor) -> Image.Image:
    pixels = (picture.detach().float().clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
    return Image.fromarray(np.ascontiguousarray(pixels))


def _mosaic(pictures: list[Tensor]) -> Tensor:
    """Up to four pictures of one size as a 2 × 2 block."""
    if len(pictures) < 2:
        return pictures[0]
    four = (pictures + [torch.zeros_like(pictures[0])] * 3)[:4]
    return torch.cat([torch.cat(four[:2], dim=2), torch.cat(four[2:], dim=2)], dim=1)


@lru_cache(maxsize=8)
def _font(size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def _fit(draw: ImageDraw.ImageDraw, text: str, size: int, width: int) -> tuple[str, int]:
    """The largest size, down to 11, at which `text` fits into `width` pixels, else the text cut short."""
    while size > 11 and draw.textlength(text, font=_font(size)) > width:
        size -= 1
    while len(text) > 1 and draw.textlength(text, font=_font(size)) > width:
        text = text[:-2] + "…"
    return text, size


def _blank(
    across: int, down: int, title: str, note: str, header: int = 0
) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    width = 2 * MARGIN + GUTTER + across * CELL + (across - 1) * GAP
    height = _top(down, header) + MARGIN
    sheet = Image.new("RGB", (width, height), BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    note_width = int(draw.textlength(note, font=_font(15)))
    title, size = _fit(draw, title, 24, width - 2 * MARGIN - note_width - 2 * GAP)
    draw.text((MARGIN, MARGIN + 18), title, fill=BRIGHT, font=_font(size), anchor="lm")
    draw.text((width - MARGIN, MARGIN + 18), note, fill=SOFT, font=_font(15), anchor="rm")
    draw.line((MARGIN, MARGIN + 42, width - MARGIN, MARGIN + 42), fill=EDGE, width=1)
    return sheet, draw


def _top(line: int, header: int = 0) -> int:
    return MARGIN + 42 + 18 + header + line * (CELL + CAPTION + GAP)


def _left(column: int) -> int:
    return MARGIN + GUTTER + column * (CELL + GAP)


def _place(
    sheet: Image.Image,
    draw: ImageDraw.ImageDraw,
    picture: Tensor,
    column: int,
    line: int,
    caption: str,
    header: int = 0,
) -> None:
    image = _to_image(picture)
    scale = CELL / max(image.size)
    size = (max(round(image.width * scale), 1), max(round(image.height * scale), 1))
    image = image.resize(size, Image.Resampling.LANCZOS if scale < 1 else Image.Resampling.BICUBIC)
    left, top = _left(column), _top(line, header)
    sheet.paste(image, (left + (CELL - size[0]) // 2, top + (CELL - size[1]) // 2))
    draw.rectangle((left - 1, top - 1, left + CELL, top + CELL), outline=EDGE)
    caption, points = _fit(draw, caption, 14, CELL)
    draw.text(
        (left + CELL / 2, top + CELL + CAPTION / 2), caption, fill=SOFT, font=_font(points), anchor="mm"
    )


def _row_name(draw: ImageDraw.ImageDraw, line: int, name: str, header: int = 0) -> None:
    name, size = _fit(draw, name, 18, GUTTER - GAP)
    draw.text((MARGIN, _top(line, header) + CELL // 2), name, fill=BRIGHT, font=_font(size), anchor="lm")


def _column_name(draw: ImageDraw.ImageDraw, column: int, name: str, detail: str) -> None:
    name, size = _fit(draw, name, 20, CELL)
    middle, top = _left(column) + CELL / 2, _top(0)
    draw.text((middle, top + 12), name, fill=BRIGHT, font=_font(size), anchor="mm")
    draw.text((middle, top + 38), detail, fill=SOFT, font=_font(15), anchor="mm")


def _error_scale(sheet: Image.Image, draw: ImageDraw.ImageDraw, across: int, down: int) -> None:
    """The error's colour scale, under the last column."""
    width, height = 120, 10
    right = _left(across - 1) + CELL - 34
    top = _top(down) - GAP - CAPTION // 2 - height // 2
    ramp = torch.linspace(0, ERROR_FULL, width).expand(3, height, width)
    sheet.paste(_to_image(error_picture(ramp, torch.zeros_like(ramp))), (right - width, top))
    draw.rectangle((right - width - 1, top - 1, right, top + height), outline=FAINT)
    middle = top + height / 2
    draw.text((right - width - 6, middle), "0", fill=SOFT, font=_font(13), anchor="rm")
    draw.text((right + 6, middle), f"{ERROR_FULL:g}", fill=SOFT, font=_font(13), anchor="lm")
