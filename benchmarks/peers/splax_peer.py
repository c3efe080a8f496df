"""splax on a CPU: the independent rasterizer that ours is compared with, in an environment of its own.

splax 0.2.3 (MIT) is JAX and Warp for NVIDIA devices; with two switches it also runs on a CPU. It must not
share an environment with this project:

    python -m venv ENV
    ENV/bin/pip install jax jaxlib warp-lang imageio plyfile numpy
    ENV/bin/pip install --no-deps splax==0.2.3
    ENV/bin/python benchmarks/peers/splax_peer.py IN.npz OUT.npz

IN.npz holds means, quats, scales, opacities, harmonics (N, K, 3), K (3, 3), world_to_camera, background,
size, antialiased, with_depth, repeats, realtime, and the weights (H, W, 5) of image, depth and alpha in the
scalar that is differentiated.
OUT.npz gets image (H, W, 3), depth, alpha, v_<field> for the activated fields, and seconds of each repeat.
"""

import os
import sys
import time
from pathlib import Path

import jax
import numpy as np
import warp

warp.config.enable_cpu_blocks = True  # without it the picture is wrong
warp.config.quiet = True
warp.JaxCallableGraphMode = type(
    "GraphMode",
    (),
    dict.fromkeys(("WARP", "NONE", "JAX"), warp.JaxCallableGraphMode.NONE),
)

import jax.numpy as jnp  # noqa: E402
import splax  # noqa: E402


def main() -> None:
    given = dict(np.load(sys.argv[1]))
    height, width = (int(v) for v in given["size"])
    K = given["K"]
    fixed = {
        "viewmat": jnp.asarray(given["world_to_camera"]),
        "background": jnp.asarray(given["background"]),
        "img_shape": (height, width),
        "f": (float(K[0, 0]), float(K[1, 1])),
        "c": (float(K[0, 2]), float(K[1, 2])),
        "antialiased": bool(given["antialiased"]),
        "render_depth": bool(given["with_depth"]),
    }
    scales, opacities = given["scales"], given["opacities"]
    parameters = tuple(
        jnp.asarray(a)
        for a in (
            given["means"],
            np.log(scales),
            given["quats"],
            given["harmonics"],
            np.log(opacities) - np.log1p(-opacities),
        )
    )
    weights = jnp.asarray(given["weights"])
    channels = 4 if fixed["render_depth"] else 3

    def picture(*p):
        return splax.render(*p, **fixed)

    def scalar(*p):
        image, alpha = picture(*p)
        return (image * weights[..., :channels]).sum() + (alpha * weights[..., 4]).sum()

    forward = jax.jit(picture)
    gradient = jax.jit(jax.grad(scalar, argnums=tuple(range(5))))
    image, alpha = jax.block_until_ready(forward(*parameters))
    v = [np.asarray(g) for g in jax.block_until_ready(gradient(*parameters))]
    times: dict[str, list[float]] = {"forward_seconds": [], "gradient_seconds": []}
    if given.get("realtime"):  # see benchmarks/rasterize.py
        for thread in Path("/proc/self/task").iterdir():
            os.sched_setscheduler(int(thread.name), os.SCHED_FIFO, os.sched_param(1))
    for _ in range(int(given["repeats"])):
        for name, function in (
            ("forward_seconds", forward),
            ("gradient_seconds", gradient),
        ):
            begin = time.perf_counter()
            jax.block_until_ready(function(*parameters))
            times[name].append(time.perf_counter() - begin)
    image = np.asarray(image)
    np.savez_compressed(
        sys.argv[2],
        image=image[..., :3],
        depth=image[..., 3] if channels == 4 else np.zeros(0),
        alpha=np.asarray(alpha),
        v_means=v[0],
        v_scales=v[1] / scales,
        v_quats=v[2],
        v_harmonics=v[3],
        v_opacities=v[4] / (opacities * (1 - opacities)),
        **{name: np.array(values) for name, values in times.items()},
    )


if __name__ == "__main__":
    main()
