"""What the trainer trains, one module a method."""

from __future__ import annotations

from dataclasses import fields, is_dataclass, replace
from typing import Any, get_type_hints

from avatars.errors import UserError
from avatars.fastavatar.config import FastAvatarDecoderConfig, FastAvatarEncoderConfig
from avatars.gasp.config import GaspConfig
from shards import Manifest
from train.config import MODELS, TrainConfig
from train.task import Task

__all__ = ["config_from_json", "settled", "task_for"]


def task_for(config: TrainConfig) -> Task:
    """The task that a recipe's configuration describes."""
    from train.tasks.avat3r import Avat3rTask
    from train.tasks.fastavatar import FastAvatarDecoderTask, FastAvatarEncoderTask
    from train.tasks.gasp import GaspTask

    if isinstance(config.model, GaspConfig):
        return GaspTask(config)
    if isinstance(config.model, FastAvatarDecoderConfig):
        return FastAvatarDecoderTask(config)
    if isinstance(config.model, FastAvatarEncoderConfig):
        return FastAvatarEncoderTask(config)
    return Avat3rTask(config)


def settled(config: TrainConfig, manifest: Manifest) -> TrainConfig:
    """The configuration with what only the shards know: whose features they hold, whether their input pictures keep
    what is behind the head, and how many people a table of learned codes has rows for.
    """
    model: Any = config.model
    found: dict[str, Any] = {}
    if manifest.settings.input_background == "kept" and hasattr(model, "input_background"):
        found["input_background"] = "kept"
    if getattr(model, "feature_dim", 0) and not model.feature_prior:
        found["feature_prior"] = manifest.priors.features
    if getattr(model, "people", None) == 0:
        found["people"] = len(manifest.subjects("train"))
    return replace(config, model=replace(model, **found)) if found else config


def config_from_json(values: dict[str, Any]) -> TrainConfig:
    """The configuration that `TrainConfig.to_json` wrote.

    Raises:
        UserError: a method or a field that this version does not know.
    """
    values = dict(values)
    method = values.pop("method", None)
    if method not in MODELS:
        raise UserError(
            f"The checkpoint's recipe is of the method {method!r}; this version trains {', '.join(MODELS)}."
        )
    return _from_json(TrainConfig, values, "", {"model": MODELS[method]})


def _from_json(kind: Any, values: dict[str, Any], where: str, known: dict[str, type] | None = None) -> Any:
    hints = get_type_hints(kind) | (known or {})
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
