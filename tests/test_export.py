"""Splat files: round trips within each format's quantisation, other people's readers, and hostile files."""

import contextlib
import gzip
import struct
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

from avatars.errors import UserError
from avatars.export import (
    load_gaussians,
    read_ply,
    read_splat,
    read_spz,
    save_gaussians,
    write_ply,
    write_splat,
    write_spz,
)
from avatars.gaussians import Gaussians, quaternion_to_matrix, rgb_to_sh, sh_basis, sh_to_rgb
from tests.rasterize_scenes import random, shell


def logit(p):
    return torch.log(p) - torch.log1p(-p)


def rotations_close(a, b, degrees):
    relative = quaternion_to_matrix(a).transpose(1, 2) @ quaternion_to_matrix(b)
    angle = torch.rad2deg(((relative.diagonal(dim1=1, dim2=2).sum(-1) - 1) / 2).clamp(-1, 1).acos())
    return angle.max() <= degrees


@pytest.mark.parametrize("sh", [1, 4, 9, 16])
def test_ply_round_trip(tmp_path, sh):
    g = shell(50, sh=sh)
    write_ply(g, tmp_path / "a.ply", ["made by a test"])
    back = read_ply(tmp_path / "a.ply")
    assert torch.equal(back.means, g.means)
    assert torch.equal(back.quats, g.quats)
    assert torch.equal(back.colors, g.colors)
    torch.testing.assert_close(back.scales, g.scales)
    torch.testing.assert_close(back.opacities, g.opacities)


def test_ply_of_rgb_holds_the_constant_harmonic(tmp_path):
    g = shell(20)
    write_ply(g, tmp_path / "a.ply")
    back = read_ply(tmp_path / "a.ply")
    assert back.colors.shape == (20, 1, 3)
    torch.testing.assert_close(sh_to_rgb(back.colors[:, 0]), g.colors)


def test_extreme_values_stay_finite(tmp_path):
    g = shell(3)
    extreme = Gaussians(g.means, g.quats, torch.zeros(3, 3), torch.tensor([0.0, 1.0, 0.5]), g.colors)
    for writer, name in ((write_ply, "a.ply"), (write_spz, "a.spz"), (write_splat, "a.splat")):
        writer(extreme, tmp_path / name)
        back = load_gaussians(tmp_path / name)
        torch.testing.assert_close(back.opacities.sort().values, torch.tensor([0, 0.5, 1]), atol=3e-3, rtol=0)
        assert (back.scales < 1e-4).all()


@pytest.mark.parametrize("sh", [1, 4, 9, 16])
def test_plyfile_reads_our_ply(tmp_path, sh):
    plyfile = pytest.importorskip("plyfile")
    g = shell(30, sh=sh)
    write_ply(g, tmp_path / "a.ply")
    vertex = plyfile.PlyData.read(tmp_path / "a.ply")["vertex"]
    torch.testing.assert_close(torch.tensor(vertex["rot_0"]), g.quats[:, 0])
    torch.testing.assert_close(torch.tensor(vertex["opacity"]), logit(g.opacities))
    if sh == 16:  # channel by channel: 15 values of red, then green, then blue
        torch.testing.assert_close(torch.tensor(vertex["f_rest_16"]), g.colors[:, 2, 1])


@pytest.mark.parametrize("sh", [1, 4, 9, 16])
def test_gsply_reads_our_ply_and_we_read_its(tmp_path, sh):
    gsply = pytest.importorskip("gsply")
    g = shell(30, sh=sh)
    write_ply(g, tmp_path / "a.ply")
    theirs = gsply.plyread(str(tmp_path / "a.ply"))
    np.testing.assert_allclose(theirs.means, g.means)
    np.testing.assert_allclose(theirs.scales, g.scales.log(), rtol=1e-5)
    np.testing.assert_allclose(theirs.opacities, logit(g.opacities), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(theirs.sh0, g.colors[:, 0])
    if sh > 1:
        np.testing.assert_allclose(theirs.shN, g.colors[:, 1:])
    gsply.plywrite(str(tmp_path / "b.ply"), theirs)
    back = read_ply(tmp_path / "b.ply")
    torch.testing.assert_close(back.colors, g.colors)
    torch.testing.assert_close(back.scales, g.scales)


def test_we_read_the_ply_of_gsplats_exporter(tmp_path):
    exporter = pytest.importorskip("gsplat.exporter")
    g = shell(30, sh=16)
    content = exporter.splat2ply_bytes(
        g.means,
        g.scales.log(),
        g.quats,
        logit(g.opacities),
        g.colors[:, 0],
        g.colors[:, 1:].permute(0, 2, 1).reshape(30, -1),
    )
    (tmp_path / "a.ply").write_bytes(content)
    back = read_ply(tmp_path / "a.ply")
    torch.testing.assert_close(back.colors, g.colors)
    torch.testing.assert_close(back.opacities, g.opacities)


def test_splat_round_trip_and_order(tmp_path):
    g = shell(200, sh=4)
    write_splat(g, tmp_path / "a.splat")
    assert (tmp_path / "a.splat").stat().st_size == 200 * 32
    back = read_splat(tmp_path / "a.splat")
    weight = back.scales.prod(1) * back.opacities
    assert (weight[1:] <= weight[:-1] * 1.02).all()  # opacity is rounded after the sort
    match = torch.cdist(back.means, g.means).argmin(1)
    assert torch.equal(back.means, g.means[match])
    assert torch.equal(back.scales, g.scales[match])
    torch.testing.assert_close(back.opacities, g.opacities[match], atol=0.5 / 255, rtol=1e-5)
    rgb = sh_to_rgb(g.colors[match, 0]).clamp(0, 1)
    torch.testing.assert_close(back.colors, rgb, atol=0.51 / 255, rtol=0)
    assert rotations_close(back.quats, g.quats[match], 1.0)


@pytest.mark.parametrize("version", [2, 3])
@pytest.mark.parametrize("sh", [1, 4, 9, 16])
def test_spz_round_trip(tmp_path, version, sh):
    g = shell(300, sh=sh)
    write_spz(g, tmp_path / "a.spz", version=version)
    back = read_spz(tmp_path / "a.spz")
    torch.testing.assert_close(back.means, g.means, atol=0.5 / 2**20, rtol=0)
    torch.testing.assert_close(back.opacities, g.opacities, atol=0.51 / 255, rtol=0)
    torch.testing.assert_close(back.scales.log(), g.scales.log(), atol=0.51 / 16, rtol=0)
    torch.testing.assert_close(back.colors[:, 0], g.colors[:, 0], atol=0.51 / 255 / 0.15, rtol=0)
    for band, step in ((slice(1, 4), 8), (slice(4, 16), 16)):
        expected = g.colors[:, band].clamp(-1, 127 / 128)
        torch.testing.assert_close(back.colors[:, band], expected, atol=(step / 2 + 0.5) / 128, rtol=0)
    assert rotations_close(back.quats, g.quats, 0.25 if version == 3 else 12.0)


def test_spz_of_large_scenes_spends_fewer_fractional_bits(tmp_path):
    g = shell(50).transform(scale=5000.0)
    write_spz(g, tmp_path / "a.spz")
    back = read_spz(tmp_path / "a.spz")
    torch.testing.assert_close(back.means, g.means, atol=1e-3, rtol=1e-5)
    with pytest.raises(UserError, match="8388607"):
        write_spz(shell(5).transform(scale=1e9), tmp_path / "b.spz")


def test_gsply_reads_our_spz_with_flipped_axes(tmp_path):
    gsply = pytest.importorskip("gsply")
    g = shell(100, sh=16)
    write_spz(g, tmp_path / "a.spz")
    theirs = gsply.read_spz(str(tmp_path / "a.spz"))  # leaves the stored axes as they are: y up, z back
    np.testing.assert_allclose(theirs.means, g.means * torch.tensor([1, -1, -1]), atol=1e-6)
    flipped = torch.tensor([1.0, 1, -1, -1])
    assert rotations_close(torch.tensor(theirs.quats), g.quats * flipped, 0.25)
    directions = torch.nn.functional.normalize(random(0, 20, 3), dim=-1)
    ours = torch.einsum("dk,nkc->ndc", sh_basis(3, directions), g.colors)
    harmonics = torch.cat([torch.tensor(theirs.sh0)[:, None], torch.tensor(theirs.shN)], dim=1)
    stored = torch.einsum("dk,nkc->ndc", sh_basis(3, directions * torch.tensor([1, -1, -1])), harmonics)
    assert (stored - ours).abs().mean() < 0.1
    assert torch.corrcoef(torch.stack([stored.flatten(), ours.flatten()]))[0, 1] > 0.98


def test_we_read_the_spz_of_gsply(tmp_path):
    gsply = pytest.importorskip("gsply")
    g = shell(60, sh=4)
    write_ply(g, tmp_path / "a.ply")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gsply.write_spz(str(tmp_path / "a.spz"), gsply.plyread(str(tmp_path / "a.ply")))
    if (tmp_path / "a.spz").read_bytes()[:2] != b"\x1f\x8b":
        pytest.skip("this gsply writes version 4 only")
    back = read_spz(tmp_path / "a.spz")
    torch.testing.assert_close(back.means * torch.tensor([1, -1, -1]), g.means, atol=3e-4, rtol=0)
    assert rotations_close(back.quats * torch.tensor([1.0, 1, -1, -1]), g.quats, 0.25)


@pytest.mark.parametrize("ending", ["ply", "splat", "spz"])
def test_heads_are_stored_upright_and_come_back(tmp_path, ending):
    g = Gaussians(
        torch.tensor([[0.0, 0.12, 0.03]]), torch.tensor([[0.8, 0.6, 0, 0]]), torch.full((1, 3), 0.01),
        torch.tensor([0.8]), torch.tensor([[0.2, 0.4, 0.6]]),
    )  # fmt: skip
    path = tmp_path / f"a.{ending}"
    save_gaussians(g, path, provenance={"subject": "s1", "note": "two\nlines"})
    back = load_gaussians(path)
    torch.testing.assert_close(back.means, g.means, atol=1e-6, rtol=0)
    assert rotations_close(back.quats, g.quats, 1.0)
    stored = load_gaussians(path, up="-y").means[0]
    assert stored[1] == pytest.approx(-0.12, abs=1e-6)  # OpenCV: down is positive
    if ending == "ply":
        assert b'comment headsplat {"subject": "s1"' in path.read_bytes()
    else:
        assert '"subject": "s1"' in (tmp_path / f"a.{ending}.json").read_text()


@pytest.mark.parametrize("ending", ["ply", "splat", "spz"])
def test_nothing_can_be_stored(tmp_path, ending):
    save_gaussians(shell(0), tmp_path / f"a.{ending}")
    assert len(load_gaussians(tmp_path / f"a.{ending}")) == 0


def test_colour_survives_every_format(tmp_path):
    g = shell(10)
    for ending in ("ply", "splat", "spz"):
        save_gaussians(g, tmp_path / f"a.{ending}")
        back = load_gaussians(tmp_path / f"a.{ending}")
        rgb = back.colors if back.colors.ndim == 2 else sh_to_rgb(back.colors[:, 0])
        match = torch.cdist(back.means, g.means).argmin(1)
        torch.testing.assert_close(rgb, g.colors[match], atol=0.01, rtol=0)
    assert rgb_to_sh(torch.tensor(0.5)) == 0


def refused(path, match):
    with pytest.raises(UserError, match=match) as error:
        load_gaussians(path)
    assert str(path) in str(error.value)


def test_missing_and_unknown_files_are_named(tmp_path):
    refused(tmp_path / "none.ply", "does not exist")
    refused(tmp_path / "a.obj", "no splat format")
    with pytest.raises(UserError, match=r"\.spz"):
        save_gaussians(shell(1), tmp_path / "a.obj")


@pytest.mark.parametrize("ending", ["ply", "splat", "spz"])
def test_what_cannot_be_drawn_is_not_written(tmp_path, ending):
    g = shell(5)
    g.scales[3, 1] = float("nan")
    with pytest.raises(UserError, match="scales"):
        save_gaussians(g, tmp_path / f"a.{ending}")
    g = shell(5)
    g.quats[2] = 0
    with pytest.raises(UserError, match="quats"):
        save_gaussians(g, tmp_path / f"a.{ending}")
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_opened_is_a_sentence(tmp_path, monkeypatch):
    save_gaussians(shell(2), tmp_path / "a.ply")

    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    refused(tmp_path / "a.ply", "Permission denied")


@pytest.mark.parametrize("ending", ["ply", "splat", "spz"])
def test_every_truncation_is_refused(tmp_path, ending):
    whole = tmp_path / f"a.{ending}"
    save_gaussians(shell(20, sh=4), whole)
    content = whole.read_bytes()
    cut = tmp_path / f"b.{ending}"
    for length in {0, 3, 10, 60, len(content) // 2, len(content) - 1}:
        if ending == "splat" and length % 32 == 0:
            continue  # has no header: a valid file of fewer splats
        cut.write_bytes(content[:length])
        refused(cut, "PLY|truncated|damaged|not an SPZ")


def ply_header(*lines, count=3):
    return "\n".join(
        ["ply", "format binary_little_endian 1.0", f"element vertex {count}", *lines, "end_header\n"]
    )


NAMES = ["x", "y", "z", *(f"f_dc_{i}" for i in range(3)), "opacity"]
NAMES += [*(f"scale_{i}" for i in range(3)), *(f"rot_{i}" for i in range(4))]
FLOATS = [f"property float {name}" for name in NAMES]


@pytest.mark.parametrize(
    ("header", "match"),
    [
        (ply_header(*FLOATS, count=10**12), "truncated"),
        (ply_header(*FLOATS, count=10**30), "element vertex"),
        (ply_header(*FLOATS, count=-5), "element vertex"),
        (ply_header(*FLOATS[:-1]), "rot_3"),
        (ply_header(*FLOATS, "property list uchar int ids"), "property"),
        (ply_header(*FLOATS, FLOATS[0]), "property"),
        (ply_header(*FLOATS, "property float f_rest_0"), "f_rest"),
        (ply_header("property uint packed_position"), "compressed"),
        (ply_header(*FLOATS).replace("binary_little_endian", "ascii"), "ascii"),
        (ply_header(*FLOATS).replace("element vertex", "element chunk"), "chunk"),
        ("solid cube", "not a PLY"),
    ],
)
def test_hostile_ply_headers_are_refused(tmp_path, header, match):
    (tmp_path / "a.ply").write_bytes(header.encode() + bytes(4 * 15 * 3))
    refused(tmp_path / "a.ply", match)


def test_ply_with_nan_or_no_rotation_names_the_splat(tmp_path):
    table = np.zeros((3, 14), "<f4")
    table[:, 10] = 1
    table[2, 6] = np.nan
    (tmp_path / "a.ply").write_bytes(ply_header(*FLOATS).encode() + table.tobytes())
    refused(tmp_path / "a.ply", "opacities of splat 2")
    table[2, 6] = 0
    table[1, 10] = 0
    (tmp_path / "a.ply").write_bytes(ply_header(*FLOATS).encode() + table.tobytes())
    refused(tmp_path / "a.ply", "rotation of splat 1")
    table[1, 10] = 1
    table[0, 7] = 1000  # exp overflows
    (tmp_path / "a.ply").write_bytes(ply_header(*FLOATS).encode() + table.tobytes())
    refused(tmp_path / "a.ply", "scales of splat 0")


@pytest.mark.parametrize(
    ("header", "match"),
    [
        ((0x5053474E, 3, 2**32 - 1, 0, 12, 0, 0), "claims"),
        ((0x5053474E, 3, 100, 3, 12, 0, 0), "damaged"),
        ((0x5053474E, 3, 1, 0, 12, 0, 0), "damaged"),  # more content than it says
        ((0x5053474E, 1, 4, 0, 12, 0, 0), "version 1"),
        ((0x5053474E, 3, 4, 9, 12, 0, 0), "degree 9"),
        ((0x5053474E, 3, 4, 0, 77, 0, 0), "77"),
        ((0x12345678, 3, 4, 0, 12, 0, 0), "not an SPZ"),
    ],
)
def test_hostile_spz_headers_are_refused(tmp_path, header, match):
    (tmp_path / "a.spz").write_bytes(gzip.compress(struct.pack("<IIIBBBB", *header) + bytes(80)))
    refused(tmp_path / "a.spz", match)


def test_spz_bomb_is_not_unpacked(tmp_path):
    bomb = gzip.compress(struct.pack("<IIIBBBB", 0x5053474E, 3, 5, 0, 12, 0, 0) + bytes(50_000_000))
    assert len(bomb) < 60_000
    (tmp_path / "a.spz").write_bytes(bomb)
    refused(tmp_path / "a.spz", "damaged")


def test_version_4_of_spz_is_named(tmp_path):
    (tmp_path / "a.spz").write_bytes(struct.pack("<III", 0x5053474E, 4, 5) + bytes(20))
    refused(tmp_path / "a.spz", "version 4")


def test_splat_with_negative_scales_is_refused(tmp_path):
    (tmp_path / "a.splat").write_bytes(struct.pack("<6f8B", 0, 0, 0, -1, 1, 1, *[200] * 8))
    refused(tmp_path / "a.splat", "negative")


def test_random_bytes_never_crash(tmp_path):
    generator = np.random.default_rng(0)
    for ending in ("ply", "splat", "spz"):
        whole = tmp_path / f"whole.{ending}"
        save_gaussians(shell(8), whole)
        content = np.frombuffer(whole.read_bytes(), np.uint8)
        for _ in range(60):
            damaged = content.copy()
            damaged[generator.integers(0, len(content), 6)] = generator.integers(0, 256, 6)
            (tmp_path / f"a.{ending}").write_bytes(damaged.tobytes())
            with contextlib.suppress(UserError):  # many damages only change a number
                load_gaussians(tmp_path / f"a.{ending}")
