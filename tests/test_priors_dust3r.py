"""Our DUSt3R against what the published network computed, and against files that are not what they should be."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from published_weights import (
    TINY,
    TINY_LINEAR,
    dust3r_shapes,
    dust3r_weights,
    model_string,
    seeded_tensor,
    write_dust3r,
    write_dust3r_hub,
)

from avatars.errors import UserError
from avatars.priors import DUSt3R, pair_maps
from avatars.priors.checkpoints import DUSt3RConfig, parse_model_string
from avatars.priors.dust3r import rotate

GOLDEN = Path(__file__).parent / "golden" / "dust3r_tiny_pair.npz"
FULL_KEYS = "7b5dd9e87fde67caf24ccc0b9ed1423565219216d0af01985044cc0e5250fb41"
"""sha256 of the 1,009 keys and shapes of the published 512_dpt checkpoint, a line each, sorted."""


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: handing parts of them to another thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def golden():
    with np.load(GOLDEN) as file:
        return {name: torch.from_numpy(file[name]) for name in file.files}


@pytest.fixture(scope="module")
def pictures(golden):
    return [(golden[name].permute(2, 0, 1)[None].float() / 255) for name in ("img1", "img2")]


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The golden network as a published `.pth`."""
    return write_dust3r(tmp_path_factory.mktemp("weights") / "tiny.pth", TINY)


@pytest.fixture(scope="module")
def network(published):
    return DUSt3R.load(published)


def largest(a, b):
    return float((a - b).abs().max())


def test_tokens_points_and_confidence_are_the_published_networks(network, golden, pictures):
    with torch.no_grad():
        first, second = (network.encode(picture) for picture in pictures)
        tokens1, tokens2 = network.decoder_tokens(first, second)
        pair = network(*pictures)
    assert largest(first.tokens, golden["enc_1"]) < 1e-5
    assert largest(second.tokens, golden["enc_2"]) < 1e-5
    assert largest(tokens1[6], golden["dec1_6"]) < 5e-5
    assert largest(tokens2[9], golden["dec2_9"]) < 5e-5
    assert largest(tokens1[12], golden["dec1_12"]) < 1e-5
    assert largest(tokens2[12], golden["dec2_12"]) < 1e-5
    for points, name in ((pair.points1, "pts3d_1"), (pair.points2_in_1, "pts3d_2_in_1")):
        assert largest(points.permute(0, 2, 3, 1)[:, ::3, ::3], golden[name]) < 5e-5
    for confidence, name in ((pair.confidence1, "conf_1"), (pair.confidence2, "conf_2")):
        assert largest(confidence[:, 0, ::3, ::3], golden[name]) < 1e-5


def test_a_wrong_network_does_not_pass_for_the_published_one(network, golden, pictures, monkeypatch):
    """The smallest of bugs, one decoder looking at what the other has just become, is beyond the tolerance."""

    def sequential(first, second):
        rotation = network._rope(first.grid, 12, first.tokens.device)
        x1, x2 = network.decoder_embed(first.tokens), network.decoder_embed(second.tokens)
        kept1, kept2 = [first.tokens], [second.tokens]
        for block1, block2 in zip(network.dec_blocks, network.dec_blocks2, strict=True):
            x1 = block1(x1, x2, rotation, rotation)
            x2 = block2(x2, x1, rotation, rotation)
            kept1.append(x1)
            kept2.append(x2)
        kept1[-1], kept2[-1] = network.dec_norm(x1), network.dec_norm(x2)
        return kept1, kept2

    monkeypatch.setattr(network, "decoder_tokens", sequential)
    with torch.no_grad():
        pair = network(*pictures)
    assert largest(pair.points2_in_1.permute(0, 2, 3, 1)[:, ::3, ::3], golden["pts3d_2_in_1"]) > 1e-4


def test_full_size_network_has_the_published_keys_and_shapes():
    published = dust3r_shapes(DUSt3RConfig(), twice=True)
    lines = "".join(f"{key} {','.join(map(str, shape))}\n" for key, shape in sorted(published.items()))
    assert len(published) == 1009
    assert hashlib.sha256(lines.encode()).hexdigest() == FULL_KEYS
    with torch.device("meta"):
        ours = DUSt3R(DUSt3RConfig()).state_dict()
    assert {key: tuple(value.shape) for key, value in ours.items()} == dust3r_shapes(
        DUSt3RConfig(), twice=False
    )
    assert len(ours) == 1001
    assert sum(value.numel() for value in ours.values()) == 571_171_208


def test_hub_folder_and_pth_give_the_same_network(tmp_path):
    one = DUSt3R.load(write_dust3r(tmp_path / "a.pth"))
    folder = write_dust3r_hub(tmp_path / "hub")
    for path in (folder, folder / "model.safetensors"):
        other = DUSt3R.load(path)
        assert other.config == one.config
        for (key, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
            assert torch.equal(a, b), key
    assert one.sha256 == hashlib.sha256((tmp_path / "a.pth").read_bytes()).hexdigest()


def test_both_key_layouts_of_the_dpt_head_are_read(published, network):
    weights = torch.load(published, weights_only=False)["model"]
    once = {key: value for key, value in weights.items() if ".layer_rn." not in key}
    twice_only = {key: value for key, value in weights.items() if not key.endswith("_rn.weight")}
    from avatars.priors.checkpoints import canonical

    for layout in (once, twice_only):
        assert canonical(layout, published).keys() == network.state_dict().keys()


def test_mast3r_file_is_read_without_its_descriptors(tmp_path, published, network, pictures):
    weights = dust3r_weights(TINY)
    for head in (1, 2):
        for layer, shape in (("fc1", (448, 112)), ("fc2", (6400, 448))):
            for kind, size in (("weight", shape), ("bias", shape[:1])):
                key = f"downstream_head{head}.head_local_features.{layer}.{kind}"
                weights[key] = seeded_tensor(key, size)
    text = model_string(TINY).replace("AsymmetricCroCo3DStereo", "AsymmetricMASt3R")
    text = text.replace(
        "head_type='dpt', output_mode='pts3d'", "head_type='catmlp+dpt', output_mode='pts3d+desc24'"
    )
    text = text[:-1] + ", two_confs=True, desc_conf_mode=('exp', 0, inf), landscape_only=False)"
    mast3r = DUSt3R.load(write_dust3r(tmp_path / "mast3r.pth", weights=weights, model=text))
    with torch.no_grad():
        ours, theirs = network(*pictures), mast3r(*pictures)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_first_files_with_one_decoder_for_both_views(tmp_path):
    weights = {key: value for key, value in dust3r_weights(TINY_LINEAR).items() if "dec_blocks2" not in key}
    network = DUSt3R.load(write_dust3r(tmp_path / "old.pth", weights=weights))
    for one, two in zip(network.dec_blocks.parameters(), network.dec_blocks2.parameters(), strict=True):
        assert torch.equal(one, two)


def test_linear_head_places_every_channel(tmp_path):
    network = DUSt3R.load(write_dust3r(tmp_path / "linear.pth"))
    tokens = torch.randn(1, 6, 32, generator=torch.Generator().manual_seed(0))
    points, confidence = network.downstream_head1([tokens], (2, 3))
    raw = tokens @ network.downstream_head1.proj.weight.T + network.downstream_head1.proj.bias
    for y, x in ((0, 0), (17, 5), (31, 47), (9, 20)):
        token = raw[0, (y // 16) * 3 + x // 16]
        place = (y % 16) * 16 + x % 16
        direction = torch.stack([token[c * 256 + place] for c in range(3)])
        expected = direction / direction.norm() * math.expm1(direction.norm())
        torch.testing.assert_close(points[0, :, y, x], expected, atol=1e-5, rtol=1e-5)
        assert float(confidence[0, 0, y, x]) == pytest.approx(1 + math.exp(token[768 + place]), rel=1e-5)


def test_rotation_turns_by_differences_of_rows_and_columns():
    """A query and a key that are moved together keep their product (RoPE's whole point)."""
    config = DUSt3RConfig(enc_embed_dim=32, enc_num_heads=1)
    with torch.device("meta"):
        network = DUSt3R(config)
    rotation = network._rope((5, 7), 32, torch.device("cpu"))
    q, k = torch.randn(2, 32, generator=torch.Generator().manual_seed(1)).unbind()
    places = q.expand(1, 1, 35, 32), k.expand(1, 1, 35, 32)
    products = rotate(places[0], rotation)[0, 0] @ rotate(places[1], rotation)[0, 0].T

    def at(row, column):
        return row * 7 + column

    assert float(products[at(1, 2), at(3, 3)] - products[at(2, 5), at(4, 6)]) == pytest.approx(0, abs=1e-4)
    assert abs(float(products[at(1, 2), at(3, 3)] - products[at(1, 2), at(2, 3)])) > 1e-2
    assert abs(float(products[at(1, 2), at(3, 3)] - products[at(1, 2), at(3, 4)])) > 1e-2


def test_two_pictures_of_different_shape(tmp_path):
    network = DUSt3R.load(write_dust3r(tmp_path / "linear.pth"))
    with torch.no_grad():
        pair = network(torch.rand(2, 3, 32, 48), torch.rand(2, 3, 64, 16))
    assert pair.points1.shape == (2, 3, 32, 48)
    assert pair.points2_in_1.shape == (2, 3, 64, 16)
    assert pair.confidence2.shape == (2, 1, 64, 16)
    assert bool((pair.confidence1 > 1).all())


def test_pairs_of_a_set_encode_each_picture_once(tmp_path, monkeypatch):
    network = DUSt3R.load(write_dust3r(tmp_path / "linear.pth"))
    images = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    encoded = []
    encode = network.encode
    monkeypatch.setattr(network, "encode", lambda batch: encoded.append(len(batch)) or encode(batch))
    with torch.no_grad():
        maps = pair_maps(network, images, batch=2)
        assert sum(encoded) == 3
        for e, (i, j) in enumerate(maps.pairs):
            pair = network(images[i : i + 1], images[j : j + 1])
            torch.testing.assert_close(maps.points[e, 0], pair.points1[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(maps.points[e, 1], pair.points2_in_1[0], atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(maps.confidence[e, 1], pair.confidence2[0], atol=1e-5, rtol=1e-4)
    assert sorted(maps.pairs) == [(0, 1), (0, 2), (1, 0), (1, 2), (2, 0), (2, 1)]


def test_bf16_trunk_is_near_and_its_heads_are_exact(published, network, pictures):
    half = DUSt3R.load(published, precision="bf16")
    assert half.enc_blocks[0].attn.qkv.weight.dtype == torch.bfloat16
    assert half.downstream_head1.dpt.head[0].weight.dtype == torch.float32
    with torch.no_grad():
        near, exact = half(*pictures), network(*pictures)
    assert float((near.points1 - exact.points1).norm() / exact.points1.norm()) < 0.03
    assert near.points1.dtype == torch.float32


@pytest.mark.parametrize(
    ("text", "quoted"),
    [
        ("AsymmetricCroCo3DStereo(enc_depth=__import__('os').system('true'))", "__import__"),
        ("AsymmetricCroCo3DStereo(enc_depth=max(1, 2))", "max(1, 2)"),
        ("AsymmetricCroCo3DStereo(img_size=(512, [x for x in ()]))", "x for x in"),
        ("AsymmetricCroCo3DStereo(24, 12)", "named arguments"),
        ("AsymmetricCroCo3DStereo(**{})", "named arguments"),
        ("os.system('true')", "named arguments"),
        ("AsymmetricCroCo3DStereo(", "no Python expression"),
        ("", "no Python expression"),
        ("f(a=" + "-" * 5000 + "1)", "it"),
    ],
)
def test_model_strings_are_parsed_and_never_run(text, quoted):
    with pytest.raises(ValueError, match=re.escape(quoted)):
        parse_model_string(text)


def test_the_published_string_is_understood():
    name, arguments = parse_model_string(model_string(TINY))
    assert name == "AsymmetricCroCo3DStereo"
    assert arguments["depth_mode"] == ("exp", -math.inf, math.inf)
    assert arguments["img_size"] == (128, 128)


class Foreign:
    """A class that no weight file needs."""


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"model": "AsymmetricCroCo3DStereo(enc_depth=print('x'))"}, "It was not evaluated"),
        ({"model": "Fast3R(enc_depth=2)"}, "Fast3R is not AsymmetricCroCo3DStereo"),
        ({"model": model_string(TINY_LINEAR).replace("'exp', 1", "'sigmoid', 1")}, "conf_mode"),
        ({"model": model_string(TINY_LINEAR).replace("RoPE100", "cosine")}, "RoPE"),
        ({"model": model_string(TINY_LINEAR).replace("'linear'", "'mlp'")}, "head_type"),
        ({"model": model_string(TINY_LINEAR).replace("enc_depth=2", "enc_depth=3")}, "another architecture"),
        ({"model": model_string(TINY_LINEAR).replace("enc_depth=2", "enc_depth=1")}, "another architecture"),
        (
            {"model": model_string(TINY_LINEAR).replace("embed_dim=32", "embed_dim=64")},
            "another architecture",
        ),
        ({"model": model_string(TINY_LINEAR).replace("num_heads=2", "num_heads=3")}, "another network"),
        ({"weights": {"a": torch.zeros(1)}}, "another architecture"),
        ({"weights": {"a": "text"}}, "where a tensor is expected"),
    ],
)
def test_files_of_other_networks_are_refused_in_a_sentence(tmp_path, change, sentence):
    path = write_dust3r(tmp_path / "other.pth", **change)
    with pytest.raises(UserError, match=r"other\.pth") as refusal:
        DUSt3R.load(path)
    assert sentence in str(refusal.value)


def test_a_pickle_with_a_foreign_class_is_refused_and_named(tmp_path):
    path = tmp_path / "foreign.pth"
    torch.save({"args": argparse.Namespace(model="x"), "model": {}, "extra": Foreign()}, path)
    with pytest.raises(UserError, match=r"foreign\.pth holds \S*Foreign, which is no part of a weight file"):
        DUSt3R.load(path)


def test_a_pickle_that_would_run_a_program_does_not(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"args": argparse.Namespace(model="x"), "model": Runs()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="loading it could run a program"):
        DUSt3R.load(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.99])
def test_files_cut_short_are_refused(tmp_path, keep):
    whole = write_dust3r(tmp_path / "whole.pth").read_bytes()
    hub = write_dust3r_hub(tmp_path / "hub")
    tensors = (hub / "model.safetensors").read_bytes()
    for path, data in ((tmp_path / "cut.pth", whole), (hub / "model.safetensors", tensors)):
        path.write_bytes(data[: keep if keep >= 1 else int(keep * len(data))])
        with pytest.raises(UserError, match="cut short"):
            DUSt3R.load(path)


def test_missing_pieces_are_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.pth is not there"):
        DUSt3R.load(tmp_path / "nothing.pth")
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        DUSt3R.load(tmp_path)
    folder = write_dust3r_hub(tmp_path / "hub")
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        DUSt3R.load(folder)
    (folder / "config.json").write_text(json.dumps({"architectures": ["ViTModel"], "hidden_size": 768}))
    with pytest.raises(UserError, match="another network than DUSt3R"):
        DUSt3R.load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"belongs beside model\.safetensors"):
        DUSt3R.load(folder)
    torch.save(dust3r_weights(TINY_LINEAR), tmp_path / "bare.pth")
    with pytest.raises(UserError, match="it has no args and model"):
        DUSt3R.load(tmp_path / "bare.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="not a dictionary"):
        DUSt3R.load(tmp_path / "list.pth")


@pytest.mark.parametrize("shape", [(1, 3, 30, 32), (1, 1, 32, 32), (3, 32, 32), (1, 3, 0, 16)])
def test_pictures_of_other_shapes_are_refused(tmp_path, shape):
    network = DUSt3R.load(write_dust3r(tmp_path / "linear.pth"))
    with pytest.raises(UserError, match="DUSt3R takes pictures"):
        network.encode(torch.zeros(shape))
