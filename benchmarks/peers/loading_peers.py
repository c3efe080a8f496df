"""The peers of benchmarks/loading.py, each as its documentation shows, in an environment of their own.

    python benchmarks/peers/loading_peers.py NAME FOLDER SECONDS WORKERS

FOLDER holds `pictures/*.jpg`; what a peer makes of them for itself is left beside it and used again. Prints one
line of JSON: pictures a second, and processor time a picture over the trainer's process and its workers.
"""

from __future__ import annotations

import io
import json
import os
import sys
import tarfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import simplejpeg

BATCH = 32
TICKS = os.sysconf("SC_CLK_TCK")


def with_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


def with_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def pictures(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted((folder / "pictures").glob("*.jpg"))]


def webdataset(folder: Path, workers: int, decode: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    """Decode and batch in workers, hand over through shared memory."""
    import webdataset as wds

    flat = folder / "flat.tar"
    if not flat.exists():
        with tarfile.open(flat, "w") as tar:
            for i, data in enumerate(pictures(folder)):
                header = tarfile.TarInfo(f"{i:06d}.jpg")
                header.size = len(data)
                tar.addfile(header, io.BytesIO(data))
    dataset = (
        wds.WebDataset([str(flat)] * (4 * workers), shardshuffle=False, empty_check=False)
        .repeat()
        .to_tuple("jpg")
        .map_tuple(decode)
        .batched(BATCH)
    )
    for (batch,) in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(batch)


def litdata(folder: Path, workers: int) -> Iterator[int]:
    """Bytes in litdata's chunks, decoded as they are taken out."""
    import litdata as ld

    out = folder / "litdata"
    if not (out / "index.json").exists():
        from litdata.streaming.cache import Cache

        cache = Cache(str(out), chunk_bytes="64MB")
        for i, data in enumerate(pictures(folder)):
            cache[i] = {"jpg": data}
        cache.done()
        cache.merge()

    class Decoded(ld.StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return with_simplejpeg(super().__getitem__(index)["jpg"])

    dataset = Decoded(str(out), shuffle=False, drop_last=True)
    loader = ld.StreamingDataLoader(dataset, batch_size=BATCH, num_workers=workers, persistent_workers=True)
    while True:
        for batch in loader:
            yield len(batch)


def streaming(folder: Path, workers: int) -> Iterator[int]:
    """Bytes in mosaicml-streaming's shards, decoded as they are taken out."""
    from streaming import MDSWriter, StreamingDataset
    from streaming.base.util import clean_stale_shared_memory
    from torch.utils.data import DataLoader

    out = folder / "mds"
    if not (out / "index.json").exists():
        with MDSWriter(out=str(out), columns={"jpg": "bytes"}) as writer:
            for data in pictures(folder):
                writer.write({"jpg": data})
    clean_stale_shared_memory()

    class Decoded(StreamingDataset):
        def __getitem__(self, index: Any) -> Any:
            return with_simplejpeg(super().__getitem__(index)["jpg"])

    dataset = Decoded(local=str(out), shuffle=False, batch_size=BATCH)
    loader = DataLoader(
        dataset, batch_size=BATCH, num_workers=workers, persistent_workers=True, drop_last=True
    )
    while True:
        for batch in loader:
            yield len(batch)


PEERS: dict[str, Callable[[Path, int], Iterator[int]]] = {
    "WebDataset + Pillow": lambda folder, workers: webdataset(folder, workers, with_pillow),
    "WebDataset + simplejpeg": lambda folder, workers: webdataset(folder, workers, with_simplejpeg),
    "litdata + simplejpeg": litdata,
    "mosaicml-streaming + simplejpeg": streaming,
}


def processor_seconds() -> float:
    """Of this process and all its children, those that still run and those that ended."""
    spent = os.times()
    total = spent.user + spent.system + spent.children_user + spent.children_system
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue  # it ended meanwhile
        if int(fields[1]) == os.getpid():
            total += sum(map(int, fields[11:13])) / TICKS
    return total


def measure(source: Iterator[int], seconds: float) -> dict[str, float]:
    """Pictures a second and processor time a picture, after a few batches."""
    for _ in range(6):
        next(source)
    started, used, count = time.perf_counter(), processor_seconds(), 0
    while time.perf_counter() - started < seconds:
        count += next(source)
    wall = time.perf_counter() - started
    return {
        "pictures_per_second": round(count / wall, 1),
        "cpu_us_per_picture": round((processor_seconds() - used) / count * 1e6, 1),
    }


def main() -> None:
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    name, folder, seconds, workers = sys.argv[1:]
    found = measure(PEERS[name](Path(folder), int(workers)), float(seconds))
    print(json.dumps(found), flush=True)
    os._exit(0)  # the workers of an endless iteration end with their parent


if __name__ == "__main__":
    main()
