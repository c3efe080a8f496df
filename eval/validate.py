"""Validation inside training: a few held-out people, measured by the code and under the id of an evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from avatars.errors import UserError
from avatars.inputs import InputSet
from avatars.method import Avatar
from eval.evaluate import Driven, Made, check_data, measure_subject
from eval.meter import Meter
from eval.protocol import Protocol

if TYPE_CHECKING:
    from shards import ShardSet

__all__ = ["Shown", "Validation", "validation"]


@dataclass(frozen=True)
class Shown:
    """One kept picture: the caption says subject, timestep and camera; both are (3, H, W) in [0, 1]."""

    caption: str
    target: Tensor
    prediction: Tensor


@dataclass(frozen=True)
class Validation:
    """What a method scores on some subjects of a protocol.

    Attributes:
        protocol: the protocol's name.
        protocol_id: its id, as in result rows.
        subjects: who was measured, in the protocol's order.
        values: metric key to the mean over these subjects; only where each of them has a number.
        missing: metric key to the reason why there is no number.
        pictures: four a subject at most, the most frontal first: the same for every method and step.
    """

    protocol: str
    protocol_id: str
    subjects: tuple[str, ...]
    values: dict[str, float]
    missing: dict[str, str]
    pictures: tuple[Shown, ...]


def validation(
    create: Callable[[InputSet], Avatar | Driven | Made],
    shards: ShardSet,
    protocol: Protocol,
    limit: int = 0,
    *,
    device: str = "cpu",
    batch: int = 0,
    meter: Meter | None = None,
    progress: Callable[[str], None] | None = None,
) -> Validation:
    """Measures what `create` makes of the protocol's first subjects. Writes nothing and times nothing.

    Each number is the one that `evaluate` would put into the subject's row.

    Args:
        create: makes an avatar of an input set, for example a method's `create` around the network in training.
            The caller puts the network into its evaluation mode and turns gradients off.
        shards: the protocol's split.
        protocol: how to measure; fewer views and timesteps make it quick, and another protocol.
        limit: number of subjects, 0 for all.
        device: where avatars are made and rendered and networks judge.
        batch: pictures at once, 0 for all views of a timestep; changes no number.
        meter: a meter of the protocol's metrics, kept between calls so that networks load once.
        progress: called with a short sentence as each subject starts.

    Raises:
        UserError: as `evaluate`, or a meter of other metrics.
    """
    check_data(shards, protocol)
    meter = meter or Meter(protocol.metrics, device)
    if meter.metrics != protocol.metrics:
        raise UserError(f"The meter measures other metrics than the protocol {protocol.name} {protocol.id}.")
    subjects = protocol.subjects[:limit] if limit else protocol.subjects
    scores, shown = [], []
    for number, subject in enumerate(subjects, start=1):
        if progress is not None:
            progress(f"validation: subject {subject} ({number} of {len(subjects)})")
        measured = measure_subject("validation", create, shards, subject, protocol, meter, device, batch)
        scores.append(measured.score)
        shown += [
            Shown(f"{subject} · {column.label}", column.target, column.prediction)
            for _, column in sorted(measured.columns.items())
        ]
    missing: dict[str, str] = {}
    for score in scores:
        missing |= score.missing
    values = {
        metric.key: sum(score.values[metric.key] for score in scores) / len(scores)
        for metric in protocol.metrics
        if all(metric.key in score.values for score in scores)
    }
    return Validation(protocol.name, protocol.id, subjects, values, missing, tuple(shown))
