"""Avat3r's network: what it must be equal to, whatever its weights are."""

import json
import math
from dataclasses import replace

import pytest
import torch

from avatars import rasterize
from avatars.avat3r import Avat3r, Avat3rAvatar, Avat3rConfig, Avat3rMethod, Views, confident
from avatars.avat3r.layers import attend
from avatars.avat3r.model import sample_at_patch_centres
from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.gaussians import Gaussians
from avatars.inputs import InputSet
from launch.recipes import find_recipe
from launch.recipes.avat3r import ABLATIONS
from shards import BatchLoader, Manifest
from train.flops import step_flops
from train.tasks import settled, task_for

TINY = Avat3rConfig(
    size=32,
    patch=8,
    width=32,
    head_width=16,
    self_layers=2,
    cross_layers=2,
    expression_dim=5,
    expression_hidden=16,
    upsample_stages=1,
    upsample_min_width=16,
)


def some_views(n: int, config: Avat3rConfig = TINY, batch: int = 1) -> Views:
    """Random pictures from cameras on a circle around the origin, and points near it."""
    g = torch.Generator().manual_seed(n)
    size = config.size
    K = torch.tensor([[2.0 * size, 0, size / 2], [0, 2.0 * size, size / 2], [0, 0, 1]])
    world_to_camera = torch.eye(4).repeat(batch, n, 1, 1)
    for i in range(n):
        a = 0.4 * i
        world_to_camera[:, i, :3, :3] = torch.tensor(
            [[math.cos(a), 0, -math.sin(a)], [0, -1, 0], [-math.sin(a), 0, -math.cos(a)]]
        )
        world_to_camera[:, i, 2, 3] = 1.1
    confidence = torch.where(torch.rand(batch, n, 1, size, size, generator=g) > 0.4, math.e, 1.0)
    return Views(
        images=torch.rand(batch, n, 3, size, size, generator=g),
        K=K.repeat(batch, n, 1, 1),
        world_to_camera=world_to_camera,
        positions=torch.randn(batch, n, 3, size, size, generator=g) * 0.05,
        confidence=confidence,
        features=torch.randn(batch, n, config.feature_dim, 4, 4, generator=g) if config.feature_dim else None,
    )


def trained(config: Avat3rConfig = TINY) -> Avat3r:
    """A network whose heads are not zero any more, as after some training."""
    torch.manual_seed(0)
    model = Avat3r(config)
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.1)
    return model


FIELDS = ("means", "quats", "scales", "opacities", "colors")


def test_zero_heads_are_the_coloured_position_maps():
    model, views = Avat3r(TINY), some_views(4)
    maps = model(views, torch.randn(1, 5))
    keep = views.confidence[0, :, 0] > 2
    gaussians = maps.gaussians(0)
    assert len(gaussians.means) == int(keep.sum())
    assert torch.equal(gaussians.means, views.positions[0].permute(0, 2, 3, 1)[keep])
    assert torch.equal(gaussians.colors, views.images[0].permute(0, 2, 3, 1)[keep])
    assert torch.allclose(gaussians.opacities, torch.sigmoid(torch.tensor(-2.0)))
    assert torch.equal(gaussians.quats, torch.tensor([1.0, 0, 0, 0]).expand(len(gaussians.means), 4))


def test_with_zero_heads_the_picture_is_the_rendered_position_map():
    views = some_views(2)
    camera = Cameras(views.K[0, :1], views.world_to_camera[0, :1])
    seen = rasterize(Avat3r(TINY)(views, torch.randn(1, 5)).gaussians(0), camera, (32, 32)).image
    keep = views.confidence[0, :, 0] > 2
    anchors = views.positions[0].permute(0, 2, 3, 1)[keep]
    depth = torch.cat([
        (p @ m[:3, :3].T + m[:3, 3])[:, 2]
        for m, p in zip(views.world_to_camera[0], anchors.split(keep.flatten(1).sum(1).tolist()), strict=True)
    ])  # fmt: skip
    by_hand = Gaussians(
        means=anchors,
        quats=torch.tensor([1.0, 0, 0, 0]).repeat(len(anchors), 1),
        scales=(0.7 * depth / (2.0 * TINY.size))[:, None].repeat(1, 3),
        opacities=torch.full((len(anchors),), 1 / (1 + math.exp(2))),
        colors=views.images[0].permute(0, 2, 3, 1)[keep],
    )
    assert torch.allclose(seen, rasterize(by_hand, camera, (32, 32)).image, atol=1e-5)
    assert seen.amax() > 0.1


def test_a_fresh_gaussian_covers_its_pixel():
    views = some_views(1)
    views.positions = torch.zeros_like(views.positions)  # all at the head's centre, 1.1 m away
    scales = Avat3r(TINY)(views, torch.zeros(1, 5)).gaussians(0).scales
    assert torch.allclose(scales, torch.tensor(0.7 * 1.1 / (2.0 * TINY.size)), rtol=1e-5)


@pytest.mark.parametrize("n", [1, 3, 4, 6])
def test_any_number_of_views(n):
    maps = trained()(some_views(n), torch.randn(1, 5))
    assert maps.raw.shape == (1, n, 14, 32, 32)
    gaussians = maps.gaussians(0)
    assert torch.isfinite(gaussians.means).all()
    assert torch.allclose(gaussians.quats.norm(dim=1), torch.ones(len(gaussians.means)))


@pytest.mark.parametrize("interleave", [False, True])
def test_cached_driving_equals_the_full_forward(interleave):
    model = trained(replace(TINY, interleave=interleave)).eval()
    views, codes = some_views(4), torch.randn(3, 5)
    driven = Avat3rMethod(model, "test-5").create(input_set(views)).sequence(codes)
    for code, cached in zip(codes, driven, strict=True):
        full = model(views, code[None]).gaussians(0)
        for name in FIELDS:
            assert torch.allclose(getattr(cached, name), getattr(full, name), atol=1e-5), name


def test_permuting_the_views_permutes_the_gaussians():
    model, views, code = trained().eval(), some_views(4), torch.randn(1, 5)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = Views(**{k: v if v is None else v[:, order] for k, v in vars(views).items()})
    straight, other = model(views, code).raw, model(shuffled, code).raw
    assert torch.allclose(straight[:, order], other, atol=1e-5)
    assert not torch.allclose(straight, other, atol=1e-3)


def test_the_expression_changes_the_gaussians():
    model, views = trained(), some_views(2)
    smile, frown = (model(views, code).gaussians(0) for code in (torch.ones(1, 5), -torch.ones(1, 5)))
    assert not torch.allclose(smile.means, frown.means, atol=1e-6)


def test_a_batch_is_its_examples():
    model, views, codes = trained().eval(), some_views(2, batch=3), torch.randn(3, 5)
    together = model(views, codes)
    for i in range(3):
        one = Views(**{k: v if v is None else v[i : i + 1] for k, v in vars(views).items()})
        alone = model(one, codes[i : i + 1])
        for name in FIELDS:
            assert torch.allclose(
                getattr(together.gaussians(i), name), getattr(alone.gaussians(0), name), atol=1e-5
            )


def test_gradients_reach_every_parameter():
    config = replace(TINY, feature_dim=6)
    model = trained(config)
    made = model(some_views(2, config), torch.randn(1, 5)).gaussians(0)
    total = sum(
        (getattr(made, n) * torch.randn_like(getattr(made, n))).sum() for n in ("means", "quats", "colors")
    )
    (total + made.scales.log().sum() + made.opacities.sum()).backward()
    silent = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    # a shift of all keys cannot be seen by a softmax; nothing else may be silent
    assert all("key_value.bias" in n for n in silent)


def test_activation_checkpointing_changes_no_number():
    views, code = some_views(2), torch.randn(1, 5)
    grads = []
    for recompute in (False, True):
        model = trained(replace(TINY, checkpoint_activations=recompute))
        model(views, code).raw.square().sum().backward()
        grads.append(model.patchify.weight.grad)
    assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("space", "threshold", "expected"),
    [
        ("log", 0.5, [False, False, True]),
        ("minus-one", 0.5, [False, True, True]),
        ("raw", 1.7, [False, False, True]),
        ("min-max", 0.3, [False, True, True]),
    ],
)
def test_confidence_spaces(space, threshold, expected):
    confidence = torch.tensor([1.0, 1.6, 2.5]).view(1, 1, 3)
    assert confident(confidence, threshold, space).flatten().tolist() == expected


def test_features_are_sampled_at_patch_centres():
    # a 4x4 map sampled on a 2x2 grid: each sample lies between four cells
    features = torch.arange(16.0).view(1, 1, 4, 4)
    assert sample_at_patch_centres(features, 2).flatten().tolist() == [2.5, 4.5, 10.5, 12.5]


def test_paper_scale_has_the_expected_shapes():
    with torch.device("meta"):
        config = Avat3rConfig(feature_dim=1920)
        model = Avat3r(config)
        n = 4
        views = Views(
            images=torch.empty(1, n, 3, 512, 512),
            K=torch.empty(1, n, 3, 3),
            world_to_camera=torch.empty(1, n, 4, 4),
            positions=torch.empty(1, n, 3, 512, 512),
            confidence=torch.empty(1, n, 1, 512, 512),
            features=torch.empty(1, n, 1920, 64, 64),
        )
        assert model.encode(views).shape == (1, n * 1024, 768)
        maps = model(views, torch.empty(1, 256))
    assert maps.raw.shape == (1, n, 14, 512, 512)
    assert maps.anchors.positions[:, :, 0].numel() == 1_048_576


def input_set(views: Views) -> InputSet:
    n = views.images.shape[1]
    return InputSet(
        images=views.images[0],
        masks=torch.ones(n, 1, TINY.size, TINY.size),
        cameras=Cameras(views.K[0], views.world_to_camera[0]),
        positions=views.positions[0],
        confidence=views.confidence[0],
        features=None,
        expressions=torch.zeros(n, 5),
        expression_kind="test-5",
        subject="nobody",
    )


def test_a_saved_avatar_drives_like_the_one_in_memory(tmp_path):
    model = trained()
    model.save(tmp_path / "model", {"expression_kind": "test-5"})
    avatar = Avat3rMethod.load(tmp_path / "model").create(input_set(some_views(3)))
    code = torch.randn(5)
    avatar.save(tmp_path / "avatar")
    read = Avat3rAvatar.load(tmp_path / "avatar").gaussians(code)
    made = avatar.gaussians(code)
    for name in FIELDS:
        assert torch.equal(getattr(read, name), getattr(made, name))


def test_what_does_not_fit_is_told(tmp_path):
    method = Avat3rMethod(trained(), "test-5")
    inputs = input_set(some_views(2))
    with pytest.raises(UserError, match="test-5 expression codes and the input set has arkit-52"):
        method.create(replace(inputs, expression_kind="arkit-52"))
    with pytest.raises(UserError, match="32x32 pixels and the input set has 16x16"):
        method.create(replace(inputs, images=inputs.images[..., :16, :16]))
    with pytest.raises(UserError, match="7 numbers and this Avat3r was trained on 5"):
        method.create(inputs).gaussians(torch.zeros(7))
    with pytest.raises(UserError, match="input set has none"):
        method.create(replace(inputs, positions=None, confidence=None))
    with pytest.raises(UserError, match=r"model\.json"):
        Avat3r.load(tmp_path)
    with pytest.raises(UserError, match="no multiple of patch"):
        replace(TINY, patch=5)


@pytest.mark.parametrize(
    "change", [{}, {"interleave": True}, {"checkpoint_activations": True}, {"feature_dim": 6}]
)
def test_the_network_compiles_as_one_graph(change):
    config = replace(TINY, **change)
    model, views, code = trained(config), some_views(2, config), torch.randn(1, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # a graph break is an error
    assert torch.allclose(compiled(views, code).raw, model(views, code).raw, atol=1e-6)
    compiled(views, code).raw.sum().backward()


def test_cameras_that_are_none_are_refused():
    method, inputs = Avat3rMethod(trained(), "test-5"), input_set(some_views(2))
    stretched = inputs.cameras.world_to_camera.clone()
    stretched[1, :3, :3] *= 1.1
    with pytest.raises(UserError, match=r"camera \(number 1\) whose world_to_camera is no rotation"):
        method.create(replace(inputs, cameras=Cameras(inputs.cameras.K, stretched)))
    broken = inputs.cameras.K.clone()
    broken[0, 0, 0] = math.nan
    with pytest.raises(UserError, match="K is not finite"):
        method.create(replace(inputs, cameras=Cameras(broken, inputs.cameras.world_to_camera)))


def test_a_half_precision_avatar_stays_close(tmp_path):
    model = trained()
    model.save(tmp_path / "model", {"expression_kind": "test-5"})
    inputs, code = input_set(some_views(3)), torch.randn(5)
    full = Avat3rMethod.load(tmp_path / "model").create(inputs).gaussians(code)
    Avat3rMethod.load(tmp_path / "model", torch.bfloat16).create(inputs).save(tmp_path / "avatar")
    half = Avat3rAvatar.load(tmp_path / "avatar")
    assert half.tokens.dtype == torch.bfloat16
    made = half.gaussians(code)
    assert made.means.dtype == torch.float32
    assert (made.colors - full.colors).abs().amax() < 0.05
    assert not torch.equal(made.colors, full.colors)


def test_half_precision_takes_features_as_they_are_stored():
    config = replace(TINY, feature_dim=6)
    model, views, code = trained(config), some_views(2, config), torch.randn(1, 5)
    full = model(views, code).raw
    half = model.to(torch.bfloat16)(views, code).raw
    assert half.dtype == torch.bfloat16
    assert (half - full).abs().amax() < 0.05 * full.abs().amax()


def test_inputs_of_the_wrong_timesteps_are_refused(tiny_shards, tmp_path):
    manifest = Manifest.load(tiny_shards)
    base = find_recipe("avat3r-tiny")
    task_for(base).check(manifest)
    same = replace(base, data=replace(base.data, input_timesteps="same"))
    with pytest.raises(UserError, match=r"input sets of different timesteps .*--input-timesteps same"):
        task_for(same).check(manifest)
    one = replace(manifest, settings=replace(manifest.settings, input_timesteps="same"))
    task_for(same).check(one)
    with pytest.raises(UserError, match=r"input sets of same timesteps .*--input-timesteps different"):
        task_for(base).check(one)


def test_the_name_of_the_features_comes_from_the_shards(tiny_shards):
    manifest = Manifest.load(tiny_shards)
    named = replace(manifest, priors=replace(manifest.priors, features="made-up:1", feature_dim=32))
    assert settled(find_recipe("avat3r-cpu-full"), named).model.feature_prior == "made-up:1"
    assert settled(find_recipe("avat3r-cpu"), named) == find_recipe("avat3r-cpu")


def test_the_wrong_number_of_pictures_is_told():
    method, inputs = Avat3rMethod(trained(), "test-5"), input_set(some_views(7))
    with pytest.raises(UserError, match="has 7 pictures and Avat3r takes 1 to 6"):
        method.create(inputs)
    with pytest.raises(UserError, match="has no picture"):
        method.create(inputs.first(0))
    with pytest.raises(UserError, match="has 7 pictures and 6 cameras; give one to each"):
        method.create(replace(inputs, cameras=inputs.cameras[:6]))
    assert len(method.create(inputs.first(6)).pictures) == 6


def test_features_of_another_prior_are_refused():
    config = replace(TINY, feature_dim=6, feature_prior="made-up:1")
    method, inputs = Avat3rMethod(trained(config), "test-5"), input_set(some_views(2))
    with pytest.raises(
        UserError, match="features made-up:1 of 6 channels, and the input set of nobody has none"
    ):
        method.create(inputs)
    for features, name in ((torch.zeros(2, 6, 4, 4), "made-up:2"), (torch.zeros(2, 5, 4, 4), "made-up:1")):
        with pytest.raises(
            UserError, match=f"nobody has {name} of {features.shape[1]}; features of two priors"
        ):
            method.create(replace(inputs, features=features, provenance={"features": name}))
    fitting = replace(inputs, features=torch.zeros(2, 6, 4, 4), provenance={"features": "made-up:1"})
    assert method.create(fitting).gaussians(torch.zeros(5)).means.isfinite().all()


def test_a_model_of_another_recipe_is_refused(tmp_path):
    trained().save(tmp_path, {"expression_kind": "test-5"})
    described = json.loads((tmp_path / "model.json").read_text())

    def written(**changes):
        (tmp_path / "model.json").write_text(json.dumps(described | changes))

    written(config=described["config"] | {"self_layers": 3})
    with pytest.raises(
        UserError, match=r"model\.safetensors does not fit its model.json: it is of another recipe"
    ):
        Avat3rMethod.load(tmp_path)
    written(config=described["config"] | {"heads": 3})
    with pytest.raises(UserError, match="unknown fields heads"):
        Avat3rMethod.load(tmp_path)
    written(method="gasp")
    with pytest.raises(UserError, match="describes a model of 'gasp', not of avat3r"):
        Avat3rMethod.load(tmp_path)
    written(provenance={})
    with pytest.raises(UserError, match="lacks 'expression_kind'"):
        Avat3rMethod.load(tmp_path)
    written()
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors is not there"):
        Avat3rMethod.load(tmp_path)


def test_fresh_weights_expect_the_codes_of_the_shards(tiny_shards):
    torch.manual_seed(0)
    plain = task_for(find_recipe("avat3r-tiny")).build().get_submodule("model.expression_tokens")
    task = task_for(find_recipe("avat3r-tiny"))
    manifest = Manifest.load(tiny_shards)
    task.check(manifest)
    torch.manual_seed(0)
    fresh = task.build().get_submodule("model.expression_tokens")
    mean, std = torch.tensor(manifest.expression_mean), torch.tensor(manifest.expression_std)
    codes = mean + std * torch.randn(3, 52, generator=torch.Generator().manual_seed(0))
    assert std.min() > 0.1 * std.max()
    assert torch.allclose(fresh(codes), plain((codes - mean) / std), atol=1e-4)
    still = replace(manifest, expression_std=(0.0,) * 52)
    task.check(still)
    torch.manual_seed(0)
    assert torch.equal(task.build().get_submodule("model.expression_tokens")(codes), plain(codes))


def test_a_code_that_hardly_moves_does_not_drown_the_others():
    model = Avat3r(TINY)
    before = model.expression_tokens[0].weight.clone()
    model.expect_codes(torch.zeros(5), torch.tensor([0.5, 0.25, 0.05, 0.01, 0.0]))
    factors = (model.expression_tokens[0].weight / before).mean(0)
    assert torch.allclose(factors, torch.tensor([2.0, 4.0, 20.0, 20.0, 20.0]))


def test_features_come_in_beside_the_tokens():
    config = replace(TINY, feature_dim=6)
    views = some_views(2, config)
    model, without = Avat3r(config), Avat3r(TINY)
    without.load_state_dict({n: t for n, t in model.state_dict().items() if not n.startswith("merge")})
    nothing = replace(views, features=torch.zeros_like(views.features))
    assert torch.allclose(model.tokens(nothing), without.tokens(views), atol=1e-5)
    assert not torch.allclose(model.tokens(views), without.tokens(views), atol=1e-2)


@pytest.mark.parametrize("row", ["", *ABLATIONS])
def test_every_ablation_takes_a_step(row, tiny_shards):
    base = find_recipe("avat3r-tiny")
    change = ABLATIONS[row].model if row else {}
    config = replace(base, model=replace(base.model, **{"feature_dim": 3, **change}))
    module = task_for(config).build()
    with BatchLoader(tiny_shards, "train", seed=0, micro_batch=1, views=2, threads=1) as loader:
        batch = next(loader) | {"input_features": torch.randn(1, 4, 3, 6, 6), "progress": 0.0}
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-3)
    for _ in range(2):  # behind the heads, which start at zero, the second step is the first to say anything
        loss, parts = module(batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    merge = module.get_submodule("model.merge_features")
    assert isinstance(merge, torch.nn.Linear) == bool(config.model.feature_dim)
    assert loss.isfinite()
    all_pixels = 4 * base.model.size**2
    assert (parts["gaussians"] == all_pixels) == (not config.model.position_prior)
    silent = [n for n, p in module.named_parameters() if p.grad is None or not p.grad.any()]
    assert all("key_value.bias" in n for n in silent), silent


def test_several_expressions_of_an_example_are_as_many_examples(tiny_shards):
    base = find_recipe("avat3r-tiny")
    module = task_for(base).build()
    for head in module.get_submodule("model.heads").children():
        torch.nn.init.normal_(head.weight, std=0.05)
    with BatchLoader(tiny_shards, "train", seed=0, micro_batch=2, views=2, threads=1) as loader:
        batch = next(loader) | {"progress": 0.0}
    rows = {name: value for name, value in batch.items() if name.startswith(("target_", "expression"))}
    codes = torch.stack(
        [rows["expression"], rows["expression"].flip(0)], 1
    )  # each with its own and the other's
    several = {name: value.repeat_interleave(2, 0) for name, value in rows.items()} | {
        "expression": codes.flatten(0, 1)
    }
    together, parts = module(batch | several)
    alone = [module(batch | {"expression": codes[:, i]})[0] for i in range(2)]
    assert not torch.isclose(alone[0], alone[1], rtol=1e-5)
    assert torch.isclose(together, sum(alone) / 2, rtol=1e-5)
    assert parts["gaussians"] == module(batch)[1]["gaussians"]


def test_what_is_wrong_in_all_expressions_is_left_out_of_the_deviation(tiny_shards):
    base = find_recipe("avat3r-tiny")
    several = replace(base, data=replace(base.data, expressions=2))
    weighted = replace(several, model=replace(base.model, deviation_weight=3.0))
    module, plain = task_for(weighted).build(), task_for(several).build()
    for head in module.get_submodule("model.heads").children():
        torch.nn.init.normal_(head.weight, std=0.05)
    plain.load_state_dict(module.state_dict())
    with BatchLoader(tiny_shards, "train", seed=0, micro_batch=2, views=2, threads=1) as loader:
        one = next(loader) | {"progress": 0.0}
    rows = [name for name in one if name.startswith(("target_", "expression"))]
    batch = one | {name: one[name].repeat_interleave(2, 0) for name in rows}
    alike, parts = module(batch)
    assert parts["deviation"] < 1e-6
    assert torch.isclose(alike, plain(batch)[0], rtol=1e-5)
    batch["target_images"][0] += (
        0.1  # of one person's two targets: half of it is deviation, in half of the batch
    )
    loss, parts = module(batch)
    assert torch.isclose(parts["deviation"], torch.tensor(0.1 / 2 / 2), rtol=1e-4)
    assert torch.isclose(loss - plain(batch)[0], 3 * parts["deviation"], rtol=1e-4)


def test_several_expressions_where_they_are_none_of_the_recipes_business():
    base = find_recipe("avat3r-tiny")
    with pytest.raises(UserError, match=r"deviation-weight is 1\.0 and compares expressions"):
        replace(base, model=replace(base.model, deviation_weight=1.0))
    with pytest.raises(UserError, match="must not be negative"):
        replace(base.model, deviation_weight=-1.0)
    for other in ("gasp-prior-tiny", "fastavatar-decoder-tiny"):
        recipe = find_recipe(other)
        with pytest.raises(UserError, match=r"--data\.expressions is 2, and .* is trained on one"):
            replace(recipe, data=replace(recipe.data, expressions=2))


def test_the_expression_layers_may_have_a_rate_of_their_own():
    base = find_recipe("avat3r-tiny")
    task = task_for(replace(base, model=replace(base.model, expression_rate=2.0)))
    module = task.build()
    (one, others), (two, expression) = task.parameter_groups(module)
    assert (one, two) == (1.0, 2.0)
    assert {id(p) for p in others} | {id(p) for p in expression} == {id(p) for p in module.parameters()}
    names = {n for n, p in module.named_parameters() if any(p is q for q in expression)}
    assert names == {
        n for n, _ in module.named_parameters() if "cross_blocks" in n or "expression_tokens" in n
    }
    assert len(task_for(base).parameter_groups(module)) == 1
    with pytest.raises(UserError, match="expression_rate is 0"):
        replace(base.model, expression_rate=0)


def test_further_expressions_cost_what_decoding_costs():
    base = find_recipe("avat3r-cpu")

    def flops(expressions):
        return step_flops(task_for(replace(base, data=replace(base.data, expressions=expressions))))

    assert flops(3) - flops(2) == flops(2) - flops(1)
    assert 0.3 < (flops(2) - flops(1)) / flops(1) < 0.6


@pytest.mark.parametrize("keys", [4, 64, 2000])
def test_attention_in_bfloat16_is_attention(keys):
    q, k, v = (torch.randn(2, 3, n, 32) for n in (50, keys, keys))
    exact = torch.softmax(q @ k.transpose(-1, -2) / 32**0.5, -1) @ v
    assert torch.allclose(attend(q, k, v), exact, atol=1e-5)
    narrow = attend(q.bfloat16(), k.bfloat16(), v.bfloat16()).float()
    assert (narrow - exact).abs().mean() < 0.01 * exact.abs().mean() + 2e-3
