"""How fast pictures come: the batch loader against WebDataset in worker processes and against the decoder alone.

All read the same 512 x 512 JPEGs and end in uint8 arrays in the trainer's process. The loader also decodes each
picture's mask, which the others do not have to. Run with an otherwise idle machine:

    python benchmarks/loading.py [--out FOLDER] [--seconds 10]
"""

from __future__ import annotations

import argparse
import io
import json
import os
import platform
import subprocess
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np
import simplejpeg
import torch

from shards import BatchLoader, Capture, Manifest, View, pack
from shards.tarfiles import ShardReader

SIZE = 512
BATCH = 32


class NoisyHeads(Capture):
    """A capture that makes its pictures up: smooth colours with the grain of a camera, about 90 kB as JPEG."""

    layout = "made-up"
    expression_kind = "none"
    size = (SIZE, SIZE)

    def __init__(self, subject: str, timesteps: int, views: int) -> None:
        self.subject = self.capture_id = subject
        self.timestep_ids = [f"{t:05d}" for t in range(timesteps)]
        self.camera_ids = [f"c{v:02d}" for v in range(views)]
        self.expressions = np.zeros((timesteps, 1), np.float32)

    def camera_matrices(self, t: int) -> tuple[np.ndarray, np.ndarray]:
        views = len(self.camera_ids)
        K = np.broadcast_to([[1800.0, 0, SIZE / 2], [0, 1800.0, SIZE / 2], [0, 0, 1]], (views, 3, 3))
        poses = np.tile(np.eye(4), (views, 1, 1))
        for v in range(views):
            angle = 2.0 * (v / views - 0.5)
            c, s = np.cos(angle), np.sin(angle)
            poses[v] = [[c, 0, -s, 0], [0, -1, 0, 0], [-s, 0, -c, 1], [0, 0, 0, 1]]
        return K, poses

    def view(self, t: int, v: int, depth: bool = True) -> View:
        rng = np.random.default_rng([t, v])
        y, x = np.mgrid[:SIZE, :SIZE] / SIZE
        inside = ((x - 0.5) / 0.36) ** 2 + ((y - 0.5) / 0.45) ** 2 < 1
        smooth = 90 + 60 * np.stack([np.sin(7 * x + t), np.cos(5 * y + v), np.sin(4 * x * y)], -1)
        image = np.clip(smooth + rng.normal(0, 7, smooth.shape), 0, 255) * inside[..., None]
        return View(image=image.astype(np.uint8), mask=(inside * 255).astype(np.uint8))


def make_data(folder: Path) -> tuple[Path, Path, list[bytes]]:
    """Shards, a flat WebDataset tar of their pictures, and the pictures."""
    shards = folder / "shards"
    captures = [NoisyHeads(f"p{i}", timesteps=10, views=24) for i in range(2)]
    pack(captures, shards, size=SIZE, heldout=0, input_sets=3, prior="none", max_input_degrees=90)
    pictures = []
    for shard in Manifest.load(shards).shards:
        reader = ShardReader(shards / shard.path, shard.index)
        for key in reader.keys:
            wanted = [name for name in reader.extensions(key) if name.endswith("jpg")]
            pictures += list(reader.read(key, wanted).values())
    flat = folder / "flat.tar"
    with tarfile.open(flat, "w") as tar:
        for i, data in enumerate(pictures):
            header = tarfile.TarInfo(f"{i:06d}.jpg")
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return shards, flat, pictures


def decoder_alone(pictures: list[bytes], threads: int) -> Iterator[int]:
    """The limit: bytes in memory, decoded over and over into the same arrays."""
    out = np.empty((BATCH, SIZE, SIZE, 3), np.uint8)

    def decode(i: int) -> None:
        simplejpeg.decode_jpeg(pictures[i % len(pictures)], "RGB", buffer=out[i % BATCH])

    with ThreadPoolExecutor(threads) as pool:
        start = 0
        while True:
            list(pool.map(decode, range(start, start + BATCH)))
            start += BATCH
            yield BATCH


def our_loader(shards: Path, threads: int) -> Iterator[int]:
    """Batches of examples of 4 input and 8 target pictures."""
    with BatchLoader(shards, "train", seed=0, micro_batch=3, threads=threads, raw=True) as loader:
        for batch in loader:
            yield batch["input_images"].shape[:2].numel() + batch["target_images"].shape[:2].numel()


def with_simplejpeg(data: bytes) -> np.ndarray:
    return simplejpeg.decode_jpeg(data, "RGB")


def with_pillow(data: bytes) -> np.ndarray:
    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def webdataset_workers(flat: Path, workers: int, decode: Callable[[bytes], np.ndarray]) -> Iterator[int]:
    """What WebDataset's documentation shows: decode in workers, batch, hand over through shared memory."""
    import webdataset as wds

    dataset = (
        wds.WebDataset([str(flat)] * (4 * workers), shardshuffle=False, empty_check=False)
        .repeat()
        .to_tuple("jpg")
        .map_tuple(decode)
        .batched(BATCH)
    )
    for (batch,) in wds.WebLoader(dataset, batch_size=None, num_workers=workers):
        yield len(batch)


def rate(source: Iterator[int], seconds: float) -> float:
    """Pictures a second, after the first two batches."""
    next(source), next(source)
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        count += next(source)
    return count / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results", help="folder for the result"
    )
    parser.add_argument("--seconds", type=float, default=10, help="to measure each candidate for")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cores = os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        shards, flat, pictures = make_data(Path(folder))
        candidates: dict[str, Callable[[], Iterator[int]]] = {
            f"simplejpeg alone, {cores} threads": lambda: decoder_alone(pictures, cores),
            f"headsplat loader, {cores} threads": lambda: our_loader(shards, cores),
            f"WebDataset + simplejpeg, {cores} workers": lambda: webdataset_workers(
                flat, cores, with_simplejpeg
            ),
            f"WebDataset + Pillow, {cores} workers": lambda: webdataset_workers(flat, cores, with_pillow),
        }
        rates = {}
        for name, make in candidates.items():
            rates[name] = round(rate(make(), options.seconds), 1)
            print(f"{rates[name]:8.0f} pictures/s  {name}", flush=True)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    hardware = f"{platform.machine()}-{cores}cores"
    content = {
        "what": "pictures a second into uint8 batches, 512 x 512 JPEG",
        "bytes_a_picture": round(sum(map(len, pictures)) / len(pictures)),
        "pictures_per_second": rates,
        "load_average": os.getloadavg()[0],
        "commit": commit,
        "hardware": hardware,
        "versions": {
            name: version(name) for name in ("torch", "webdataset", "simplejpeg", "pillow", "numpy")
        },
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"loading-{hardware}.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
