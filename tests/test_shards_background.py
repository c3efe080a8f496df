"""Input pictures that keep what is behind the head: packed, read, and cut out for those who have no use for it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_captures import write_tiny_captures

from avatars.avat3r import Avat3r, Avat3rMethod
from avatars.errors import UserError
from avatars.fastavatar.method import FastAvatarMethod
from avatars.method import load_avatar
from eval.baselines import nearest_input
from launch.cli import main
from launch.recipes import find_recipe
from shards import BatchLoader, Manifest, check, info, open_shards, pack, read_capture, to_float
from shards.manifest import PriorSettings
from shards.photographs import read_photographs
from shards.priors import PriorMaps, write_with_priors
from train.fits import FitSource
from train.fits.pictures import FitPictures, from_shards
from train.tasks import settled, task_for
from train.tasks.avat3r import Avat3rTask

STUDIO = (90, 40, 140)  # behind the head


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Two people before a wall that is not black."""
    folders = write_tiny_captures(tmp_path_factory.mktemp("studio"), 2, timesteps=6, views=6)
    for folder in folders:
        for path in folder.glob("image/*/*.png"):
            image = np.array(Image.open(path))
            mask = np.array(Image.open(folder / "mask" / path.relative_to(folder / "image")))
            image[mask == 0] = STUDIO
            Image.fromarray(image).save(path)
    return folders


@pytest.fixture(scope="module")
def packed(captures, tmp_path_factory):
    """The same captures, with input pictures cut out and as a whole."""
    folder = tmp_path_factory.mktemp("packed")
    for background in ("masked", "kept"):
        pack(
            [read_capture(path) for path in captures],
            folder / background,
            size=48,
            heldout=["s01"],
            input_sets=2,
            codec="png",
            input_background=background,
        )
    return folder


@pytest.fixture(scope="module")
def both(packed):
    """The held-out person's first input set, cut out and as a whole."""
    return [
        open_shards(packed / background, "heldout").read("s01").input_sets[0]
        for background in ("masked", "kept")
    ]


def outside(images, masks):
    """(n, 3) colours of the pixels that are not the head's at all."""
    return images.movedim(-3, -1)[masks.movedim(-3, -1)[..., 0] == 0]


def test_only_input_pictures_keep_it(packed, captures, both):
    cut, whole = both
    assert (cut.background, whole.background) == ("masked", "kept")
    assert torch.equal(cut.masks, whole.masks)
    assert torch.equal(cut.positions, whole.positions)
    assert torch.equal(cut.cameras.world_to_camera, whole.cameras.world_to_camera)
    inside = (cut.masks > 0).expand_as(cut.images)
    assert torch.equal(cut.images[inside], whole.images[inside])
    assert not outside(cut.images, cut.masks).any()
    wall = outside(whole.images, whole.masks)
    assert len(wall) > 1000
    assert torch.equal((wall * 255).round(), torch.tensor(STUDIO).expand_as(wall).float())
    source = read_capture(captures[1])
    t = source.timestep_ids.index(whole.provenance["timesteps"][0])
    seen = source.uncut(t, source.camera_ids.index(whole.provenance["camera_ids"][0]))
    assert torch.equal((whole.images[0] * 255).round().byte(), torch.from_numpy(seen).permute(2, 0, 1))
    targets = [
        open_shards(packed / background, "heldout").read("s01").targets[0]
        for background in ("masked", "kept")
    ]
    assert torch.equal(targets[0].images(range(6)), targets[1].images(range(6)))
    assert not outside(targets[1].images(range(6)), targets[1].masks(range(6))).any()
    assert not [finding for finding in check(packed / "kept") if finding.severity == "error"]
    assert "background kept" in str(info(packed / "kept"))


def test_manifests_from_before_are_of_cut_out_pictures(packed, tmp_path):
    for file in (packed / "masked").iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    content = json.loads((tmp_path / "manifest.json").read_text())
    assert content["settings"].pop("input_background") == "masked"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    assert Manifest.load(tmp_path).settings.input_background == "masked"
    content["settings"]["input_background"] = "blurred"
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="there is no input_background 'blurred'"):
        Manifest.load(tmp_path)


def test_what_cannot_be_kept_is_told(captures, tmp_path):
    capture = read_capture(captures[0])
    with pytest.raises(UserError, match="input_background is 'blurred'; it must be masked or kept"):
        pack([capture], tmp_path, size=48, heldout=0, input_background="blurred")
    capture.has_background, capture.layout = False, "vhap"
    with pytest.raises(UserError, match=r"s00 is of the layout vhap.*--input-background masked"):
        pack([capture], tmp_path, size=48, heldout=0, input_background="kept")
    assert list(tmp_path.iterdir()) == []


def test_batches_have_it_raw_and_as_floats(packed):
    options: dict = {"seed": 0, "micro_batch": 2, "views": 2}
    batches = []
    for background in ("masked", "kept"):
        folder = packed / background
        with (
            BatchLoader(folder, "train", **options) as loader,
            BatchLoader(folder, "train", raw=True, **options) as raw,
        ):
            batch, made = next(loader), to_float(next(raw))
        assert set(made) == set(batch)
        assert all(torch.equal(made[name], batch[name]) for name in set(batch) - {"ids"})
        batches.append(batch)
    cut, whole = batches
    differing = {name for name in set(cut) - {"ids"} if not torch.equal(cut[name], whole[name])}
    assert differing == {"input_images"}
    wall = outside(whole["input_images"], whole["input_masks"])
    assert torch.equal((wall * 255).round(), torch.tensor(STUDIO).expand_as(wall).float())
    assert not outside(cut["input_images"], cut["input_masks"]).any()


def test_shards_with_other_priors_keep_it_and_priors_see_it(packed, tmp_path):
    seen = []

    def features(inputs):
        seen.append(inputs.background)
        return PriorMaps(features=inputs.images.mean((2, 3), keepdim=True))

    settings = PriorSettings(position="depth", features="made-up:1", feature_dim=3)
    made = write_with_priors(packed / "kept", tmp_path / "x", features, settings)
    assert set(seen) == {"kept"}
    assert made.settings.input_background == "kept"
    inputs = open_shards(tmp_path / "x", "heldout").read("s01").input_sets[0]
    assert outside(inputs.images, inputs.masks).any()
    assert inputs.features is not None
    assert inputs.masked().features is None  # they have seen what is cut out now


def test_fits_the_baseline_and_fastavatar_get_heads_over_black(packed, both, monkeypatch):
    cut, whole = both
    subject = open_shards(packed / "kept", "heldout").read("s01")
    fitted = FitPictures.of(from_shards(subject, FitSource("inputs")))
    assert not outside(fitted.images, fitted.masks).any()
    assert torch.equal(fitted.images, whole.masked().images)
    views = from_shards(subject, FitSource("views", views=3))
    assert not outside(*views.take(range(len(views)))).any()
    shown = nearest_input(whole).images
    assert not outside(shown, whole.masks).any()
    sure = (whole.masks == 1).expand_as(shown)
    assert torch.equal(shown[sure], cut.images[sure])
    assert cut.masked() is cut

    given = []
    monkeypatch.setattr(FastAvatarMethod, "latent", lambda self, image, mask, who: given.append(image))
    monkeypatch.setattr(FastAvatarMethod, "decode", lambda self, latent, **more: None)
    method = object.__new__(FastAvatarMethod)
    method.expression_kind = "arkit-52"
    method.create(whole)
    assert torch.equal(given[0], whole.masked().images[0])


def network(**changes) -> Avat3r:
    """A network with random heads."""
    torch.manual_seed(0)
    made = Avat3r(replace(find_recipe("avat3r-tiny").model, **changes))
    for head in made.heads.values():
        torch.nn.init.normal_(head.weight, std=0.05)
    return made


def test_avat3r_takes_pictures_as_it_was_trained(both):
    cut, whole = both
    usual, open_ = (
        Avat3rMethod(network(input_background=background), "arkit-52") for background in ("masked", "kept")
    )
    code = torch.zeros(52)
    assert torch.equal(
        usual.create(whole).gaussians(code).means, usual.create(whole.masked()).gaussians(code).means
    )
    assert not torch.equal(
        usual.create(whole).gaussians(code).means, open_.create(whole).gaussians(code).means
    )
    assert torch.equal(open_.create(whole).pictures, (whole.images * 255).round().byte())
    with pytest.raises(
        UserError, match=r"trained on pictures with what is behind .* --input-background kept"
    ):
        open_.create(cut)
    featured = Avat3rMethod(network(feature_dim=3, feature_prior="made-up:1"), "arkit-52")
    with pytest.raises(UserError, match=r"features of pictures that are cut out.*--input-background masked"):
        featured.create(replace(whole, features=torch.zeros(4, 3, 2, 2)))


def test_a_training_learns_from_its_shards_what_its_pictures_are(packed):
    recipe, kept = find_recipe("avat3r-tiny"), Manifest.load(packed / "kept")
    assert settled(recipe, Manifest.load(packed / "masked")) == recipe
    config = settled(recipe, kept)
    assert config.model.input_background == "kept"
    task = task_for(config)
    task.check(kept)
    assert isinstance(task, Avat3rTask)
    with pytest.raises(
        UserError, match=r"background kept and the recipe's --model.input-background is masked"
    ):
        task_for(recipe).check(kept)
    with pytest.raises(UserError, match=r"background masked .* is kept; leave the option out"):
        task.check(Manifest.load(packed / "masked"))
    with BatchLoader(packed / "kept", "train", seed=0, micro_batch=1, views=2) as loader:
        batch = next(loader)
    module = task.build()
    loss, _ = module(batch | {"progress": 0.0})
    loss.backward()
    assert loss.isfinite()
    named = task.method(module.state_dict(), "arkit-52", "cpu")
    assert named.input_background == "kept"


def test_a_checkpoint_from_before_there_was_a_choice_goes_on():
    recipe = find_recipe("avat3r-tiny")
    before = recipe.to_json()
    del before["model"]["input_background"]
    assert recipe.same_model_as(before)
    kept = replace(recipe, model=replace(recipe.model, input_background="kept"))
    assert not kept.same_model_as(before)
    del before["model"]["width"]
    assert not recipe.same_model_as(before)


def write_photographs(folder: Path, whole) -> Path:
    """The whole pictures as somebody's own, with masks."""
    folder.mkdir()
    entries = []
    for i in range(len(whole)):
        picture = (whole.images[i] * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(folder / f"{i}.png")
        Image.fromarray((whole.masks[i, 0] * 255).round().byte().numpy()).save(folder / f"{i}m.png")
        np.save(folder / f"{i}.position.npy", whole.positions[i].numpy())
        np.save(folder / f"{i}.confidence.npy", whole.confidence[i].numpy())
        entries.append(
            {
                "image": f"{i}.png",
                "mask": f"{i}m.png",
                "K": whole.cameras.K[i].tolist(),
                "world_to_camera": whole.cameras.world_to_camera[i].tolist(),
                "position": f"{i}.position.npy",
                "confidence": f"{i}.confidence.npy",
            }
        )
    (folder / "pictures.json").write_text(json.dumps({"pictures": entries}))
    return folder


def test_the_commands_pack_and_create(captures, packed, both, tmp_path, capsys):
    cut, whole = both
    words = ["shards", "pack", str(captures[0].parent), str(tmp_path / "shards"), "--size", "48"]
    assert main([*words, "--input-background", "kept", "--workers", "1", "--codec", "png"]) == 0
    assert Manifest.load(tmp_path / "shards").settings.input_background == "kept"
    photographs = write_photographs(tmp_path / "photographs", whole)
    pictures = {}
    for background in ("masked", "kept"):
        model, avatar = tmp_path / background, tmp_path / f"avatar-{background}"
        network(input_background=background).save(model, {"expression_kind": "arkit-52"})
        assert main(["create", str(model), str(avatar), "--pictures", str(photographs)]) == 0
        pictures[background] = load_avatar(avatar).pictures
        assert main(["create", str(model), str(avatar), "--data", str(packed / "kept")]) == 0
    assert torch.equal(pictures["kept"], (whole.images * 255).round().byte())
    assert torch.equal(pictures["masked"], (cut.images * 255).round().byte())
    assert read_photographs(photographs, 48, "arkit-52", 52, "kept").background == "kept"
    words = ["create", str(tmp_path / "kept"), str(tmp_path / "x"), "--data", str(packed / "masked")]
    assert main(words) == 1
    assert "pack the shards with --input-background kept" in capsys.readouterr().err
