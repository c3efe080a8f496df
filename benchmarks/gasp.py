"""GASP: how fast the prior learns, how long a fit takes and how fast its avatars are; and how good they are.

    python benchmarks/gasp.py [--out FOLDER]                      speed, about two minutes on two cores
    python benchmarks/gasp.py --quality [--population CAPTURES]   quality, about half an hour of one core
    python benchmarks/gasp.py --quality --people 2 --steps 100    the same in some minutes, to see it run

`--quality` trains priors of 1, 8, 32 and 64 synthetic people with the recipe `gasp-prior-cpu`, fits people that none of
them has seen from a single picture, and measures views and expressions that the fit has not seen. The unseen people
come twice: from the population's own renderer, and path-traced with other light before other cameras. It goes on where
it was stopped: what is done is kept in `--work`.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from record import RESULTS, arguments, write
from torch import Tensor

from avatars.cameras import Cameras
from avatars.gasp import ATTRIBUTES, GaspAvatar, GaspConfig, GaspPrior
from avatars.gasp.config import small_model
from avatars.head import ParametricHead
from avatars.method import load_avatar, render
from avatars.rasterize import rasterize
from launch.recipes import find_recipe
from shards import Manifest, open_shards, pack, read_capture
from shards.synth import synthesize
from train.fits import RECIPES, FitPictures, FitSource
from train.fits.gasp import GaspFitConfig
from train.fits.heldout import measure_held_out
from train.fits.pictures import from_shards
from train.tasks.gasp import GaspTask

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
SIZE = 64
PRIORS = (1, 8, 32, 64)
POPULATION = 100  # seed of the prior's people
OTHERS = 9  # seed of those before the other renderer
UNSEEN = 4  # people of each renderer that are there to be fitted; a path-traced one takes a minute
FIT_SHARE = 0.5  # of the recipe's steps
SETTINGS = ("same renderer", "other renderer")
WARM_UP = 20
OUTSIDE = ("lips", "ears", "scalp", "neck", "skin")  # a Gaussian belongs to the first that has it


# Speed, on any device


def wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def now(device: str) -> float:
    """A clock: of the wall for a GPU, of this process's one busy thread on a CPU, whose cores others may use, too."""
    return time.perf_counter() if device == "cuda" else time.process_time()


def seconds_each(work: Callable[[], object], device: str, times: int, warm_up: int = 3) -> float:
    """Median seconds of a piece of work."""
    taken = []
    for turn in range(warm_up + times):
        wait(device)
        started = now(device)
        work()
        wait(device)
        if turn >= warm_up:
            taken.append(now(device) - started)
    return statistics.median(taken)


def around(count: int, size: int) -> Cameras:
    """Cameras a metre away, all around."""
    angle = torch.linspace(0, 2 * torch.pi, count + 1)[:-1]
    positions = torch.stack([angle.sin(), 0.1 * torch.ones_like(angle), angle.cos()], -1)
    K = torch.tensor([[3.8 * size, 0, size / 2], [0, 3.8 * size, size / 2], [0, 0, 1.0]])
    return Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))


def prior_speed(recipe: str, device: str, times: int, people: int = 32) -> dict[str, Any]:
    """Examples and pictures a second of a prior's training step, without the reading of data."""
    config = find_recipe(recipe)
    task = GaspTask(
        replace(config, model=replace(config.model, people=people), loss=replace(config.loss, lpips=0.0))
    )
    module = task.build().to(device)
    groups = [
        {"params": parameters, "lr": 1e-4 * share} for share, parameters in task.parameter_groups(module)
    ]
    optimizer = torch.optim.Adam(groups)
    head, size, views = module.prior.surface.head, task.size, config.data.views
    cameras = around(views, size).to(device=device)
    batch = {
        "ids": ["0/made-up"],
        "identity": torch.zeros(1, head.n_identity, device=device),
        "expression": torch.zeros(1, head.n_expression, device=device),
        "target_images": torch.rand(1, views, 3, size, size, device=device),
        "target_masks": torch.ones(1, views, 1, size, size, device=device),
        "target_K": cameras.K[None],
        "target_world_to_camera": cameras.world_to_camera[None],
        "progress": 0.0,
    }

    def step() -> None:
        loss, _ = module(batch)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()

    taken = seconds_each(step, device, times)
    return {
        "recipe": recipe,
        "gaussians": len(module.prior.surface),
        "size": size,
        "views": views,
        "step_ms": round(1e3 * taken, 2),
        "examples_per_second": round(1 / taken, 2),
        "pictures_per_second": round(views / taken, 2),
    }


def made_up_prior(config: GaspConfig) -> GaspPrior:
    """A prior that was trained by nobody: what a fit takes does not depend on what a prior knows."""
    torch.manual_seed(0)
    return GaspPrior(config)


def one_picture(size: int, expressions: int = 1) -> FitPictures:
    """Pictures of the grey mean head."""
    head = ParametricHead.load()
    prior, cameras = made_up_prior(replace(small_model(), people=1)), around(expressions, size)
    codes = torch.zeros(expressions, head.n_expression)
    posed = prior.surface.attach(
        prior.surface.start(), head.vertices(torch.zeros(expressions, head.n_identity), codes)
    )
    drawn = [rasterize(g, cameras[i], (size, size)) for i, g in enumerate(posed)]
    return FitPictures(
        torch.cat([one.image for one in drawn]).detach(),
        torch.cat([one.alpha for one in drawn]).detach(),
        cameras,
        codes,
        head.expression_kind,
        "nobody",
        head.name,
        torch.zeros(head.n_identity),
    )


def fit_speed(config: GaspFitConfig, people: int, size: int, device: str, steps: int) -> dict[str, Any]:
    """Seconds of each stage of a fit to one picture, from the median of some steps of each."""
    with tempfile.TemporaryDirectory() as folder:
        made_up_prior(replace(config.model, people=people)).save(Path(folder), {})
        asked = {"invert": config.invert_steps, "tune": config.tune_steps, "refine": config.refine_steps}
        short = replace(config, network=folder, loss=replace(config.loss, lpips=0.0))
        short = replace(short, invert_steps=steps + 3, tune_steps=steps + 3, refine_steps=steps + 3)
        began = now(device)
        fit = short.build(one_picture(size), device)
        wait(device)
        stages: dict[str, Any] = {"build_seconds": round(now(device) - began, 2)}
        for stage, count in asked.items():
            taken = seconds_each(fit.advance, device, steps)
            stages[stage] = {
                "steps": count,
                "step_ms": round(1e3 * taken, 2),
                "seconds": round(count * taken, 2),
            }
    stages["seconds"] = round(stages["build_seconds"] + sum(stages[stage]["seconds"] for stage in asked), 2)
    return {"gaussians": len(fit.surface), "size": size, **stages}


@torch.no_grad()
def driving(uv_resolution: int, size: int, device: str, frames: int) -> dict[str, Any]:
    """Frames a second of an avatar: posing the head, carrying the Gaussians, rasterizing; each an expression."""
    head = ParametricHead.load()
    config = replace(small_model(), uv_resolution=uv_resolution)
    start = GaspPrior(replace(config, people=1)).surface.start()
    avatar = GaspAvatar(config, start, torch.zeros(head.n_identity), head.expression_kind).to(device)
    camera = around(1, size).to(device=device)
    codes = torch.rand(WARM_UP + frames, head.n_expression, device=device)
    for code in codes[:WARM_UP]:
        render(avatar, code, camera, (size, size))
    wait(device)
    started = now(device)
    for code in codes[WARM_UP:]:
        render(avatar, code, camera, (size, size))
    wait(device)
    taken = (now(device) - started) / frames
    return {
        "gaussians": len(start),
        "size": size,
        "frames_per_second": round(1 / taken, 1),
        "megabytes": round(4 * (start.numel() + head.n_identity) / 1e6, 2),
    }


def speed() -> dict[str, Any]:
    torch.set_num_threads(1)
    content = {
        "what": "seconds of one core (CPU time of one thread); a prior's training step without reading data, a fit to "
        "one picture by stage (medians of steps, LPIPS left out), and an avatar driven with head, Gaussians and "
        "rasterizer",
        "prior": [prior_speed("gasp-prior-cpu", "cpu", 20)],
        "fit": [fit_speed(RECIPES["gasp-cpu"](), 32, SIZE, "cpu", 15)],  # type: ignore[arg-type]
        "driving": [
            driving(uv, size, "cpu", 60 if uv < 512 else 15)
            for uv, size in ((64, SIZE), (64, 512), (128, 512), (512, 512))
        ],
    }
    print(json.dumps(content, indent=1))
    return content


# Quality


def rows(work: Path) -> dict[str, GaspFitConfig]:
    """The fits of the table by name: sizes of the prior, ablations, and two ways to start without prior."""
    whole: Any = RECIPES["gasp-cpu"]()
    best = str(prior_folder(work, max(PRIORS)))
    none: Any = RECIPES["gasp-no-prior-cpu"]()
    made = {f"{n} people": replace(whole, network=str(prior_folder(work, n))) for n in PRIORS}
    for row in ("no-inversion", "no-tuning", "no-anchor"):
        ablation: Any = RECIPES[f"gasp-{row}-cpu"]()
        made[row] = replace(ablation, network=best)
    made |= {"no-prior": none, "no-prior, picture's colours": replace(none, look="pictures")}
    return {name: shorter(config) for name, config in made.items()}


def shorter(config: GaspFitConfig) -> GaspFitConfig:
    return replace(
        config,
        invert_steps=round(FIT_SHARE * config.invert_steps),
        tune_steps=round(FIT_SHARE * config.tune_steps),
        refine_steps=round(FIT_SHARE * config.refine_steps),
    )


def prior_folder(work: Path, people: int) -> Path:
    return work / "runs" / f"prior-{people}" / "export"


def prepare(work: Path, population: Path | None) -> tuple[Path, Path]:
    """Shards of the population, its first people to train on, and of the people before the other renderer."""
    count = max(PRIORS) + UNSEEN
    if population is None:
        population = work / "population"
        synthesize(population, subjects=count, timesteps=3, views=24, size=SIZE, seed=POPULATION)
    others = work / "others"
    synthesize(
        others,
        subjects=UNSEEN,
        timesteps=2,
        views=16,
        size=SIZE,
        seed=OTHERS,
        rig_name="nersemble",
        quality="path",
    )
    folders = []
    for name, captures, training in (
        ("population", population, max(PRIORS)),
        ("others", others, 0),
    ):
        out = work / "shards" / name
        if not (out / "manifest.json").is_file():
            chosen = sorted(path for path in captures.iterdir() if (path / "capture.json").is_file())
            read = [read_capture(path) for path in chosen[: training + UNSEEN]]
            held = [capture.subject for capture in read[training:]]
            pack(read, out, size=SIZE, heldout=held, input_sets=1, n_inputs=1, prior="none")
        folders.append(out)
    return folders[0], folders[1]


def prior_steps(people: int, steps: int) -> int:
    """The same number of passes through everybody's pictures, as in the paper; at least `steps` for a few people."""
    return steps * max(1, people // 16)


def train_prior(work: Path, shards: Path, people: int, steps: int) -> None:
    """One prior of the population's first people, by the trainer, in a process of its own."""
    if prior_folder(work, people).is_dir():
        return
    manifest, own = Manifest.load(shards), work / "shards" / f"train-{people}"
    own.mkdir(parents=True, exist_ok=True)
    names = manifest.train[:people]
    kept = [shard for shard in manifest.shards if shard.subject in names]
    for shard in kept:
        link = own / shard.path
        link.unlink(missing_ok=True)
        link.symlink_to((shards / shard.path).resolve())
    replace(manifest, folder=own, train=names, heldout=(), shards=tuple(kept)).save()
    words = ["train", "gasp-prior-cpu", "--data", str(own), "--run", str(prior_folder(work, people).parent)]
    # The recipe's two ranks in one: the same batch.
    words += ["--steps", str(steps), "--data.micro-batch", "2", "--data.threads", "1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, "-m", "launch.cli", *words], check=True, env=environment)


def unseen(subject: Any, used: dict[str, Any], inputs: FitPictures) -> FitPictures:
    """All other cameras' pictures of all other expressions."""
    parts = [
        (target, [v for v, name in enumerate(target.camera_ids) if name not in used["camera_ids"]])
        for target in subject.targets
        if target.timestep not in used["timesteps"]
    ]
    return replace(
        inputs,
        images=torch.cat([target.images(views) for target, views in parts]),
        masks=torch.cat([target.masks(views) for target, views in parts]),
        cameras=Cameras.cat([target.cameras[views] for target, views in parts]),
        expressions=torch.cat([target.expression.expand(len(views), -1) for target, views in parts]),
    )


def pictures_of(shards: Path, subject: str) -> tuple[FitPictures, FitPictures]:
    """The single picture of a fit, and the unseen ones."""
    read = open_shards(shards, "heldout").read(subject)
    inputs = FitPictures.of(from_shards(read, FitSource("inputs")))
    return inputs, unseen(read, inputs.provenance, inputs)


def measured_fit(
    work: Path, setting: str, row: str, config: GaspFitConfig, shards: Path, subject: str
) -> Any:
    """One fit and what it is worth, from its file where it is done."""
    name = f"{setting}-{row}-{subject}".replace(" ", "-").replace(",", "").replace("'", "")
    folder = work / "fits" / name
    if (folder / "measured.json").is_file():
        return json.loads((folder / "measured.json").read_text())
    inputs, held = pictures_of(shards, subject)
    fit = config.build(inputs)
    began = time.process_time()
    while fit.step < config.steps:
        fit.advance()
    seconds = time.process_time() - began
    avatar = fit.avatar()
    avatar.save(folder)
    means, _ = measure_held_out(avatar, held)
    result = {
        "setting": setting,
        "row": row,
        "subject": subject,
        "cpu_seconds": round(seconds, 1),
        "pictures": means["pictures"],
        **{name: means[name] for name in ("psnr", "ssim", "psnr_masked", "lpips/vgg") if name in means},
    }
    (folder / "measured.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result), flush=True)
    return result


def table(measured: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Means over the people by setting and row, and how far each row is from the whole method, person by person."""
    made: dict[str, dict[str, Any]] = {}
    for setting in SETTINGS:
        of = {(one["row"], one["subject"]): one for one in measured if one["setting"] == setting}
        subjects = sorted({subject for _, subject in of})
        whole = f"{max(PRIORS)} people"
        made[setting] = {}
        for row in dict.fromkeys(row for row, _ in of):
            gaps = [of[row, s]["psnr"] - of[whole, s]["psnr"] for s in subjects]
            made[setting][row] = {
                "psnr": round(statistics.mean(of[row, s]["psnr"] for s in subjects), 2),
                "ssim": round(statistics.mean(of[row, s]["ssim"] for s in subjects), 4),
                "psnr_less_than_whole": round(-statistics.mean(gaps), 2),
                "people_worse_than_whole": sum(gap < 0 for gap in gaps),
                "people": len(subjects),
            }
            print(f"{setting:15} {row:28} {made[setting][row]}")
    return made


def region_labels(prior: GaspPrior) -> tuple[Tensor, list[str]]:
    """(N,) which of the outer regions of the head each Gaussian sits on, -1 for what pictures hardly show."""
    surface = prior.surface
    names, labels = [], torch.full((len(surface),), -1)
    for name in OUTSIDE:
        inside = surface.head.regions[name][surface.triangles] & (labels < 0)
        labels[inside] = len(names)
        names.append(name)
    return labels, names


def clusters(prior: GaspPrior) -> dict[str, Any]:
    """How well a Gaussian's feature tells its region: the nearest of the regions' means, found on half of the
    Gaussians and asked of the other half. The features start as noise, so neighbours know nothing of each other.
    """
    labels, names = region_labels(prior)
    features, labels = prior.features.detach()[labels >= 0], labels[labels >= 0]
    features = (features - features.mean(0)) / features.std(0)
    generator = torch.Generator().manual_seed(0)
    half = torch.rand(len(labels), generator=generator) < 0.5

    def accuracy(labels: Tensor) -> dict[str, float]:
        centres = torch.stack([features[half & (labels == k)].mean(0) for k in range(len(names))])
        told = torch.cdist(features[~half], centres).argmin(1)
        each = {
            name: round((told[labels[~half] == k] == k).float().mean().item(), 3)
            for k, name in enumerate(names)
        }
        return {"mean": round(statistics.mean(each.values()), 3), **each}

    return {
        "what": "share of Gaussians whose region is that of the nearest mean feature, and the mean over regions",
        "gaussians": {name: int((labels == k).sum()) for k, name in enumerate(names)},
        "trained": accuracy(labels),
        "shuffled": accuracy(labels[torch.randperm(len(labels), generator=generator)])["mean"],
        "chance": round(1 / len(names), 3),
    }


def three_colors(features: Tensor) -> Tensor:
    """(N, 3) the first three principal components as colours."""
    centred = features - features.mean(0)
    _, _, directions = torch.linalg.svd(centred, full_matrices=False)
    parts = centred @ directions[:3].T
    return (0.5 + 0.2 * parts / parts.std(0)).clamp(0, 1)


@torch.no_grad()
def draw_features(prior: GaspPrior, path: Path) -> None:
    """The features' principal components and the regions, on the template seen from three sides and on the UV map."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    labels, names = region_labels(prior)
    palette = torch.tensor(matplotlib.colormaps["tab10"].colors)[: len(names)].float()
    palette = torch.cat([palette, torch.full((1, 3), 0.8)])  # the last, -1: inside
    surface, size = prior.surface, 320
    cameras = around(8, size)[[0, 1, 2, 4]]
    vertices = surface.mean_head()[None]
    figure, axes = plt.subplots(2, 5, figsize=(13, 5.6), layout="constrained")
    for row, (title, colors) in enumerate(
        (("features f", three_colors(prior.features)), ("regions of the head", palette[labels]))
    ):
        attributes = surface.start()
        attributes[:, ATTRIBUTES["color"]] = colors
        drawn = rasterize(surface.attach(attributes, vertices)[0], cameras, (size, size), torch.ones(3)).image
        for place, picture in enumerate(drawn):
            axes[row, place].imshow(picture.permute(1, 2, 0).clamp(0, 1))
        resolution = prior.config.uv_resolution
        flat = torch.ones(resolution * resolution, 3)
        flat[surface.pixels] = colors
        axes[row, 4].imshow(flat.view(resolution, resolution, 3))
        axes[row, 0].set_ylabel(title)
    handles = [plt.Rectangle((0, 0), 1, 1, color=palette[k].tolist()) for k in range(len(names))]
    figure.legend(handles, names, loc="outside lower center", ncol=len(names), frameon=False)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=80)
    plt.close(figure)


@torch.no_grad()
def draw_fits(work: Path, places: dict[str, Path], people: int, path: Path) -> None:
    """The picture that was fitted, and unseen ones: true, with the prior, without."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    chosen = [
        (setting, subject)
        for setting, shards in places.items()
        for subject in open_shards(shards, "heldout").subjects[: min(people, 3)]
    ]
    kinds = {"true": None, "GASP": f"{max(PRIORS)}-people", "no prior": "no-prior-pictures-colours"}
    figure, axes = plt.subplots(len(chosen), 10, figsize=(13, 1.36 * len(chosen)), layout="constrained")
    for line, (setting, subject) in enumerate(chosen):
        inputs, held = pictures_of(places[setting], subject)
        few = torch.linspace(0, len(held) - 1, 5).long().tolist()[1:4]
        axes[line, 0].imshow(inputs.images[0].permute(1, 2, 0))
        axes[line, 0].set_ylabel(setting.split()[0])
        column = 1
        for picture in few:
            for kind, row in kinds.items():
                if row is None:
                    shown = held.take([picture])[0][0]
                else:
                    avatar = load_avatar(work / "fits" / f"{setting.replace(' ', '-')}-{row}-{subject}")
                    camera = held.cameras[picture]
                    shown = render(avatar, held.expressions[picture], camera, held.size).image[0]
                axes[line, column].imshow(shown.permute(1, 2, 0).clamp(0, 1))
                if line == 0:
                    axes[line, column].set_title(kind, fontsize=9)
                column += 1
    axes[0, 0].set_title("the picture", fontsize=9)
    for axis in axes.flat:
        axis.set_xticks([])
        axis.set_yticks([])
    figure.savefig(path, dpi=80)
    plt.close(figure)


def quality(work: Path, population: Path | None, people: int, steps: int, draw: bool) -> dict[str, Any]:
    torch.set_num_threads(1)
    own, other = prepare(work, population)
    for count in PRIORS:
        train_prior(work, own, count, prior_steps(count, steps))
    places = dict(zip(SETTINGS, (own, other), strict=True))
    measured = [
        measured_fit(work, setting, row, config, shards, subject)
        for number in range(people)
        for setting, shards in places.items()
        for subject in open_shards(shards, "heldout").subjects[number : number + 1]
        for row, config in rows(work).items()
    ]
    prior = GaspPrior.load(prior_folder(work, max(PRIORS)))
    if draw:
        draw_features(prior, IMAGES / "gasp-features.png")
        draw_fits(work, places, people, IMAGES / "gasp-fits.png")
    return {
        "what": f"fits of the recipe gasp-cpu with {FIT_SHARE:.0%} of its steps to one picture of {SIZE} px of people "
        "that no prior has seen, measured over black on all other cameras at all other expressions; means over people",
        "priors": "recipe gasp-prior-cpu, steps of 2 examples x 4 views",
        "prior_steps": {str(count): prior_steps(count, steps) for count in PRIORS},
        "settings": {
            SETTINGS[0]: f"seed {POPULATION}, 24 views on the dome, 3 expressions, as the priors' people",
            SETTINGS[
                1
            ]: f"seed {OTHERS}, path-traced, 16 cameras before the face as NeRSemble's, 2 expressions",
        },
        "table": table(measured),
        "features": clusters(prior),
        "fits": measured,
    }


def main() -> None:
    """Measures and writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--quality", action="store_true", help="measure quality instead of speed")
    parser.add_argument(
        "--population", type=Path, help="captures of 64 people and some more, of the seed 100"
    )
    parser.add_argument("--work", type=Path, default=Path("work/benchmark-gasp"), help="what --quality keeps")
    parser.add_argument(
        "--people",
        type=int,
        default=4,
        choices=range(1, UNSEEN + 1),
        help="unseen people of each renderer, for --quality",
    )
    parser.add_argument(
        "--steps",
        type=int,
        default=600,
        help="of the training of a prior of up to 31 people; one of 32 takes twice, one of 64 four times as many",
    )
    options = parser.parse_args()
    if options.quality:
        draw = options.out == RESULTS
        content = quality(options.work, options.population, options.people, options.steps, draw)
        write("gasp-quality", content, ("torch", "deepspeed"), options.out)
    else:
        write("gasp", speed(), ("torch",), options.out)


if __name__ == "__main__":
    main()
