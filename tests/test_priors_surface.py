"""Features of places on a tracked head: equal for equal places, whoever it is and whatever the face does."""

from dataclasses import replace

import pytest
import torch
from tiny_captures import pack_tiny

from avatars.cameras import Cameras
from avatars.errors import UserError
from avatars.head import ParametricHead
from avatars.inputs import InputSet
from avatars.priors import SurfacePrior
from launch.cli import main
from shards import Manifest, open_shards


@pytest.fixture(scope="module")
def prior():
    return SurfacePrior(ParametricHead.load("makehuman"))


def cells_of_vertices(head, vertices, identity, expression, off=0.0):
    """An input set of one picture whose 8 x 8 cells each show one vertex, from `off` metres outside of it."""
    place = head.vertices(identity[None], expression[None])[0, vertices]  # (n, 3)
    place = place + off * torch.nn.functional.normalize(place, dim=1)
    positions = place.T[:, None, :, None].expand(3, 8, len(vertices), 8).reshape(1, 3, 8, 8 * len(vertices))
    size = positions.shape[-2:]
    return InputSet(
        images=torch.zeros(1, 3, *size),
        masks=torch.ones(1, 1, *size),
        cameras=Cameras(torch.eye(3)[None], torch.eye(4)[None]),
        positions=positions.contiguous(),
        confidence=torch.full((1, 1, *size), 2.7),
        features=None,
        expressions=expression[None],
        expression_kind="arkit-52",
        subject="nobody",
        head="makehuman",
        identity=identity,
    )


def test_a_place_has_the_same_features_on_everybody_in_every_expression(prior):
    head, generator = prior.head, torch.Generator().manual_seed(1)
    places = head.landmarks68[[8, 30, 36, 45, 48]]  # chin, tip of the nose, eyes' and mouth's corners
    made = [
        prior(
            cells_of_vertices(
                head,
                places,
                torch.randn(head.n_identity, generator=generator),
                torch.rand(head.n_expression, generator=generator),
            )
        )
        for _ in range(2)
    ]
    assert made[0].shape == (1, 32, 1, 5)
    assert torch.allclose(*made, atol=1e-5)
    apart = torch.pdist(made[0][0, :, 0].T)
    assert apart.min() > 1  # different places have different features; each vector has length 4


def test_features_fade_with_the_distance_and_are_zero_where_nothing_is(prior):
    zero = torch.zeros(prior.head.n_identity), torch.zeros(prior.head.n_expression)
    nose = prior.head.landmarks68[[30]]
    on, off = (prior(cells_of_vertices(prior.head, nose, *zero, off)) for off in (0.0, 0.02))
    assert torch.allclose(on.norm(dim=1), torch.tensor(4.0), atol=1e-4)
    assert 1 < off.norm(dim=1).item() < 3
    nothing = cells_of_vertices(prior.head, nose, *zero)
    nothing.confidence[:] = 1
    assert not prior(nothing).any()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"positions": None}, "need position maps, and the input set of nobody has none"),
        ({"head": None}, "that of nobody has no tracked head"),
        ({"images": torch.zeros(1, 3, 12, 8)}, "multiples of 8 pixels, not 12x8"),
    ],
)
def test_input_sets_without_what_it_needs(prior, change, sentence):
    zero = torch.zeros(prior.head.n_identity), torch.zeros(prior.head.n_expression)
    inputs = cells_of_vertices(prior.head, prior.head.landmarks68[[30]], *zero)
    with pytest.raises(UserError, match=sentence):
        prior(replace(inputs, **change))


def test_the_command_writes_shards_with_them_or_says_why_not(tmp_path, capsys):
    from shards.synth import synthesize

    (capture,) = synthesize(tmp_path / "captures", subjects=1, timesteps=3, views=4, size=32, progress=False)
    words = [
        "shards",
        "pack",
        str(capture.parent),
        str(tmp_path / "shards"),
        "--size",
        "32",
        "--input-views",
        "2",
    ]
    assert main([*words, "--heldout", "0"]) == 0
    words = ["priors", str(tmp_path / "shards"), "--out", str(tmp_path / "out"), "--features", "surface"]
    assert main([*words, "--channels", "4"]) == 1
    assert "no --channels to reduce" in capsys.readouterr().err
    assert main([*words, "--position", "none"]) == 1
    assert "leave --position out" in capsys.readouterr().err
    assert main(words) == 0
    manifest = Manifest.load(tmp_path / "out")
    assert (manifest.priors.features, manifest.priors.feature_grid) == ("surface:makehuman", (4, 4))
    inputs = open_shards(tmp_path / "out", "train").read(manifest.train[0]).input_sets[0]
    assert inputs.features.abs().amax() > 0.1
    untracked = pack_tiny(
        tmp_path / "tiny", subjects=1, heldout=0, views=4, size=32, input_sets=1, prior="none"
    )
    assert main(["priors", str(untracked), "--out", str(tmp_path / "no"), "--features", "surface"]) == 1
    assert "from true depth, and there are none" in capsys.readouterr().err
