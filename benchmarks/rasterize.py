"""How fast Gaussians are drawn on a CPU, forward and backward, against peers and the machine's floor.

    python benchmarks/rasterize.py [--out FOLDER] [--splax PYTHON] [--repeats 9] [--realtime] [--table]

Every figure is the median over repeats in one run, projection included. Run it on an otherwise idle machine, or
with --realtime, which holds other processes off the cores for the seconds in which something is measured, peers
too. With --splax, the interpreter of an environment made as `benchmarks/peers/splax_peer.py` says, splax draws the
same scenes.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, write

from avatars.cameras import Cameras
from avatars.gaussians import Gaussians, rgb_to_sh
from avatars.rasterize.build import FLAGS
from avatars.rasterize.cpu import count_work, rasterize_cpu
from avatars.rasterize.reference import rasterize_reference

HERE = Path(__file__).parent
SCENES = [(10_000, 128), (50_000, 128), (10_000, 256), (50_000, 256), (13_453, 512)]
PEER_SCENES = [(10_000, 128), (50_000, 256)]
FIELDS = ("means", "quats", "scales", "opacities", "colors")

# Vector operations a block of pixels in tiles.h besides 2^x and loads: arithmetic, comparisons and selections, each
# as one multiply-add; a division counts as four.
FORWARD_OPERATIONS, BACKWARD_OPERATIONS = 18, 40


def head(count: int, pixels: int) -> tuple[Gaussians, Cameras, torch.Tensor]:
    """An ellipsoid the size of a head, covered by Gaussians that overlap about twice, and eight cameras."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=random)

    means = torch.nn.functional.normalize(normal(count, 3), dim=-1) * torch.tensor([0.09, 0.12, 0.1])
    scales = (normal(count, 3) * 0.4).exp() * 0.16 / count**0.5
    gaussians = Gaussians(
        means,
        normal(count, 4),
        scales,
        (normal(count) + 1).sigmoid(),
        normal(count, 3).sigmoid(),
    )
    positions = torch.nn.functional.normalize(normal(8, 3) * torch.tensor([1.0, 0.3, 1.0]), dim=-1) * 0.8
    focal = 2.4 * pixels
    K = torch.tensor([[focal, 0, pixels / 2], [0, focal, pixels / 2], [0, 0, 1]])
    cameras = Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1, 0]))
    return gaussians, cameras, normal(8, 3, pixels, pixels)


@contextmanager
def undisturbed(realtime: bool) -> Iterator[None]:
    """Real-time priority for all threads of this process, then a pause in which the others catch up."""

    def schedule(policy: int, priority: int) -> None:
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), policy, os.sched_param(priority))

    if not realtime:
        yield
        return
    schedule(os.SCHED_FIFO, 1)
    try:
        yield
    finally:
        schedule(os.SCHED_OTHER, 0)
        time.sleep(2)


def step(
    draw: Callable[..., object],
    gaussians: Gaussians,
    cameras: Cameras,
    weights: torch.Tensor,
) -> tuple[float, float]:
    """Seconds of one forward and one backward."""
    leaves = Gaussians(*(getattr(gaussians, name).clone().requires_grad_() for name in FIELDS))
    size = (weights.shape[-2], weights.shape[-1])
    begin = time.perf_counter()
    image = draw(leaves, cameras, size, torch.ones(3)).image  # type: ignore[attr-defined]
    middle = time.perf_counter()
    image.backward(weights)
    return middle - begin, time.perf_counter() - middle


def median_ms(times: list[tuple[float, float]]) -> dict[str, float]:
    forward, backward = zip(*times, strict=True)
    return {
        "forward_ms": round(1e3 * statistics.median(forward), 3),
        "backward_ms": round(1e3 * statistics.median(backward), 3),
        "both_ms": round(1e3 * statistics.median(map(sum, times)), 3),
        "fastest_both_ms": round(1e3 * min(map(sum, times)), 3),
    }


def measure(
    draw: Callable[..., object],
    scene: tuple[Gaussians, Cameras, torch.Tensor],
    cameras: int,
    threads: int,
    repeats: int,
) -> dict[str, float]:
    gaussians, all_cameras, weights = scene
    torch.set_num_threads(threads)
    step(draw, gaussians, all_cameras[:cameras], weights[:cameras])
    both = [step(draw, gaussians, all_cameras[:cameras], weights[:cameras]) for _ in range(repeats)]
    alone = []
    with torch.no_grad():  # as an avatar is driven: nothing is kept for a backward
        for _ in range(repeats):
            begin = time.perf_counter()
            draw(gaussians, all_cameras[:cameras], (weights.shape[-2], weights.shape[-1]), torch.ones(3))
            alone.append(time.perf_counter() - begin)
    return median_ms(both) | {"forward_only_ms": round(1e3 * statistics.median(alone), 3)}


def splax(python: str, count: int, pixels: int, repeats: int, realtime: bool) -> dict[str, float]:
    gaussians, cameras, weights = head(count, pixels)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(
            Path(folder) / "in.npz",
            **{name: getattr(gaussians, name).numpy() for name in FIELDS[:4]},
            harmonics=rgb_to_sh(gaussians.colors)[:, None].numpy(),
            K=cameras.K[0].numpy(),
            world_to_camera=cameras.world_to_camera[0].numpy(),
            background=np.ones(3, np.float32),
            size=np.array([pixels, pixels]),
            antialiased=False,
            with_depth=False,
            repeats=repeats,
            realtime=realtime,
            weights=np.concatenate(
                [
                    weights[0].permute(1, 2, 0).numpy(),
                    np.zeros((pixels, pixels, 2), np.float32),
                ],
                axis=2,
            ),
        )
        command = [
            python,
            str(HERE / "peers" / "splax_peer.py"),
            f"{folder}/in.npz",
            f"{folder}/out.npz",
        ]
        subprocess.run(command, check=True, capture_output=True)
        made = np.load(Path(folder) / "out.npz")
    image = rasterize_cpu(gaussians, cameras[:1], (pixels, pixels), torch.ones(3)).image[0]
    return {
        "forward_ms": round(1e3 * float(np.median(made["forward_seconds"])), 2),
        "gradient_ms": round(1e3 * float(np.median(made["gradient_seconds"])), 2),
        "largest_picture_difference": float(np.abs(made["image"] - image.permute(1, 2, 0).numpy()).max()),
    }


def machine_rates() -> dict[str, float]:
    """Multiply-adds and exponentials a second and core, the best of twenty."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "rates.so"
        compiler = os.environ.get("CXX", "g++").split()
        subprocess.run([*compiler, *FLAGS, "-o", str(library), str(HERE / "rates.cpp")], check=True)
        rates = ctypes.CDLL(str(library)).headsplat_rates
        fma, exp = ctypes.c_double(), ctypes.c_double()
        best = [0.0, 0.0]
        for _ in range(20):
            rates(ctypes.byref(fma), ctypes.byref(exp))
            best = [max(best[0], fma.value), max(best[1], exp.value)]
    return {"multiply_adds": best[0], "exponentials": best[1]}


def floor_ms(pairs: int, rates: dict[str, float]) -> float:
    """One core's time for the arithmetic of so many lit (pixel, Gaussian) pairs, forward and backward."""
    operations = FORWARD_OPERATIONS + BACKWARD_OPERATIONS
    return 1e3 * pairs * (2 / rates["exponentials"] + operations / rates["multiply_adds"])


def start_up() -> dict[str, float]:
    """Seconds until a fresh process has drawn its first picture, without and with a build in the cache."""
    program = (
        "import time, torch; begin = time.perf_counter()\n"
        "from avatars.rasterize.build import load_library; load_library()\n"
        "print(time.perf_counter() - begin)"
    )
    seconds = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("first_process", "second_process"):
            begin = time.perf_counter()
            ready = subprocess.run(
                [sys.executable, "-c", program],
                env={**os.environ, "HEADSPLAT_CACHE": folder},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
            seconds[f"{name}_rasterizer_ready"] = round(float(ready), 3)
            seconds[f"{name}_in_all_with_torch"] = round(time.perf_counter() - begin, 3)
    return seconds


def memory() -> dict[str, Any]:
    """What one forward and backward adds to a fresh process at its peak, and eight cameras to that, in MiB."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path; from rasterize import head, rasterize_cpu, step\n"
        "def kib(name):\n"
        "    lines = Path('/proc/self/status').read_text().splitlines()\n"
        "    return next(int(line.split()[1]) for line in lines if line.startswith(name))\n"
        "gaussians, cameras, weights = head(50_000, 256)\n"
        "step(rasterize_cpu, gaussians[:10], cameras[:1], weights[:1])\n"
        "for count in (1, 8):\n"
        "    Path('/proc/self/clear_refs').write_text('5')  # forgets the peak\n"
        "    before = kib('VmRSS'); step(rasterize_cpu, gaussians, cameras[:count], weights[:count])\n"
        "    print((kib('VmHWM') - before) / 1024)"
    )
    command = [sys.executable, "-W", "ignore", "-c", program, str(HERE)]
    one, eight = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return {
        "what": "50,000 Gaussians at 256 x 256, gradients included",
        "cameras_1_mib": round(float(one)),
        "cameras_8_mib_more": round(float(eight)),
    }


def table(content: dict[str, Any]) -> str:
    """The Markdown table of docs/rasterizer.md."""
    lines = [
        "| Gaussians | picture | cameras | 1 thread | 2 threads | 1 thread, no gradients | lanes lit | floor | times |",
        "| ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in content["scenes"]:
        for cameras in (1, 8):
            cell = row[f"cameras_{cameras}"]
            one, two = cell["threads_1"], cell["threads_2"]
            numbers = [
                f"{row['gaussians']:,} | {row['pixels']}² | {cameras}",
                *(f"{both['forward_ms']:.1f} + {both['backward_ms']:.1f}" for both in (one, two)),
                f"{one['forward_only_ms']:.1f} | {cell['lit_share_of_lanes']:.0%}",
                f"{cell['floor_ms_1_thread']:.2f} | {cell['times_the_floor']:.1f}",
            ]
            lines.append(f"| {' | '.join(numbers)} |")
    return "\n".join(lines)


def main() -> None:
    parser = arguments(str(__doc__))
    parser.add_argument("--splax", help="interpreter of splax's own environment, to run it too")
    parser.add_argument("--repeats", type=int, default=9, help="of every measurement")
    parser.add_argument(
        "--realtime",
        action="store_true",
        help="measure at real-time priority (needs root)",
    )
    parser.add_argument(
        "--table", action="store_true", help="print the last result of two cores as Markdown instead"
    )
    options = parser.parse_args()
    if options.table:
        result = options.out / f"rasterize-{platform.machine()}-2cores.json"
        print(table(json.loads(result.read_text())))
        return
    warnings.simplefilter("ignore")
    cores = os.cpu_count() or 1
    load = [os.getloadavg()[0]]
    with undisturbed(options.realtime):
        rates = machine_rates()
    scenes = []
    for count, pixels in SCENES:
        scene = head(count, pixels)
        gaussians, cameras, weights = scene
        row: dict[str, Any] = {"gaussians": count, "pixels": pixels}
        for c in (1, 8):
            counted = count_work(gaussians, cameras[:c], (pixels, pixels))
            floor = floor_ms(counted["pixel_pairs"], rates)
            filled = counted["pixel_pairs"] / (counted["block_pairs"] * counted["vector_width"])
            with undisturbed(options.realtime):
                one = measure(rasterize_cpu, scene, c, 1, options.repeats)
                several = measure(rasterize_cpu, scene, c, cores, options.repeats)
            row[f"cameras_{c}"] = {
                "threads_1": one,
                f"threads_{cores}": several,
                "speed_up_of_threads": round(one["both_ms"] / several["both_ms"], 2),
                "work": counted,
                "lit_share_of_lanes": round(filled, 3),
                "floor_ms_1_thread": round(floor, 3),
                "times_the_floor": round(one["both_ms"] / floor, 2),
                "times_the_floor_of_full_lanes": round(one["both_ms"] / floor * filled, 2),
            }
        with undisturbed(options.realtime):
            torch.set_num_threads(cores)
            singly = [
                sum(sum(step(rasterize_cpu, gaussians, cameras[c], weights[c : c + 1])) for c in range(8))
                for _ in range(options.repeats)
            ]
        together = row["cameras_8"][f"threads_{cores}"]["both_ms"]
        row["eight_calls_ms"] = round(1e3 * statistics.median(singly), 3)
        row["eight_calls_over_one_call"] = round(1e3 * statistics.median(singly) / together, 2)
        if (count, pixels) in PEER_SCENES:
            ours = row["cameras_1"][f"threads_{cores}"]["both_ms"]
            with undisturbed(options.realtime):
                row["torch_tile_loop"] = measure(rasterize_reference, scene, 1, cores, 3)
            row["torch_tile_loop"]["times_ours"] = round(row["torch_tile_loop"]["both_ms"] / ours, 1)
            if options.splax:
                row["splax"] = splax(options.splax, count, pixels, 3, options.realtime)
                row["splax"]["times_ours"] = round(row["splax"]["gradient_ms"] / ours, 1)
        load.append(os.getloadavg()[0])
        print(json.dumps(row), flush=True)
        scenes.append(row)
    with undisturbed(options.realtime):
        start_up_seconds = start_up()
    content = {
        "what": "forward and backward of the CPU rasterizer with projection, medians in milliseconds",
        "scenes": scenes,
        "rates_per_core_and_second": rates,
        "floor": "lit (pixel, Gaussian) pairs at the measured rates, one core; no projection, sorting or memory",
        "operations_per_pair": {
            "exponentials": 2,
            "multiply_adds": FORWARD_OPERATIONS + BACKWARD_OPERATIONS,
        },
        "start_up_seconds": start_up_seconds,
        "memory_of_one_step": memory(),
        "peak_memory_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "realtime_priority": options.realtime,
        "load_average_after_each_scene": [round(value, 2) for value in load],
        "processor": processor(),
        "splax": "0.2.3" if options.splax else "not run",
    }
    write("rasterize", content, ("torch", "numpy"), options.out)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        "",
    )


if __name__ == "__main__":
    main()
