"""Sequences of expression codes out of files: numbers, or what a phone's face capture writes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from avatars.errors import UserError
from avatars.head.makehuman import ARKIT_NAMES

__all__ = ["read_expressions"]


def read_expressions(path: str | Path, kind: str, length: int) -> Tensor:
    """A sequence of expression codes.

    Args:
        path: `.npy` (T, E); `.json`, a list of T codes or of T objects {ARKit name: weight}; `.csv` with a header of
            ARKit names, as Live Link Face writes it (a missing name counts as 0; times and head turns are left out).
        kind: the kind of code wanted; names mean something only for "arkit-52".
        length: its length E.

    Returns:
        (T, E) float32.

    Raises:
        UserError: the file is missing or damaged, or its codes are of another kind or length.
    """
    path = Path(path)
    try:
        if path.suffix == ".npy":
            values = np.load(path, allow_pickle=False)
        elif path.suffix == ".json":
            values = _from_json(json.loads(path.read_text()), path, kind)
        elif path.suffix == ".csv":
            with path.open(newline="") as lines:
                values = np.stack([_named(row, path, kind, strict=False) for row in csv.DictReader(lines)])
        else:
            raise UserError(f"{path} is no expression file: end it in .npy, .json or .csv.")
    except FileNotFoundError:
        raise UserError(f"{path} is not there.") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path} cannot be read as expression codes ({error}).") from None
    if values.ndim != 2 or values.shape[1] != length or not len(values):
        raise UserError(f"{path} holds {values.shape} numbers where (frames, {length}) of {kind} are needed.")
    if not np.isfinite(values).all():
        raise UserError(f"{path} holds values that are not finite.")
    return torch.from_numpy(values.astype(np.float32))


def _from_json(content: Any, path: Path, kind: str) -> np.ndarray:
    if isinstance(content, list) and content and all(isinstance(frame, dict) for frame in content):
        return np.stack([_named(frame, path, kind, strict=True) for frame in content])
    return np.asarray(content, np.float64)


def _named(frame: dict[str, Any], path: Path, kind: str, *, strict: bool) -> np.ndarray:
    """One frame of ARKit weights by name; names differ in the case of their first letter between programs."""
    if kind != "arkit-52":
        raise UserError(f"{path} names ARKit expressions, and this avatar is driven by {kind} codes.")
    places = {name.lower(): i for i, name in enumerate(ARKIT_NAMES)}
    code = np.zeros(len(ARKIT_NAMES))
    known = 0
    for name, weight in frame.items():
        place = places.get((name or "").lower())
        if place is None:
            if strict:
                raise UserError(f"{path} names the expression {name!r}, which is none of ARKit's 52.")
            continue
        code[place] = float(weight)
        known += 1
    if not known and not strict:
        raise UserError(f"{path} has no column with the name of an ARKit expression, for example JawOpen.")
    return code
