"""Speed of synthetic captures: pictures a second and core, share of time outside the renderer, Mitsuba beside it.

Run on an idle machine: `python benchmarks/synth.py [OUT.json]`. One process, one thread.
"""

from __future__ import annotations

import io
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from avatars.head import ParametricHead
from shards.synth.capture import _encode, subject_seed
from shards.synth.dome import rig
from shards.synth.expressions import random_expression
from shards.synth.render import render
from shards.synth.subject import Posed, draw_subject, pose

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


def mitsuba_seconds(posed: Posed, size: int, samples: int) -> float:
    """Wall seconds of one path-traced picture of the same triangles under a constant light (geometry only)."""
    import mitsuba as mi

    mi.set_variant("scalar_rgb")
    mesh = mi.Mesh("head", len(posed.points), len(posed.faces))
    values = mi.traverse(mesh)
    values["vertex_positions"] = posed.points.ravel()
    values["faces"] = posed.faces.astype(np.uint32).ravel()
    values.update()
    scene = mi.load_dict(
        {
            "type": "scene", "integrator": {"type": "path", "max_depth": 3}, "emitter": {"type": "constant"},
            "shape": mesh,
            "sensor": {
                "type": "perspective", "fov": 16.5, "sampler": {"type": "independent", "sample_count": samples},
                "to_world": mi.ScalarTransform4f().look_at([0, 0, 1.1], [0, 0, 0], [0, 1, 0]),
                "film": {"type": "hdrfilm", "width": size, "height": size},
            },
        }
    )  # fmt: skip
    mi.render(scene, spp=1)
    start = time.perf_counter()
    np.array(mi.render(scene, spp=samples))
    return time.perf_counter() - start


def main(out: Path) -> None:
    """Measure, print and write."""
    torch.set_num_threads(1)
    head, cameras = ParametricHead.load(), rig("dome", 1, 128)
    posed = pose(head, draw_subject(head, 0), np.zeros(52, np.float32), np.eye(4))
    render(posed, cameras.K[0], cameras.world_to_camera[0], 128)  # compiled before anything is timed
    identity, expression = torch.zeros(1, head.n_identity), torch.zeros(1, 52)
    head.vertices(identity, expression)
    head_seconds = cpu_seconds(lambda: [head.vertices(identity, expression) for _ in range(200)])[0] / 200
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    model = next((line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.machine())  # fmt: skip
    report = {
        "what": "synthetic captures",
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit,
        "hardware": {"cpu": model, "cores": os.cpu_count(), "load_before": round(os.getloadavg()[0], 2)},
        "versions": {name: version(name) for name in ("numpy", "numba", "torch", "mitsuba")},
        "head_vertices_milliseconds": round(1e3 * head_seconds, 3),
        "sizes": {str(size): measure(size) for size in (128, 512)},
        "mitsuba_path_128_16spp_wall_seconds_all_cores": round(mitsuba_seconds(posed, 128, 16), 4),
    }
    fast = report["sizes"]["128"]
    report["demo_set_core_seconds"] = round(3200 / fast["pictures_per_core_second"], 1)
    report["gasp_population_1000x50_512_core_hours"] = round(
        50_000 * (report["sizes"]["512"]["render_seconds"] + report["sizes"]["512"]["write_seconds"]) / 3600
        + 1000 * (fast["subject_seconds"] + fast["pose_seconds"]) / 3600, 2,
    )  # fmt: skip
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    default = Path(__file__).parent / "results" / f"synth-{platform.machine()}-{os.cpu_count()}cores.json"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
