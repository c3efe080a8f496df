"""GASP: Gaussians that follow triangles, the prior and its training, the three-stage fit and its refusals."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from egg_head import cameras_around
from ranks import finish, start

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gasp import ATTRIBUTES, GaspAvatar, GaspConfig, GaspPrior, Surface
from avatars.gasp.prior import Decoder
from avatars.gaussians import quaternion_to_matrix
from avatars.head import ParametricHead
from avatars.head.mesh import triangle_frames
from avatars.method import load_avatar, load_method
from avatars.rasterize import rasterize
from launch.cli import main
from launch.data import DEMO
from launch.recipes import CAPTURES, RECIPES, find_recipe
from shards import Manifest, pack, read_capture
from shards.synth import synthesize
from train.fits import RECIPES as FITS
from train.fits import FitPictures
from train.fits.fit import fit_key, run_fit
from train.fits.gasp import INVERT, REFINE, TUNE, GaspFitConfig, refinement_rates
from train.tasks import settled, task_for
from train.tasks.gasp import GaspTask, backgrounds_of

SHAPE = GaspConfig(size=48, uv_resolution=24, code=6, width=16, layers=2, people=3)
TURN = torch.linalg.matrix_exp(torch.tensor([[0.0, -0.3, 0.2], [0.3, 0.0, -0.5], [-0.2, 0.5, 0.0]]))


@pytest.fixture(scope="module")
def head():
    return ParametricHead.load()


def faces_of(head, people=1, expression=0):
    """Posed heads (B, V, 3) of people that differ, all with one weight of the expression on."""
    generator = torch.Generator().manual_seed(0)
    identity = torch.randn(people, head.n_identity, generator=generator)
    weights = torch.zeros(people, head.n_expression)
    weights[:, expression] = 0.7
    return head.vertices(identity, weights)


def knowing_prior(head):
    """A prior whose network says something: one that is trained by nobody, but not zero."""
    torch.manual_seed(1)
    prior = GaspPrior(SHAPE, head)
    with torch.no_grad():
        prior.codes.normal_()
        prior.features.normal_()
        prior.decoder.output.weight.normal_(0, 0.05)
        prior.decoder.output.weight[ATTRIBUTES["color"]].normal_(0, 0.5)
        prior.color.copy_(torch.rand_like(prior.color))
        prior.opacity.fill_(3.0)
    return prior.eval()


@pytest.fixture(scope="module")
def prior_folder(head, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prior")
    knowing_prior(head).save(folder, {"recipe": "by hand"})
    return folder


@pytest.fixture(scope="module")
def pictures(head):
    """Three pictures of somebody that the prior could be, but was not."""
    prior, count = knowing_prior(head), 3
    generator = torch.Generator().manual_seed(2)
    identity = torch.randn(head.n_identity, generator=generator)
    expressions = 0.5 * torch.rand(count, head.n_expression, generator=generator)
    with torch.no_grad():
        attributes = prior.attributes(torch.randn(1, SHAPE.code, generator=generator))[0]
        posed = prior.surface.attach(attributes, head.vertices(identity.expand(count, -1), expressions))
    cameras = cameras_around([0.0, 50.0, 160.0], SHAPE.size)
    drawn = [rasterize(g, cameras[i], (SHAPE.size, SHAPE.size)) for i, g in enumerate(posed)]
    return FitPictures(
        torch.cat([one.image for one in drawn]).clamp(0, 1),
        torch.cat([one.alpha for one in drawn]),
        cameras,
        expressions,
        "arkit-52",
        "somebody",
        "makehuman",
        identity,
        {"timesteps": ["0", "1", "2"]},
    )


# The surface


def test_the_built_in_head_carries_as_many_gaussians_as_the_papers(head):
    assert len(Surface(GaspConfig(uv_resolution=512), head)) == 186_839  # the paper: about 188,000
    assert len(Surface(GaspConfig(uv_resolution=64), head)) == 2_926


def test_triangle_frames_turn_and_grow_with_the_mesh(head):
    vertices = faces_of(head)[0]
    turn, size = triangle_frames(vertices, head.faces)
    solid = size > 1e-5
    identity = torch.eye(3).expand(int(solid.sum()), 3, 3)
    torch.testing.assert_close(turn[solid].transpose(1, 2) @ turn[solid], identity, atol=1e-4, rtol=0)
    turned, grown = triangle_frames(2 * vertices @ TURN.T, head.faces)
    torch.testing.assert_close(turned[solid], TURN @ turn[solid], atol=1e-3, rtol=0)
    torch.testing.assert_close(grown[solid], 2 * size[solid], atol=1e-6, rtol=1e-4)


def test_gaussians_start_flat_on_the_skin(head):
    surface = Surface(SHAPE, head)
    vertices = surface.mean_head()
    gaussians = surface.attach(surface.start(), vertices[None])[0]
    corners = vertices[head.faces[surface.triangles]]
    expected = (corners * surface.barycentric[..., None]).sum(1)
    torch.testing.assert_close(gaussians.means, expected, atol=1e-6, rtol=0)
    normals = triangle_frames(vertices, head.faces)[0][surface.triangles, :, 2]
    thin = quaternion_to_matrix(gaussians.quats)[:, :, 2]
    assert float((thin * normals).sum(-1).min()) > 0.999


def test_gaussians_turn_and_grow_with_the_head(head):
    surface = Surface(SHAPE, head)
    attributes = surface.start() + 0.3 * torch.randn(
        len(surface), 14, generator=torch.Generator().manual_seed(0)
    )
    vertices = faces_of(head)
    before, after = surface.attach(attributes, torch.cat([vertices, 2 * vertices @ TURN.T]))
    torch.testing.assert_close(after.means, 2 * before.means @ TURN.T, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after.scales, 2 * before.scales, atol=1e-6, rtol=1e-3)
    expected = TURN @ quaternion_to_matrix(before.quats)
    torch.testing.assert_close(quaternion_to_matrix(after.quats), expected, atol=1e-3, rtol=0)
    assert torch.equal(after.colors, before.colors)


def test_a_head_without_a_scalp_is_refused(head):
    surface = Surface(SHAPE, head)
    bare = ParametricHead.load()
    bare.region_names = tuple(name.replace("scalp", "crown") for name in bare.region_names)
    surface._head = [bare]
    with pytest.raises(UserError, match="no region 'scalp'"):
        surface.scalp()


# The prior


def test_the_split_first_layer_is_one_layer_on_both(head):
    torch.manual_seed(0)
    decoder = Decoder(SHAPE)
    features, code = torch.randn(5, SHAPE.feature), torch.randn(2, SHAPE.code)
    weight = torch.cat([decoder.from_feature.weight, decoder.from_code.weight], 1)
    both = torch.cat(
        [features.expand(2, 5, -1), code[:, None].expand(2, 5, -1)],
        -1,
    )
    values = torch.relu(both @ weight.T + decoder.from_feature.bias)
    for layer in decoder.hidden:
        values = torch.relu(layer(values))
    torch.nn.init.normal_(decoder.output.weight)
    torch.testing.assert_close(decoder(features, code), values @ decoder.output.weight.T)


def test_before_training_everybody_is_the_template(head):
    prior = GaspPrior(SHAPE, head)
    people = prior.attributes(prior.codes)
    assert torch.equal(people, prior.template.expand_as(people))
    assert torch.equal(prior.template, prior.surface.start())


def test_a_prior_reads_back_and_says_what_it_is(head, tmp_path):
    prior = knowing_prior(head)
    prior.save(tmp_path, {"recipe": "r"})
    assert torch.equal(GaspPrior.load(tmp_path).attributes(prior.codes), prior.attributes(prior.codes))
    described = json.loads((tmp_path / "model.json").read_text())
    assert described["method"] == "gasp"
    assert described["gaussians"] == len(prior.surface)
    with pytest.raises(
        UserError, match="makes nobody by itself; fit people with it: `headsplat fit gasp --network"
    ):
        load_method(tmp_path)


def test_priors_that_do_not_belong_here_are_refused(head, tmp_path):
    with pytest.raises(UserError, match=r"no model\.json"):
        GaspPrior.load(tmp_path)
    knowing_prior(head).save(tmp_path, {})
    description = tmp_path / "model.json"
    good = json.loads(description.read_text())
    for change, sentence in (
        ({"method": "avat3r"}, "not a prior of gasp"),
        ({"surface": "0" * 16}, "other triangles or another UV map"),
        ({"config": {**good["config"], "wings": 2}}, "unknown fields wings"),
        ({"config": {**good["config"], "code": 7}}, "does not fit its model.json"),
    ):
        description.write_text(json.dumps(good | change))
        with pytest.raises(UserError, match=sentence):
            GaspPrior.load(tmp_path)


# The avatar


def test_an_avatar_is_its_attributes_and_the_head(head, tmp_path):
    prior = knowing_prior(head)
    attributes = prior.attributes(prior.codes[:1])[0].detach()
    identity = torch.randn(head.n_identity, generator=torch.Generator().manual_seed(3))
    avatar = GaspAvatar(SHAPE, attributes, identity, "arkit-52", {"from": "nowhere"}, head)
    avatar.save(tmp_path)
    read = load_avatar(tmp_path)
    assert isinstance(read, GaspAvatar)
    assert set(read.state_dict()) == {"attributes", "identity"}  # no network is left
    codes = torch.rand(2, head.n_expression)
    for ours, theirs in zip(avatar.sequence(codes), read.sequence(codes), strict=True):
        assert torch.equal(ours.means, theirs.means)
        assert torch.equal(ours.colors, theirs.colors)
    expected = prior.surface.attach(attributes, head.vertices(identity[None], codes[:1]))[0]
    torch.testing.assert_close(avatar.gaussians(codes[0]).means, expected.means)
    with pytest.raises(UserError, match="codes of 52 numbers"):
        avatar.gaussians(torch.zeros(3))


def test_an_expression_moves_what_is_near_the_mouth(head):
    prior = knowing_prior(head)
    avatar = GaspAvatar(SHAPE, prior.template.detach(), torch.zeros(head.n_identity), "arkit-52", head=head)
    closed, opened = torch.zeros(head.n_expression), torch.zeros(head.n_expression)
    opened[head.expression_names.index("jawOpen")] = 1.0
    moved = (avatar.gaussians(opened).means - avatar.gaussians(closed).means).norm(dim=-1)
    crown = avatar.gaussians(closed).means[:, 1] > 0.08
    assert float(moved.max()) > 0.01
    assert float(moved[crown].max()) < 1e-6


def test_avatars_that_do_not_belong_here_are_refused(head, tmp_path):
    prior = knowing_prior(head)
    identity = torch.zeros(head.n_identity)
    with pytest.raises(UserError, match="fit the avatar again"):
        GaspAvatar(SHAPE, prior.template[:7], identity, "arkit-52", head=head)
    GaspAvatar(SHAPE, prior.template, identity, "arkit-52", head=head).save(tmp_path)
    description = tmp_path / "avatar.json"
    description.write_text(json.dumps(json.loads(description.read_text()) | {"surface": "0" * 16}))
    with pytest.raises(UserError, match="another UV"):
        load_avatar(tmp_path)
    (tmp_path / "avatar.safetensors").unlink()
    with pytest.raises(UserError, match=r"no avatar\.safetensors"):
        load_avatar(tmp_path)


# The task


@pytest.fixture(scope="module")
def people(tmp_path_factory):
    """Shards of three synthetic people, the last of them held out, two expressions and eight views each."""
    folder = tmp_path_factory.mktemp("people")
    made = synthesize(folder / "captures", subjects=3, timesteps=2, views=8, size=48, seed=5, progress=False)
    captures = [read_capture(path) for path in made]
    pack(
        captures,
        folder / "shards",
        size=48,
        heldout=[c.subject for c in captures[2:]],
        input_sets=1,
        n_inputs=1,
    )
    return folder / "shards"


def tiny_task(**changes):
    recipe = find_recipe("gasp-prior-tiny")
    return GaspTask(replace(recipe, model=replace(SHAPE, **changes)))


def made_batch(head, people):
    cameras = cameras_around([0.0, 120.0], SHAPE.size)
    count = len(people)
    return {
        "ids": [f"{name}/0/inputs-000/0,1@7" for name in people],
        "identity": torch.zeros(count, head.n_identity),
        "expression": torch.zeros(count, head.n_expression),
        "target_images": torch.rand(count, 2, 3, SHAPE.size, SHAPE.size),
        "target_masks": torch.ones(count, 2, 1, SHAPE.size, SHAPE.size),
        "target_K": cameras.K.expand(count, -1, -1, -1),
        "target_world_to_camera": cameras.world_to_camera.expand(count, -1, -1, -1),
        "progress": 0.0,
    }


def test_a_batch_reaches_the_codes_of_its_people_alone(head):
    task = tiny_task()
    task.people = ("anna", "ben", "cleo")
    module = task.build()
    with torch.no_grad():
        module.prior.decoder.output.weight.normal_(0, 0.05)
    loss, parts = module(made_batch(head, ["ben", "ben"]))
    loss.backward()
    assert loss.item() == pytest.approx(
        0.8 * float(parts["l1"])
        + 0.2 * (1 - float(parts["ssim"]))
        + sum(float(parts[name]) for name in ("alpha", "displacement", "scale", "code")),
        rel=1e-5,
    )
    moved = module.prior.codes.grad.abs().sum(1) > 0
    assert moved.tolist() == [False, True, False]
    for name in ("features", *ATTRIBUTES):
        assert float(module.prior.get_parameter(name).grad.abs().sum()) > 0, name


def test_backgrounds_depend_on_the_example_alone_and_its_alpha_is_known(head):
    assert torch.equal(backgrounds_of("a@1", 4), backgrounds_of("a@1", 4))
    assert not torch.equal(backgrounds_of("a@1", 4), backgrounds_of("a@2", 4))
    task = tiny_task()
    task.people = ("anna", "ben", "cleo")
    module, batch = task.build(), made_batch(head, ["anna"])
    # A picture of nothing over black is the background itself wherever nothing is drawn: only the head differs.
    batch["target_images"], batch["target_masks"] = torch.zeros(1, 2, 3, 48, 48), torch.zeros(1, 2, 1, 48, 48)
    with torch.no_grad():
        module.prior.opacity.fill_(-20.0)
        _, parts = module(batch)
    assert float(parts["l1"]) == pytest.approx(0.0, abs=1e-6)
    assert float(parts["alpha"]) == pytest.approx(0.0, abs=1e-6)


def test_displacement_costs_a_hundredth_on_the_scalp(head):
    task = tiny_task()
    task.people = ("anna", "ben", "cleo")
    module, batch = task.build(), made_batch(head, ["anna"])
    scalp = module.prior.surface.scalp()
    assert 0.2 < float(scalp.float().mean()) < 0.8
    costs = []
    for where in (scalp, ~scalp):
        with torch.no_grad():
            module.prior.position.copy_(where[:, None].float().expand(-1, 3))
            costs.append(float(module(batch)[1]["displacement"]) / int(where.sum()))
    assert costs[0] == pytest.approx(SHAPE.scalp_share * costs[1], rel=1e-4)


def test_rates_cover_every_parameter_once():
    task = tiny_task()
    module = task.build()
    groups = task.parameter_groups(module)
    names = [id(parameter) for _, parameters in groups for parameter in parameters]
    assert sorted(names) == sorted(id(parameter) for parameter in module.parameters())
    assert groups[0][0] == 1.0


def test_the_papers_scale_is_counted_without_its_memory():
    task = GaspTask(find_recipe("gasp-prior"))
    task.config = replace(task.config, people=1000)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in task.build().parameters())
    per_gaussian = 186_839 * (14 + 8)
    network = (8 * 256 + 256) + 512 * 256 + 3 * (256 * 256 + 256) + (256 * 14 + 14)
    assert count == per_gaussian + 1000 * 512 + network
    assert task.dry_pass(recompute=False).is_meta


def test_shards_that_a_prior_cannot_be_trained_on_are_refused(people):
    manifest = Manifest.load(people)
    recipe = find_recipe("gasp-prior-tiny")
    task_for(settled(recipe, manifest)).check(manifest)
    for changed, sentence in (
        (replace(manifest, settings=replace(manifest.settings, size=64)), "pictures of 64 px"),
        (replace(manifest, head="flame"), "tracked with the head 'flame'"),
        (replace(manifest, head=None), "tracked with the head 'none'"),
    ):
        with pytest.raises(UserError, match=sentence):
            task_for(settled(recipe, manifest)).check(changed)
    with pytest.raises(UserError, match="2 people to train on and the prior has codes for 5"):
        task_for(replace(recipe, model=replace(recipe.model, people=5))).check(manifest)
    with pytest.raises(UserError, match="--precision fp32"):
        task_for(replace(recipe, precision="bf16"))


def test_lpips_without_weights_is_refused(monkeypatch):
    monkeypatch.setattr("train.losses.load_lpips", lambda: (None, "there are none."))
    with pytest.raises(UserError, match=r"there are none\..*--loss.lpips 0"):
        task_for(find_recipe("gasp-prior")).check_weights()
    task_for(find_recipe("gasp-prior-cpu")).check_weights()


def test_recipes_make_people_of_their_own():
    gasp = {name for name in RECIPES if name.startswith("gasp")}
    assert gasp == {name for name in CAPTURES if name.startswith("gasp")}
    paper = CAPTURES["gasp-prior"]
    assert paper.subjects - paper.heldout == 1000
    assert paper.timesteps * paper.views == 50
    assert CAPTURES["gasp-prior-one"].subjects - CAPTURES["gasp-prior-one"].heldout == 1
    assert all(
        CAPTURES[name] != DEMO and CAPTURES[name].size == find_recipe(name).model.size for name in gasp
    )


@pytest.mark.slow
@pytest.mark.e2e
def test_a_prior_is_trained_exported_and_fitted_by_commands(people, tmp_path, capfd):
    run = tmp_path / "runs" / "prior"
    status, output = finish(start(people, run, ranks=None, recipe="gasp-prior-tiny"))
    assert status == 0, output
    first, last = (GaspPrior.load(run / name) for name in ("initial", "export"))
    assert last.config.people == 2
    assert not torch.equal(first.codes, last.codes)
    assert main(["export", str(run), str(tmp_path / "again")]) == 0
    assert torch.equal(GaspPrior.load(tmp_path / "again").codes, last.codes)

    held = Manifest.load(people).subjects("heldout")[0]
    words = [
        "fit",
        "gasp",
        "--data",
        str(people),
        "--out",
        str(tmp_path),
        "--subjects",
        held,
        "--inputs",
        "1",
    ]
    assert main([*words, "--network", str(run / "export")]) == 1
    told = capfd.readouterr()
    assert "--uv-resolution 24" in told.out + told.err
    assert main([*words, "--network", str(run / "export"), "--uv-resolution", "24"]) == 0
    avatar = load_avatar(tmp_path / "fits" / "gasp-1-input" / held)
    assert isinstance(avatar, GaspAvatar)
    assert avatar.provenance["prior"] == str(run / "export")


# The fit


def fit_config(folder, **changes):
    short = GaspFitConfig(
        network=str(folder), model=SHAPE, invert_steps=6, tune_steps=5, refine_steps=4, rate_tune=1e-3
    )
    return replace(short, **changes)


def test_each_stage_frees_what_it_should(prior_folder, pictures, head):
    fit = fit_config(prior_folder).build(pictures, head=head)

    def looks():
        decoder = torch.cat([parameter.flatten() for parameter in fit.prior.decoder.parameters()])
        return fit.code.detach().clone(), decoder.detach().clone(), fit.attributes().detach().clone()

    before = looks()
    stages = []
    while fit.step < fit.config.steps:
        fit.advance()
        after, stage = looks(), fit.stage
        same = [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
        assert (
            same
            == {
                INVERT: [False, True, False],
                TUNE: [True, False, False],
                REFINE: [True, True, False],
            }[stage]
        )
        before = after
        stages.append(stage)
    assert stages == [INVERT] * 6 + [TUNE] * 5 + [REFINE] * 4


def test_the_fit_holds_on_to_the_end_of_its_first_stage(prior_folder, pictures, head):
    ends = {}
    for weight in (0.0, 1000.0):
        fit = fit_config(prior_folder, tune_steps=30, rate_tune=3e-3, anchor=weight).build(
            pictures, head=head
        )
        while fit.step < 6:
            fit.advance()
        reached = fit.attributes().detach()
        while fit.step < fit.config.steps:
            losses = fit.advance()
        assert torch.equal(fit.anchor, reached)
        assert ("prior" in losses) == bool(weight)
        ends[weight] = (fit.attributes() - reached).norm().item()
    assert ends[1000.0] < 0.5 * ends[0.0]


@pytest.mark.parametrize("stop", [3, 8, 13])
def test_a_fit_that_stopped_in_any_stage_goes_on_bit_by_bit(prior_folder, pictures, head, tmp_path, stop):
    class Stopped(Exception):
        pass

    def stopping(step, steps, losses):
        if step == stop:
            raise Stopped

    config = fit_config(prior_folder, checkpoint_every=1)
    straight = run_fit(config, pictures, tmp_path / "straight").avatar
    with pytest.raises(Stopped):
        run_fit(config, pictures, tmp_path / "resumed", on_step=stopping)
    resumed = run_fit(config, pictures, tmp_path / "resumed")
    assert resumed.resumed_from == stop - 1
    assert torch.equal(straight.attributes, resumed.avatar.attributes)


def test_a_fit_comes_closer_to_the_pictures(prior_folder, pictures, head):
    def distance(avatar):
        drawn = [
            rasterize(avatar.gaussians(pictures.expressions[i]), pictures.cameras[i], pictures.size).image
            for i in range(len(pictures))
        ]
        return float((torch.cat(drawn) - pictures.images).square().mean())

    longer = fit_config(prior_folder, invert_steps=80, tune_steps=40, refine_steps=20, rate_invert=0.05)
    fit = longer.build(pictures, head=head)
    before = distance(fit.avatar())
    while fit.step < longer.steps:
        fit.advance()
    assert distance(fit.avatar()) < 0.35 * before


def test_without_a_prior_the_gaussians_are_fitted_alone(pictures, head):
    config = replace(FITS["gasp-no-prior-cpu"](), model=SHAPE, refine_steps=5)
    fit = config.build(pictures, head=head)
    assert torch.equal(fit.attributes(), fit.surface.start())
    while fit.step < 5:
        assert "prior" not in fit.advance()
    seen = replace(config, look="pictures").build(pictures, head=head)
    colors = seen.attributes()[:, ATTRIBUTES["color"]]
    assert float(colors.std()) > 0.05
    with pytest.raises(UserError, match="nothing to invert"):
        replace(config, invert_steps=1)


def test_recipes_are_the_papers_stages_and_ablations():
    paper = FITS["gasp-gpu"]()
    assert (paper.invert_steps, paper.tune_steps, paper.refine_steps) == (500, 500, 100)
    assert paper.model.uv_resolution == 512
    for size in ("cpu", "gpu"):
        whole = FITS[f"gasp-{size}"]()
        rows = {
            name: FITS[f"gasp-{name}-{size}"]()
            for name in ("no-prior", "no-inversion", "no-tuning", "no-anchor")
        }
        assert rows["no-prior"].prior == "none"
        assert rows["no-prior"].steps == whole.steps
        assert (
            rows["no-inversion"].invert_steps == rows["no-tuning"].tune_steps == rows["no-anchor"].anchor == 0
        )
        assert len({fit_key(row) for row in rows.values()} | {fit_key(whole)}) == 5
        assert {row.method for row in rows.values()} == {f"gasp-{name}" for name in rows}
    assert FITS["gasp-one-person-cpu"]().method == "gasp-one-person"
    tenth, whole_rate = refinement_rates(0.01, 0.1), refinement_rates(0.01, 1.0)
    assert whole_rate["position"] == pytest.approx(1.6e-2)  # 0.16 mm
    assert all(tenth[name] == pytest.approx(0.1 * rate) for name, rate in whole_rate.items())


def test_priors_that_a_fit_cannot_start_from_are_refused(prior_folder, pictures, head):
    for changes, sentence in (
        ({"network": ""}, "give --network FOLDER"),
        ({"model": replace(SHAPE, uv_resolution=32)}, "--uv-resolution 24"),
        ({"variant": "one-person"}, "is of 3 people"),
    ):
        with pytest.raises(UserError, match=sentence):
            fit_config(prior_folder, **changes).build(pictures, head=head)
    flame = fit_config(prior_folder, model=replace(SHAPE, head="flame"))
    with pytest.raises(UserError, match="sits on the head 'makehuman' and this fit on 'flame'"):
        flame.build(replace(pictures, head="flame"))


def test_pictures_that_would_spoil_a_fit_are_refused(prior_folder, pictures, head):
    behind = [2]
    empty = pictures.masks.clone()
    empty[1] = 0
    shifted = pictures.cameras.world_to_camera.clone()
    shifted[:, 0, 3] += 0.1  # the masks stay where they were
    aside = pictures.cameras.world_to_camera.clone()
    aside[:, 0, 3] += 3.0
    from_behind = replace(
        pictures,
        images=pictures.images[behind],
        masks=pictures.masks[behind],
        cameras=pictures.cameras[behind],
        expressions=pictures.expressions[behind],
    )
    for wrong, sentence in (
        (replace(pictures, masks=empty), "mask of picture 1 of somebody is empty"),
        (replace(pictures, cameras=Cameras(pictures.cameras.K, shifted)), "does not reproject"),
        (replace(pictures, cameras=Cameras(pictures.cameras.K, aside)), "in none of the 3 pictures"),
        (from_behind, "in none of the 1 pictures"),
        (replace(pictures, identity=None), "needs a tracked head"),
        (replace(pictures, head="ict"), "tracked with the head 'ict'"),
        (replace(pictures, expressions=pictures.expressions[:, :7]), "codes of 7 numbers"),
        (replace(pictures, masks=pictures.masks[:2]), "3 pictures, 2 masks"),
    ):
        with pytest.raises(UserError, match=sentence):
            fit_config(prior_folder).build(wrong, head=head)


@pytest.mark.parametrize("side", [1, -1])
def test_the_furthest_input_picture_of_shards_is_fitted(prior_folder, pictures, head, side):
    one = replace(
        pictures,
        images=pictures.images[:1],
        masks=torch.ones_like(pictures.masks[:1]),
        cameras=cameras_around([side * 80.0], SHAPE.size),
        expressions=pictures.expressions[:1],
    )
    fit_config(prior_folder).build(one, head=head)
    behind = replace(one, cameras=cameras_around([side * 100.0], SHAPE.size))
    with pytest.raises(UserError, match="in none of the 1 pictures"):
        fit_config(prior_folder).build(behind, head=head)


def test_lpips_that_is_not_here_is_told(prior_folder, pictures, head, monkeypatch):
    monkeypatch.setattr("train.fits.gasp.load_lpips", lambda: (None, "there are no weights."))
    config = fit_config(prior_folder)
    fit = replace(config, loss=replace(config.loss, lpips=0.1)).build(pictures, head=head)
    assert fit.notes == ["LPIPS left out of the loss: there are no weights."]
    assert "lpips" not in fit.advance()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_cuda_device_fits_the_same_person(prior_folder, pictures, tmp_path):
    config = fit_config(prior_folder)
    here = run_fit(config, pictures, tmp_path / "here").avatar
    there = run_fit(config, pictures, tmp_path / "there", device="cuda").avatar
    assert there.attributes.device.type == "cuda"
    # Adam turns rounding of small gradients into steps of its rate; most attributes must agree all the same.
    assert float((there.attributes.cpu() - here.attributes).abs().mean()) < 0.02
    code = torch.zeros(here.expression_length)
    torch.testing.assert_close(
        there.gaussians(code.cuda()).means.cpu(), here.gaussians(code).means, atol=2e-3, rtol=0
    )
