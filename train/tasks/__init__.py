"""What the trainer trains, one module a method."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any, get_type_hints

from avatars.errors import UserError
from train.config import TrainConfig
from train.task import Task

__all__ = ["config_from_json", "task_for"]


def task_for(config: TrainConfig) -> Task:
    """The task that a recipe's configuration describes."""
    from train.tasks.avat3r import Avat3rTask

    return Avat3rTask(config)


def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `TrainConfig.to_json` wrote.

    Raises:
        UserError: a field that this version does not know.
    """
    return _from_json(TrainConfig, values, "")


def _from_json(kind: Any, values: dict[str, Any], where: str) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(set(values) - {field.name for field in fields(kind)})
    if unknown:
        raise UserError(
            f"The checkpoint's recipe has the unknown fields {', '.join(where + name for name in unknown)}; it was "
            "written by another version of headsplat."
        )
    made = {}
    for name, value in values.items():
        if is_dataclass(hints[name]):
            made[name] = _from_json(hints[name], value, f"{where}{name}.")
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return kind(**made)
