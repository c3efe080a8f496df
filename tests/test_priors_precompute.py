"""`headsplat priors` and what is under it, with small networks in the published files' layout."""

from __future__ import annotations

import errno
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_weights import write_dust3r, write_sapiens
from tiny_captures import pack_tiny

from avatars import weights
from avatars.errors import UserError
from avatars.priors import DUSt3R, DUSt3RPrior, Sapiens
from avatars.priors.reduction import Reduction, ReductionFit
from avatars.priors.registry import FEATURE_PRIORS, POSITION_PRIORS, find_network
from cluster import priors as room
from cluster.priors import PriorRequest, compute_subject, picture_hashes, precompute_priors, storage_needed
from cluster.session import ray_session
from launch.cli import main
from shards import Manifest, check, input_sets


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: handing parts of them to another thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def no_weights_of_the_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two people at 32 pixels; three cameras, so that input sets share pictures."""
    return pack_tiny(
        tmp_path_factory.mktemp("people"), subjects=2, timesteps=4, views=4, size=32, input_sets=3, n_inputs=3
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Weight files: DUSt3R's and Sapiens'."""
    folder = tmp_path_factory.mktemp("weights")
    return write_dust3r(folder / "dust3r.pth"), write_sapiens(folder / "sapiens_tiny_clean.pth", grid=3)


@pytest.fixture(scope="module")
def request_all(files):
    return PriorRequest(
        position=find_network("dust3r", files[0]), features=find_network("sapiens", files[1]), batch=2
    )


def job(shards, store, request, subject="s00", **changes):
    return {
        "folder": str(shards), "store": str(store), "request": request, "gpu": False, "reduction": None,
        "subject": subject, **changes,
    }  # fmt: skip


def quiet(**values):
    pass


def everything(manifest):
    return [inputs for shard in manifest.shards for inputs in input_sets(manifest, shard)]


def files_in(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*.safetensors"))}


@pytest.mark.e2e
def test_command_writes_shards_that_carry_what_the_networks_say(shards, files, tmp_path, capsys):
    out = tmp_path / "new"
    words = [
        "priors", str(shards), "--out", str(out), "--position", "dust3r", "--position-weights", str(files[0]),
        "--features", "sapiens", "--feature-weights", str(files[1]), "--workers", "1", "--store", str(tmp_path / "s"),
    ]  # fmt: skip
    assert main(words) == 0
    told = capsys.readouterr().out
    assert "6 input sets of 18 pictures need at most" in told
    assert "CC BY-NC-SA 4.0" in told
    manifest = Manifest.load(out)
    digest = weights.file_sha256(files[0])[:8]
    assert manifest.priors.position == f"dust3r:{digest}"
    assert manifest.priors.features.startswith("sapiens-128x2:")
    assert (manifest.priors.feature_dim, manifest.priors.feature_grid) == (128, (3, 3))
    assert 0 < manifest.prior_error.position_rms < 1e-2
    assert 0 < manifest.prior_error.features_rms < 1e-2
    assert check(out) == []
    network, prior = Sapiens.load(files[1]), DUSt3RPrior(DUSt3R.load(files[0]), batch=2)
    for old, new in zip(everything(Manifest.load(shards)), everything(manifest), strict=True):
        assert torch.equal(old.images, new.images)
        torch.testing.assert_close(new.features, network(old.images), atol=2e-3, rtol=2e-3)
        positions, confidence = prior(old.images, old.cameras, old.masks)
        trusted = (confidence > 1).expand_as(positions)
        torch.testing.assert_close(new.positions[trusted], positions[trusted], atol=2e-3, rtol=2e-3)
    assert main(words) == 1
    assert "already holds packed shards" in capsys.readouterr().err


def test_a_picture_that_sets_share_is_computed_once(shards, request_all, tmp_path):
    manifest = Manifest.load(shards)
    pictures = [
        digest
        for shard in manifest.shards
        if shard.subject == "s00"
        for inputs in input_sets(manifest, shard)
        for digest in picture_hashes(inputs)
    ]
    assert len(set(pictures)) < len(pictures)  # otherwise this test says nothing
    done = compute_subject(job(shards, tmp_path, request_all), quiet)
    assert done["pictures"] == len(set(pictures))
    assert done["found"] == len(pictures) - len(set(pictures))
    assert done["sets"] == 3
    again = compute_subject(job(shards, tmp_path, request_all), quiet)
    assert (again["pictures"], again["sets"], again["found"]) == (0, 0, len(pictures) + 3)
    assert again["features"] == done["features"]


@pytest.mark.parametrize("batch", [1, 3])
def test_what_was_interrupted_goes_on_and_gives_the_same(shards, request_all, tmp_path, batch):
    request_all = replace(request_all, batch=batch)
    compute_subject(job(shards, tmp_path / "whole", request_all), quiet)

    def stop(sets, of):
        if sets == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compute_subject(job(shards, tmp_path / "parts", request_all), stop)
    before = files_in(tmp_path / "parts")
    assert before
    done = compute_subject(job(shards, tmp_path / "parts", request_all), quiet)
    assert done["found"] >= len(before)
    whole = {
        path.relative_to(tmp_path / "whole"): data for path, data in files_in(tmp_path / "whole").items()
    }
    parts = {
        path.relative_to(tmp_path / "parts"): data for path, data in files_in(tmp_path / "parts").items()
    }
    assert whole.keys() == parts.keys()
    if batch == 1:  # elsewhere other pictures share a batch, which may round otherwise
        assert whole == parts


@pytest.mark.e2e
def test_an_actor_that_is_killed_costs_only_what_it_was_at(shards, request_all, tmp_path):
    killed = []

    def kill_once(event):
        if event.kind == "progress" and not killed and event.report.get("sets", 0) >= 1:
            killed.append(event.report["pid"])
            os.kill(event.report["pid"], signal.SIGKILL)

    slow = replace(request_all, batch=1)
    with pytest.MonkeyPatch.context() as patch, ray_session(1):
        patch.setenv("PYTHONPATH", str(Path(__file__).parent))
        done = precompute_priors(
            shards,
            tmp_path / "out",
            slow,
            store=tmp_path / "store",
            workers=1,
            gpus_per_actor=0,
            on_event=kill_once,
        )
    assert done.manifest.priors.feature_dim == 128
    assert len(everything(done.manifest)) == 6
    if killed:  # a machine may be faster than the first question for progress
        assert done.found > 0


def test_fewer_channels_are_the_training_subjects_principal_components(shards, request_all, files, tmp_path):
    request = replace(request_all, position=None, channels=16, storage="int8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(room, "ray_session", lambda *_: __import__("contextlib").nullcontext())
        patch.setattr(room, "slots_here", lambda *_: 1)
        patch.setattr(room, "run_jobs", run_here)
        lines = []
        done = precompute_priors(
            shards, tmp_path / "out", request, store=tmp_path / "store", gpus_per_actor=0, say=lines.append
        )
    priors = done.manifest.priors
    assert (priors.position, priors.feature_dim, priors.storage) == ("depth", 16, "int8")
    assert "+pca16:" in priors.features
    assert any("principal components keep" in line for line in lines)
    reduction = Reduction.load(tmp_path / "out" / "features-reduction.safetensors")
    network = Sapiens.load(files[1])
    for old, new in zip(everything(Manifest.load(shards)), everything(done.manifest), strict=True):
        exact = reduction(network(old.images))
        assert float((new.features - exact).abs().max()) < float(exact.abs().max()) / 127
        assert torch.equal(old.positions, new.positions)  # true depth was kept


def run_here(function, jobs, **options):
    """The pool without Ray."""
    from cluster.pool import Outcome

    outcomes = []
    for job in jobs:
        try:
            outcomes.append(Outcome(job.name, function(job.arguments, quiet)))
        except UserError as error:
            outcomes.append(Outcome(job.name, error=str(error)))
    return outcomes


@pytest.fixture
def here(monkeypatch):
    """Precomputing in this process."""
    from contextlib import nullcontext

    monkeypatch.setattr(room, "ray_session", lambda *_: nullcontext())
    monkeypatch.setattr(room, "slots_here", lambda *_: 1)
    monkeypatch.setattr(room, "run_jobs", run_here)


def test_reduction_keeps_the_most_variance_and_distances():
    drawn = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(12, 12, generator=drawn))[0]
    features = torch.einsum("dk,bkhw->bdhw", basis[:, :3], torch.randn(4, 3, 5, 5, generator=drawn)) + 2
    fit = ReductionFit(12)
    fit.add(features[:2])
    fit.add(features[2:])
    reduction = fit.result(3)
    assert reduction.kept == pytest.approx(1, abs=1e-5)
    few = reduction(features)
    near, exact = few.flatten(2).mT, features.flatten(2).mT
    torch.testing.assert_close(torch.cdist(near, near), torch.cdist(exact, exact), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(reduction.components @ reduction.components.T, torch.eye(3), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="cannot be reduced to 12"):
        fit.result(12)


def test_storage_is_told_to_the_byte_for_the_store(shards, request_all, tmp_path, here):
    lines = []
    done = precompute_priors(
        shards, tmp_path / "out", request_all, store=tmp_path / "s", gpus_per_actor=0, say=lines.append
    )
    needed = storage_needed(Manifest.load(shards), request_all)
    assert lines[0] == f"{needed}."
    assert needed.store_positions == 18 * 4 * 32 * 32 * 2
    assert needed.store_features == 18 * 128 * 9 * 2
    written = sum(shard.bytes for shard in done.manifest.shards)
    assert written == pytest.approx(needed.shards, rel=0.15)
    kept = sum(path.stat().st_size for path in (tmp_path / "s").rglob("*.safetensors"))
    assert kept < needed.store_positions + needed.store_features + 400 * 24  # headers


def test_a_sapiens_2b_set_needs_what_the_paper_sized_maps_take():
    network = replace_kind("sapiens-2b")
    manifest = manifest_of(pictures_size=512)
    needed = storage_needed(manifest, PriorRequest(features=network))
    assert needed.store_features == needed.pictures * 1920 * 64 * 64 * 2
    reduced = storage_needed(manifest, PriorRequest(features=network, channels=256, storage="int8"))
    assert reduced.store_features == reduced.pictures * 256 * 64 * 64 * 2


def replace_kind(kind):
    from avatars.priors.registry import NetworkFile

    return NetworkFile(kind, Path("nowhere"), "0" * 64, "")


def manifest_of(pictures_size):
    from shards.manifest import PackSettings, PriorError, PriorSettings, ShardInfo

    shard = ShardInfo("a.tar", "a", 10**9, "0", (0, 0), (80,) * 4, ((0, 1, 2, 3),) * 2)
    return Manifest(
        folder=Path("x"), expression_kind="arkit-52", expression_length=52, expression_mean=(), expression_std=(),
        head=None, settings=PackSettings(size=pictures_size), priors=PriorSettings(), prior_error=PriorError(),
        train=("a",), heldout=(), shards=(shard,),
    )  # fmt: skip


def test_maps_in_the_store_that_are_not_what_they_should_be(shards, request_all, tmp_path, here):
    def again():
        with pytest.raises(UserError) as refusal:
            precompute_priors(shards, tmp_path / "out", request_all, store=store, gpus_per_actor=0)
        return str(refusal.value)

    store = tmp_path / "store"
    for subject in ("s00", "s01"):
        compute_subject(job(shards, store, request_all, subject), quiet)
    feature = min((store / "features").rglob("*.safetensors"))
    whole = feature.read_bytes()

    feature.write_bytes(whole[: len(whole) // 2])
    assert "cannot be read" in again()

    maps = room._Store(store, request_all, None)
    maps.write(feature, {"features": torch.zeros(128, 3, 3)}, "sapiens-9b-00000000-fp32")
    assert "is of the network sapiens-9b-00000000-fp32, not of sapiens-" in again()

    maps.write(feature, {"features": torch.zeros(128, 2, 2)}, maps.feature_identity)
    assert "feature maps of the sizes" in again()

    feature.write_bytes(whole)
    precompute_priors(shards, tmp_path / "out", request_all, store=store, gpus_per_actor=0)


def test_a_recipe_for_other_features_is_refused(shards, request_all, tmp_path, here):
    from launch.recipes import find_recipe
    from train.tasks.avat3r import Avat3rTask

    done = precompute_priors(
        shards, tmp_path / "out", request_all, store=tmp_path / "s", gpus_per_actor=0
    )  # 128 channels
    recipe = find_recipe("avat3r-tiny")
    recipe = replace(recipe, model=replace(recipe.model, size=32, feature_dim=1920))
    with pytest.raises(UserError, match=r"128 channels .*feature-dim is 1920"):
        Avat3rTask(recipe).check(done.manifest)


def test_a_full_disk_in_the_middle_is_a_sentence_and_keeps_what_is_whole(
    shards, request_all, tmp_path, here, monkeypatch
):
    import avatars.files

    written = []
    write_whole = avatars.files.write_whole

    def until_full(path, content):
        if len(written) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        write_whole(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(avatars.files, "write_whole", until_full)
        with pytest.raises(UserError, match="No space left on device") as refusal:
            precompute_priors(shards, tmp_path / "out", request_all, store=tmp_path / "s", gpus_per_actor=0)
    assert "run the same command again" in str(refusal.value)
    assert set(files_in(tmp_path / "s")) == set(written)
    done = precompute_priors(shards, tmp_path / "out", request_all, store=tmp_path / "s", gpus_per_actor=0)
    assert done.found >= 3


def test_a_disk_that_is_too_small_is_told_before_anything_starts(shards, request_all, tmp_path, monkeypatch):
    from collections import namedtuple

    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda _: usage(10, 9, 1))
    with pytest.raises(UserError, match="Make space, or ask for fewer --channels"):
        precompute_priors(shards, tmp_path / "out", request_all, store=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_every_prior_is_registered_with_its_licence_and_source(tmp_path):
    for kind in POSITION_PRIORS + FEATURE_PRIORS:
        if kind == "sapiens":
            continue
        with pytest.raises(weights.MissingWeights) as missing:
            find_network(kind)
        entry = weights.WEIGHTS[kind]
        assert entry.fetch in str(missing.value)
        assert entry.licence in str(missing.value)
        assert kind in entry.used_by
    with pytest.raises(UserError, match="There is no prior 'vggt'"):
        find_network("vggt")


def test_weights_are_found_in_the_folder_of_the_variable(tmp_path, monkeypatch):
    file = write_dust3r(tmp_path / "DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth")
    found = find_network("dust3r")
    assert found.path == file
    assert found.sha256 == DUSt3R.load(file).sha256


def refused(capsys, *words):
    assert main(["priors", *map(str, words)]) == 1
    return capsys.readouterr().err


def test_the_command_says_what_is_wrong(shards, files, tmp_path, capsys):
    out = ("--out", tmp_path / "out")
    assert "curl" in refused(capsys, shards, *out, "--position", "dust3r")
    assert "--position depth" in refused(capsys, shards, *out, "--position", "dust3r")
    assert "curl" in refused(capsys, shards, *out, "--features", "sapiens-0.3b")
    assert "no prior 'resnet'" in refused(capsys, shards, *out, "--features", "resnet")
    assert "no features to reduce" in refused(capsys, shards, *out, "--channels", 8)
    assert "of no use" in refused(capsys, shards, *out, "--feature-weights", files[1])
    assert "of no use" in refused(capsys, shards, *out, "--position", "none", "--position-weights", files[0])
    assert "--batch is 0" in refused(capsys, shards, *out, "--batch", 0)
    assert "--workers is 0" in refused(capsys, shards, *out, "--workers", 0)
    assert "--channels is -1" in refused(capsys, shards, *out, "--channels", -1)
    assert not (tmp_path / "out").exists()


def test_without_weights_the_true_depth_is_kept(shards, tmp_path, capsys):
    assert main(["priors", str(shards), "--out", str(tmp_path / "out")]) == 0
    assert "the positions that the shards have (depth) are kept" in capsys.readouterr().out
    assert Manifest.load(tmp_path / "out").priors.position == "depth"
    bare = pack_tiny(
        tmp_path, subjects=2, timesteps=3, views=4, size=32, input_sets=1, n_inputs=2, prior="none"
    )
    assert "curl" in refused(capsys, bare, "--out", tmp_path / "other")
    assert "Pack captures that carry depth" in refused(
        capsys, bare, "--out", tmp_path / "o", "--position", "depth"
    )
