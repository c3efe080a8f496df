"""Writes splax.npz: a small scene with the picture and gradients of an independent rasterizer.

    python tests/golden/make_splax.py PYTHON_OF_SPLAX

See benchmarks/peers/splax_peer.py for how to make that environment.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).parent
PEER = HERE.parent.parent / "benchmarks" / "peers" / "splax_peer.py"


def main() -> None:
    rng = np.random.default_rng(11)
    count, size = 160, (40, 52)
    means = rng.normal(size=(count, 3))
    means *= np.array([0.09, 0.12, 0.1]) / np.linalg.norm(means, axis=1, keepdims=True)
    position, down = np.array([0.15, 0.1, 0.5]), np.array([0.0, -1.0, 0.0])
    forward = -position / np.linalg.norm(position)
    right = np.cross(down, forward)
    right /= np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = [right, np.cross(forward, right), forward]
    pose[:3, 3] = -pose[:3, :3] @ position
    scene = {
        "means": means,
        "quats": rng.normal(size=(count, 4)),
        "scales": np.exp(rng.normal(size=(count, 3)) * 0.6) * 0.008,
        "opacities": rng.uniform(0.05, 0.99, count),
        "harmonics": rng.normal(size=(count, 4, 3)) * 0.5,
        "K": np.array([[75.0, 0, 25.2], [0, 80.0, 21.1], [0, 0, 1]]),
        "world_to_camera": pose,
        "background": np.array([0.2, 0.5, 0.9]),
        "weights": rng.normal(size=(*size, 5)),
    }
    golden = {name: value.astype(np.float32) for name, value in scene.items()}
    golden["size"] = np.array(size)
    for mode, antialiased in (("classic", False), ("antialiased", True)):
        with tempfile.TemporaryDirectory() as folder:
            given, made = Path(folder) / "in.npz", Path(folder) / "out.npz"
            np.savez(given, **golden, antialiased=antialiased, with_depth=True, repeats=0)
            subprocess.run([sys.argv[1], str(PEER), str(given), str(made)], check=True)
            results = np.load(made)
            golden |= {f"{mode}_{name}": results[name] for name in results.files if "seconds" not in name}
    np.savez_compressed(HERE / "splax.npz", **golden)


if __name__ == "__main__":
    main()
