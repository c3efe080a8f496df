"""FastAvatar: how long one picture takes to become Gaussians, by part, and how good it is on unseen people.

    python benchmarks/fastavatar.py [--out FOLDER] [--rounds 30]          speed, beside a FlashAvatar fit, a minute
    python benchmarks/fastavatar.py --quality --model EXPORT --template TEMPLATE --shards SHARDS --captures CAPTURES

Speed needs no training: what a network takes does not depend on its weights. `--quality` measures what these commands
made, minutes to an hour on two cores (docs/fastavatar.md tells all of them):

    headsplat template TEMPLATE --data SHARDS
    headsplat train fastavatar-decoder-cpu --data SHARDS --run DECODER
    headsplat train fastavatar-encoder-cpu --data SHARDS --run ENCODER --model.decoder DECODER/export

The unseen people are the held-out ones of SHARDS, or of other shards: --unseen SHARDS --unseen-captures CAPTURES.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import arguments, medians, write
from torch import Tensor

from avatars.cameras import Cameras
from avatars.fastavatar import FastAvatar, FastAvatarConfig, seats_of, shared_head
from avatars.fastavatar.editing import Directions, between, fit_directions
from avatars.fastavatar.faces import FROZEN, crops, head_box, recogniser
from avatars.fastavatar.method import FastAvatarMethod
from avatars.fastavatar.model import Decoder, Encoder, read_network, seated
from avatars.method import render
from eval.metrics import psnr
from eval.movies import portrait_cameras
from launch.editing import UNITS, label_people, latents_of
from launch.recipes import find_recipe
from shards import ShardSet, open_shards, read_capture
from shards.synth import synthesize
from train.fits import RECIPES, FitPictures, FitSource
from train.fits.fastavatar import first_look
from train.fits.pictures import from_capture

YAW = 60.0  # degrees to either side within which pictures of a person must look alike to the encoder
WALKS = 20  # pairs of people that are walked between
CHANGED = 12  # people that are edited
STEPS = 16  # of a walk
SIZE = 128
TIMED = 60  # steps of the longer of the two FlashAvatar fits


def untrained(config: FastAvatarConfig) -> FastAvatarMethod:
    """A model of that shape on a grey head."""
    torch.manual_seed(0)
    head = shared_head(config.head)
    nobody, calm = torch.zeros(1, head.n_identity), torch.zeros(1, head.n_expression)
    centers, _ = seats_of(head, config.uv_resolution).posed(head.vertices(nobody, calm))
    grey = FastAvatar(first_look(centers[0], config), nobody[0], head=config.head,
                      uv_resolution=config.uv_resolution, expression_kind="arkit-52")  # fmt: skip
    decoder = Decoder(config, seated(config), grey)
    return FastAvatarMethod(decoder, Encoder(config), "arkit-52", {})


@torch.no_grad()
def parts(method: FastAvatarMethod, image: Tensor, mask: Tensor, rounds: int) -> dict[str, Any]:
    """Milliseconds of each part of picture to Gaussians, each waited for."""
    device = image.device
    config = method.encoder.config
    calm = torch.zeros(method.expression_length, device=device)
    box = head_box(image, mask, "benchmark")
    latent = method.latent(image, mask)
    person = method.decode(latent)

    def waited(action: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            action()
            if device.type == "cuda":
                torch.cuda.synchronize()

        return run

    actions: dict[str, Callable[[], object]] = {"find_head": lambda: head_box(image, mask, "benchmark")}
    if config.backbone in FROZEN:
        look = recogniser(config.backbone)
        said = look(image)
        assert said is not None
        seen = said[None].to(device)
        actions["detector_and_backbone"] = lambda: look(image)
        actions["mlp"] = lambda: method.encoder(seen)
    else:
        crop = crops(image[None], box[None], config.backbone_size)
        features = method.encoder.features(crop)
        actions["crop"] = lambda: crops(image[None], box[None], config.backbone_size)
        actions["backbone"] = lambda: method.encoder.features(crop)
        actions["mlp"] = lambda: method.encoder.mlp(features)
    actions["decoder"] = lambda: method.decoder(latent[None])
    actions["place_on_the_head"] = lambda: person.gaussians(calm)
    actions["picture_to_gaussians"] = lambda: method.decode(method.latent(image, mask)).gaussians(calm)
    actions["latent_to_gaussians"] = lambda: method.decode(latent).gaussians(calm)
    taken = medians({name: waited(action) for name, action in actions.items()}, rounds, 3)
    return {"gaussians": len(person)} | {f"{name}_ms": round(1e3 * s, 3) for name, s in taken.items()}


def speed(folder: Path, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """Both scales of the networks on one picture, and one FlashAvatar fit beside them."""
    capture = read_capture(
        synthesize(folder, subjects=[1], timesteps=2, views=24, size=SIZE, seed=3, progress=False)[0]
    )
    pictures, _ = from_capture(capture, FitSource("views", views=8, held_views=4, held_timesteps=0.5))
    view = capture.view(0, 0)
    assert view is not None  # synthetic captures have every picture
    image = (torch.from_numpy(view.image.copy()).permute(2, 0, 1) / 255).to(device)
    mask = (torch.from_numpy(view.mask.copy())[None] / 255).to(device)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    small = find_recipe("fastavatar-encoder-cpu").model
    large = find_recipe("fastavatar-encoder").model
    assert isinstance(small, FastAvatarConfig)
    assert isinstance(large, FastAvatarConfig)
    shapes = {
        "fastavatar-encoder-cpu": small.network(),
        "fastavatar-encoder with dlib": replace(large.network(), backbone="dlib"),
    }
    measured = {}
    for name, config in shapes.items():
        method = untrained(config)
        method.decoder.to(device)
        method.encoder.to(device)
        measured[name] = parts(method, image, mask, rounds)
        print(name, measured[name], flush=True)
    kind = "cpu" if device == "cpu" else "gpu"
    fits = {
        "few pictures": flashed(f"flashavatar-{kind}", pictures, device, 0),
        "many pictures": flashed(f"flashavatar-{kind}-many", pictures, device, TIMED),
    }
    torch.set_num_threads(threads)
    ours = measured["fastavatar-encoder-cpu"]["picture_to_gaussians_ms"]
    return {
        "what": f"one picture of {SIZE} px to posed Gaussians on one thread, medians of {rounds}; untrained weights",
        "by_part": measured,
        "flashavatar": fits,
        "times_faster_than_a_flashavatar_fit": {
            name: round(1e3 * fit["fit_seconds"] / ours, 1) for name, fit in fits.items()
        },
    }


def flashed(recipe: str, pictures: FitPictures, device: str, timed: int) -> dict[str, Any]:
    """How long a FlashAvatar fit takes: all of it, or its building and `timed` of its steps."""
    config: Any = RECIPES[recipe]()
    started = time.perf_counter()
    fit = config.build(pictures, device)
    built = time.perf_counter() - started
    times = []
    for _ in range(timed or config.steps):
        started = time.perf_counter()
        fit.advance()
        times.append(time.perf_counter() - started)
    seconds = built + (statistics.median(times) * config.steps if timed else sum(times))
    return {
        "recipe": recipe,
        "pictures": len(pictures),
        "steps": config.steps,
        "steps_timed": len(times),
        "fit_seconds": round(seconds, 2),
    }


def drawn(person: FastAvatar, expression: Tensor, cameras: Cameras, size: tuple[int, int]) -> Tensor:
    return render(person, expression, cameras, size).image.clamp(0, 1)


def likeness(
    method: FastAvatarMethod, template: FastAvatar, people: ShardSet
) -> tuple[dict[str, Any], list[FastAvatar]]:
    """PSNR on unseen people of unseen views and expressions: from one picture, guided, and of the template."""
    scores: dict[str, list[float]] = {}
    made = []
    for subject in people.subjects:
        person = people.read(subject)
        inputs = person.input_sets[0]
        used = inputs.first(1).provenance
        avatars = {
            "fastavatar": method.create(inputs),
            "fastavatar_guided": method.create_guided(inputs),
            "template": template,
        }
        made.append(avatars["fastavatar"])
        for target in person.targets:
            if target.timestep in used["timesteps"]:
                continue
            views = [v for v, name in enumerate(target.camera_ids) if name not in used["camera_ids"]][::2]
            truth = target.images(views)
            size = (truth.shape[-2], truth.shape[-1])
            for name, avatar in avatars.items():
                image = drawn(avatar, target.expression, target.cameras[views], size)
                scores.setdefault(name, []).append(float(psnr(image, truth).mean()))
    means = {f"psnr_{name}": round(statistics.mean(values), 2) for name, values in scores.items()}
    means["psnr_gain_over_the_template"] = round(means["psnr_fastavatar"] - means["psnr_template"], 2)
    return {"people": len(people.subjects), "pictures_each": len(views) * 2} | means, made


def same_person(method: FastAvatarMethod, people: ShardSet) -> dict[str, Any]:
    """How often pictures of one person give nearer latents than pictures of two, within YAW of straight ahead."""
    latents, owners, yaws = [], [], []
    for number, subject in enumerate(people.subjects):
        for target in people.read(subject).targets:
            place = target.cameras.centers
            yaw = torch.rad2deg(torch.atan2(place[:, 0], place[:, 2]))
            views = (yaw.abs() <= YAW).nonzero()[:, 0].tolist()
            for image, mask in zip(target.images(views), target.masks(views), strict=True):
                latents.append(method.latent(image, mask))
                owners.append(number)
            yaws += yaw[views].tolist()
    unit = torch.nn.functional.normalize(torch.stack(latents), dim=1)
    owner = torch.tensor(owners)
    near = unit @ unit.T
    same, itself = owner[:, None] == owner, torch.eye(len(owner), dtype=torch.bool)
    # The mean cosine of each picture to all pictures of every person, itself left out.
    count = torch.zeros(len(people.subjects)).index_add(0, owner, torch.ones(len(owner)))
    sums = torch.zeros(len(owner), len(count)).index_add(1, owner, near.masked_fill(itself, 0.0))
    others = count.repeat(len(owner), 1)
    others[torch.arange(len(owner)), owner] -= 1
    to_person = (sums / others).argmax(1)
    nearest = near.masked_fill(itself, -2).argmax(1)
    stranger = near.masked_fill(same, -2).amax(1)
    pairs = (near > stranger[:, None])[same & ~itself]
    return {
        "pictures": len(owner),
        "yaw_degrees": [round(min(yaws), 1), round(max(yaws), 1)],
        "closer_on_the_mean_to_the_own_person_than_to_any_other": share(to_person == owner),
        "nearest_picture_is_of_the_same_person": share(owner[nearest] == owner),
        "every_pair_closer_than_the_nearest_stranger": share(pairs),
    }


def share(values: Tensor) -> float:
    return round(float(values.float().mean()), 4)


def walks(method: FastAvatarMethod, made: list[FastAvatar]) -> dict[str, Any]:
    """How even the steps of a walk from one person to the next are, in the mean absolute difference of pictures."""
    camera, calm = portrait_cameras(1, SIZE), torch.zeros(method.expression_length)
    worst, ratios = [], []
    for first, second in pairwise(made[: WALKS + 1]):
        assert first.latent is not None
        assert second.latent is not None
        people = [method.decode(w) for w in between(first.latent, second.latent, STEPS + 1)]
        pictures = torch.cat([drawn(person, calm, camera, (SIZE, SIZE)) for person in people])
        steps = (pictures[1:] - pictures[:-1]).abs().mean((1, 2, 3))
        whole = float((pictures[-1] - pictures[0]).abs().mean())
        worst.append(float(steps.max()))
        ratios.append(float(steps.max()) * STEPS / whole)
    return {
        "pairs": len(worst),
        "steps": STEPS,
        "largest_step_l1": round(max(worst), 5),
        "largest_step_over_an_even_share_of_the_way": round(max(ratios), 2),
    }


def head_labels(people: list[FastAvatar]) -> Tensor:
    """Age, masculinity and width (P, 3) of the heads that w is decoded to, by the maps that made the labels."""
    head = shared_head(people[0].head)
    codes = torch.stack([person.identity for person in people])
    with_one = torch.cat([codes, torch.ones(len(codes), 1)], 1)
    masculinity, age = (with_one @ torch.as_tensor(head.arrays["attribute_map"]).float()).T
    ears = head.vertices(codes, torch.zeros(len(codes), head.n_expression))[:, head.landmarks68[[0, 16]]]
    return torch.stack([age, masculinity, 100 * (ears[:, 0] - ears[:, 1]).norm(dim=-1)], 1)


def edits(
    method: FastAvatarMethod,
    directions: Directions,
    train: tuple[ShardSet, Path],
    heldout: tuple[ShardSet, Path],
    made: list[FastAvatar],
) -> dict[str, Any]:
    """What an edit by one standard deviation does to its attribute, to the others and to who it is.

    Age, masculinity and width are read from the decoded head. Skin tone and hair are read by the encoder from a picture
    of the changed person, through a ridge regression that training people give. Identity is told by dlib's face
    recognition, which has no part in the model: how far a person's picture is from that before the edit, beside how far
    other people's are.

    Args:
        method: the model.
        directions: of its latents.
        train: people who were trained on, and their captures.
        heldout: people who were not, and theirs.
        made: the first of these from one picture each.
    """
    known, labels = latents_of(method, train[0], 4), label_people(train[1], train[0].subjects)
    unseen, truth = latents_of(method, heldout[0], 4), label_people(heldout[1], heldout[0].subjects)
    names = list(labels)
    wanted = torch.stack([labels[name] for name in names], 1)
    mean, spread = wanted.mean(0), wanted.std(0)
    center, scale = known.mean(0), known.std(0)

    def design(latents: Tensor) -> Tensor:
        return torch.cat([(latents - center) / scale, torch.ones(len(latents), 1)], 1).double()

    a = design(known)
    ridge = len(known) * 0.3 * torch.eye(a.shape[1], dtype=torch.float64)
    weights = torch.linalg.solve(a.T @ a + ridge, a.T @ ((wanted - mean) / spread).double())

    def read(people: list[FastAvatar], latents: Tensor) -> Tensor:
        """All attributes (P, 5) in standard deviations."""
        values = (design(latents) @ weights).float()
        places = [names.index(name) for name in ("age", "masculinity", "width")]
        values[:, places] = (head_labels(people) - mean[places]) / spread[places]
        return values

    told = (torch.stack([truth[name] for name in names], 1) - mean) / spread
    error = (read([method.decode(w) for w in unseen], unseen) - told).square().sum(0)
    explained = 1 - error / (told - told.mean(0)).square().sum(0)
    camera, calm = portrait_cameras(1, 2 * SIZE), torch.zeros(method.expression_length)
    look = recogniser("dlib")

    def pictured(person: FastAvatar) -> tuple[Tensor, Tensor | None]:
        """W of a picture of the person, and what dlib says of it."""
        rendering = render(person, calm, camera, (2 * SIZE, 2 * SIZE))
        image = rendering.image[0].clamp(0, 1)
        return method.latent(image, (rendering.alpha[0] > 0.5).float()), look(image)

    def all_pictured(people: list[FastAvatar]) -> tuple[Tensor, list[Tensor | None]]:
        latents, faces = zip(*(pictured(person) for person in people), strict=True)
        return torch.stack(latents), list(faces)

    people = [person for person in made if person.latent is not None][:CHANGED]
    before, faces = all_pictured(people)
    was = read(people, before)
    strangers = [
        float((a - b).norm())
        for i, a in enumerate(faces)
        for b in faces[:i]
        if a is not None and b is not None
    ]
    result: dict[str, Any] = {}
    for place, name in enumerate(names):
        amount = float(spread[place])
        moved = [method.decode(directions.moved(method.latent_of(w), name, amount)) for w in people]
        after, changed = all_pictured(moved)
        change = (read(moved, after) - was).mean(0)
        far = [
            float((a - b).norm())
            for a, b in zip(faces, changed, strict=True)
            if a is not None and b is not None
        ]
        result[name] = {
            "one_standard_deviation": round(amount, 3),
            "unit": UNITS[name],
            "r2_on_unseen_people": round(float(explained[place]), 3),
            "changes_in_standard_deviations": {
                other: round(float(change[p]), 2) for p, other in enumerate(names)
            },
            "dlib_distance_to_themselves": round(statistics.mean(far), 3) if far else None,
        }
    return {
        "people": len(people),
        "dlib_distance_between_people": round(statistics.mean(strangers), 3) if strangers else None,
        "dlib_distance_between_people_least": round(min(strangers), 3) if strangers else None,
        "attributes": result,
    }


def portraits(people: list[FastAvatar], size: int = SIZE) -> list[Tensor]:
    """Calm faces (3, size, size) from the front."""
    camera, calm = portrait_cameras(1, size), torch.zeros(people[0].expression_length)
    return [drawn(person, calm, camera, (size, size))[0] for person in people]


def save_sheet(rows: list[list[Tensor]], path: Path) -> None:
    pixels = torch.cat([torch.cat(row, 2) for row in rows], 1)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((255 * pixels).round().byte().permute(1, 2, 0).numpy()).save(path, quality=92)


def pictures(
    method: FastAvatarMethod, template: FastAvatar, people: ShardSet, directions: Directions, made: list[FastAvatar],
    folder: Path,
) -> None:  # fmt: skip
    """Sheets for the page: unseen people (their one picture, then truth, FastAvatar and the template of two views of
    another expression), walks, and each attribute changed by up to half of its range either way.
    """
    rows = []
    for subject, person in list(zip(people.subjects, made, strict=True))[:6]:
        shards = people.read(subject)
        inputs = shards.input_sets[0].first(1)
        target = next(t for t in shards.targets if t.timestep not in inputs.provenance["timesteps"])
        order = target.cameras.centers[:, 2].argsort(descending=True).tolist()
        row = [inputs.images[0]]
        for view in (order[0], order[len(order) // 2]):
            camera, truth = target.cameras[[view]], target.images([view])[0]
            size = (truth.shape[-2], truth.shape[-1])
            both = [drawn(avatar, target.expression, camera, size)[0] for avatar in (person, template)]
            row += [truth, *both]
        rows.append(row)
    save_sheet(rows, folder / "fastavatar-people.jpg")
    latents = [person.latent for person in made if person.latent is not None]
    walked = [
        [method.decode(w) for w in between(latents[a], latents[b], 7)] for a, b in ((0, 3), (1, 4), (6, 2))
    ]
    save_sheet([portraits(row) for row in walked], folder / "fastavatar-interpolation.jpg")
    changed = []
    for name, (low, high) in directions.ranges.items():
        span = (high - low) / 4
        changed.append(
            [method.decode(directions.moved(latents[0], name, step * span)) for step in (-2, -1, 0, 1, 2)]
        )
    save_sheet([portraits(row) for row in changed], folder / "fastavatar-edits.jpg")


def quality(
    model: Path, template: Path, train: tuple[ShardSet, Path], heldout: tuple[ShardSet, Path], sheets: Path | None
) -> dict[str, Any]:  # fmt: skip
    """Everything about a trained model, from people that it was trained on and others, each with their captures."""
    method = FastAvatarMethod.load(model)
    people, captures = heldout
    found, made = likeness(method, FastAvatar.load(template), people)
    print(found, flush=True)
    directions = fit_directions(
        latents_of(method, train[0], 4), label_people(train[1], train[0].subjects), UNITS, method.network
    )
    directions.save(model)
    if sheets is not None:
        pictures(method, FastAvatar.load(template), people, directions, made, sheets)
    content = {
        "what": "one picture of an unseen synthetic person, the first of the input set, to pictures of unseen "
        "expressions from unseen cameras; driven by the expression codes, over black, whole pictures",
        "trained_on_people": len(train[0].subjects),
        "config": read_network(model)[2]["config"],
        "provenance": method.provenance,
        "likeness": found,
        "latents": same_person(method, people),
    }
    print(content["latents"], flush=True)
    content["interpolation"] = walks(method, made)
    print(content["interpolation"], flush=True)
    content["editing"] = edits(method, directions, train, (people, captures), made)
    print(content["editing"], flush=True)
    return content


def main() -> None:
    """Measures, writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--quality", action="store_true", help="measure quality instead of speed")
    parser.add_argument("--rounds", type=int, default=30, help="repetitions that are timed")
    for name in ("model", "template", "shards", "captures", "unseen", "unseen-captures"):
        parser.add_argument(f"--{name}", type=Path, help="for --quality")
    parser.add_argument("--pictures", type=Path, help="for --quality: folder for sheets of pictures")
    options = parser.parse_args()
    packages = ("torch", "timm")
    if options.quality:
        if None in (options.model, options.template, options.shards, options.captures):
            parser.error("--quality needs --model, --template, --shards and --captures")
        if (options.unseen is None) != (options.unseen_captures is None):
            parser.error("--unseen and --unseen-captures belong together")
        train = open_shards(options.shards, "train"), options.captures
        unseen = options.unseen or options.shards
        heldout = open_shards(unseen, "heldout"), options.unseen_captures or options.captures
        measured = quality(options.model, options.template, train, heldout, options.pictures)
        write("fastavatar-quality", measured, packages, options.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        write("fastavatar", speed(Path(folder), options.rounds), packages, options.out)


if __name__ == "__main__":
    main()
