"""Files that a reader sees whole: the old one or the new one, never a half."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["write_whole"]


def write_whole(path: Path, content: bytes | str) -> None:
    """Replaces a file in one step, with its bytes on the disk before its name is.

    Args:
        path: the file; its folder is made when it is not there.
        content: bytes, or text that is written as UTF-8.

    Raises:
        OSError: it cannot be written. What was there before is untouched, and nothing else is left.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=f".{path.name}.", delete=False) as file:
        partial = Path(file.name)
        try:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        except BaseException:
            partial.unlink(missing_ok=True)
            raise
    partial.chmod(0o644)
    partial.replace(path)
