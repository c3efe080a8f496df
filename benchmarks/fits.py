"""FlashAvatar fits: how many an hour, how well two share a machine, how fast an avatar is driven, and how good it is.

    python benchmarks/fits.py [--out FOLDER] [--steps 100]      speed, about three minutes on two cores
    python benchmarks/fits.py --quality [--part 1.0]            quality, about a quarter of an hour of one core

Both work on synthetic people that are made first. `--quality` fits views, a video and three densities with the recipe
for many pictures and measures views and expressions that were held out; `--part 0.1` takes a tenth of the steps,
`--workers 2` makes two fits at a time, and `--sheet FILE` draws what was measured.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import arguments, write

from avatars.method import render
from cluster.pool import Job, run_jobs
from cluster.session import ray_session
from shards import read_capture
from shards.synth import synthesize
from train.fits import RECIPES, FitPictures, FitSource
from train.fits.flashavatar import FlashAvatarFitConfig
from train.fits.heldout import measure_held_out, off_axis_degrees
from train.fits.pictures import from_capture

SIZE = 128
PEOPLE = (2, 4)  # a bald one and one with hair
TIMESTEPS = 12
VIEWS = 40
HELD_VIEWS = 16
VIDEO_FRAMES, VIDEO_VIEWS = 40, 24  # a smooth sequence; all cameras but one are only measured from
WARM_UP = 50
ON_AXIS, OFF_AXIS = 30.0, 60.0  # degrees from straight before the face
DENSITIES = (64, 128, 256)
MEASURED_OF_FIT = (
    32  # pictures of the fit itself that are measured, to tell what it cannot draw from what it overfits
)
SHOWN = (0, 0.3, 0.5, 0.7, 0.9)  # of the held-out pictures, ordered by their angle to the face's axis


def device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def recipe(part: float = 1.0) -> FlashAvatarFitConfig:
    config: Any = RECIPES["flashavatar-gpu-many" if device() == "cuda" else "flashavatar-cpu-many"]()
    return replace(config, steps=max(1, round(config.steps * part)))


def wait() -> None:
    if device() == "cuda":
        torch.cuda.synchronize()


def step_rate(pictures: FitPictures, config: FlashAvatarFitConfig, steps: int) -> float:
    """Seconds a step, the median of single ones."""
    fit = config.build(pictures, device())
    times = []
    for step in range(steps + 5):
        started = time.perf_counter()
        fit.advance()
        wait()
        if step >= 5:
            times.append(time.perf_counter() - started)
    return statistics.median(times)


def stepping(job: dict[str, Any], report: Any) -> float:
    """A Ray job: seconds a step on one core."""
    return step_rate(job["pictures"], job["config"], job["steps"])


def plain_stepping(pictures: FitPictures, config: FlashAvatarFitConfig, steps: int) -> float:
    torch.set_num_threads(1)
    return step_rate(pictures, config, steps)


def slots(pictures: FitPictures, steps: int) -> dict[str, float]:
    """Two Ray slots against one, beside two plain processes against one: what the machine's cores share (memory
    bandwidth, clock, other load) is in both ratios, and Ray's own cost is in their quotient.
    """
    config = recipe()
    steps *= 4  # the two actors start some moments apart, which must not count
    jobs = [Job(str(number), {"pictures": pictures, "config": config, "steps": steps}) for number in range(2)]
    with ray_session(2):
        one = run_jobs(stepping, jobs[:1], slots=1)[0].value
        two = statistics.mean(outcome.value for outcome in run_jobs(stepping, jobs, slots=2))
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        plain_one = pool.submit(plain_stepping, pictures, config, steps).result()
        both = [pool.submit(plain_stepping, pictures, config, steps) for _ in range(2)]
        plain_two = statistics.mean(future.result() for future in both)
    return {
        "ray_one_step_ms": round(1e3 * one, 2),
        "ray_two_step_ms": round(1e3 * two, 2),
        "plain_one_step_ms": round(1e3 * plain_one, 2),
        "plain_two_step_ms": round(1e3 * plain_two, 2),
        "two_slots_share_of_ideal": round(one / two, 3),
        "two_processes_share_of_ideal": round(plain_one / plain_two, 3),
        "two_slots_share_without_contention": round(one / two / (plain_one / plain_two), 3),
    }


@torch.no_grad()
def driving(avatar: Any, pictures: FitPictures, zoom: float, size: int, frames: int) -> dict[str, float]:
    """Pictures a second with network, head and rasterizer; each frame has an expression of its own and stays where it
    was drawn. The device is waited for once, after the last frame.
    """
    camera = pictures.cameras[0].resize(zoom, zoom).to(device=device())
    codes = torch.rand(WARM_UP + frames, pictures.expressions.shape[1], device=device())
    for code in codes[:WARM_UP]:
        render(avatar, code, camera, (size, size))
    wait()
    started = time.perf_counter()
    for code in codes[WARM_UP:]:
        render(avatar, code, camera, (size, size))
    wait()
    seconds = time.perf_counter() - started
    return {"gaussians": len(avatar.samples), "frames_per_second": round(frames / seconds, 1)}


def at_density(config: FlashAvatarFitConfig, resolution: int) -> FlashAvatarFitConfig:
    return replace(config, model=replace(config.model, uv_resolution=resolution))


def whole_fit(pictures: FitPictures, name: str, steps: int) -> dict[str, Any]:
    """What a whole fit by a recipe takes: its building, measured once, and all of its steps at the median's pace."""
    config: Any = RECIPES[name]()
    started = time.perf_counter()
    config.build(pictures, device())
    wait()
    building = time.perf_counter() - started
    step = step_rate(pictures, config, steps)
    seconds = building + step * config.steps
    return {
        "step_ms": round(1e3 * step, 2),
        "build_seconds": round(building, 2),
        "steps": config.steps,
        "fit_seconds": round(seconds, 1),
        "fits_an_hour": round(3600 / seconds, 2),
        "of": "one core" if device() == "cpu" else "one GPU",
    }


def speed(folder: Path, steps: int, frames: int) -> dict[str, Any]:
    capture = synthesize(folder, subjects=[PEOPLE[0]], timesteps=4, views=24, size=SIZE, progress=False)[0]
    pictures, _ = from_capture(read_capture(capture), FitSource("views", views=16))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    fits = {name: whole_fit(pictures, name, steps) for name in ("flashavatar-cpu", "flashavatar-cpu-many")}
    config = recipe()
    avatars = {uv: at_density(config, uv).build(pictures, device()).avatar() for uv in DENSITIES}
    content: dict[str, Any] = {
        "what": f"FlashAvatar on pictures of {SIZE} pixels, one thread; driving with {WARM_UP} warm-up and {frames} "
        "timed frames, network, head and rasterizer included",
        "fits": fits,
        "driving": {
            f"uv{uv}_{size}px": driving(avatar, pictures, size / SIZE, size, frames)
            for uv, avatar in avatars.items()
            for size in (SIZE, 512)
        },
        "slots": slots(pictures, steps),
    }
    torch.set_num_threads(threads)
    return content


def fitted(job: dict[str, Any]) -> dict[str, Any]:
    """One fit of the quality table, measured on what was held out of the views."""
    torch.set_num_threads(1)
    capture = read_capture(job["capture"])
    _, held = from_capture(capture, replace(job["source"], pictures="views"))
    pictures, same_camera = from_capture(capture, job["source"])
    assert held is not None
    assert same_camera is not None
    started = time.perf_counter()
    fit = job["config"].build(pictures, device())
    while fit.step < job["config"].steps:
        fit.advance()
    wait()
    seconds = time.perf_counter() - started
    avatar = fit.avatar()
    means, each = measure_held_out(avatar, held, device())
    angles = off_axis_degrees(held)

    def mean(keep: Any) -> float | None:
        values = [one["psnr"] for one, angle in zip(each, angles, strict=True) if keep(angle)]
        numbers = [value for value in values if value is not None]
        return round(statistics.mean(numbers), 2) if numbers else None

    fitted_to, _ = measure_held_out(avatar, pictures.spread(MEASURED_OF_FIT), device())
    result = {
        "name": job["name"],
        "subject": capture.subject,
        "pictures": len(pictures),
        "expressions": len(fit.codes),
        "gaussians": len(fit.model.samples),
        "fit_seconds": round(seconds, 1),
        "held_out": means,
        "psnr_on_axis": mean(lambda angle: angle <= ON_AXIS),
        "psnr_off_axis": mean(lambda angle: angle >= OFF_AXIS),
        "psnr_fitted": round(fitted_to["psnr"], 2),
    }
    if job["source"].pictures == "video":
        result["psnr_same_camera"] = round(measure_held_out(avatar, same_camera, device())[0]["psnr"], 2)
    return result | ({"drawn": drawn(avatar, held)} if job["draw"] else {})


@torch.no_grad()
def drawn(avatar: Any, held: FitPictures) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Pictures of an avatar and the true ones, (3, H, W) each, from before the face to behind the head."""
    angles = off_axis_degrees(held)
    order = sorted(range(len(held)), key=lambda picture: angles[picture])
    found = []
    for share in SHOWN:
        picture = order[round(share * (len(order) - 1))]
        image, _ = held.take([picture])
        camera = held.cameras[picture].to(device=device())
        expression = held.expressions[picture].to(device())
        found.append((render(avatar, expression, camera, held.size).image[0].cpu(), image[0]))
    return found


def write_sheet(rows: list[dict[str, Any]], path: Path) -> None:
    """The pictures of the rows: for each the true ones above, the avatar's below."""
    strips = [
        torch.cat([torch.stack(side) for side in zip(*row["drawn"], strict=True)][::-1], 2) for row in rows
    ]  # (columns, 3, 2 H, W)
    sheet = torch.cat([torch.cat(list(strip), 2) for strip in strips], 1)
    pixels = (sheet.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
    Image.fromarray(pixels).save(path, quality=88)
    print(path)


def quality(folder: Path, part: float, workers: int, sheet: Path | None) -> dict[str, Any]:
    captures = synthesize(
        folder / "views", subjects=PEOPLE, timesteps=TIMESTEPS, views=80, size=SIZE, progress=False
    )
    videos = synthesize(
        folder / "videos",
        subjects=PEOPLE,
        timesteps=VIDEO_FRAMES,
        views=VIDEO_VIEWS,
        size=SIZE,
        motion="smooth",
        progress=False,
    )
    views = FitSource("views", views=VIEWS, held_views=HELD_VIEWS, held_timesteps=0.25)
    config = recipe(part)
    jobs = [
        {"name": f"{VIEWS} views, {uv}²", "source": views, "uv": uv, "capture": capture}
        for uv in DENSITIES
        for capture in (captures if uv == 128 else captures[:1])
    ]
    jobs += [
        {"name": "one camera, 128²", "source": replace(views, pictures="video"), "uv": 128, "capture": video}
        for video in videos
    ]
    for job in jobs:
        job |= {
            "config": at_density(config, job.pop("uv")),
            "capture": str(job["capture"]),
            "draw": sheet is not None,
        }
    measured = []
    print(
        f"{'fit':18} {'person':7} {'pictures':>8} {'PSNR':>6} {'SSIM':>6} {'on axis':>8} {'off axis':>8} {'s':>6}"
    )
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        for row in pool.map(fitted, jobs):
            held = row["held_out"]
            print(
                f"{row['name']:18} {row['subject']:7} {row['pictures']:8} {held['psnr']:6.2f} {held['ssim']:6.3f} "
                f"{row['psnr_on_axis'] or 0:8.2f} {row['psnr_off_axis'] or 0:8.2f} {row['fit_seconds']:6.0f}",
                flush=True,
            )
            measured.append(row)
    if sheet is not None:
        write_sheet([row for row in measured if "128²" in row["name"]], sheet)
    return {
        "what": f"held-out views ({HELD_VIEWS}) and expressions (the last quarter of {TIMESTEPS}, of a video of "
        f"{VIDEO_FRAMES}) of synthetic people, {SIZE} px, over black; on axis up to {ON_AXIS:g} degrees, off axis from "
        f"{OFF_AXIS:g}",
        "recipe": asdict(config),
        "part": part,
        "fits": [{name: value for name, value in row.items() if name != "drawn"} for row in measured],
    }


def main() -> None:
    """Makes people, measures, writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--quality", action="store_true", help="measure quality instead of speed")
    parser.add_argument("--part", type=float, default=1.0, help="share of the recipe's steps, for --quality")
    parser.add_argument("--workers", type=int, default=1, help="fits at a time, for --quality")
    parser.add_argument("--sheet", type=Path, help="JPEG of the pictures that were measured, for --quality")
    parser.add_argument("--steps", type=int, default=100, help="steps that are timed")
    parser.add_argument("--frames", type=int, default=500, help="driven frames that are timed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.quality:
            found = quality(Path(folder), options.part, options.workers, options.sheet)
            write("fits-quality", found, ("torch", "gsplat"), options.out)
        else:
            write(
                "fits",
                speed(Path(folder), options.steps, options.frames),
                ("torch", "gsplat", "ray"),
                options.out,
            )


if __name__ == "__main__":
    main()
