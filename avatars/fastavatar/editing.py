"""Editing people by their w: between two of them, and along directions that labelled people give.

The paper shows both and says how for neither (section 5); what is here is ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.files import write_whole

__all__ = ["Directions", "between", "fit_directions", "read_directions"]

FILE = "directions.json"


@dataclass(frozen=True)
class Directions:
    """How w moves with attributes of people.

    Attributes:
        network: fingerprint of the decoder that the latents belong to.
        steps: by attribute, (d,) change of w for one unit of it while the others stay.
        units: by attribute, what a unit is.
        ranges: by attribute, the least and the greatest value among the labelled people.
        people: how many there were.
    """

    network: str
    steps: dict[str, Tensor]
    units: dict[str, str]
    ranges: dict[str, tuple[float, float]]
    people: int

    def moved(self, latent: Tensor, attribute: str, amount: float) -> Tensor:
        """W with one attribute changed by `amount` of its units.

        Raises:
            UserError: no such attribute.
        """
        if attribute not in self.steps:
            raise UserError(f"There is no attribute {attribute!r}; there are {', '.join(self.steps)}.")
        return latent + amount * self.steps[attribute].to(latent)

    def save(self, folder: Path) -> None:
        """Writes `directions.json` beside the model."""
        values = {
            "network": self.network,
            "people": self.people,
            "attributes": {
                name: {"unit": self.units[name], "range": list(self.ranges[name]), "step": step.tolist()}
                for name, step in self.steps.items()
            },
        }
        write_whole(folder / FILE, json.dumps(values) + "\n")


def read_directions(folder: str | Path, network: str) -> Directions:
    """The directions beside a model.

    Args:
        folder: the model's.
        network: the model's fingerprint.

    Raises:
        UserError: there are none, or they belong to another checkpoint.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise UserError(
            f"{path} is not there; find directions with headsplat attributes {folder} --data SHARDS --captures "
            "CAPTURES."
        )
    told = json.loads(path.read_text())
    if told["network"] != network:
        raise UserError(
            f"{path} holds directions of another checkpoint ({told['network']}) than this model's ({network}); run "
            "headsplat attributes again."
        )
    found = told["attributes"]
    return Directions(
        network,
        {name: torch.tensor(entry["step"]) for name, entry in found.items()},
        {name: entry["unit"] for name, entry in found.items()},
        {name: (entry["range"][0], entry["range"][1]) for name, entry in found.items()},
        told["people"],
    )


def fit_directions(
    latents: Tensor, labels: dict[str, Tensor], units: dict[str, str], network: str
) -> Directions:
    """Regresses w on all attributes at once, so that each direction is what one adds while the others stay.

    A direction of this kind needs no Gram-Schmidt against the others: people who are old and pale at once tell the two
    apart as soon as some are only one of them. (A classifier's normal, from w to the attribute, is the other way round,
    and with fewer people than numbers in w mostly noise.)

    Args:
        latents: (P, d), one w a person.
        labels: by attribute, (P,).
        units: by attribute.
        network: fingerprint of the decoder.

    Raises:
        UserError: too few people for so many attributes.
    """
    people, names = len(latents), list(labels)
    if people < 2 * (len(names) + 1):
        raise UserError(
            f"{people} labelled people are too few to tell {len(names)} attributes apart; give at least "
            f"{2 * (len(names) + 1)}."
        )
    values = torch.stack([labels[name].double() for name in names], 1)
    mean, spread = values.mean(0), values.std(0).clamp_min(1e-9)
    design = torch.cat([(values - mean) / spread, torch.ones(people, 1, dtype=torch.float64)], 1)
    solution = torch.linalg.lstsq(design, latents.double()).solution[:-1] / spread[:, None]
    return Directions(
        network,
        {name: step.float() for name, step in zip(names, solution, strict=True)},
        units,
        {name: (float(labels[name].min()), float(labels[name].max())) for name in names},
        people,
    )


def between(first: Tensor, second: Tensor, count: int) -> Sequence[Tensor]:
    """`count` latents on the straight line from one w (d,) to another, both ends included.

    Raises:
        UserError: fewer than two, or latents of different lengths.
    """
    if count < 2:
        raise UserError(f"An interpolation has at least 2 steps, not {count}.")
    if first.shape != second.shape:
        raise UserError(
            f"Latents of {len(first)} and {len(second)} numbers are of different checkpoints; make both avatars with "
            "one model."
        )
    return [torch.lerp(first, second, place / (count - 1)) for place in range(count)]
