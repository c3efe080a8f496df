"""Hashes that name JSON values."""

from __future__ import annotations

import hashlib
import json
from typing import Any

__all__ = ["canonical_json", "short_hash"]


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, no NaN."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def short_hash(value: Any, length: int = 12) -> str:
    """First `length` hexadecimal digits of the sha256 of a JSON value."""
    return hashlib.sha256(canonical_json(value).encode()).hexdigest()[:length]
