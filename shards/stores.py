"""Shards that are elsewhere: folders behind any URL that fsspec knows, and a node-local cache of what is
used.

A shard is either copied whole into the cache and read there like a local one, or, without a cache, streamed
from front to back by WebDataset. Both give the same samples.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar

from avatars.errors import UserError
from shards.tarfiles import Data, Scratch

__all__ = ["RemoteFolder", "ShardCache", "StreamReader", "is_remote", "location"]

BLOCK = tarfile.BLOCKSIZE
LOOK_BACK = 4  # samples that a stream keeps: threads may ask for neighbours in the wrong order
CHUNK = 1 << 20

log = logging.getLogger(__name__)
T = TypeVar("T")


def is_remote(location: str | Path) -> bool:
    """Whether this is a URL rather than a folder of this machine."""
    return "://" in str(location)


def location(folder: str | Path) -> str | Path:
    """A URL as text, anything else as a path. A URL that went through `Path` has lost a slash and gets it back."""
    if is_remote(folder):
        return str(folder).rstrip("/")
    lost = re.fullmatch(r"([a-z][a-z0-9+.-]+):/(.*)", str(folder))
    if lost is None:
        return Path(folder)
    return f"{lost[1]}://{'/' if lost[1] in ('file', 'local') else ''}{lost[2]}"


class RemoteFolder:
    """A folder behind a URL, with retries.

    Args:
        url: anything fsspec knows whose package is installed, such as s3://bucket/folder with s3fs.
        attempts: how often an operation is tried.
        wait: seconds before the second try; each further pause is twice as long.

    Raises:
        UserError: the kind of URL is unknown; any operation that fails at every attempt.
    """

    def __init__(self, url: str, *, attempts: int = 4, wait: float = 0.5) -> None:
        import fsspec

        self.url, self._attempts, self._wait = url.rstrip("/"), attempts, wait
        try:
            self._files, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise UserError(
                f"{url} cannot be opened ({error}). Give a folder or a URL of a known kind."
            ) from None

    def text(self, name: str) -> str | None:
        """A small file, or None where it is not."""
        try:
            data: bytes = self._try(name, lambda: self._files.cat_file(f"{self._root}/{name}"))
        except FileNotFoundError:
            return None
        return data.decode()

    def sizes(self) -> dict[str, int | None]:
        """The files of the folder and their sizes in bytes, where the storage knows them."""
        try:
            entries = self._try("", lambda: self._files.ls(self._root, detail=True))
        except FileNotFoundError:
            return {}
        return {entry["name"].rsplit("/", 1)[-1]: entry["size"] for entry in entries}

    def open(self, name: str) -> tuple[IO[bytes], bytes]:
        """A file, to be read from front to back, and what it begins with."""

        def begin() -> tuple[IO[bytes], bytes]:
            file: IO[bytes] = self._files.open(f"{self._root}/{name}", "rb")
            try:
                start = file.read(BLOCK)  # many stores say only now that they cannot
                file.seek(0)
            except BaseException:
                file.close()
                raise
            return file, start

        return self._try(name, begin)

    def insist(self, name: str, action: Callable[[], T]) -> T:
        """Does something with a file that may fail now and then; see `attempts`."""
        return self._try(name, action)

    def fetch(self, name: str, target: Path, sha256: str) -> None:
        """Copies a file, whole and with the right hash or not at all."""

        def copy() -> None:
            digest = hashlib.sha256()
            with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".partial", delete=False) as partial:
                try:
                    with self._files.open(f"{self._root}/{name}", "rb") as source:
                        while chunk := source.read(CHUNK):
                            digest.update(chunk)
                            partial.write(chunk)
                    partial.close()
                    if digest.hexdigest() != sha256:
                        raise OSError(f"its hash is {digest.hexdigest()[:12]}… and not {sha256[:12]}…")
                    Path(partial.name).replace(target)
                finally:
                    Path(partial.name).unlink(missing_ok=True)

        try:
            self._try(name, copy)
        except FileNotFoundError:
            raise UserError(f"{self.url}/{name} is not there. Upload the shards again.") from None

    def _try(self, name: str, action: Callable[[], T]) -> T:
        """Does something that may fail now and then."""
        for attempt in range(1, self._attempts + 1):
            try:
                return action()
            except (FileNotFoundError, UserError):
                raise
            except Exception as error:  # every kind of storage has its own exceptions
                if attempt == self._attempts:
                    raise UserError(
                        f"{self.url}/{name} cannot be read after {attempt} attempts ({error})."
                        " Check the connection and the shards."
                    ) from None
                log.warning("%s/%s: attempt %d failed: %s", self.url, name, attempt, error)
                time.sleep(self._wait * 2 ** (attempt - 1))
        raise ValueError("attempts must be positive")


class ShardCache:
    """Copies of remote shards on this node, at most `limit` bytes of them; the least recently used make room.

    Several processes may share one folder: files appear whole, and one that is removed while it is read stays
    readable to who has it open.

    Args:
        folder: where copies are kept.
        limit: bytes; one shard is kept even if it is larger.
    """

    def __init__(self, folder: str | Path, limit: int) -> None:
        self._folder, self._limit = Path(folder), limit
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"The cache {folder} cannot be made ({error.strerror}). Give another folder."
            ) from None

    def path(self, remote: RemoteFolder, name: str, sha256: str) -> Path:
        """The local copy of a shard, fetched if it is not here yet."""
        target = self._folder / f"{sha256}.tar"
        with self._lock:
            if target.is_file():
                now = time.time_ns()  # by hand: the kernel stamps in steps of milliseconds
                os.utime(target, ns=(now, now))  # the access that eviction goes by
            else:
                remote.fetch(name, target, sha256)
                self._make_room(target)
        return target

    def _make_room(self, keep: Path) -> None:
        kept = []
        for path in self._folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):  # another process made room at the same time
                kept.append((path.stat().st_mtime_ns, path.stat().st_size, path))
        total = sum(size for _, size, _ in kept)
        for _, size, path in sorted(kept):
            if total > self._limit and path != keep:
                path.unlink(missing_ok=True)
                total -= size


class StreamReader:
    """Reads members of a remote shard by name without a copy: WebDataset reads the tar from front to back.

    Input sets, which come first and every example needs, are kept; of the target timesteps only the last few
    are, so asking in the order of the file is cheap and asking for an earlier one starts again.

    Args:
        remote: the folder.
        name: of the shard in it.
    """

    def __init__(self, remote: RemoteFolder, name: str) -> None:
        self.path = Path(name)
        self._remote, self._where = remote, f"{remote.url}/{name}"
        self._lock = threading.Lock()
        self._kept: dict[str, dict[str, bytes]] = {}
        self._samples: Iterator[dict[str, Any]] | None = None
        self._file: IO[bytes] | None = None

    def close(self) -> None:
        """Closes the connection."""
        if self._file is not None:
            self._file.close()

    @property
    def keys(self) -> list[str]:
        """Names of the samples; reads the shard to its end."""

        def walk() -> list[str]:
            found = []
            self._open()
            while (sample := self._next()) is not None:
                found.append(sample["__key__"])
            self._samples = None
            return found

        with self._lock:
            return self._remote.insist(self.path.name, walk)

    def read(self, key: str, wanted: list[str], scratch: Scratch | None = None) -> dict[str, Data]:
        """The bytes of the `wanted` extensions of one sample; `scratch` is not needed here."""
        with self._lock:
            sample = self._kept.get(key) or self._remote.insist(
                self.path.name, lambda: self._forward(key) or self._again(key)
            )
        if sample is None:
            raise UserError(
                f"{self._where} ends without {key}: it is cut short or another file. Copy the shard again."
            )
        missing = [extension for extension in wanted if extension not in sample]
        if missing:
            raise UserError(f"{self._where}: {key} has no {missing[0]}. Pack the shards again.")
        return {extension: sample[extension] for extension in wanted}

    def _forward(self, key: str) -> dict[str, bytes] | None:
        """Reads on until the sample comes."""
        while self._samples is not None and (sample := self._next()) is not None:
            targets = [kept for kept in self._kept if kept.startswith("target-")]
            if len(targets) >= LOOK_BACK:
                del self._kept[targets[0]]
            self._kept[sample["__key__"]] = sample
            if sample["__key__"] == key:
                return sample
        return None

    def _again(self, key: str) -> dict[str, bytes] | None:
        self._open()
        return self._forward(key)

    def _open(self) -> None:
        from webdataset.tariterators import group_by_keys, tar_file_expander

        self.close()
        self._kept.clear()
        try:
            self._file, start = self._remote.open(self.path.name)
        except FileNotFoundError:
            raise UserError(f"{self._where} is not there. Upload the shards again.") from None
        if start[257:262] != b"ustar":  # WebDataset would also inflate a compressed tar, however large
            raise UserError(f"{self._where} is not a plain tar. Pack or copy the shards again.")
        files = tar_file_expander([{"url": self._where, "stream": self._file}])
        self._samples = iter(group_by_keys(files))

    def _next(self) -> dict[str, Any] | None:
        try:
            return next(self._samples, None) if self._samples is not None else None
        except OSError:  # the storage's: opened anew and read up to here again
            self._samples = None
            raise
        except Exception as error:  # tarfile's, and WebDataset adds the stream to any
            self._samples = None
            raise UserError(
                f"{self._where} cannot be read to its end ({error!r:.200}). Copy it again."
            ) from None
