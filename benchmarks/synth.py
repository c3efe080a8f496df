"""Speed of synthetic captures: pictures a second and core, share of time outside the renderer, path tracing beside it.

Run on an idle machine: `python benchmarks/synth.py [--out FOLDER]`, about two minutes. One process and one thread,
except for path tracing, which is measured one picture at a time and two at a time, both on all cores, in alternating
rounds.
"""

from __future__ import annotations

import io
import json
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, write

from avatars.head import ParametricHead
from avatars.head.model import cache_path
from shards.synth.capture import _encode, subject_seed
from shards.synth.dome import rig
from shards.synth.expressions import random_expression
from shards.synth.render import render
from shards.synth.subject import draw_subject, pose

SUBJECTS, VIEWS = 8, 10


def cpu_seconds(action: Callable[[], object]) -> tuple[float, object]:
    """Processor time of this process, which other load on the machine disturbs less than the wall clock."""
    start = time.process_time()
    result = action()
    return time.process_time() - start, result


def measure(size: int) -> dict[str, float]:
    """Mean costs at one picture size over people of all hair styles, as in a capture of 5 timesteps × 80 views."""
    from PIL import Image

    head, cameras = ParametricHead.load(), rig("dome", 80, size)
    spent = dict.fromkeys(("subject", "pose", "render", "write"), 0.0)
    for number in range(SUBJECTS):
        seconds, subject = cpu_seconds(lambda number=number: draw_subject(head, subject_seed(0, number)))
        spent["subject"] += seconds / SUBJECTS
        expression = random_expression(np.random.default_rng(number))
        seconds, posed = cpu_seconds(lambda s=subject, e=expression: pose(head, s, e, np.eye(4)))
        spent["pose"] += seconds / SUBJECTS
        for k in range(VIEWS):
            seconds, picture = cpu_seconds(
                lambda p=posed, k=k: render(p, cameras.K[k], cameras.world_to_camera[k], size)
            )
            spent["render"] += seconds / SUBJECTS / VIEWS
            seconds, _ = cpu_seconds(
                lambda p=picture: [
                    Image.fromarray(pixels).save(io.BytesIO(), "PNG", compress_level=1)
                    for pixels in _encode(p).values()
                ]
            )
            spent["write"] += seconds / SUBJECTS / VIEWS
    outside = spent["subject"] / 400 + spent["write"]
    total = spent["subject"] / 400 + spent["pose"] / 80 + spent["render"] + spent["write"]
    return {
        **{f"{name}_seconds": round(value, 5) for name, value in spent.items()},
        "pictures_per_core_second": round(1 / total, 2),
        "share_outside_renderer": round(outside / total, 4),  # drawing the person and writing files
    }


def path_tracing(size: int = 128, samples: int = 64, pictures: int = 4, rounds: int = 3) -> dict[str, object]:
    """Seconds a path-traced picture, one at a time and two in flight, by wall clock and by processor."""
    import drjit

    from shards.synth.traced import TracedPerson

    head, cameras = ParametricHead.load(), rig("dome", 80, size)
    subject = draw_subject(head, subject_seed(0, 0))
    person = TracedPerson(pose(head, subject, np.zeros(52, np.float32), np.eye(4)), subject.light, np.eye(4))

    def picture(k: int) -> object:
        return person.render(cameras.K[k], cameras.world_to_camera[k], size, samples=samples, seed=k)

    picture(0)
    wall: dict[int, list[float]] = {1: [], 2: []}
    processor: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(rounds):
        for in_flight in (1, 2):
            start, before = time.perf_counter(), time.process_time()
            with ThreadPoolExecutor(in_flight) as pool:
                list(pool.map(picture, range(pictures)))
            wall[in_flight].append((time.perf_counter() - start) / pictures)
            processor[in_flight].append((time.process_time() - before) / pictures)
    return {
        "size": size,
        "samples": samples,
        "threads": drjit.thread_count(),
        **{f"{n}_in_flight_wall_seconds": round(float(np.median(wall[n])), 4) for n in (1, 2)},
        **{f"{n}_in_flight_processor_seconds": round(float(np.median(processor[n])), 4) for n in (1, 2)},
    }


def captures_seconds(costs: dict[str, float], *, subjects: int, timesteps: int, views: int) -> float:
    """Core seconds of a set of captures, from the mean costs of its parts."""
    picture = costs["render_seconds"] + costs["write_seconds"]
    return subjects * (costs["subject_seconds"] + timesteps * (costs["pose_seconds"] + views * picture))


def main(out: Path) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    head, cameras = ParametricHead.load(), rig("dome", 1, 128)
    posed = pose(head, draw_subject(head, 0), np.zeros(52, np.float32), np.eye(4))
    render(posed, cameras.K[0], cameras.world_to_camera[0], 128)  # compiled before anything is timed
    identity, expression = torch.zeros(1, head.n_identity), torch.zeros(1, 52)
    head.vertices(identity, expression)
    head_seconds = cpu_seconds(lambda: [head.vertices(identity, expression) for _ in range(200)])[0] / 200
    load = round(os.getloadavg()[0], 2)
    report: dict[str, Any] = {
        "what": "synthetic captures",
        "load_average_before": load,
        "head_vertices_milliseconds": round(1e3 * head_seconds, 3),
        "head_cache_megabytes": round(cache_path().stat().st_size / 1e6, 2),
        "basis_of_100_error_millimetres": {
            name: round(1e3 * float(value), 3)
            for name, value in zip(("mean", "p99"), head.arrays["reconstruction_error"], strict=True)
        },
        "sizes": {str(size): measure(size) for size in (128, 512)},
        "path_traced": path_tracing(),
    }
    report["demo_set_core_seconds"] = round(
        captures_seconds(report["sizes"]["128"], subjects=8, timesteps=6, views=80), 1
    )
    # 50 pictures a person: ten expressions, each from five cameras.
    for size in ("128", "512"):
        seconds = captures_seconds(report["sizes"][size], subjects=1000, timesteps=10, views=5)
        report[f"gasp_population_1000x50_{size}"] = {
            "core_hours": round(seconds / 3600, 2),
            "share_outside_renderer": round(
                captures_seconds(
                    report["sizes"][size] | {"pose_seconds": 0, "render_seconds": 0},
                    subjects=1000,
                    timesteps=10,
                    views=5,
                )
                / seconds,
                3,
            ),
            "hours_on_1_node_of_32_cores": round(seconds / 3600 / 32, 3),
            # 1,000 people on 2,048 cores: a person is one job of one core, so each of them is done at once
            "seconds_on_64_nodes_of_32_cores": round(seconds / 1000, 1),
        }
    print(json.dumps(report, indent=1))
    write("synth", report, ("numpy", "numba", "torch", "mitsuba"), out)


if __name__ == "__main__":
    main(arguments(str(__doc__)).parse_args().out)
