"""Does a trained Avat3r drive? Its avatars of held-out people with their own expressions, with others, and with none.

    python benchmarks/driving.py MODEL --data SHARDS [--sheet FILE.jpg] [--out FOLDER]

MODEL is what a training exported, SHARDS have held-out people. Every input set makes an avatar; every timestep that the
set was not made of is drawn from its own cameras with each of these timesteps' expressions in turn. Said is

- the PSNR with the picture's own expression, with the others' and with the code of zeros, over whole pictures,
- in how many timesteps the own expression's drawing is the nearest to the pictures: a network that ignores the code
  finds one in as many as there are timesteps,
- how far Gaussians are from where the code of zeros puts them (the furthest hundredth of them).

The sheet has three lines for each of the first people: the four input pictures of the first set, true pictures of the
first six of those timesteps from one camera, and the avatar's.
"""

from __future__ import annotations

import json
import math
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import arguments, write
from torch import Tensor

from avatars.avat3r import Avat3rMethod
from avatars.inputs import InputSet
from avatars.method import Avatar, render
from avatars.rasterize import rasterize
from shards import SubjectShards, open_shards

CAMERAS = 4  # of each timestep, evenly among those that there are
FRACTION = 0.99
ON_SHEET, COLUMNS = 3, 6


@dataclass
class Seen:
    """One input set's avatar, measured.

    Attributes:
        errors: (T, T + 1) mean squared error of timestep i drawn with the expression of timestep j, zeros last.
        moves: T distances in metres.
    """

    errors: Tensor
    moves: list[float]


@torch.no_grad()
def measured(avatar: Avatar, person: SubjectShards, inputs: InputSet) -> Seen:
    """Every timestep outside the input set under every expression of them."""
    targets = [t for t in person.targets if t.timestep not in inputs.provenance["timesteps"]]
    codes = [target.expression for target in targets]
    heads = [avatar.gaussians(code) for code in (*codes, torch.zeros_like(codes[0]))]
    errors = torch.empty(len(targets), len(heads))
    for i, target in enumerate(targets):
        count = len(target.camera_ids)
        views = [round(k * (count - 1) / max(CAMERAS - 1, 1)) for k in range(min(CAMERAS, count))]
        truth = target.images(views)
        for j, head in enumerate(heads):
            drawn = rasterize(head, target.cameras[views], truth.shape[-2:]).image.clamp(0, 1)
            errors[i, j] = (drawn - truth).square().mean()
    moves = [float((head.means - heads[-1].means).norm(dim=1).quantile(FRACTION)) for head in heads[:-1]]
    return Seen(errors, moves)


def summary(found: list[Seen]) -> dict[str, Any]:
    """The numbers over all input sets."""
    own = torch.cat([s.errors.diagonal() for s in found])
    none = torch.cat([s.errors[:, -1] for s in found])
    others, nearest, chance = [], [], []
    for seen in found:
        count = len(seen.errors)
        pairs = seen.errors[:, :count]
        others.append(pairs[~torch.eye(count, dtype=torch.bool)])
        nearest += (pairs.argmin(1) == torch.arange(count)).tolist()
        chance += [1 / count] * count
    psnr = {
        f"psnr_{name}_db": round(-10 * math.log10(float(errors.mean())), 3)
        for name, errors in (
            ("own_expression", own),
            ("other_expressions", torch.cat(others)),
            ("no_expression", none),
        )
    }
    moves = sorted(1e3 * move for seen in found for move in seen.moves)
    return psnr | {
        "own_expression_nearest": round(statistics.fmean(nearest), 4),
        "by_chance": round(statistics.fmean(chance), 4),
        "timesteps_drawn": len(own),
        "moves_mm": {"median": round(statistics.median(moves), 2), "most": round(moves[-1], 2)},
    }


@torch.no_grad()
def lines(avatar: Avatar, person: SubjectShards, inputs: InputSet) -> list[list[Tensor]]:
    """Three lines of pictures (3, H, W): inputs, truth, avatar."""
    targets = [t for t in person.targets if t.timestep not in inputs.provenance["timesteps"]][:COLUMNS]
    drawn, truth = [], []
    for target in targets:
        truth.append(target.images([0])[0])
        size = truth[-1].shape[-2:]
        drawn.append(render(avatar, target.expression, target.cameras[:1], size).image[0].clamp(0, 1))
    return [list(inputs.images), truth, drawn]


def write_sheet(rows: list[list[Tensor]], path: Path) -> None:
    """Lines of pictures, each centred."""
    side, gap = rows[0][0].shape[-1], 3
    sheet = torch.ones(3, len(rows) * (side + gap) - gap, COLUMNS * (side + gap) - gap)
    for number, row in enumerate(rows):
        left = (COLUMNS - len(row)) * (side + gap) // 2
        for column, picture in enumerate(row):
            x, y = left + column * (side + gap), number * (side + gap)
            sheet[:, y : y + side, x : x + side] = picture
    pixels = (sheet * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=90)
    print(path)


def main() -> None:
    """Measures every held-out person and writes the result, and the sheet where asked for."""
    parser = arguments(__doc__ or "")
    parser.add_argument("model", type=Path, help="what a training exported")
    parser.add_argument("--data", type=Path, required=True, help="shards with held-out people")
    parser.add_argument("--sheet", type=Path, help="also draw the first people into this JPEG file")
    options = parser.parse_args()
    method, shards = Avat3rMethod.load(options.model), open_shards(options.data, "heldout")
    trained = json.loads((options.model / "model.json").read_text())["provenance"]
    found, rows = {}, []
    for name in shards.subjects:
        person = shards.read(name)
        avatars = [method.create(inputs) for inputs in person.input_sets]
        if len(found) < ON_SHEET:
            rows += lines(avatars[0], person, person.input_sets[0])
        found[name] = [
            measured(avatar, person, inputs)
            for avatar, inputs in zip(avatars, person.input_sets, strict=True)
        ]
        print(name, summary(found[name]), flush=True)
    content = {
        "what": "Avat3r's avatars of held-out people, drawn with their own, others' and no expression",
        "trained": {key: trained[key] for key in ("recipe", "step", "data")}
        | {"commit": trained["versions"]["commit"]},
        "people": len(found),
        **summary([seen for one in found.values() for seen in one]),
        "by_person": {name: summary(seen) for name, seen in found.items()},
    }
    if options.sheet:
        write_sheet(rows, options.sheet)
    write("driving", content, ("torch",), options.out)


if __name__ == "__main__":
    main()
