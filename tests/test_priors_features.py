"""Sapiens against a forward pass written out from its description, DINOv2 and Sapiens2 by their files' layout."""

from __future__ import annotations

import math

import pytest
import torch
from published_weights import sapiens_shapes, sapiens_weights, seeded_tensor, write_dust3r, write_sapiens
from torch.nn import functional as F

from avatars.errors import UserError
from avatars.priors import FeaturePrior, Sapiens, load_dinov2, load_sapiens2
from avatars.priors.features import RENAMED, SAPIENS


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Small tensors: handing parts of them to another thread takes longer than the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def norm(x, w, name):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def sapiens_by_hand(w, images, depth, heads):
    """Sapiens v1 as its paper's code says, in the file's own names, with nothing but products and sums."""
    mean, std = torch.tensor([123.5, 116.5, 103.5]), torch.tensor([58.5, 57.0, 57.5])
    x = (255 * images - mean[:, None, None]) / std[:, None, None]
    cells = x.unfold(2, 16, 16).unfold(3, 16, 16)  # (B, 3, h, w, 16, 16)
    kernel, bias = w["patch_embed.projection.weight"], w["patch_embed.projection.bias"]
    x = torch.einsum("bcijyx,dcyx->bijd", cells, kernel).flatten(1, 2) + bias
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for n in range(depth):
        p = f"layers.{n}"
        h = norm(x, w, f"{p}.ln1") @ w[f"{p}.attn.qkv.weight"].T + w[f"{p}.attn.qkv.bias"]
        q, k, v = h.view(*h.shape[:2], 3, heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        h = (attention @ v).transpose(1, 2).flatten(2)
        x = x + h @ w[f"{p}.attn.proj.weight"].T + w[f"{p}.attn.proj.bias"]
        h = norm(x, w, f"{p}.ln2") @ w[f"{p}.ffn.layers.0.0.weight"].T + w[f"{p}.ffn.layers.0.0.bias"]
        h = h * 0.5 * (1 + torch.erf(h / math.sqrt(2)))
        x = x + h @ w[f"{p}.ffn.layers.1.weight"].T + w[f"{p}.ffn.layers.1.bias"]
    x = norm(x, w, "ln1")[:, 1:]
    side = math.isqrt(x.shape[1])
    return x.transpose(1, 2).reshape(len(x), -1, side, side)


@pytest.fixture(scope="module")
def pictures():
    return torch.rand(2, 3, 96, 96, generator=torch.Generator().manual_seed(0))


def test_sapiens_computes_what_its_description_says(tmp_path, pictures):
    model = Sapiens.load(write_sapiens(tmp_path / "sapiens_tiny_clean.pth"))
    expected = sapiens_by_hand(sapiens_weights(), pictures, depth=2, heads=2)
    assert isinstance(model, FeaturePrior)
    assert (model.dim, model.grid) == (128, (6, 6))
    torch.testing.assert_close(model(pictures), expected, atol=2e-5, rtol=1e-5)


def test_full_checkpoints_and_folders_give_the_same(tmp_path, pictures):
    clean = Sapiens.load(write_sapiens(tmp_path / "sapiens_tiny_clean.pth"))
    full = {f"backbone.{key}": value for key, value in sapiens_weights().items()}
    full |= {"neck.decoder.weight": torch.zeros(3), "decode_head.conv.bias": torch.zeros(2)}
    (tmp_path / "task").mkdir()
    torch.save({"state_dict": full, "meta": {"epoch": 1}}, tmp_path / "task" / "seg.pth")
    for path in (tmp_path, tmp_path / "task", tmp_path / "task" / "seg.pth"):
        assert torch.equal(Sapiens.load(path)(pictures), clean(pictures))


@pytest.mark.parametrize("size", list(SAPIENS))
def test_published_sizes_have_the_published_entries_and_parameters(size):
    from functools import partial

    from timm.models.vision_transformer import VisionTransformer

    width, depth, heads = SAPIENS[size]
    published = sapiens_shapes(width, depth, 64)
    entries = {"0.3b": 294, "0.6b": 390, "1b": 486, "2b": 582}
    millions = {"0.3b": 307.3, "0.6b": 635.9, "1b": 1140.7, "2b": 2133.9}
    assert len(published) == entries[size]
    assert sum(math.prod(shape) for shape in published.values()) / 1e6 == pytest.approx(
        millions[size], abs=0.1
    )
    with torch.device("meta"):
        vit = VisionTransformer(
            img_size=1024, patch_size=16, embed_dim=width, depth=depth, num_heads=heads, num_classes=0,
            global_pool="", norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
        )  # fmt: skip
    renamed = {}
    for key, shape in published.items():
        for pattern, name in RENAMED:
            key = pattern.sub(name, key)
        renamed[key] = shape
    assert {key: tuple(value.shape) for key, value in vit.state_dict().items()} == renamed


def test_pictures_are_resized_as_the_authors_do(tmp_path, pictures):
    model = Sapiens.load(write_sapiens(tmp_path / "sapiens_tiny_clean.pth"))
    small = pictures[:, :, :48, :64]
    expected = model(F.interpolate(small, (96, 96), mode="bilinear", align_corners=False))
    torch.testing.assert_close(model(small), expected, atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"takes pictures \(B, 3, H, W\)"):
        model(pictures[0])


def test_bf16_features_are_near(tmp_path, pictures):
    path = write_sapiens(tmp_path / "sapiens_tiny_clean.pth")
    near, exact = Sapiens.load(path, precision="bf16")(pictures), Sapiens.load(path)(pictures)
    assert near.dtype == torch.float32
    assert 0 < float((near - exact).norm() / exact.norm()) < 0.02


def dinov2_weights(registers):
    """Meta's file of the small size: timm's names and a mask token; registers under another name."""
    import timm

    name = f"vit_small_patch14_{'reg4_' if registers else ''}dinov2"
    with torch.device("meta"):
        shapes = {
            key: tuple(v.shape) for key, v in timm.create_model(name, num_classes=0).state_dict().items()
        }
    if registers:  # there the position table has a place for the class token too
        shapes["register_tokens"] = shapes.pop("reg_token")
        shapes["pos_embed"] = (1, shapes["pos_embed"][1] + 1, 384)
    return {"mask_token": torch.zeros(1, 384)} | {
        key: seeded_tensor(f"{key}.weight", shape) for key, shape in shapes.items()
    }


@pytest.mark.parametrize("registers", [False, True])
def test_dinov2_reads_metas_file_and_timms(tmp_path, registers):
    size = "small-registers" if registers else "small"
    torch.save(dinov2_weights(registers), tmp_path / "dinov2_vits14_pretrain.pth")
    model = load_dinov2(tmp_path / "dinov2_vits14_pretrain.pth", size)
    assert (model.dim, model.grid, model.pixels) == (384, (37, 37), 518)
    assert model.name.startswith(f"dinov2-{size}:")
    if not registers:
        from safetensors.torch import save_file

        save_file(model.vit.state_dict(), tmp_path / "model.safetensors")
        other = load_dinov2(tmp_path / "model.safetensors", size)
        picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        assert torch.equal(other(picture), model(picture))
        assert model(picture).shape == (1, 384, 37, 37)


def metas_names(weights):
    """A Sapiens2 state dict of timm's under the names of Meta's files."""
    pairs = (
        ("reg_token", "storage_tokens"), ("patch_embed.proj.", "patch_embed.projection."), (".q_proj.", ".wq."),
        (".k_proj.", ".wk."), (".v_proj.", ".wv."), ("gamma_1", "attn.gamma.weight"), (".norm1.", ".ln1."),
        (".norm2.", ".ln2."), (".mlp.fc1.", ".ffn.w12."), (".mlp.fc2.", ".ffn.w3."),
    )  # fmt: skip
    renamed = {}
    for key, value in weights.items():
        for ours, theirs in pairs:
            key = key.replace(ours, theirs)
        renamed[f"ln1.{key[5:]}" if key.startswith("norm.") else key] = value
    return renamed | {"rope_embed.periods": torch.ones(16), "mask_token": torch.zeros(1, 768)}


def test_sapiens2_reads_metas_file(tmp_path, monkeypatch):
    """The smallest size, one layer deep, so that the test stays small; the whole one refuses that file."""
    import timm
    from safetensors.torch import save_file

    create = timm.create_model
    vit = create("vit_base_patch16_sapiens2", num_classes=0, depth=1, num_kv_heads=12)
    file = tmp_path / "sapiens2_0.1b_pretrain.safetensors"
    save_file(metas_names(vit.state_dict()), file)
    with pytest.raises(UserError, match="of another architecture"):  # eleven layers are missing
        load_sapiens2(file, "0.1b")
    monkeypatch.setattr(
        timm, "create_model", lambda name, **more: create(name, depth=1, num_kv_heads=12, **more)
    )
    model = load_sapiens2(file, "0.1b")
    assert (model.dim, model.grid) == (768, (64, 64))
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    features = model(picture)
    assert features.shape == (1, 768, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    whole = F.interpolate(picture, (1024, 1024), mode="bilinear", align_corners=False)
    with torch.no_grad():
        tokens = vit.eval().forward_features((whole - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(features.flatten(2).mT, tokens[:, 9:], atol=1e-4, rtol=1e-4)


def test_files_that_are_not_sapiens_are_refused_in_a_sentence(tmp_path):
    write_dust3r(tmp_path / "dust3r.pth")
    with pytest.raises(UserError, match="another architecture than Sapiens"):
        Sapiens.load(tmp_path / "dust3r.pth")
    weights = sapiens_weights()
    del weights["layers.1.attn.qkv.bias"]
    torch.save(weights, tmp_path / "a.pth")
    with pytest.raises(UserError, match=r"lacks blocks\.1\.attn\.qkv\.bias"):
        Sapiens.load(tmp_path / "a.pth")
    weights = sapiens_weights()
    weights["layers.0.attn.proj.weight"] = torch.zeros(128, 64)
    torch.save(weights, tmp_path / "b.pth")
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.proj\.weight is \(128, 64\)"):
        Sapiens.load(tmp_path / "b.pth")
    whole = write_sapiens(tmp_path / "c.pth").read_bytes()
    (tmp_path / "c.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut short"):
        Sapiens.load(tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"holds 3 files \*\.pth|holds \d files"):
        Sapiens.load(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no weight file"):
        Sapiens.load(tmp_path / "empty")
    with pytest.raises(UserError, match="of another architecture"):
        load_dinov2(write_sapiens(tmp_path / "d.pth"), "small")
