"""Configurations of avatars and networks read back from JSON."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, TypeVar

from avatars.errors import UserError

__all__ = ["config_from"]

Config = TypeVar("Config")


def config_from(kind: type[Config], values: dict[str, Any], what: str) -> Config:
    """The dataclass `kind` of what its `asdict` gave.

    Args:
        kind: a frozen dataclass whose fields are plain values.
        values: fields by name.
        what: whose configuration it is, for the sentence.

    Raises:
        UserError: a field that this version does not know.
    """
    known: Any = kind
    unknown = sorted(set(values) - {field.name for field in fields(known)})
    if unknown:
        raise UserError(
            f"The configuration of {what} has the unknown fields {', '.join(unknown)}; it was written by another "
            "version of headsplat. Use that one, or make it again."
        )
    return kind(**values)
