"""What storing features in few bits or few channels does to a trained model's PSNR, on synthetic captures.

    python benchmarks/prior_storage.py [--out FOLDER] [--steps 400] [--subjects 8]

The features are no network's: they are a synthetic semantic map that carries information which pictures do not show
plainly, 64 Fourier features of the place on the head that a pixel shows (true depth, head frame), averaged over cells
of 4 x 4 pixels, zero where there is no head. The model is `avat3r-tiny` without position prior, so that it has to learn
from pictures and features where things are. Every way of storing sees the same examples, and starts from the same
weights where it has as many channels; PSNR is of held-out people, all pixels on black. Differences below those between
two seeds of the fp16 row mean nothing.
"""

from __future__ import annotations

import math
import statistics
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from record import arguments, write
from torch import Tensor
from torch.nn import functional as F

from avatars.cameras import Cameras
from avatars.inputs import InputSet
from avatars.priors.reduction import Reduction, ReductionFit
from avatars.rasterize import rasterize
from launch.recipes import find_recipe
from shards import (
    BatchLoader,
    Manifest,
    PriorMaps,
    PriorSettings,
    input_sets,
    pack,
    read_capture,
    write_with_priors,
)
from train.tasks.avat3r import Avat3rTask, views_from_batch

SIZE, CELL, CHANNELS = 48, 4, 64


@dataclass(frozen=True)
class Way:
    """One way of storing features."""

    name: str
    storage: str = "fp16"
    channels: int = CHANNELS
    how: str = "all"
    """"all", "pca", "leading" or "none"."""
    seed: int = 0


WAYS = (
    Way("fp16, 64 channels"),
    Way("int8, 64 channels", storage="int8"),
    Way("fp16, 16 principal components", channels=16, how="pca"),
    Way("int8, 16 principal components", storage="int8", channels=16, how="pca"),
    Way("fp16, first 16 channels", channels=16, how="leading"),
    Way("none", channels=0, how="none"),
    Way("fp16, 64 channels, seed 1", seed=1),
)


def semantic_map(inputs: InputSet) -> Tensor:
    """Fourier features (N, 64, h, w) of the true places that the pictures show."""
    assert inputs.positions is not None
    drawn = torch.Generator().manual_seed(0)
    frequencies = torch.randn(CHANNELS // 2, 3, generator=drawn) * 25  # per metre: waves of a few centimetres
    phase = torch.einsum("kd,ndhw->nkhw", frequencies, inputs.positions)
    waves = torch.cat([phase.sin(), phase.cos()], 1) * (inputs.masks > 0.5)
    return F.avg_pool2d(waves, CELL)


def make_shards(folder: Path, subjects: int) -> Path:
    """Synthetic people packed with true depth."""
    from shards.synth import synthesize

    captures = synthesize(
        folder / "captures", subjects=subjects, timesteps=6, views=16, size=96, progress=False
    )
    pack(
        [read_capture(path) for path in captures],
        folder / "shards",
        size=SIZE,
        heldout=2,
        input_sets=2,
        prior="depth",
    )
    return folder / "shards"


def stored(folder: Path, shards: Path, way: Way, reduction: Reduction | None) -> Path:
    """Shards with the features stored one way."""
    if way.how == "none":
        return shards

    def compute(inputs: InputSet) -> PriorMaps:
        features = semantic_map(inputs)
        if reduction is not None:
            features = reduction(features)
        return PriorMaps(features=features[:, : way.channels])

    out = folder / way.name.replace(" ", "-").replace(",", "")
    settings = PriorSettings("depth", f"semantic-{way.how}", way.channels, way.storage)  # type: ignore[arg-type]
    write_with_priors(shards, out, compute, settings)
    return out


def train_and_measure(folder: Path, way: Way, steps: int) -> float:
    """PSNR of held-out people after training with these shards."""
    recipe = find_recipe("avat3r-tiny")
    model_config = replace(recipe.model, position_prior=False, position_skip=False, feature_dim=way.channels)
    task = Avat3rTask(replace(recipe, model=model_config))
    torch.manual_seed(way.seed)
    module = task.build()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
    with BatchLoader(folder, "train", seed=way.seed, micro_batch=1, views=4, threads=1) as loader:
        for step, batch in zip(range(steps), loader, strict=False):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 * min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
            loss, _ = module(batch | {"progress": 0.0})
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
    return heldout_psnr(module, folder)


@torch.no_grad()
def heldout_psnr(module: torch.nn.Module, folder: Path, examples: int = 16) -> float:
    """Mean over pictures."""
    network, found = module.get_submodule("model").eval(), []
    with BatchLoader(folder, "heldout", seed=0, micro_batch=1, views=8, threads=1) as loader:
        for _, batch in zip(range(examples), loader, strict=False):
            maps = network(views_from_batch(batch), batch["expression"])
            cameras = Cameras(batch["target_K"][0], batch["target_world_to_camera"][0])
            pictures = rasterize(maps.gaussians(0), cameras, (SIZE, SIZE)).image.clamp(0, 1)
            errors = (pictures - batch["target_images"][0]).square().mean((1, 2, 3))
            found += (-10 * errors.log10()).tolist()
    return statistics.mean(found)


def main() -> None:
    """Makes people and shards, trains once a way, writes the table."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--steps", type=int, default=400, help="training steps of each way")
    parser.add_argument("--subjects", type=int, default=8, help="synthetic people, two of them held out")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shards = make_shards(folder, options.subjects)
        manifest = Manifest.load(shards)
        fit = ReductionFit(CHANNELS)
        for shard in manifest.split("train"):
            for inputs in input_sets(manifest, shard):
                fit.add(semantic_map(inputs))
        for way in WAYS:
            reduction = fit.result(way.channels) if way.how == "pca" else None
            made = stored(folder, shards, way, reduction)
            error = Manifest.load(made).prior_error.features_rms
            row = {
                "way": way.name,
                "bytes_per_picture": way.channels * (SIZE // CELL) ** 2 * (1 if way.storage == "int8" else 2),
                "stored_features_rms_error": None if error is None else float(f"{error:.3g}"),
                "variance_kept": None if reduction is None else round(reduction.kept, 4),
                "heldout_psnr_db": round(train_and_measure(made, way, options.steps), 3),
            }
            rows.append(row)
            print(row, flush=True)
    content = {
        "what": "PSNR of avat3r-tiny without position prior by how 64 synthetic semantic channels are stored",
        "steps": options.steps,
        "subjects": options.subjects,
        "rows": rows,
    }
    write("prior_storage", content, ("torch",), options.out)


if __name__ == "__main__":
    main()
