"""How fast pictures come: the batch loader against other loaders and against the decoder alone.

All read the same 512 x 512 JPEGs and end in uint8 batches of 32 in the trainer's process. The batch loader also
decodes each picture's mask, which the others do not have to. Every candidate is measured in every round; the
medians count. On a shared machine the processor time a picture is the figure to trust.

The peers run in an environment of their own:

    python -m venv PEERS && PEERS/bin/pip install -r benchmarks/peers/loading-requirements.txt
    python benchmarks/loading.py --peers PEERS/bin/python [--out FOLDER] [--seconds 5] [--rounds 3]

Before that the codecs that shards may have are compared on synthetic people: bytes, processor time and what is lost.
`--codecs` stops there.
"""

from __future__ import annotations

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from record import arguments, write

from shards import BatchLoader, Capture, Manifest, View, pack
from shards.codecs import CODECS, decode_picture, encode_picture
from shards.manifest import ShardInfo
from shards.tarfiles import ShardReader

SIZE = 512
BATCH = 32
PEERS = (
    "WebDataset + Pillow",
    "WebDataset + simplejpeg",
    "litdata + simplejpeg",
    "mosaicml-streaming + simplejpeg",
)
PEER_FILE = Path(__file__).parent / "peers" / "loading_peers.py"


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


def make_data(folder: Path) -> tuple[Path, list[bytes]]:
    """Shards, and a folder of the pictures in them, which are returned too."""
    shards = folder / "shards"
    captures = [NoisyHeads(f"p{i}", timesteps=10, views=24) for i in range(2)]
    pack(captures, shards, size=SIZE, heldout=0, input_sets=3, prior="none", max_input_degrees=90)
    pictures = []
    for shard in Manifest.load(shards).shards:
        reader = ShardReader(shards / shard.path, shard.index)
        for key in reader.keys:
            wanted = [name for name in reader.extensions(key) if name.endswith("jpg")]
            pictures += [bytes(data) for data in reader.read(key, wanted).values()]
    (folder / "pictures").mkdir()
    for i, data in enumerate(pictures):
        (folder / "pictures" / f"{i:06d}.jpg").write_bytes(data)
    return shards, pictures


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
    """Batches of four examples of 4 input and 4 target pictures."""
    with BatchLoader(shards, "train", seed=0, micro_batch=4, views=4, threads=threads, raw=True) as loader:
        for batch in loader:
            yield batch["input_images"].shape[:2].numel() + batch["target_images"].shape[:2].numel()


def measure(source: Iterator[int], seconds: float) -> dict[str, float]:
    """Pictures a second and processor time a picture, after a few batches."""
    for _ in range(6):
        next(source)
    started, used, count = time.perf_counter(), time.process_time(), 0
    while time.perf_counter() - started < seconds:
        count += next(source)
    wall = time.perf_counter() - started
    return {
        "pictures_per_second": round(count / wall, 1),
        "cpu_us_per_picture": round((time.process_time() - used) / count * 1e6, 1),
    }


def measure_peer(python: Path, name: str, folder: Path, seconds: float, workers: int) -> dict[str, float]:
    """The same of a peer, in its own environment."""
    command = [str(python), str(PEER_FILE), name, str(folder), str(seconds), str(workers)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def people(folder: Path) -> list[np.ndarray]:
    """Eight views of each of two synthetic people."""
    from shards import read_capture
    from shards.synth import synthesize

    synthesize(folder / "people", subjects=2, timesteps=1, views=8, size=SIZE)
    captures = [read_capture(path) for path in sorted((folder / "people").iterdir()) if path.is_dir()]
    views = [capture.view(0, v, depth=False) for capture in captures for v in range(8)]
    return [view.image * (view.mask > 0)[..., None] for view in views if view is not None]


def compare_codecs(pictures: list[np.ndarray], rounds: int) -> dict[str, dict[str, float | None]]:
    """Bytes a picture, processor time to encode and decode it, and the head's PSNR (None where nothing is lost)."""
    out = np.empty((SIZE, SIZE, 3), np.uint8)
    found = {}
    for codec in CODECS:
        started = time.process_time()
        coded = [encode_picture(picture, codec) for picture in pictures]
        encoding = (time.process_time() - started) / len(pictures)
        decoding, errors = [], []
        for _ in range(rounds):
            for data, picture in zip(coded, pictures, strict=True):
                started = time.process_time()
                decode_picture(data, out, codec, codec)
                decoding.append(time.process_time() - started)
                head = picture.any(-1)
                errors.append(float(((out[head].astype(float) - picture[head]) ** 2).mean()))
        error = statistics.mean(errors)
        found[codec] = {
            "kilobytes": round(sum(map(len, coded)) / len(coded) / 1000, 1),
            "encode_cpu_ms": round(encoding * 1e3, 1),
            "decode_cpu_ms": round(statistics.median(decoding) * 1e3, 2),
            "psnr_of_head": round(10 * float(np.log10(255**2 / error)), 1) if error else None,
        }
        print(f"{codec:45s} {found[codec]}", flush=True)
    return found


START = """
import json, sys, time, torch
from shards import BatchLoader, Manifest
from shards.plans import Plan
from pathlib import Path
def memory(field):
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1024
before, started = memory("VmRSS"), time.perf_counter()
{action}
seconds = time.perf_counter() - started
print(json.dumps({{"seconds": round(seconds, 3), "megabytes_above_imports": round(memory("VmHWM") - before, 1)}}))
"""


def measure_start(action: str) -> dict[str, float]:
    """Seconds and memory above the imports of something that a fresh process does."""
    done = subprocess.run(
        [sys.executable, "-c", START.format(action=action)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout)
    return found


def first_batch(shards: Path, folder: Path, count: int = 1000) -> dict[str, float]:
    """From a folder of `count` shards to the first batch: links to the same few files under many names."""
    many = folder / "many"
    many.mkdir()
    manifest = Manifest.load(shards)
    listed = []
    for i in range(count):
        shard = manifest.shards[i % len(manifest.shards)]
        name = f"q{i:04d}-0000.tar"
        os.link(shards / shard.path, many / name)
        listed.append(dataclasses.replace(shard, path=name, subject=f"q{i:04d}"))
    names = tuple(shard.subject for shard in listed)
    dataclasses.replace(manifest, folder=many, shards=tuple(listed), train=names).save()
    return measure_start(
        f"loader = BatchLoader({str(many)!r}, 'train', seed=0, micro_batch=4, views=4, raw=True); next(loader)"
    )


def resume(shards: Path, folder: Path, subjects: int = 244, timesteps: int = 5000) -> dict[str, float]:
    """From the manifest of Ava-256's size, without its data, to what rank 63 of 64 reads in step 10^6."""
    large = folder / "large"
    large.mkdir()
    a_shard = 256
    listed = []
    for i in range(subjects):
        for j, start in enumerate(range(0, timesteps, a_shard)):
            targets = min(a_shard, timesteps - start)
            inputs = tuple(tuple((4 * s + t) % targets for t in range(4)) for s in range(8))
            listed.append(
                ShardInfo(
                    path=f"p{i:03d}-{j:04d}.tar",
                    subject=f"p{i:03d}",
                    bytes=3_000_000_000,
                    sha256=f"{i * 100 + j:064x}",
                    index=(2_999_000_000, 300_000),
                    views=(80,) * targets,
                    inputs=inputs,
                )
            )
    names = tuple(f"p{i:03d}" for i in range(subjects))
    manifest = Manifest.load(shards)
    dataclasses.replace(manifest, folder=large, shards=tuple(listed), train=names, heldout=()).save()
    return measure_start(
        f"plan = Plan(Manifest.read({str(large)!r}).split('train'), seed=0, views=8)\n"
        "plan.batch(10**6, micro_batch=1, world_size=64, rank=63)"
    )


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--peers", type=Path, help="the python of the peers' environment")
    parser.add_argument("--seconds", type=float, default=5, help="to measure each candidate for in a round")
    parser.add_argument("--rounds", type=int, default=3, help="the medians of how many rounds")
    parser.add_argument("--codecs", action="store_true", help="compare codecs and nothing else")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        codecs = compare_codecs(people(folder), options.rounds)
        content = {"what": f"views of two synthetic people, {SIZE} x {SIZE}", "codecs": codecs}
        write("codecs", content, ("simplejpeg", "pillow", "numpy"), options.out)
        if options.codecs:
            return
        shards, pictures = make_data(folder)
        limit, ours = f"simplejpeg alone, {cores} threads", f"headsplat loader, {cores} threads"
        candidates: dict[str, Callable[[], dict[str, float]]] = {
            limit: lambda: measure(decoder_alone(pictures, cores), options.seconds),
            ours: lambda: measure(our_loader(shards, cores), options.seconds),
        }
        for peer in PEERS if options.peers else ():
            candidates[f"{peer}, {cores} workers"] = lambda peer=peer: measure_peer(
                options.peers, peer, folder, options.seconds, cores
            )
        rounds: dict[str, list[dict[str, float]]] = {candidate: [] for candidate in candidates}
        for _ in range(options.rounds):
            for candidate, run in candidates.items():
                rounds[candidate].append(run())
                print(f"{candidate:45s} {rounds[candidate][-1]}", flush=True)
        medians = {
            candidate: {key: statistics.median(found[key] for found in runs) for key in runs[0]}
            for candidate, runs in rounds.items()
        }
        started = {
            "first batch of 1,000 shards": first_batch(shards, folder),
            "resume at step 10^6 of 244 subjects x 5,000 timesteps": resume(shards, folder),
        }
    ratios: dict[str, float] = {}
    for key in ("pictures_per_second", "cpu_us_per_picture"):
        better = (lambda a, b: a / b) if key == "pictures_per_second" else (lambda a, b: b / a)
        value = {candidate: found[key] for candidate, found in medians.items()}
        peers = [v for candidate, v in value.items() if candidate not in (limit, ours)]
        ratios[f"loader / decoder by {key}"] = round(better(value[ours], value[limit]), 3)
        if peers:
            best = max(peers) if key == "pictures_per_second" else min(peers)
            ratios[f"loader / best peer by {key}"] = round(better(value[ours], best), 3)
            ratios[f"decoder / best peer by {key}: no loader can be more"] = round(
                better(value[limit], best), 3
            )
    content = {
        "what": "pictures into uint8 batches of 32, 512 x 512 JPEG",
        "bytes_a_picture": round(sum(map(len, pictures)) / len(pictures)),
        "medians": medians,
        "ratios": ratios,
        "start": started,
        "rounds": options.rounds,
        "load_average_before": round(load, 2),
    }
    print(json.dumps({"ratios": ratios, "start": started}, indent=1))
    write("loading", content, ("torch", "webdataset", "simplejpeg", "pillow", "numpy"), options.out)


if __name__ == "__main__":
    main()
