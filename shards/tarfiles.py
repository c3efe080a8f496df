"""A shard on disk: a WebDataset tar with fixed headers, whose last member says where everything is.

Every tool that reads WebDataset reads a shard from front to back. The last member, `index.json`, also lets a
reader with random access fetch the dozen members that one training example uses out of the hundred and more
of a timestep. The index is only a hint: each member's own tar header is compared with it before its bytes
are used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tarfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

from avatars.errors import UserError

__all__ = ["INDEX_KEY", "Data", "Scratch", "ShardReader", "ShardWriter"]

Data = bytes | memoryview
BLOCK = tarfile.BLOCKSIZE
INDEX_KEY = "index"


def _header(name: str, size: int) -> bytes:
    """A member's tar header. Owner, time and mode are fixed, so that equal content makes equal files."""
    info = tarfile.TarInfo(name)
    info.size = size
    info.mode = 0o644
    return info.tobuf(tarfile.USTAR_FORMAT)


def _padded(size: int) -> int:
    return -(-size // BLOCK) * BLOCK


class ShardWriter:
    """Writes one shard; the file gets its name only when everything is in it.

    Used as a context manager. Leaving it with an error removes what was written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._partial = path.with_name(path.name + ".partial")
        self._hash = hashlib.sha256()
        self._position = 0
        self._layouts: dict[tuple[str, ...], int] = {}
        self._samples: list[tuple[str, int, int, list[int]]] = []
        self.index: tuple[int, int] = (0, 0)  # where the index's bytes are: offset, size

    def __enter__(self) -> ShardWriter:
        self._file = self._partial.open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._finish()
            self._file.close()  # the last bytes may find the disk full here
            if kind is None:
                self._partial.replace(self.path)
        finally:
            with contextlib.suppress(OSError):
                self._file.close()
            self._partial.unlink(missing_ok=True)

    @property
    def size(self) -> int:
        """How many bytes the file has so far."""
        return self._position

    @property
    def sha256(self) -> str:
        """The hash of what was written so far."""
        return self._hash.hexdigest()

    def write(self, key: str, members: Mapping[str, Data]) -> None:
        """Appends one sample: members named `key.extension`, in the order given."""
        layout = self._layouts.setdefault(tuple(members), len(self._layouts))
        self._samples.append((key, self._position, layout, [len(data) for data in members.values()]))
        for extension, data in members.items():
            self._member(f"{key}.{extension}", data)

    def _member(self, name: str, data: Data) -> None:
        for part in (_header(name, len(data)), data, bytes(_padded(len(data)) - len(data))):
            self._file.write(part)
            self._hash.update(part)
            self._position += len(part)

    def _finish(self) -> None:
        index = {
            "version": 1,
            "layouts": [list(layout) for layout in self._layouts],
            "samples": self._samples,
        }
        data = json.dumps(index, separators=(",", ":")).encode()
        self.index = (self._position + BLOCK, len(data))
        self._member(f"{INDEX_KEY}.json", data)
        end = bytes(2 * BLOCK)
        self._file.write(end)
        self._hash.update(end)
        self._position += len(end)
        self._file.flush()
        os.fsync(self._file.fileno())


class Scratch:
    """Memory that one thread reads into over and over: fresh memory is cleared by the kernel each time."""

    def __init__(self) -> None:
        self._memory, self._used = bytearray(), 0

    def free(self) -> None:
        """Nobody uses what was taken so far."""
        self._used = 0

    def take(self, size: int) -> memoryview:
        """`size` bytes that nobody uses."""
        if self._used + size > len(self._memory):
            self._memory, self._used = bytearray(max(size, 2 * len(self._memory))), 0
        self._used += size
        return memoryview(self._memory)[self._used - size : self._used]


class ShardReader:
    """Reads members of a shard by name, from a local file. Safe to use from several threads.

    Args:
        path: the tar.
        index: offset and size of the index's bytes, as the manifest gives them.

    Raises:
        UserError: the file is not there, cut short, or its index cannot be read; every read may raise it too.
    """

    def __init__(self, path: Path, index: tuple[int, int]) -> None:
        self.path = path
        try:
            self._file = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise UserError(
                f"{path} cannot be opened ({error.strerror}). Pack or copy the shards again."
            ) from None
        self.close = weakref.finalize(self, os.close, self._file)  # by hand or when nobody needs it any more
        self._bytes = os.fstat(self._file).st_size
        try:
            name, (offset, size) = f"{INDEX_KEY}.json", index
            data = self._span(offset - BLOCK, BLOCK + size, name)
            content = json.loads(bytes(self._member(data, 0, name, size)))
            layouts = [tuple(layout) for layout in content["layouts"]]
            self._samples = {
                key: (offset, layouts[layout], sizes) for key, offset, layout, sizes in content["samples"]
            }
        except (ValueError, KeyError, TypeError, IndexError):
            os.close(self._file)
            raise UserError(
                f"{path}: the index at the end cannot be read. Pack or copy the shards again."
            ) from None
        except UserError:
            self.close()
            raise

    @property
    def keys(self) -> list[str]:
        """Names of the samples, in the order they are in the file."""
        return list(self._samples)

    def extensions(self, key: str) -> tuple[str, ...]:
        """What a sample has, in the order it is in the file."""
        return self._sample(key)[1]

    def read(self, key: str, wanted: list[str], scratch: Scratch | None = None) -> dict[str, Data]:
        """The bytes of the `wanted` extensions of one sample. Neighbours in the file are read in one go and
        not copied apart.

        Args:
            key: of the sample.
            wanted: extensions of its members.
            scratch: memory to read into. What is returned is then good until it is given again.
        """
        if scratch is not None:
            scratch.free()
        offset, extensions, sizes = self._sample(key)
        runs: list[list[tuple[int, str, int]]] = []  # of neighbours: where, what, how many bytes
        remaining, end = set(wanted), -1
        for extension, size in zip(extensions, sizes, strict=True):
            if extension in remaining:
                remaining.discard(extension)
                if offset != end:
                    runs.append([])
                runs[-1].append((offset, extension, size))
                end = offset + BLOCK + _padded(size)
            offset += BLOCK + _padded(size)
        if remaining:
            raise UserError(f"{self.path}: {key} has no {min(remaining)}. Pack the shards again.")
        found: dict[str, Data] = {}
        for run in runs:
            start, (last, _, size) = run[0][0], run[-1]
            data = self._span(start, last + BLOCK + size - start, f"{key}.{run[-1][1]}", scratch)
            for at, extension, size in run:
                found[extension] = self._member(data, at - start, f"{key}.{extension}", size)
        return found

    def _sample(self, key: str) -> tuple[int, tuple[str, ...], list[int]]:
        if key not in self._samples:
            raise UserError(f"{self.path} has no sample {key}. Pack or copy the shards again.")
        return self._samples[key]

    def _span(self, offset: int, size: int, name: str, scratch: Scratch | None = None) -> memoryview:
        """A stretch of the file that ends with the member `name`."""
        if offset < 0 or size < BLOCK:
            raise UserError(
                f"{self.path} is damaged: the index places {name} at {offset}. Copy the shard again."
            )
        inside = offset + size <= self._bytes  # asked first: a wrong size must not allocate
        data = memoryview(b"")
        if inside:
            data = (scratch or Scratch()).take(size)
            data = data[: os.preadv(self._file, [data], offset)]
        if len(data) < size:
            raise UserError(
                f"{self.path} is cut short: {name} ends after the file does. Copy the shard again."
            )
        return data

    def _member(self, data: memoryview, at: int, name: str, size: int) -> memoryview:
        """The bytes of the member whose header is `at` this place of a stretch."""
        header = bytes(data[at : at + BLOCK])
        if header[:100].rstrip(b"\0") != name.encode() or header[124:135] != b"%011o" % size:
            raise UserError(
                f"{self.path} is damaged: there is no {name} where its index says. Copy the shard again."
            )
        return data[at + BLOCK : at + BLOCK + size]
