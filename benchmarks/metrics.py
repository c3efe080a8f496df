"""Pairs of 512 × 512 pictures a second: PSNR + SSIM, LPIPS and all metrics, against other packages in one run.

    python benchmarks/metrics.py [--out FOLDER] [--rounds 5] [--threads 2] [--vgg] [--pyiqa PYTHON]

The pictures are photographs that scikit-image ships, with noise. LPIPS runs on a trunk of seeded random weights, which
measures time and agreement with its package and nothing else. The actions of a comparison take turns, and the figures
are medians. With --pyiqa, the interpreter of an environment made as `benchmarks/peers/metrics-requirements.txt` says,
pyiqa measures the same pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import tempfile
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from record import arguments, medians, write
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torchmetrics.functional.image import peak_signal_noise_ratio as tm_psnr
from torchmetrics.functional.image import structural_similarity_index_measure as tm_ssim

from eval import faces
from eval.meter import Meter
from eval.metrics import (
    AKD_DLIB,
    AKD_MESH,
    AKD_MTCNN,
    CSIM_DLIB,
    LPIPS,
    LPIPS_VGG,
    PSNR,
    PSNR_MASKED,
    SSIM,
    SSIM_MASKED,
    Definition,
    Pictures,
)
from eval.perceptual import Perceptual, lpips_network
from eval.similarity import similarity, similarity_torch

HERE = Path(__file__).parent
SIDE = 512


def photographs() -> tuple[torch.Tensor, torch.Tensor]:
    """(8, 3, 512, 512) noisy predictions and targets: two photographs, each also mirrored, turned and both."""
    two = [skimage.data.astronaut(), np.ascontiguousarray(skimage.data.coffee()[-400:, :512])]
    two[1] = np.pad(two[1], ((0, 112), (0, 0), (0, 0)), "reflect")[:SIDE]
    pair = torch.stack([torch.from_numpy(picture.copy()).permute(2, 0, 1) for picture in two]).float() / 255
    target = torch.cat([pair, pair.flip(-1), pair.flip(-2), pair.flip(-1, -2)])
    noise = 0.05 * torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    return (target + noise).clamp(0, 1).mul(255).round() / 255, target


def formulas(
    x: torch.Tensor, y: torch.Tensor, rounds: int, pyiqa: str | None, threads: int
) -> dict[str, Any]:
    mine, theirs = Pictures(x), Pictures(y)
    mask = (y.mean(1, keepdim=True) > 0.2).float()
    arrays = [(a.permute(1, 2, 0).numpy(), b.permute(1, 2, 0).numpy()) for a, b in zip(x, y, strict=True)]
    found: dict[str, Any] = {}

    def torchmetrics() -> None:
        found["torchmetrics"] = (
            torch.stack([tm_psnr(a, b, data_range=1.0) for a, b in zip(x, y, strict=True)]),
            tm_ssim(x, y, data_range=1.0, reduction="none"),
        )

    def scikit() -> None:
        options = {"channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
        found["skimage"] = (
            [peak_signal_noise_ratio(b, a, data_range=1) for a, b in arrays],
            [structural_similarity(a, b, data_range=1, **options) for a, b in arrays],
        )

    seconds = medians(
        {
            "ours": lambda: found.update(ours=similarity(mine, theirs)),
            "ours_with_mask": lambda: similarity(mine, theirs, mask),
            "ours_plain_torch": lambda: similarity_torch(x, y),
            "torchmetrics": torchmetrics,
            "skimage": scikit,
        },
        rounds,
    )
    rates = {name: round(len(x) / taken, 2) for name, taken in seconds.items()}
    ours, (psnr, ssim) = found["ours"], found["torchmetrics"]
    pairs = zip(
        x.double().split(1), y.double().split(1), strict=True
    )  # singly: doubles take much memory there
    in_double = torch.cat([tm_ssim(a, b, data_range=1.0, reduction="none") for a, b in pairs])
    result: dict[str, Any] = {
        "largest_difference_to_torchmetrics": {
            "psnr_db": float((ours.psnr - psnr).abs().max()),
            "ssim": float((ours.ssim - ssim).abs().max()),
            "ssim_where_torchmetrics_computes_in_double": float((ours.ssim - in_double).abs().max()),
            "ssim_of_torchmetrics_in_float_and_in_double": float((ssim - in_double).abs().max()),
        },
        "largest_difference_to_skimage_psnr_db": float(
            (ours.psnr - torch.tensor(found["skimage"][0])).abs().max()
        ),
    }
    if pyiqa:
        with tempfile.TemporaryDirectory() as folder:
            np.savez(f"{folder}/in.npz", prediction=x.numpy(), target=y.numpy(), threads=threads)
            peer = str(HERE / "peers" / "metrics_peer.py")
            subprocess.run([pyiqa, peer, f"{folder}/in.npz", f"{folder}/out.json", "1"], check=True)
            answer = json.loads(Path(f"{folder}/out.json").read_text())
        rates["pyiqa"] = round(len(x) / answer["seconds"], 2)
        result["pyiqa_version"] = answer["version"]
    result["times_torchmetrics"] = round(rates["ours"] / rates["torchmetrics"], 1)
    return {"pairs_per_second": rates, **result}


def seeded_trunk(definition: Definition, folder: Path) -> Definition:
    """Writes a trunk of seeded random weights; the definition with its hash."""
    import torchvision.models

    torch.manual_seed(0)
    net = {"alex": torchvision.models.alexnet, "vgg": torchvision.models.vgg16}[str(definition.network)]()
    path = folder / definition.weights[0][0]
    torch.save({k: v for k, v in net.state_dict().items() if k.startswith("features.")}, path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return replace(definition, weights=((path.name, digest[:8]), *definition.weights[1:]))


def lpips(net: str, trunk: Path, x: torch.Tensor, y: torch.Tensor, rounds: int) -> dict[str, Any]:
    package = lpips_network(net, trunk, "")[0]
    network = lpips_network(net, trunk, "")[0]
    kept = Perceptual(network)
    one = Pictures(y[:1])
    same = (Pictures(x), Pictures(y))
    noisy = [(y[:1] + 0.02 * i * (x[:1] - y[:1])).clamp(0, 1) for i in range(len(x))]
    shared = Pictures(torch.cat(noisy))
    found: dict[str, Any] = {}

    @torch.no_grad()
    def peer(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return package(prediction, target, normalize=True).flatten()

    seconds = medians(
        {
            "ours": lambda: found.update(ours=Perceptual(network).distances(*same)),
            "package": lambda: found.update(package=peer(x, y)),
            "ours_shared_target": lambda: found.update(shared=Perceptual(network).distances(shared, one)),
            "package_shared_target": lambda: found.update(
                package_shared=peer(shared.tensor, y[:1].expand_as(x))
            ),
            "ours_target_seen_before": lambda: kept.distances(shared, one),
        },
        rounds,
    )
    rates = {name: round(len(x) / taken, 3) for name, taken in seconds.items()}
    differences = [
        float((torch.tensor(found[a]) - found[b]).abs().max())
        for a, b in (("ours", "package"), ("shared", "package_shared"))
    ]
    return {
        "pairs_per_second": rates,
        "largest_difference_to_package": max(differences),
        "times_package": round(rates["ours"] / rates["package"], 2),
        "times_package_with_shared_target": round(
            rates["ours_shared_target"] / rates["package_shared_target"], 2
        ),
    }


def everything(definition: Definition, x: torch.Tensor, y: torch.Tensor, rounds: int) -> dict[str, Any]:
    metrics = (PSNR, SSIM, PSNR_MASKED, SSIM_MASKED, definition, AKD_MTCNN, AKD_DLIB, AKD_MESH, CSIM_DLIB)
    some = (Pictures(x[:4]), Pictures(y[:4]), torch.ones(4, 1, SIDE, SIDE))
    detectors = (faces._mtcnn, faces._dlib, faces._mesh)

    def fresh() -> None:
        for detector in detectors:  # they remember the faces that they saw
            detector.cache_clear()
        Meter(metrics).measure(*some)

    seconds = medians({"ours": fresh}, rounds)
    return {"metrics": [metric.key for metric in metrics], "pairs_per_second": round(4 / seconds["ours"], 3)}


def main() -> None:
    parser = arguments(__doc__ or "")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each action")
    parser.add_argument("--threads", type=int, default=min(2, os.cpu_count() or 1), help="of torch")
    parser.add_argument("--vgg", action="store_true", help="LPIPS over VGG-16 as well (a minute)")
    parser.add_argument("--pyiqa", help="interpreter of pyiqa's environment, to run it too")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(options.threads)
    x, y = photographs()
    content: dict[str, Any] = {
        "what": "pairs of 512 x 512 pictures a second, medians; 8 pairs a call",
        "threads": options.threads,
        "psnr_and_ssim": formulas(x, y, options.rounds, options.pyiqa, options.threads),
    }
    print(json.dumps(content["psnr_and_ssim"]), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HEADSPLAT_WEIGHTS"] = folder
        alex = seeded_trunk(LPIPS, Path(folder))
        content["lpips_alex"] = lpips("alex", Path(folder) / alex.weights[0][0], x, y, options.rounds)
        print(json.dumps(content["lpips_alex"]), flush=True)
        if options.vgg:
            vgg = seeded_trunk(LPIPS_VGG, Path(folder))
            content["lpips_vgg"] = lpips("vgg", Path(folder) / vgg.weights[0][0], x[:4], y[:4], 1)
            print(json.dumps(content["lpips_vgg"]), flush=True)
        content["all"] = everything(alex, x, y, max(1, options.rounds // 2))
    write("metrics", content, ["torch", "torchmetrics", "scikit-image", "lpips", "dlib-bin"], options.out)


if __name__ == "__main__":
    main()
