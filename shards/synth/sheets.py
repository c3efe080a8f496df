"""Contact sheets of synthetic people, for looking at: `python -m shards.synth.sheets docs/images`."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from avatars.head import ParametricHead
from shards.synth.dome import rig
from shards.synth.expressions import code
from shards.synth.render import render
from shards.synth.subject import draw_subject, pose

__all__ = ["expressions_sheet", "identities_sheet"]

Pixels = NDArray[np.uint8]


def identities_sheet(count: int = 24, columns: int = 8, size: int = 192, seed: int = 0) -> Pixels:
    """`count` people with a neutral face, half of them from the front and half from the side, (H, W, 3)."""
    head, cameras = ParametricHead.load(), rig("dome", 80, size)
    azimuth = np.array(
        [np.arctan2(*(-pose_[:3, :3].T @ pose_[:3, 3])[[0, 2]]) for pose_ in cameras.world_to_camera]
    )
    height = np.array([(-pose_[:3, :3].T @ pose_[:3, 3])[1] for pose_ in cameras.world_to_camera])
    side = int(np.argmin(np.abs(azimuth - 0.6) + np.abs(height)))
    pictures = []
    for k in range(count):
        posed = pose(head, draw_subject(head, seed + k), code({}), np.eye(4))
        camera = 0 if k % 2 == 0 else side
        pictures.append(render(posed, cameras.K[camera], cameras.world_to_camera[camera], size).image)
    return grid(pictures, columns)


def expressions_sheet(subject: int = 3, columns: int = 13, size: int = 112, crop: float = 0.66) -> Pixels:
    """The 52 expression units of one person at full weight, in the order of their names, (H, W, 3)."""
    head = ParametricHead.load()
    person = draw_subject(head, subject)
    full = int(size / crop)
    cameras = rig("dome", 1, full)
    edge = (full - size) // 2
    low = edge + full // 20  # a jaw drops below the middle
    pictures = []
    for name in head.expression_names:
        weights = {name: 1.0}
        # Two units go with an open jaw: one closes the lips over it, the other puts the tongue out of it.
        weights["jawOpen"] = {"mouthClose": 1.0, "tongueOut": 0.4}.get(name, weights.get("jawOpen", 0.0))
        image = render(
            pose(head, person, code(weights), np.eye(4)), cameras.K[0], cameras.world_to_camera[0], full
        ).image
        pictures.append(image[low : low + size, edge : edge + size])
    return grid(pictures, columns)


def grid(pictures: list[Pixels], columns: int) -> Pixels:
    """Pictures of one size side by side, row by row."""
    rows = [np.concatenate(pictures[k : k + columns], axis=1) for k in range(0, len(pictures), columns)]
    return np.concatenate(rows)


def main(folder: Path) -> None:
    """Write identities.jpg and expressions.jpg into a folder."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in (("identities", identities_sheet()), ("expressions", expressions_sheet())):
        Image.fromarray(picture).save(folder / f"{name}.jpg", quality=90)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images"))
