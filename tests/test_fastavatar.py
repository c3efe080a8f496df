"""FastAvatar: a layout that all people share, a template, two trainings, one picture to a head, and editing."""

import copy
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.fastavatar import (
    FastAvatar,
    FastAvatarConfig,
    FastAvatarEncoderConfig,
    LocalGaussians,
    average,
    place,
    seats_of,
    shared_head,
)
from avatars.fastavatar import faces as fastavatar_faces
from avatars.fastavatar.editing import between, fit_directions, read_directions
from avatars.fastavatar.faces import crops, face_boxes, head_box
from avatars.fastavatar.method import FastAvatarMethod
from avatars.fastavatar.model import Decoder, Encoder, fingerprint, read_network, save_network, seated
from avatars.gaussians import quaternion_to_matrix
from avatars.head import ParametricHead
from avatars.method import Avatar, load_avatar, load_method, render
from launch.cli import main
from launch.recipes import find_recipe
from shards import Manifest, open_shards
from train.config import LossConfig
from train.fits import RECIPES, FitSource, run_fit
from train.fits.fastavatar import FastAvatarTemplateFitConfig, first_look
from train.fits.pictures import from_shards
from train.tasks import task_for
from train.tasks.fastavatar import info_nce

SMALL = FastAvatarConfig(size=48, uv_resolution=24, sh_degree=0, latent=8, width=16, layers=2,
                         backbone="resnet10t", backbone_size=32, hidden=(16,), dropout=0.0)  # fmt: skip
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def head():
    return shared_head("makehuman")


@pytest.fixture(scope="module")
def captures(tmp_path_factory):
    """Five synthetic people, few and small pictures."""
    from shards.synth import synthesize

    folder = tmp_path_factory.mktemp("people") / "captures"
    synthesize(folder, subjects=5, timesteps=3, views=6, size=48, seed=3, progress=False)
    return folder


@pytest.fixture(scope="module")
def shards(captures):
    """The same, packed; the last one is held out."""
    from shards import pack, read_capture

    out = captures.parent / "shards"
    people = sorted(captures.iterdir())
    held = [people[-1].name]
    pack([read_capture(p) for p in people], out, size=48, heldout=held, input_sets=1, n_inputs=2, seed=0)
    return out


def grey(head, config=SMALL) -> FastAvatar:
    """The mean head without a look."""
    seats = seats_of(head, config.uv_resolution)
    code, calm = torch.zeros(1, head.n_identity), torch.zeros(1, head.n_expression)
    centers, _ = seats.posed(head.vertices(code, calm))
    return FastAvatar(first_look(centers[0], config), code[0], head="makehuman",
                      uv_resolution=config.uv_resolution, expression_kind="arkit-52")  # fmt: skip


@pytest.fixture(scope="module")
def method(head):
    """An untrained model whose decoder listens to w."""
    torch.manual_seed(0)
    config = replace(SMALL, gain=0.5)
    decoder = Decoder(config, seated(config), grey(head, config))
    return FastAvatarMethod(decoder, Encoder(config), "arkit-52", {"expression_kind": "arkit-52"})


def picture(size=48):
    """A bright disc before black, and its matte."""
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    mask = (((x - size / 2) ** 2 + (y - size / 2) ** 2) < (size / 3) ** 2).float()[None]
    return mask * torch.tensor([0.8, 0.6, 0.5])[:, None, None], mask


# The layout


def test_a_gaussian_sits_on_every_triangle_but_the_neck_s_rim(head):
    seats = seats_of(head, 0)
    assert len(seats) == len(head.faces) - int(head.regions["boundary"].sum())
    centers, frames = seats.posed(head.vertices(torch.zeros(1, 100), torch.zeros(1, 52)))
    assert torch.allclose(centers[0], head.template[: head.n_vertices][seats.corners].mean(1), atol=1e-6)
    unit = frames[0].transpose(1, 2) @ frames[0]
    assert (unit - torch.eye(3)).abs().max() < 1e-3
    outward = (frames[0][:, :, 2] * torch.nn.functional.normalize(centers[0], dim=1)).sum(1)
    skin = head.regions["scalp"][~head.regions["boundary"]]
    assert (outward[skin] > 0).float().mean() > 0.95
    assert 300 < len(seats_of(head, 24)) < len(seats_of(head, 64)) < len(seats)


def test_gaussians_turn_and_move_with_their_triangles():
    torch.manual_seed(0)
    corners = torch.randn(1, 12, 3)
    seats = fastavatar_seats(4)
    local = LocalGaussians(torch.randn(4, 3) * 0.1, torch.randn(4, 4), torch.full((4, 3), -5.0), torch.zeros(4),
                           torch.zeros(4, 1, 3))  # fmt: skip
    turn = quaternion_to_matrix(torch.tensor([0.8, 0.4, -0.2, 0.4]))
    still = place(local, *(value[0] for value in seats.posed(corners)))
    moved = place(local, *(value[0] for value in seats.posed(corners @ turn.T + 0.3)))
    assert torch.allclose(moved.means, still.means @ turn.T + 0.3, atol=1e-5)
    before, after = quaternion_to_matrix(still.quats), quaternion_to_matrix(moved.quats)
    assert torch.allclose(after, turn @ before, atol=1e-5)


def fastavatar_seats(count):
    from avatars.fastavatar import Seats

    return Seats(torch.arange(3 * count).reshape(count, 3), torch.full((count, 3), 1 / 3))


# The template


def test_a_template_is_the_mean_and_quaternions_of_both_signs_do_not_cancel(head):
    first, second = grey(head), grey(head)
    second.local.offsets = second.local.offsets + 0.02
    second.local.quats = -second.local.quats
    second.identity = torch.ones(100)
    mean = average([first, second])
    assert torch.allclose(mean.local.offsets, torch.full_like(mean.local.offsets, 0.01))
    assert torch.allclose(mean.local.quats, first.local.quats)
    assert torch.allclose(mean.identity, torch.full((100,), 0.5))
    assert mean.variant == "template"
    with pytest.raises(UserError, match="one head, one layout"):
        average([first, grey(head, replace(SMALL, uv_resolution=32))])
    with pytest.raises(UserError, match="there is none"):
        average([])


def test_a_person_of_the_template_is_fitted_and_goes_on_where_it_stopped(shards, tmp_path):
    inputs = from_shards(open_shards(shards, "train").read("s0000"), FitSource("views", views=6))
    config = FastAvatarTemplateFitConfig(model=SMALL, steps=40, pictures_per_step=1, checkpoint_every=20,
                                         rate_offsets=5e-4)  # fmt: skip
    fit = config.build(inputs)
    assert len(fit.avatar()) == len(seats_of(shared_head("makehuman"), 24))
    before = error(fit.avatar(), inputs)
    for _ in range(40):
        fit.advance()
    assert error(fit.avatar(), inputs) < 0.9 * before
    run_fit(replace(config, steps=20), inputs, tmp_path, key="k")
    resumed = run_fit(config, inputs, tmp_path, key="k")
    assert resumed.resumed_from == 20
    # The rates fall with the share of all steps, which the first half was told wrongly; only its start can agree.
    straight = run_fit(config, inputs, tmp_path / "other")
    again = run_fit(config, inputs, tmp_path / "third")
    assert torch.equal(straight.avatar.local.colors, again.avatar.local.colors)
    untracked = dataclasses.replace(inputs, identity=None, head=None)
    with pytest.raises(UserError, match=r"tracked, and those of s0000 are tracked with none"):
        config.build(untracked)
    short = dataclasses.replace(inputs, identity=inputs.identity[:10])
    with pytest.raises(UserError, match="takes 52 and 100"):
        config.build(short)


def error(avatar, pictures) -> float:
    """Mean absolute difference to the pictures."""
    images, _ = pictures.take(range(len(pictures)))
    drawn = [
        render(avatar, code, pictures.cameras[place], pictures.size).image[0]
        for place, code in enumerate(pictures.expressions)
    ]
    return float((torch.stack(drawn) - images).abs().mean())


def test_recipes_of_the_template_are_fits():
    for name in ("fastavatar-template-cpu", "fastavatar-template-gpu"):
        assert RECIPES[name]().method == "fastavatar-template"


# The networks


def test_the_decoder_has_the_published_size_and_starts_at_the_template(head):
    config = FastAvatarConfig()
    decoder = Decoder(config, 7)
    own = sum(
        p.numel() for name, p in decoder.named_parameters() if name.startswith(("from", "trunk", "heads"))
    )
    assert own == 812_603  # the authors' decoder, whose first layer takes w and the embedding side by side
    small = replace(SMALL, gain=0.02)
    start = grey(head)
    decoder = Decoder(small, seated(small), start)
    made = decoder(torch.randn(2, 8))
    assert (made[1].local.offsets - start.local.offsets).abs().max() < 1e-3
    assert (made[1].local.colors - start.local.colors).abs().max() < 1e-2
    assert (made.local.offsets.abs() <= small.offset).all()
    assert decoder.embedding[:, :3].amin() == 0
    assert decoder.embedding[:, :3].amax() == 1
    with pytest.raises(UserError, match="layout"):
        Decoder(replace(small, uv_resolution=32), 5, start)
    with pytest.raises(UserError, match="harmonics"):
        Decoder(replace(small, sh_degree=1), len(start), start)


def test_the_encoder_has_the_published_size():
    encoder = Encoder(FastAvatarConfig(backbone="arcface"))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(1.97e6, rel=0.01)
    assert encoder.eval()(torch.randn(3, 512)).shape == (3, 512)
    with pytest.raises(UserError, match=r"neither 'dlib' nor 'arcface' nor a network of timm"):
        Encoder(FastAvatarConfig(backbone="resnet-nobody"))


def test_info_nce_is_the_share_of_the_same_person():
    latent = torch.tensor([[1.0, 0], [1, 0.1], [0, 1], [-0.1, 1]])
    who = torch.tensor([0, 0, 1, 1])
    unit = torch.nn.functional.normalize(latent, dim=1)
    expected = []
    for i in range(4):
        shares = torch.stack([(unit[i] @ unit[j] / 0.5).exp() for j in range(4) if j != i])
        expected.append(-torch.log((unit[i] @ unit[i ^ 1] / 0.5).exp() / shares.sum()))
    assert info_nce(latent, who, 0.5) == pytest.approx(float(torch.stack(expected).mean()), rel=1e-5)
    assert info_nce(latent, who, 0.5) < info_nce(latent, torch.tensor([0, 1, 0, 1]), 0.5)


def test_a_crop_follows_the_matte_wherever_the_head_is():
    image, mask = picture()
    moved = [torch.roll(value, (5, -4), (1, 2)) for value in (image, mask)]
    both = [torch.stack(pair) for pair in zip((image, mask), moved, strict=True)]
    cut = crops(both[0], face_boxes(both[1]), 32)
    assert torch.allclose(cut[0], cut[1], atol=1e-5)
    assert cut[0, 0, 16, 16] == pytest.approx(0.8)


# One picture to a person


def test_it_is_a_method_and_its_avatars_are_avatars(method, shards, tmp_path):
    inputs = open_shards(shards, "heldout").read("s0004").input_sets[0]
    assert (method.name, method.expression_length, method.needs_positions) == ("fastavatar", 52, False)
    avatar = method.create(inputs)
    assert isinstance(avatar, Avatar)
    assert avatar.provenance["camera_ids"] == inputs.provenance["camera_ids"][:1]
    others = dataclasses.replace(inputs, images=inputs.images.clone())
    others.images[1:] = 0
    assert torch.equal(method.create(others).latent, avatar.latent)
    moved = dataclasses.replace(inputs, identity=None, head=None, expressions=inputs.expressions * 0)
    assert torch.equal(method.create(moved).latent, avatar.latent)
    calm, open_ = torch.zeros(52), torch.zeros(52)
    open_[17] = 1  # jawOpen
    assert (avatar.gaussians(open_).means - avatar.gaussians(calm).means).abs().max() > 0.01
    avatar.save(tmp_path)
    read = load_avatar(tmp_path)
    assert torch.equal(read.gaussians(open_).means, avatar.gaussians(open_).means)
    assert torch.equal(read.latent, avatar.latent)
    with pytest.raises(UserError, match="52 numbers"):
        read.gaussians(torch.zeros(3))
    (tmp_path / "avatar.safetensors").unlink()
    with pytest.raises(UserError, match="copy both"):
        load_avatar(tmp_path)


def test_guided_people_are_kept_apart(method, shards):
    inputs = open_shards(shards, "heldout").read("s0004").input_sets[0]
    plain, guided = method.create(inputs), method.create_guided(inputs)
    assert (plain.variant, guided.variant) == ("", "guided by the person's tracked head")
    assert torch.equal(guided.identity, inputs.identity)
    assert not torch.equal(plain.identity, inputs.identity)
    assert torch.equal(guided.local.colors, plain.local.colors)
    with pytest.raises(UserError, match="guided mode needs"):
        method.create_guided(dataclasses.replace(inputs, head=None))


def test_the_command_makes_guided_people_by_this_method_alone(method, shards, tmp_path, capsys, monkeypatch):
    save_network(tmp_path / "model", "fastavatar", method.decoder, method.encoder, method.provenance)
    words = ["create", str(tmp_path / "model"), str(tmp_path / "ada"), "--data", str(shards), "--guided"]
    assert not main(words)
    made = load_avatar(tmp_path / "ada")
    person = open_shards(shards, "heldout").read("s0004")
    assert made.variant == "guided by the person's tracked head"
    assert torch.equal(made.identity, person.input_sets[0].identity)
    other = SimpleNamespace(name="avat3r")
    monkeypatch.setattr("avatars.method.load_method", lambda *_: other)
    assert main(words) == 1
    assert "--guided is for FastAvatar, and" in capsys.readouterr().err


def test_pictures_that_show_no_face_or_several_or_too_little(method, monkeypatch):
    image, mask = picture()
    with pytest.raises(UserError, match="of ada shows no face"):
        method.latent(image * 0, mask * 0, "ada")
    pair = torch.cat([mask, mask], 2)
    with pytest.raises(UserError, match="of ada shows 2 heads"):
        method.latent(torch.cat([image, image], 2), pair, "ada")
    speck = mask.clone()
    speck[:, :3, :3] = 1
    assert torch.equal(head_box(image, speck, "ada"), head_box(image, mask, "ada"))
    with pytest.raises(UserError, match="16x16 pixels; FastAvatar needs at least 32"):
        method.latent(image[:, :16, :16], mask[:, :16, :16], "ada")
    # Without a matte a detector looks.
    with pytest.raises(UserError, match="no face that dlib finds"):
        method.latent(image, torch.ones_like(mask), "ada")

    def no_dlib():
        raise UserError("dlib is not there")

    monkeypatch.setattr(fastavatar_faces, "_dlib", no_dlib)
    with pytest.raises(UserError, match="has no mask, and finding its face needs dlib"):
        method.latent(image, torch.ones_like(mask), "ada")


@pytest.fixture(scope="module")
def portrait(tmp_path_factory):
    """A synthetic face that dlib finds: (3, 160, 160) and its matte."""
    from shards import read_capture
    from shards.synth import synthesize

    folder = tmp_path_factory.mktemp("portrait")
    path = synthesize(folder, subjects=[1], timesteps=1, views=1, size=160, seed=3, progress=False)[0]
    view = read_capture(path).view(0, 0)
    return torch.from_numpy(view.image.copy()).permute(2, 0, 1) / 255, torch.from_numpy(view.mask.copy())[
        None
    ] / 255


def test_dlib_finds_the_face_of_a_picture_without_a_matte(portrait):
    pytest.importorskip("dlib")
    image, mask = portrait
    box, matte = head_box(image, torch.ones_like(mask), "ada"), head_box(image, mask, "ada")
    low, high = torch.maximum(box[:2], matte[:2]), torch.minimum(box[2:], matte[2:])
    shared = (high - low).clamp_min(0).prod()
    union = (box[2:] - box[:2]).prod() + (matte[2:] - matte[:2]).prod() - shared
    assert shared / union > 0.5
    with pytest.raises(UserError, match="shows 2 faces"):
        head_box(torch.cat([image, image], 2), torch.ones(1, 160, 320), "ada")


def test_a_frozen_recogniser_as_the_backbone(portrait, head):
    pytest.importorskip("dlib")
    config = replace(SMALL, backbone="dlib")
    torch.manual_seed(0)
    decoder = Decoder(config, seated(config), grey(head, config))
    method = FastAvatarMethod(decoder, Encoder(config), "arkit-52", {})
    image, mask = portrait
    latent = method.latent(image, mask)
    assert latent.shape == (8,)
    assert torch.equal(latent, method.latent(image, mask))
    with pytest.raises(UserError, match="looks at the camera"):
        method.latent(image.flip(1), mask.flip(1))
    assert not any(name.startswith("encoder.backbone") for name in Encoder(config).state_dict())


def test_arcface_needs_the_user_s_file(monkeypatch, tmp_path):
    pytest.importorskip("dlib")
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(UserError, match=r"w600k_r50.onnx"):
        fastavatar_faces.recogniser.__wrapped__("arcface")


# Files


def test_a_model_reads_back_and_its_halves_are_told_apart(method, tmp_path):
    provenance = {"expression_kind": "arkit-52"}
    save_network(tmp_path / "whole", "fastavatar", method.decoder, method.encoder, provenance)
    read = load_method(tmp_path / "whole")
    image, mask = picture()
    assert torch.equal(read.latent(image, mask), method.latent(image, mask))
    assert read.network == method.network
    people = {"ada": torch.randn(8), "ben": torch.randn(8)}
    save_network(tmp_path / "half", "fastavatar-decoder", method.decoder, None, provenance, people)
    decoder, encoder, _, found = read_network(tmp_path / "half")
    assert encoder is None
    assert torch.equal(found["ben"], people["ben"])
    assert fingerprint(decoder) == method.network
    with pytest.raises(UserError, match="only FastAvatar's decoder"):
        FastAvatarMethod.load(tmp_path / "half")
    with pytest.raises(UserError, match="leave --precision out"):
        FastAvatarMethod.load(tmp_path / "whole", torch.bfloat16)
    (tmp_path / "half" / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds no trained FastAvatar"):
        read_network(tmp_path / "half")
    told = json.loads((tmp_path / "whole" / "model.json").read_text())
    told["config"]["width"] = 20
    (tmp_path / "whole" / "model.json").write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"does not fit its model.json"):
        read_network(tmp_path / "whole")


def test_settings_that_make_no_network():
    for wrong, told in (
        ({"latent": 0}, "latent is 0"),
        ({"embedding": 3}, "embedding must be at least 4"),
        ({"sh_degree": 4}, "sh_degree is from 0 to 3"),
    ):
        with pytest.raises(UserError, match=told):
            FastAvatarConfig(**wrong)
    for wrong in ({"degrees": 0.0}, {"degrees": 181.0}, {"picture_people": -1}):
        with pytest.raises(UserError, match="degrees is more than 0 and at most 180"):
            FastAvatarEncoderConfig(**wrong)
    with pytest.raises(UserError, match="the unknown fields warp"):
        FastAvatarConfig.from_json(FastAvatarConfig().to_json() | {"warp": 1})


# Trainings


def batch_of(shards, inputs=False, **options):
    from shards import BatchLoader

    with BatchLoader(shards, "train", seed=0, inputs=inputs, **options) as loader:
        return next(loader) | {"progress": 0.0}


def test_the_shards_must_fit_the_recipe(shards):
    manifest = Manifest.load(shards)
    for changed, told in (
        ({"size": 64}, "--model.size is 64"),
        ({"expression_dim": 5}, "--model.expression-dim is 5"),
        ({"head": "flame"}, "--model.head"),
    ):
        config = find_recipe("fastavatar-decoder-tiny")
        task = task_for(config)
        task.config = replace(task.config, **changed)
        with pytest.raises(UserError, match=told):
            task.check(manifest)


def test_a_decoder_learns_people_and_an_encoder_finds_them(shards, tmp_path):
    """Both tasks in this process, from a template of fits to a whole model, and what does not fit together."""
    torch.manual_seed(0)
    manifest = Manifest.load(shards)
    layout = {"uv_resolution": 24, "sh_degree": 0}
    people = open_shards(shards, "train")
    fits = []
    for subject in people.subjects:
        inputs = from_shards(people.read(subject), FitSource("views", views=6))
        config = FastAvatarTemplateFitConfig(model=SMALL, steps=10, pictures_per_step=1)
        fits.append(run_fit(config, inputs, tmp_path / subject).avatar)
    average(fits).save(tmp_path / "template")

    recipe = find_recipe("fastavatar-decoder-tiny")
    recipe = replace(
        recipe, model=replace(recipe.model, **layout, people=4, template=str(tmp_path / "template"))
    )
    task = task_for(recipe)
    task.check(manifest)
    module = task.build()
    frozen = {name: value.clone() for name, value in module.state_dict().items() if ".template." in name}
    batch = batch_of(shards, micro_batch=2, views=2)
    losses = trained(task, module, batch, 25)
    assert losses[-1] < 0.9 * losses[0]
    assert all(torch.equal(module.state_dict()[name], value) for name, value in frozen.items())
    task.export(module, tmp_path / "decoder", {"expression_kind": "arkit-52"})
    task.verify_export(module, tmp_path / "decoder")
    assert list(read_network(tmp_path / "decoder")[3]) == people.subjects

    recipe = find_recipe("fastavatar-encoder-tiny")
    recipe = replace(recipe, model=replace(recipe.model, **layout, decoder=str(tmp_path / "decoder")))
    task = task_for(recipe)
    task.check(manifest)
    module = task.build()
    losses = trained(task, module, batch, 15)
    assert losses[-1] < losses[0]
    task.export(module, tmp_path / "model", {"expression_kind": "arkit-52"})
    task.verify_export(module, tmp_path / "model")
    kept = task_for(replace(recipe, model=replace(recipe.model, decoder_rate=0.0)))
    kept.check(manifest)
    assert len(kept.parameter_groups(kept.build())) == 1

    with pytest.raises(UserError, match=r"another latent than the recipe; set --model.latent 16"):
        task_for(replace(recipe, model=replace(recipe.model, latent=5))).build()
    task.config = replace(task.config, decoder=str(tmp_path / "model"))
    with pytest.raises(UserError, match="has learned no w for s0000"):
        task.check(manifest)
    wrong = replace(find_recipe("fastavatar-decoder-tiny").model, template=str(tmp_path / "template"))
    with pytest.raises(UserError, match="The template has"):
        task_for(replace(recipe, model=wrong)).build()
    with pytest.raises(UserError, match=r"holds no avatar.json; make a template"):
        task_for(replace(recipe, model=replace(wrong, template="nowhere"))).build()


def test_an_encoder_looks_at_other_moments_and_not_at_backs_of_heads(shards, monkeypatch):
    torch.manual_seed(0)
    recipe = find_recipe("fastavatar-encoder-tiny")
    assert task_for(recipe).reads_inputs
    assert not task_for(replace(recipe, model=replace(recipe.model, nce_weight=0.0))).reads_inputs
    batch = batch_of(shards, inputs=True, micro_batch=3, views=6)
    poses = torch.cat([batch["target_world_to_camera"], batch["input_world_to_camera"]], 1)
    places = -(poses[..., :3, :3].mT @ poses[..., :3, 3:])[..., 0]
    degrees = torch.rad2deg(torch.atan2(places[..., :2].norm(dim=-1), places[..., 2]))  # (3, 8)
    layout = {"uv_resolution": 24, "sh_degree": 0}
    looked: list[int] = []
    drawn: list[int] = []
    for most in (180.0, 70.0):
        model = replace(recipe.model, **layout, degrees=most, picture_people=2)
        task = task_for(replace(recipe, model=model))
        task.check(Manifest.load(shards))
        module = task.build()
        monkeypatch.setattr(module.decoder, "forward", counting(module.decoder.forward, drawn))
        monkeypatch.setattr(module.encoder, "forward", counting(module.encoder.forward, looked))
        loss, _ = module(batch)
        assert loss.isfinite()
    assert looked == [24, int((degrees <= 70).sum())]
    assert 6 <= looked[1] < 24
    assert drawn == [2, 2]
    seen, owner = module._looked_at(batch)
    assert owner.tolist() == sorted(owner.tolist())
    behind = batch | {
        "input_images": torch.maximum(batch["input_images"], (batch["input_masks"] == 0).float())
    }
    assert torch.equal(module._looked_at(behind)[0], seen)
    module.config = replace(module.config, degrees=1.0)
    with pytest.raises(UserError, match=r"within 1 degrees of straight ahead"):
        module(batch)


def test_a_matte_shows_the_hair_that_black_hides(shards):
    """Black hair over black: only the matte moves Gaussians, and to as much hair as it has."""
    recipe = find_recipe("fastavatar-decoder-tiny")
    batch = batch_of(shards, micro_batch=2, views=2)
    batch["target_images"] = torch.zeros_like(batch["target_images"])
    bald = batch["target_masks"]
    covered: dict[str, float] = {}
    gradients: dict[str, float] = {}
    for name, weight, matte in (
        ("no matte", 0.0, bald),
        ("bald", 1.0, bald),
        ("afro", 1.0, torch.nn.functional.max_pool2d(bald.flatten(0, 1), 9, 1, 4).view_as(bald)),
    ):
        torch.manual_seed(0)
        model = replace(recipe.model, uv_resolution=24, people=4, matte_weight=weight, shape_weight=0.0)
        task = task_for(replace(recipe, model=model))
        task.check(Manifest.load(shards))
        module = task.build()
        with torch.no_grad():  # so black that it stays black
            module.decoder.template["colors"].fill_(-9.0)
        seen = batch | {"target_masks": matte}
        loss, parts = module(seen)
        loss.backward()
        assert ("matte" in parts) == (weight > 0)
        gradients[name] = float(module.decoder.template["offsets"].grad.abs().sum())
        if weight:
            trained(task, module, seen, 25)
            with torch.no_grad():
                covered[name] = alpha_of(module, seen)
                assert abs(covered[name] - float(matte.mean())) < 0.05, name
    assert gradients["no matte"] == 0
    assert min(gradients["bald"], gradients["afro"]) > 0
    assert covered["afro"] > covered["bald"] + 0.1


def alpha_of(module, batch) -> float:
    """Mean coverage of the batch's people in its pictures, before black."""
    rows = [module.rows[name.split("/")[0]] for name in batch["ids"]]
    made = module.decoder(module.people[rows])
    size = tuple(batch["target_masks"].shape[-2:])
    total = []
    for person, expression in enumerate(batch["expression"]):
        avatar = FastAvatar(made[person].local, batch["identity"][person], head="makehuman",
                            uv_resolution=module.config.uv_resolution, expression_kind="arkit-52")  # fmt: skip
        cameras = Cameras(batch["target_K"][person], batch["target_world_to_camera"][person])
        total.append(render(avatar, expression, cameras, size).alpha.mean())
    return float(torch.stack(total).mean())


def counting(function, counts):
    """The same function, which notes how many rows it is given."""

    def counted(rows):
        counts.append(len(rows))
        return function(rows)

    return counted


def trained(task, module, batch, steps) -> list[float]:
    """Losses of some plain Adam steps on one batch."""
    module.train()
    groups = [{"params": values, "lr": 3e-3 * share} for share, values in task.parameter_groups(module)]
    optimizer = torch.optim.Adam(groups)
    losses = []
    for _ in range(steps):
        loss, _ = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_lpips_is_asked_for_before_the_first_step(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    config = replace(find_recipe("fastavatar-decoder-tiny"), loss=LossConfig(lpips=0.1))
    with pytest.raises(UserError, match=r"--loss.lpips 0.1 needs weights"):
        task_for(config).check_weights()


@pytest.mark.slow
@pytest.mark.e2e
def test_the_whole_way_on_the_command_line(shards, captures, tmp_path, capsys):
    """Both trainings under DeepSpeed on one rank, then people made, mixed and changed."""
    export = tmp_path / "encoder" / "export"
    run("train", "fastavatar-decoder-tiny", "--data", shards, "--run", tmp_path / "decoder", "--steps", "4")
    assert not main(["export", str(tmp_path / "decoder"), str(tmp_path / "again")])
    decoder = tmp_path / "decoder" / "export"
    words = ["--data", shards, "--run", tmp_path / "encoder", "--steps", "4", "--model.decoder", decoder]
    for weight in (
        "decoder-rate",
        "picture-weight",
        "shape-weight",
    ):  # as the authors: the decoder stays as it is
        words += [f"--model.{weight}", "0"]
    run("train", "fastavatar-encoder-tiny", *words)
    for name, subject in (("ada", "s0000"), ("ben", "s0001")):
        assert not main(
            ["create", str(export), str(tmp_path / name), "--data", str(shards), "--subject", subject]
        )
    between_ = [str(tmp_path / name) for name in ("ada", "ben", "between")]
    assert not main(["interpolate", str(export), *between_, "--count", "3", "--size", "32"])
    first, last = (load_avatar(tmp_path / "between" / name) for name in ("00", "02"))
    assert torch.equal(first.latent, load_avatar(tmp_path / "ada").latent)
    assert torch.equal(last.latent, load_avatar(tmp_path / "ben").latent)
    assert (tmp_path / "between" / "strip.png").is_file()

    capsys.readouterr()
    words = ["attributes", str(export), "--data", str(shards), "--captures", str(captures)]
    assert main(words) == 1
    assert "4 labelled people are too few" in capsys.readouterr().err
    method = load_method(export)
    torch.manual_seed(0)
    labels = {"age": torch.rand(20), "hair": torch.rand(20)}
    fit_directions(torch.randn(20, 16), labels, {"age": "0 to 1", "hair": "cm"}, method.network).save(export)
    edited = ["edit", str(export), str(tmp_path / "ada"), str(tmp_path / "older"), "--amount", "0.5"]
    assert not main([*edited, "--attribute", "age"])
    moved = load_avatar(tmp_path / "older").latent - first.latent
    assert torch.allclose(moved, 0.5 * read_directions(export, method.network).steps["age"], atol=1e-6)
    assert main([*edited, "--attribute", "wit"]) == 1
    assert "there are age, hair" in capsys.readouterr().err

    # Latents and directions of another checkpoint.
    run("train", "fastavatar-encoder-tiny", "--data", shards, "--run", tmp_path / "other", "--steps", "2",
        "--seed", "5")  # fmt: skip
    other = str(tmp_path / "other" / "export")
    assert main(["interpolate", other, *between_]) == 1
    assert "is of another checkpoint" in capsys.readouterr().err
    (tmp_path / "other" / "export" / "directions.json").write_text((export / "directions.json").read_text())
    assert main(["edit", other, *edited[2:], "--attribute", "age"]) == 1
    assert "directions of another checkpoint" in capsys.readouterr().err


def run(*words):
    """A command in a process of its own, as trainings set up a process group."""
    environment = os.environ | {"CI": "true", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run([sys.executable, "-m", "launch.cli", *map(str, words)], capture_output=True, text=True,
                         env=environment)  # fmt: skip
    assert ran.returncode == 0, f"{words}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"


@pytest.mark.e2e
def test_the_template_command_fits_and_averages(shards, tmp_path):
    out = tmp_path / "template"
    words = ["template", out, "--data", shards, "--steps", "5", "--uv-resolution", "24", "--views", "4"]
    run(*words, "--workers", "1")
    template = load_avatar(out)
    assert template.variant == "template"
    fits = [FastAvatar.load(path) for path in sorted((tmp_path / "template-fits").glob("*/s*"))]
    assert len(fits) == 4
    assert torch.allclose(template.local.opacities, torch.stack([f.local.opacities for f in fits]).mean(0))


TINY = {
    "--subjects 20 --timesteps 3 --views 16 --size 128": "--subjects 14 --timesteps 2 --views 4 --size 48",
    "--size 128 --heldout 2": "--size 48 --heldout 2",
    "headsplat template work/template": "headsplat template work/template --uv-resolution 32 --steps 4 --workers 1",
    "-cpu --data": "-tiny --steps 4 --data",
    "s0018": "s0012",
    "s0019": "s0013",
}


@pytest.mark.e2e
@pytest.mark.slow
def test_what_the_page_shows_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "fastavatar.md").read_text()
    for long, short in TINY.items():
        assert long in text
        text = text.replace(long, short)
    lines = [line for block in re.findall(r"```sh\n(.*?)```", text, re.S) for line in block.splitlines()]
    assert len(lines) == 11
    for line in lines:
        run(*shlex.split(line)[1:])
    assert (tmp_path / "work" / "between" / "strip.png").is_file()
    assert load_avatar(tmp_path / "work" / "older").provenance["attribute"] == "age"


# Editing


def test_directions_tell_attributes_apart_that_go_together():
    torch.manual_seed(0)
    steps = {"age": torch.randn(8), "tone": torch.randn(8)}
    age = torch.rand(60)
    labels = {"age": age, "tone": 0.8 * age + 0.2 * torch.rand(60)}
    latents = sum(labels[name][:, None] * steps[name] for name in steps) + 0.01 * torch.randn(60, 8) + 3
    found = fit_directions(latents, labels, {"age": "", "tone": ""}, "abc")
    for name in steps:
        assert torch.allclose(found.steps[name], steps[name], atol=0.1)
    assert found.ranges["age"] == (float(age.min()), float(age.max()))
    moved = found.moved(torch.zeros(8), "age", 2.0)
    assert torch.allclose(moved, 2 * found.steps["age"])
    with pytest.raises(UserError, match="there are age, tone"):
        found.moved(torch.zeros(8), "wit", 1.0)
    with pytest.raises(UserError, match="5 labelled people are too few"):
        fit_directions(latents[:5], {n: v[:5] for n, v in labels.items()}, {}, "abc")


def test_directions_are_kept_with_their_checkpoint(tmp_path):
    torch.manual_seed(0)
    found = fit_directions(torch.randn(9, 4), {"age": torch.rand(9)}, {"age": "years"}, "abc")
    with pytest.raises(UserError, match="find directions with headsplat attributes"):
        read_directions(tmp_path, "abc")
    found.save(tmp_path)
    read = read_directions(tmp_path, "abc")
    assert torch.equal(read.steps["age"], found.steps["age"])
    assert (read.units, read.ranges, read.people) == (found.units, found.ranges, 9)
    with pytest.raises(UserError, match="of another checkpoint"):
        read_directions(tmp_path, "def")


def test_between_two_people_lies_a_line():
    a, b = torch.zeros(4), torch.ones(4)
    assert [float(w[0]) for w in between(a, b, 5)] == [0, 0.25, 0.5, 0.75, 1]
    with pytest.raises(UserError, match="at least 2 steps"):
        between(a, b, 1)
    with pytest.raises(UserError, match="different checkpoints"):
        between(a, torch.ones(5), 3)


def test_latents_that_are_not_this_model_s(method, head):
    with pytest.raises(UserError, match="decodes latents of 8 numbers"):
        method.decode(torch.zeros(9))
    with pytest.raises(UserError, match="was fitted and has no latent"):
        method.latent_of(grey(head))
    foreign = method.decode(torch.zeros(8))
    assert torch.equal(method.latent_of(foreign), torch.zeros(8))
    foreign.network = "0123456789abcdef"
    with pytest.raises(UserError, match="is of another checkpoint"):
        method.latent_of(foreign)


def test_labels_come_from_the_captures(captures, tmp_path):
    from launch.editing import label_people

    labels = label_people(captures, ["s0000", "s0003"])
    told = [json.loads((captures / name / "capture.json").read_text()) for name in ("s0000", "s0003")]
    assert labels["age"].tolist() == pytest.approx([t["appearance"]["age"] for t in told])
    assert all(10 < width < 22 for width in labels["width"].tolist())
    assert all(0 <= hair < 40 for hair in labels["hair"].tolist())
    with pytest.raises(UserError, match="holds no labels"):
        label_people(tmp_path, ["s0000"])


def test_pictures_of_a_person_come_out_of_the_cpu_rasterizer(method):
    from eval.movies import portrait_cameras

    person = method.decode(torch.zeros(8))
    image = render(person, torch.zeros(52), portrait_cameras(1, 48), (48, 48)).image
    assert 0.05 < float(image.mean()) < 0.8
    assert isinstance(shared_head("makehuman"), ParametricHead)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_cuda_device_makes_the_same_person(method, shards):
    inputs = open_shards(shards, "heldout").read("s0004").input_sets[0]
    here = method.create(inputs)
    there = FastAvatarMethod(
        copy.deepcopy(method.decoder).cuda(), copy.deepcopy(method.encoder).cuda(), "arkit-52", {}
    ).create(inputs.to("cuda"))
    assert there.latent.device.type == "cuda"
    torch.testing.assert_close(there.latent.cpu(), here.latent, atol=1e-3, rtol=1e-3)
    code = torch.full((52,), 0.2)
    ours, theirs = here.gaussians(code), there.gaussians(code.cuda())
    torch.testing.assert_close(theirs.means.cpu(), ours.means, atol=1e-4, rtol=1e-3)
