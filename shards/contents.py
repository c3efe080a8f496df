"""What is in a folder of shards: a table, and a picture to look at."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from avatars.errors import UserError
from shards.manifest import SPLITS, Manifest, PackSettings, PriorError, PriorSettings
from shards.reading import open_shards

__all__ = ["Contents", "contact_sheet", "info"]


@dataclass(frozen=True)
class Contents:
    """What a folder of shards holds.

    Attributes:
        manifest: the whole list.
        rows: one row a subject: subject, split, shards, input sets, timesteps, views, megabytes.
    """

    manifest: Manifest
    rows: list[tuple[str, str, int, int, int, int, float]]

    def __str__(self) -> str:
        m, s = self.manifest, self.manifest.settings
        head = f"{m.head} head" if m.head else "no tracked head"
        lines = [
            f"{m.folder}: {len(self.rows)} subjects, {len(m.shards)} shards, fingerprint {m.fingerprint}",
            f"codes {m.expression_kind} of {m.expression_length} numbers, {head}",
            _priors(m.priors, m.prior_error),
            f"pictures {s.size} x {s.size} {_coding(s)}, {s.crop} crop, {s.n_inputs} to an input set",
            f"input sets of {s.input_timesteps} timesteps, k {s.k}, to {s.max_input_degrees:g} degrees, seed {s.seed}, "
            f"background {s.input_background}",
            "",
        ]
        header = ("subject", "split", "shards", "input sets", "timesteps", "views", "MB")
        table = [
            header,
            *(tuple(f"{c:.1f}" if isinstance(c, float) else str(c) for c in row) for row in self.rows),
        ]
        widths = [max(len(row[i]) for row in table) for i in range(len(header))]
        for row in table:
            cells = [
                c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)


def info(folder: str | Path) -> Contents:
    """Tells what a folder of shards holds, from its manifest.

    Raises:
        UserError: no valid set of shards.
    """
    manifest = Manifest.load(folder)
    rows = []
    for split in SPLITS:
        for subject in manifest.subjects(split):
            shards = [shard for shard in manifest.shards if shard.subject == subject]
            rows.append(
                (
                    subject,
                    split,
                    len(shards),
                    sum(len(shard.inputs) for shard in shards),
                    sum(shard.targets for shard in shards),
                    sum(sum(shard.views) for shard in shards),
                    sum(shard.bytes for shard in shards) / 1e6,
                )
            )
    return Contents(manifest, rows)


def contact_sheet(folder: str | Path, out: str | Path, *, subjects: int = 12, targets: int = 4) -> Path:
    """Draws a picture of a folder of shards: a row a subject, its first input set, then views of targets.

    Args:
        folder: what `pack` wrote.
        out: picture file to write, PNG or JPEG by its name.
        subjects: rows at most.
        targets: target pictures a row.

    Returns:
        `out`.

    Raises:
        UserError: no valid set of shards, a shard that cannot be read, or a file that cannot be written.
    """
    from PIL import Image

    rows: list[np.ndarray] = []
    for split in SPLITS:
        shards = open_shards(folder, split)
        for subject in shards.subjects[: subjects - len(rows)]:
            data = shards.read(subject)
            inputs = data.input_sets[0].images
            pictures = [*inputs]
            for i in range(targets):
                target = data.targets[i * len(data.targets) // targets]
                pictures.append(target.images([i * len(target.camera_ids) // targets])[0])
            rows.append(np.concatenate([_bytes(picture) for picture in pictures], axis=1))
    try:
        Image.fromarray(np.concatenate(rows)).save(out)
    except (OSError, ValueError) as error:
        raise UserError(
            f"{out} cannot be written ({error}). Give a .png or .jpg in a folder that is there."
        ) from None
    return Path(out)


def _coding(settings: PackSettings) -> str:
    """The codec with those settings that it has."""
    if settings.codec == "jpeg":
        return f"jpeg {settings.quality} {settings.subsampling}"
    return f"webp {settings.quality}" if settings.codec == "webp" else settings.codec


def _priors(priors: PriorSettings, error: PriorError) -> str:
    """A line about the priors, with what their storage costs where that is known."""
    positions, features = f"positions {priors.position}", f"features {priors.features}"
    if error.position_max is not None:
        positions += f" (stored to within {error.position_max * 1000:.2g} mm)"
    if priors.features != "none":
        height, width = priors.feature_grid
        features += f" {priors.feature_dim} x {height} x {width} {priors.storage}"
        if error.features_max is not None:
            features += f" (to within {error.features_max:.2g}, rms {error.features_rms:.2g})"
    return f"{positions}, {features}"


def _bytes(picture: Tensor) -> np.ndarray:
    return (picture.permute(1, 2, 0) * 255).round().byte().numpy()
