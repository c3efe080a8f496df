import dataclasses
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_captures import pack_tiny

from avatars.avat3r import Avat3rConfig
from avatars.errors import UserError
from shards import (
    BatchLoader,
    Manifest,
    PriorMaps,
    PriorSettings,
    check,
    info,
    input_sets,
    open_shards,
    to_float,
    write_with_priors,
)
from train.config import TrainConfig
from train.tasks.avat3r import Avat3rTask, views_from_batch

SIZE, D, GRID = 32, 5, (4, 4)
FEATURES = PriorSettings(position="depth", features="made-up:00000000", feature_dim=D)


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("tiny"), subjects=3, timesteps=7, views=6, size=SIZE, timesteps_per_shard=5
    )


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("bare"), subjects=2, timesteps=6, views=5, size=SIZE, prior="none"
    )


def features(inputs):
    """Features that differ by picture, with channels of very different range."""
    means = torch.nn.functional.adaptive_avg_pool2d(inputs.images.mean(1, keepdim=True), GRID)
    return means * torch.tensor([0.0, 1e-3, 1.0, -30.0, 400.0]).view(1, D, 1, 1)


def positions(inputs):
    generator = torch.Generator().manual_seed(len(inputs.subject))
    points = torch.randn(len(inputs), 3, SIZE, SIZE, generator=generator) * 0.1
    return {"positions": points, "confidence": 1 + inputs.masks * 1e6}


def contents(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


@pytest.mark.parametrize("storage", ["fp16", "int8"])
def test_features_go_in_and_come_back(shards, tmp_path, storage):
    settings = dataclasses.replace(FEATURES, storage=storage)
    made = write_with_priors(shards, tmp_path / "x", lambda s: PriorMaps(features=features(s)), settings)
    assert made.priors == dataclasses.replace(settings, feature_grid=GRID)
    assert Manifest.load(tmp_path / "x") == made
    assert check(tmp_path / "x") == []
    assert f"features made-up:00000000 5 x 4 x 4 {storage}" in str(info(tmp_path / "x"))
    old, largest, squares, count = Manifest.load(shards), 0.0, 0.0, 0
    for before, after in zip(old.shards, made.shards, strict=True):
        for was, now in zip(input_sets(old, before), input_sets(made, after), strict=True):
            assert torch.equal(was.images, now.images)
            assert torch.equal(was.positions, now.positions)
            assert now.provenance["features"] == "made-up:00000000"
            exact = features(was)
            off = (now.features - exact).abs()
            # half a level of each channel; 16 bits have 11 digits
            limit = exact.abs().amax((2, 3), keepdim=True) / (254 / 1.002 if storage == "int8" else 2048)
            assert (off <= limit + 1e-7).all()
            largest, squares = max(largest, float(off.max())), squares + float(off.double().square().sum())
            count += off.numel()
    assert made.prior_error.features_max == pytest.approx(largest, rel=1e-4)
    assert made.prior_error.features_rms == pytest.approx((squares / count) ** 0.5, rel=1e-4)
    assert made.prior_error.position_max == old.prior_error.position_max > 0
    with (
        BatchLoader(tmp_path / "x", "train", seed=0, micro_batch=2, views=2) as loader,
        BatchLoader(tmp_path / "x", "train", seed=0, micro_batch=2, views=2, raw=True) as raw,
    ):
        batch, stored = next(loader), next(raw)
    assert batch["input_features"].shape == (2, 4, D, *GRID)
    assert stored["input_features"].dtype == (torch.int8 if storage == "int8" else torch.float16)
    assert torch.equal(to_float(stored)["input_features"], batch["input_features"])
    assert set(to_float(stored)) == set(batch)
    assert views_from_batch(batch).features is batch["input_features"]
    target = open_shards(tmp_path / "x", "train").read("s00").targets[0]
    before = open_shards(shards, "train").read("s00").targets[0]
    assert torch.equal(target.images([1]), before.images([1]))


def test_position_maps_go_into_shards_without_any(bare, tmp_path):
    settings = PriorSettings(position="dust3r:12345678")
    made = write_with_priors(bare, tmp_path / "x", lambda s: PriorMaps(**positions(s)), settings)
    assert check(tmp_path / "x") == []
    inputs = next(input_sets(made, made.shards[0]))
    old = Manifest.load(bare)
    exact = positions(next(input_sets(old, old.shards[0])))
    assert (inputs.positions - exact["positions"]).abs().max() <= 2.0**-12  # half a step of 16 bits below 1
    assert (
        inputs.confidence.max() == np.finfo(np.float16).max
    )  # more than 16 bits hold is as much as they hold
    assert inputs.confidence[inputs.masks == 0].unique() == 1
    assert 0 < made.prior_error.position_rms < made.prior_error.position_max <= 2.0**-12
    assert inputs.provenance["prior"] == "dust3r:12345678"


def test_the_same_priors_give_the_bytes_that_packing_gives(shards, tmp_path):
    def again(inputs):
        return PriorMaps(positions=inputs.positions, confidence=inputs.confidence)

    write_with_priors(shards, tmp_path / "x", again, PriorSettings(position="depth"))
    assert contents(tmp_path / "x") == contents(shards)


def test_priors_can_be_taken_out(shards, tmp_path):
    made = write_with_priors(shards, tmp_path / "x", lambda s: PriorMaps(), PriorSettings())
    assert made.prior_error.position_max is None
    assert next(input_sets(made, made.shards[0])).positions is None
    assert check(tmp_path / "x") == []


def test_a_stopped_copy_goes_on_and_gives_the_same_bytes(shards, tmp_path):
    def compute(inputs):
        calls.append(inputs.provenance["id"])
        if len(calls) == stop:
            raise KeyboardInterrupt
        return PriorMaps(features=features(inputs))

    calls: list[str] = []
    stop = 0
    write_with_priors(shards, tmp_path / "whole", compute, FEATURES)
    total, calls, stop = len(calls), [], 4
    with pytest.raises(KeyboardInterrupt):
        write_with_priors(shards, tmp_path / "x", compute, FEATURES)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["s00-0000.tar", "s00-0000.tar.written.json"]
    calls, stop = [], 0
    lines: list[str] = []
    write_with_priors(shards, tmp_path / "x", compute, FEATURES, lines.append)
    assert len(calls) == total - 2  # the two input sets of the first shard were done
    assert (
        lines[-1]
        == f"{len(lines)}/{len(Manifest.load(shards).shards)} {Manifest.load(shards).shards[-1].path}: 2 input sets"
    )
    assert contents(tmp_path / "x") == contents(tmp_path / "whole")


@pytest.mark.parametrize(
    ("maps", "settings", "error", "sentence"),
    [
        ({}, FEATURES, ValueError, "the settings say features made-up"),
        ({"features": torch.zeros(4, 3, *GRID)}, FEATURES, ValueError, r"features have the shape \(4, 3, 4, 4\)"),
        ({"features": torch.full((4, D, *GRID), torch.nan)}, FEATURES, UserError, "features have numbers that are not"),
        ({"features": torch.full((4, D, *GRID), 1e5)}, FEATURES, UserError, "not finite in 16 bits"),
        ({"features": torch.zeros(4, D, *GRID)}, PriorSettings("depth"), ValueError, "the settings say none"),
        ({"positions": torch.zeros(4, 3, SIZE, SIZE)}, FEATURES, ValueError, "come with their confidence"),
        (
            {"positions": torch.zeros(4, 3, SIZE, SIZE), "confidence": torch.zeros(4, 1, SIZE, SIZE)},
            PriorSettings("depth"),
            UserError,
            "a confidence below 1",
        ),
        ({}, dataclasses.replace(FEATURES, storage="fp8"), UserError, "must be fp16 or int8"),
        ({}, PriorSettings(feature_dim=3), UserError, "3 channels are declared of the features none"),
    ],
)  # fmt: skip
def test_maps_that_do_not_fit_are_refused(shards, tmp_path, maps, settings, error, sentence):
    with pytest.raises(error, match=sentence):
        write_with_priors(shards, tmp_path / "x", lambda s: PriorMaps(**maps), settings)
    assert not list(tmp_path.glob("x/*.tar*"))


def test_feature_maps_of_two_sizes_are_refused(shards, tmp_path):
    grids = iter([(4, 4), (2, 2)])
    with pytest.raises(ValueError, match="several sizes"):
        write_with_priors(
            shards, tmp_path / "x", lambda s: PriorMaps(features=torch.zeros(4, D, *next(grids))), FEATURES
        )


def test_shards_are_not_overwritten(shards):
    before = contents(shards)
    with pytest.raises(UserError, match="already holds packed shards"):
        write_with_priors(shards, shards, lambda s: PriorMaps(), PriorSettings())
    assert contents(shards) == before


def test_a_manifest_of_the_first_schema_is_read(shards, tmp_path):
    content = json.loads((shards / "manifest.json").read_text())
    content["schema"] = 1
    content["prior_error"] = content["prior_error"]["position_max"]
    del content["priors"]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    old, new = Manifest.read(tmp_path), Manifest.read(shards)
    assert old.priors == new.priors == PriorSettings(position="depth")
    assert old.prior_error.position_max == new.prior_error.position_max
    assert old.prior_error.position_rms is None


def test_damaged_features_are_found(shards, tmp_path):
    settings = dataclasses.replace(FEATURES, storage="int8")
    made = write_with_priors(shards, tmp_path / "x", lambda s: PriorMaps(features=features(s)), settings)
    path = tmp_path / "x" / made.shards[0].path
    path.write_bytes(path.read_bytes().replace(b"00.features-scale.npy", b"00.features-scael.npy"))
    found = "\n".join(map(str, check(tmp_path / "x")))
    assert "inputs-000.00.features-scale.npy: is missing" in found
    assert "inputs-000.00.features-scael.npy: belongs to no picture" in found
    with pytest.raises(UserError, match=r"inputs-00\d has no 00.features-scale.npy"):
        list(input_sets(made, made.shards[0]))


@pytest.mark.parametrize(
    ("folder", "config", "sentence"),
    [
        (
            "shards",
            {"feature_dim": 7},
            "features none of 0 channels .*is 7; .*headsplat priors --features.* set it to 0",
        ),
        ("x", {"feature_dim": 7}, "features made-up:00000000 of 5 channels .* is 7; .* set it to 5"),
        (
            "x",
            {"feature_dim": 5, "feature_prior": "sapiens-2b:1"},
            "features made-up:00000000 and --model.feature-prior says sapiens-2b:1",
        ),
        ("bare", {}, "has no position maps .*headsplat priors --position"),
    ],
)
def test_a_recipe_and_shards_that_differ_in_priors(shards, bare, tmp_path, folder, config, sentence):
    if folder == "x":
        manifest = write_with_priors(shards, tmp_path, lambda s: PriorMaps(features=features(s)), FEATURES)
    else:
        manifest = Manifest.load({"shards": shards, "bare": bare}[folder])
    model = Avat3rConfig(size=SIZE, expression_dim=52, **config)
    task = Avat3rTask(TrainConfig(recipe="mine", steps=1, model=model))
    with pytest.raises(UserError, match=sentence):
        task.check(manifest)
