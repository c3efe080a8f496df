"""A folder for what is derived once from the data of installed packages."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import numpy as np

from avatars.errors import UserError

__all__ = ["cache_folder", "save_npz_atomically"]


def cache_folder() -> Path:
    """`$HEADSPLAT_CACHE`, by default `~/.cache/headsplat`; made when missing."""
    folder = Path(os.environ.get("HEADSPLAT_CACHE") or Path.home() / ".cache" / "headsplat")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"cannot make the cache folder {folder} ({error.strerror}); set HEADSPLAT_CACHE to a writable folder"
        ) from error
    return folder


def save_npz_atomically(path: Path, arrays: dict[str, np.ndarray]) -> None:
    """Write an npz that other processes see whole or not at all; the last of several writers wins."""
    name = None
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
        with os.fdopen(handle, "wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        Path(name).replace(path)
    except OSError as error:
        if name is not None:
            Path(name).unlink(missing_ok=True)
        raise UserError(
            f"cannot write {path}: {error.strerror}; free space or set HEADSPLAT_CACHE"
        ) from error
