"""Fits: they make the person better, go on where they stopped, and refuse what they cannot fit."""

from __future__ import annotations

import dataclasses
import errno
from dataclasses import dataclass

import pytest
import torch
from egg_head import EggHead, cameras_around, painted_egg, pictures_of

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatarConfig
from avatars.gaussians import quaternion_to_matrix
from avatars.head.uv import surface_frames
from avatars.method import render
from cluster.fit import configuration, fits_name, network_identity
from eval.metrics import psnr
from train.fits import RECIPES, FitSource
from train.fits.fit import CHECKPOINT, fit_key, forget_checkpoint, run_fit
from train.fits.flashavatar import FlashAvatarFitConfig
from train.fits.look import neighbour_distance, sample_colors, spread_colors
from train.fits.mouth import lip_points, mouth_masks

EXPRESSIONS = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.6, 0.5, 0.0]])
DEGREES = [0.0, 45.0, -45.0, 10.0]
MODEL = FlashAvatarConfig(head="egg", uv_resolution=32, sh_degree=1, mlp_width=16, mlp_layers=2)


class EggFit(FlashAvatarFitConfig):
    """A fit on the egg, which `ParametricHead.load` does not know."""

    def build(self, inputs, device="cpu", head=None):
        return super().build(inputs, device, EggHead())


def small(**changes):
    given = {
        "model": MODEL,
        "steps": 12,
        "checkpoint_every": 4,
        "pictures_per_step": 2,
        "look": "pictures",
        "opacity": 0.9,
        "background": "random",
        "lpips_weight": 0.0,
        "keep_unseen_colors": True,
        "rate_color": 0.02,
        "rate_offsets": 1e-3,
        "sh_every": 5,
    }
    return EggFit(**(given | changes))


@pytest.fixture(scope="module")
def inputs():
    return pictures_of(painted_egg(), DEGREES, EXPRESSIONS)


def test_a_fit_comes_closer_to_views_and_expressions_that_it_never_saw(inputs, tmp_path):
    truth, expression = painted_egg(), torch.tensor([0.3, 0.8, 0.0])
    cameras = cameras_around([-20.0, 25.0], 40)
    wanted = render(truth, expression, cameras, (40, 40)).image

    def quality(avatar):
        return float(psnr(render(avatar, expression, cameras, (40, 40)).image, wanted).mean())

    config = small(steps=60)
    start = quality(config.build(inputs).avatar())
    losses = []
    fitted = run_fit(config, inputs, tmp_path, on_step=lambda step, steps, loss: losses.append(loss["loss"]))
    assert quality(fitted.avatar) > start + 1.0
    assert sum(losses[-10:]) < 0.7 * sum(losses[:10])
    assert fitted.seconds > 0
    grey = small(look="grey", background="black").build(inputs).avatar()
    assert start > quality(grey) + 3.0  # the pictures' colours are worth a lot from the first step


def test_a_fit_that_was_stopped_ends_as_one_that_never_stopped(inputs, tmp_path):
    whole = run_fit(small(), inputs, tmp_path / "whole")

    class StoppedError(Exception):
        pass

    def stop(step, steps, losses):
        if step == 10:  # two steps after a checkpoint
            raise StoppedError

    with pytest.raises(StoppedError):
        run_fit(small(), inputs, tmp_path / "stopped", on_step=stop)
    steps = []
    resumed = run_fit(
        small(), inputs, tmp_path / "stopped", on_step=lambda step, total, losses: steps.append(step)
    )
    assert (whole.resumed_from, resumed.resumed_from) == (0, 8)
    assert steps == [9, 10, 11, 12]
    for name, value in whole.avatar.state_dict().items():
        assert torch.equal(value, resumed.avatar.state_dict()[name]), name


def test_a_finished_fit_is_not_stepped_again_and_another_fit_starts_afresh(inputs, tmp_path):
    run_fit(small(), inputs, tmp_path)
    steps = []

    def count(step, total, losses):
        steps.append(step)

    assert run_fit(small(), inputs, tmp_path, on_step=count).resumed_from == 12
    assert steps == []
    assert run_fit(small(seed=1), inputs, tmp_path, on_step=count).resumed_from == 0
    assert steps == list(range(1, 13))
    forget_checkpoint(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fits_are_called_after_what_they_were_made_from():
    names = {
        "flashavatar": FitSource(),
        "flashavatar-1-input": FitSource(inputs=1),
        "flashavatar-2-inputs": FitSource(inputs=2),
        "flashavatar-views": FitSource("views"),
        "flashavatar-video": FitSource("video"),
    }
    assert [fits_name("flashavatar", source) for source in names.values()] == list(names)


def test_keys_tell_configurations_and_inputs_apart():
    keys = {
        fit_key(small()),
        fit_key(small(seed=1)),
        fit_key(small(model=dataclasses.replace(MODEL, uv_resolution=16))),
        fit_key(small(), {"subject": "a"}),
        fit_key(small(), {"subject": "b"}),
    }
    assert len(keys) == 5
    assert fit_key(small(), {"subject": "a"}) in keys


def test_a_damaged_checkpoint_is_a_sentence(inputs, tmp_path):
    (tmp_path / CHECKPOINT).write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"checkpoint\.pt cannot be read; delete it"):
        run_fit(small(), inputs, tmp_path)


def test_no_space_for_a_checkpoint_leaves_the_older_one_whole(inputs, tmp_path, monkeypatch):
    run_fit(small(), inputs, tmp_path)
    before = (tmp_path / CHECKPOINT).read_bytes()

    def full(state, file):
        file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match="cannot be written \\(No space left on device\\)"):
        run_fit(small(seed=1), inputs, tmp_path)
    assert (tmp_path / CHECKPOINT).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT]


def test_a_loss_that_is_not_finite_stops_the_fit(inputs, tmp_path):
    broken = dataclasses.replace(inputs, images=inputs.images.clone())
    config = small(look="grey")
    broken.images[:, :, 20, 20] = torch.nan
    with pytest.raises(UserError, match="egg got a loss that is not finite at step 1"):
        run_fit(config, broken, tmp_path)


def test_pictures_that_cannot_be_fitted_are_a_sentence_each(inputs):
    cases = [
        ({"identity": None}, "egg have none"),
        ({"head": None}, "egg have none"),
        ({"head": "flame"}, "tracked with the head 'flame'"),
        ({"expressions": torch.zeros(4, 52)}, "codes of 52 numbers"),
        ({"expressions": EXPRESSIONS[:3]}, "4 pictures, 4 masks, 4 cameras and 3 expression codes"),
        ({"masks": torch.zeros_like(inputs.masks)}, "No picture of egg shows the tracked head"),
        ({"cameras": cameras_around([0, 1, 2, 3], 4000)}, "The face of egg is in none of the 4 pictures"),
        (
            {"cameras": cameras_around([180, 150, 200, 210], 40)},
            "The face of egg is in none of the 4 pictures",
        ),
    ]
    for change, sentence in cases:
        for look in ("pictures", "grey"):
            with pytest.raises(UserError, match=sentence):
                small(look=look).build(dataclasses.replace(inputs, **change))
    with pytest.raises(UserError, match="steps is 0"):
        small(steps=0)
    with pytest.raises(UserError, match="opacity is 0"):
        small(opacity=0.0)


def test_what_no_picture_shows_keeps_the_colour_of_its_start(inputs):
    fit = small(pictures_per_step=1).build(inputs)
    first = fit.model.sh_dc.detach().clone()
    for _ in range(8):
        fit.advance()
    moved = (fit.model.sh_dc.detach() - first).abs().sum((1, 2))
    behind = fit.centers[0][:, 2] < -0.06
    assert behind.sum() > 50
    assert not fit.seen[behind].any()
    assert (moved[~fit.seen] == 0).all()
    assert (moved[fit.seen] > 0).float().mean() > 0.9


def test_pictures_of_a_step_share_an_expression_and_a_pass_has_all_of_them(inputs):
    five = dataclasses.replace(
        inputs,
        images=inputs.images[[0, 1, 2, 3, 0, 1, 2]],
        masks=inputs.masks[[0, 1, 2, 3, 0, 1, 2]],
        cameras=inputs.cameras[[0, 1, 2, 3, 0, 1, 2]],
        expressions=EXPRESSIONS[[0, 1, 0, 1, 0, 1, 2]],
    )
    fit = small(pictures_per_step=2).build(five)
    passes = []
    for number in range(3):
        steps = []
        for step in range(4):
            fit.step = 4 * number + step
            steps.append(fit._drawn())
        assert sorted(picture for step in steps for picture in step) == list(range(7))
        assert [len({int(fit.code_of[picture]) for picture in step}) for step in steps[:2]] == [1, 1]
        assert [len(step) for step in steps] == [2, 2, 2, 1]
        passes.append(steps)
    assert passes[0] != passes[1] != passes[2]
    fit.step = 4
    assert fit._drawn() == passes[1][0]  # whatever came before
    limited = small(pictures_per_step=2, most_a_pass=3).build(five)
    assert len(limited._drawn()) == 2
    limited.step = 1
    assert len(limited._drawn()) == 1


def test_the_loss_of_a_step_is_the_mean_over_its_pictures(inputs):
    config = small(pictures_per_step=4, background="black", mouth_weight=0.0)
    fit = config.build(inputs)
    single = [fit._losses([picture])["huber"].item() for picture in range(4)]
    assert fit.advance()["huber"] == pytest.approx(sum(single) / 4, rel=1e-5)


def test_hiding_the_expression_depends_on_how_many_pictures_share_one(inputs):
    config = small(expression_dropout=0.5)
    assert config.build(inputs).dropout == 0.5
    shared = dataclasses.replace(inputs, expressions=EXPRESSIONS[[0, 0, 1, 1]])
    assert config.build(shared).dropout == 0.25


def test_every_recipe_builds_and_says_when_lpips_is_left_out(inputs, monkeypatch, tmp_path):
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name, recipe in RECIPES.items():
        config = recipe()
        if not isinstance(config, FlashAvatarFitConfig):
            continue
        egg = dataclasses.replace(
            config, model=dataclasses.replace(config.model, head="egg", uv_resolution=16)
        )
        fit = egg.build(inputs, head=EggHead())
        assert fit.advance()["loss"] > 0, name
        left_out = [note for note in fit.notes if "vgg16-397923af.pth" in note]
        assert len(left_out) == (0 if config.lpips_weight == 0 else 1), name


@dataclass(frozen=True)
class Other:
    """A method whose fits start from a trained network and which has one recipe for all pictures."""

    steps: int = 3
    network: str = ""
    checkpoint_every: int = 1
    method: str = "other"


def test_a_method_chooses_its_recipe_by_the_hardware_and_the_pictures(monkeypatch):
    monkeypatch.setitem(RECIPES, "other-cpu", Other)
    inputs, views = FitSource(), FitSource("views")

    def chosen(method, gpu, source, **overrides):
        return configuration(method, gpu, source, overrides)

    assert chosen("flashavatar", False, inputs) == RECIPES["flashavatar-cpu"]()
    assert chosen("flashavatar", False, views) == RECIPES["flashavatar-cpu-many"]()
    assert chosen("flashavatar", True, views) == RECIPES["flashavatar-gpu-many"]()
    assert chosen("flashavatar-paper", False, views) == RECIPES["flashavatar-paper"]()
    assert chosen("other", False, views) == Other()
    changed = chosen("flashavatar", False, inputs, steps=7, uv_resolution=32)
    assert (changed.steps, changed.model.uv_resolution) == (7, 32)
    with pytest.raises(UserError, match="other has no recipe for GPUs; name one of its own: other-cpu"):
        chosen("other", True, inputs)
    with pytest.raises(
        UserError, match=r"no fit called 'otter'; there are the methods .*flashavatar, .*other"
    ):
        chosen("otter", True, inputs)
    with pytest.raises(UserError, match="A fit of other has no setting 'uv_resolution'"):
        chosen("other", False, inputs, uv_resolution=32)
    with pytest.raises(UserError, match="A fit of flashavatar has no setting 'network'"):
        chosen("flashavatar", False, inputs, network="somewhere")


def test_a_fit_knows_the_network_it_starts_from_by_its_content(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"one")
    first = network_identity(Other(network=str(tmp_path)))
    assert first == network_identity(Other(network=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes(b"two")
    assert first != network_identity(Other(network=str(tmp_path)))
    assert network_identity(Other()) == network_identity(small()) == {}
    with pytest.raises(UserError, match="is not a folder; --network is what a training of other exported"):
        network_identity(Other(network=str(tmp_path / "nothing")))


def test_the_paper_recipe_starts_as_the_paper_says(inputs):
    config = RECIPES["flashavatar-paper"]()
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, head="egg", uv_resolution=16)
    )
    fit = config.build(inputs, head=EggHead())
    made = fit.avatar()
    assert (config.steps, config.mouth_weight, config.lpips_from, config.background) == (
        150_000,
        40,
        15_000,
        "green",
    )
    assert bool((made.sh_dc == 0).all())
    torch.testing.assert_close(made.opacity_logit.sigmoid(), torch.full_like(made.opacity_logit, 0.1))
    placed = made.deform(fit.centers[0], EXPRESSIONS[0]).means.detach()
    torch.testing.assert_close(made.log_scale[:, 0].exp(), neighbour_distance(placed))
    rates = [group["lr"] for group in fit.optimizer.param_groups]
    assert rates == pytest.approx([0.0025, 0.0025 / 20, 0.05, 0.005, 0.001, 1e-4])


def test_spherical_harmonics_grow_with_the_schedule(inputs):
    fit = small(sh_every=3).build(inputs)
    for _ in range(3):
        fit.advance()
    assert not fit.model.sh_rest.detach().any()
    fit.advance()
    assert fit.model.sh_rest.detach().abs().max() > 0


def test_the_mouth_mask_covers_the_lips_from_the_front_and_nothing_from_behind():
    head = EggHead()
    vertices = head.vertices(torch.zeros(3, 2), torch.zeros(3, 3))
    points, margin = lip_points(head)
    lips = vertices[:, points]
    assert margin > 1
    cameras = cameras_around([0.0, 30.0, 180.0], 64)
    masks = mouth_masks(lips, cameras, (64, 64))
    for view in (0, 1):
        pixels, _ = cameras[view].project(lips[view])
        x, y = pixels[0].mean(0).long().tolist()
        assert masks[view, 0, y, x] == 1
        assert 0.005 < masks[view].mean() < 0.1
    assert masks[2].sum() == 0


def test_mouths_that_are_kept_are_those_that_were_drawn(inputs):
    fit = small().build(inputs)
    pictures = [2, 0, 3]
    wanted = mouth_masks(fit.lips[fit.code_of[pictures]], fit.inputs.cameras[pictures], fit.inputs.size)
    for _ in range(2):
        assert torch.equal(fit._mouths(pictures), wanted)
    assert wanted.sum() > 0
    behind = dataclasses.replace(inputs, cameras=cameras_around([180.0, *DEGREES[1:]], 40))
    assert not small().build(behind)._mouths([0]).any()


def test_a_grid_has_neighbours_at_distance_one():
    grid = torch.stack(torch.meshgrid(*[torch.arange(4.0)] * 3, indexing="ij"), -1).reshape(-1, 3)
    torch.testing.assert_close(neighbour_distance(grid), torch.ones(64))


def test_ellipses_follow_the_stretch_of_the_map():
    generator = torch.Generator().manual_seed(0)
    uv = torch.rand(40, 3, 2, generator=generator)
    turn, _ = torch.linalg.qr(torch.randn(40, 3, 3, generator=generator))
    flat = torch.cat(
        [uv * torch.tensor([0.3, 0.1]), torch.zeros(40, 3, 1)], -1
    )  # a pixel is 3 cm x 1 cm of skin
    corners = flat @ turn.transpose(1, 2)
    rotations, lengths, normals = surface_frames(corners, uv, resolution=10)
    torch.testing.assert_close(lengths, torch.tensor([0.03, 0.01]).expand(40, 2), rtol=1e-3, atol=0)
    axes = quaternion_to_matrix(rotations)
    torch.testing.assert_close(axes[..., 2], normals, rtol=0, atol=1e-4)
    along = (axes[..., 0] * turn[..., 0]).sum(-1).abs()  # the long axis lies where u goes
    torch.testing.assert_close(along, torch.ones(40), rtol=0, atol=1e-3)
    edge = corners[:, 1] - corners[:, 0]
    torch.testing.assert_close((edge * normals).sum(-1), torch.zeros(40), rtol=0, atol=1e-5)


def test_points_get_the_colours_that_pictures_show_and_others_their_neighbours():
    camera = cameras_around([0.0], 16)
    points = torch.tensor([[[0.02, 0.0, 0.1], [0.02, 0.0, -0.1], [-0.05, 0.0, 0.1], [5.0, 0.0, 0.1]]])
    facing = torch.tensor([0.0, 0.0, 1.0]).expand(1, 4, 3).clone()
    facing[0, 2] *= -1  # looks away
    image = torch.zeros(1, 3, 16, 16)
    image[:, 0, :, 8:] = 1.0  # red on the right of the picture, the subject's left
    mask = torch.ones(1, 1, 16, 16)
    depth = torch.full((1, 1, 16, 16), 0.9)
    colors, weights = sample_colors(points, facing, image, mask, depth, camera, slack=0.02)
    assert (weights > 0).tolist() == [True, False, False, False]  # seen, behind, turned away, outside
    torch.testing.assert_close(colors[0], torch.tensor([1.0, 0.0, 0.0]))

    points = torch.tensor([[0.05, 0, 0], [0.0, 0.1, 0], [-0.05, 0, 0]])
    colors, weights = torch.tensor([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 0]]), torch.tensor([1.0, 1.0, 0.0])
    assert spread_colors(points, colors, weights, mirror=True)[2, 0] > 0.8  # the other side's red
    assert spread_colors(points, colors, weights, mirror=False)[2, 0] < 0.6
    assert bool((spread_colors(points, colors, torch.zeros(3), mirror=True) == 0.5).all())
