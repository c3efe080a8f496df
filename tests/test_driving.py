"""Four pictures to an avatar, expressions to a video: the commands and the files they read."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from published_weights import write_dust3r, write_sapiens

from avatars import load_avatar
from avatars.avat3r import Avat3r
from avatars.errors import UserError
from avatars.export import load_gaussians
from avatars.expressions import read_expressions
from avatars.head.makehuman import ARKIT_NAMES
from avatars.priors import Sapiens
from avatars.priors.reduction import ReductionFit
from eval.movies import frames, portrait_cameras
from launch.cli import main
from launch.recipes import find_recipe
from shards import PriorMaps, PriorSettings, open_shards, write_with_priors
from shards.photographs import read_photographs


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A network with random heads in the folder that a training would export."""
    torch.manual_seed(0)
    network = Avat3r(find_recipe("avat3r-tiny").model)
    for head in network.heads.values():
        torch.nn.init.normal_(head.weight, std=0.05)
    folder = tmp_path_factory.mktemp("model")
    network.save(folder, {"expression_kind": "arkit-52"})
    return folder


@pytest.fixture(scope="module")
def avatar(model, tiny_shards, tmp_path_factory):
    folder = tmp_path_factory.mktemp("avatar")
    assert main(["create", str(model), str(folder), "--data", str(tiny_shards)]) == 0
    return folder


@pytest.fixture
def photographs(tiny_shards, tmp_path):
    """The held-out person's first input set as somebody's own folder of pictures."""
    inputs = open_shards(tiny_shards, "heldout").read("s03").input_sets[0]
    entries = []
    for i in range(len(inputs)):
        picture = (inputs.images[i] * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(tmp_path / f"{i}.png")
        Image.fromarray((inputs.masks[i, 0] * 255).round().to(torch.uint8).numpy()).save(
            tmp_path / f"{i}m.png"
        )
        np.save(tmp_path / f"{i}.position.npy", inputs.positions[i].numpy())
        np.save(tmp_path / f"{i}.confidence.npy", inputs.confidence[i].numpy())
        entries.append(
            {
                "image": f"{i}.png",
                "mask": f"{i}m.png",
                "K": inputs.cameras.K[i].tolist(),
                "world_to_camera": inputs.cameras.world_to_camera[i].tolist(),
                "expression": inputs.expressions[i].tolist(),
                "position": f"{i}.position.npy",
                "confidence": f"{i}.confidence.npy",
            }
        )
    (tmp_path / "pictures.json").write_text(
        json.dumps({"subject": "s03", "expression_kind": "arkit-52", "pictures": entries})
    )
    return tmp_path


def change(folder, **fields):
    """Changes fields of the first entry of pictures.json; None takes a field out."""
    path = folder / "pictures.json"
    described = json.loads(path.read_text())
    described["pictures"][0] |= fields
    described["pictures"][0] = {k: v for k, v in described["pictures"][0].items() if v is not None}
    path.write_text(json.dumps(described))


def test_photographs_make_the_avatar_that_the_shard_makes(model, avatar, photographs, tmp_path):
    assert main(["create", str(model), str(tmp_path / "mine"), "--pictures", str(photographs)]) == 0
    mine, theirs = load_avatar(tmp_path / "mine"), load_avatar(avatar)
    code = torch.rand(52)
    assert torch.allclose(mine.gaussians(code).means, theirs.gaussians(code).means, atol=1e-5)
    assert torch.allclose(mine.gaussians(code).colors, theirs.gaussians(code).colors, atol=1e-4)


def test_pictures_without_position_maps_need_dust3r(model, photographs, tmp_path, monkeypatch, capsys):
    path = photographs / "pictures.json"
    described = json.loads(path.read_text())
    for entry in described["pictures"]:
        del entry["position"], entry["confidence"]
    path.write_text(json.dumps(described))
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    words = ["create", str(model), str(tmp_path / "mine"), "--pictures", str(photographs)]
    assert main(words) == 1
    assert "making them needs DUSt3R" in capsys.readouterr().err
    # A network with seeded weights under the published names sees nothing, so its confidence is that of nothing.
    assert main([*words, "--weights", str(write_dust3r(tmp_path / "dust3r.pth"))]) == 0
    assert load_avatar(tmp_path / "mine").provenance["prior"].startswith("dust3r:")


def test_pictures_are_cut_to_the_head_and_resampled(photographs):
    inputs = read_photographs(photographs, 24, "arkit-52", 52)
    assert inputs.size == (24, 24)
    assert inputs.positions.shape == (4, 3, 24, 24)
    whole = read_photographs(photographs, 48, "arkit-52", 52)
    assert torch.allclose(inputs.cameras.K[:, :2], whole.cameras.K[:, :2] / 2, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"image": "gone.png"}, "gone.png is not there"),
        ({"K": None}, "picture 0 has no K"),
        ({"K": [[1, 0], [0, 1]]}, r"K must be \(3, 3\) finite numbers"),
        ({"world_to_camera": (2 * np.eye(4)).tolist()}, "is no rotation"),
        ({"expression": [0.0] * 7}, r"expression must be \(52,\)"),
        ({"confidence": None}, "only one of position and confidence"),
        ({"position": None, "confidence": None}, "only some pictures have a position map"),
        ({"image": "pictures.json"}, "is not a readable picture"),
    ],
)
def test_what_is_wrong_with_photographs_is_told(photographs, fields, sentence):
    change(photographs, **fields)
    with pytest.raises(UserError, match=sentence):
        read_photographs(photographs, 48, "arkit-52", 52)


def test_a_video_shows_what_the_avatar_shows(avatar, tmp_path):
    av = pytest.importorskip("av")
    codes = np.random.default_rng(0).random((5, 52), np.float32)
    np.save(tmp_path / "codes.npy", codes)
    words = ["drive", str(avatar), str(tmp_path / "clip.mp4"), "--expressions", str(tmp_path / "codes.npy")]
    assert main([*words, "--size", "64", "--sweep", "20"]) == 0
    with av.open(str(tmp_path / "clip.mp4")) as container:
        shown = [frame.to_ndarray(format="rgb24").astype(float) for frame in container.decode(video=0)]
    made = list(frames(load_avatar(avatar), torch.from_numpy(codes), portrait_cameras(5, 64, 20), 64))
    assert len(shown) == len(made) == 5
    assert made[0].max() > 60  # somebody is in the picture
    for a, b in zip(shown, made, strict=True):
        assert np.abs(a - b).mean() < 6  # 4:2:0 chroma and quantisation


def test_a_folder_gets_pictures_or_gaussians_of_recorded_expressions(avatar, tiny_shards, tmp_path):
    words = ["drive", str(avatar), "--data", str(tiny_shards)]
    assert main([*words, str(tmp_path / "png"), "--size", "32", "--background", "1", "1", "1"]) == 0
    pictures = sorted((tmp_path / "png").glob("*.png"))
    targets = open_shards(tiny_shards, "heldout").read("s03").targets
    assert len(pictures) == len(targets)
    assert np.asarray(Image.open(pictures[0]))[0, 0].min() > 250
    assert main([*words, str(tmp_path / "ply"), "--files", "ply"]) == 0
    read = load_gaussians(tmp_path / "ply" / "00001.ply")
    expected = load_avatar(avatar).gaussians(targets[1].expression)
    assert torch.allclose(read.means, expected.means, atol=1e-5)


def test_a_sheet_shows_what_the_avatar_was_made_from_and_its_expressions(avatar, tmp_path):
    path = tmp_path / "codes.json"
    path.write_text(json.dumps([{"jawOpen": 0.1 * number} for number in range(8)]))
    words = ["drive", str(avatar), str(tmp_path / "sheet.png"), "--expressions", str(path), "--size", "32"]
    assert main([*words, "--sweep", "0"]) == 0
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (3 * 36 - 4 + 12, 6 * 36 - 4, 3)  # four inputs, six expressions, two more
    given = Image.fromarray(load_avatar(avatar).pictures[0].permute(1, 2, 0).numpy()).resize((32, 32))
    assert np.array_equal(sheet[:32, 36:68], np.asarray(given))
    (picture,) = frames(load_avatar(avatar), torch.zeros(1, 52), portrait_cameras(1, 32), 32)
    assert np.array_equal(sheet[48:80, :32], picture)


def test_expressions_are_read_from_what_a_phone_writes(tmp_path):
    path = tmp_path / "take.csv"
    path.write_text(
        "Timecode,BlendshapeCount,JawOpen,EyeBlinkLeft,HeadYaw\n0,61,0.5,0.25,0.1\n1,61,0.75,0,0.2\n"
    )
    codes = read_expressions(path, "arkit-52", 52)
    assert codes.shape == (2, 52)
    assert codes[:, ARKIT_NAMES.index("jawOpen")].tolist() == [0.5, 0.75]
    assert codes[:, ARKIT_NAMES.index("eyeBlinkLeft")].tolist() == [0.25, 0]
    assert codes.sum() == 1.5
    (tmp_path / "named.json").write_text('[{"jawOpen": 1}]')
    assert read_expressions(tmp_path / "named.json", "arkit-52", 52).sum() == 1


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.json", "[[1, 2, 3]]", r"\(1, 3\) numbers where \(frames, 52\) of arkit-52"),
        ("a.json", '[{"jawOpenn": 1}]', "'jawOpenn', which is none of ARKit's"),
        ("a.json", "[", "cannot be read"),
        ("a.csv", "Time,Yaw\n0,1\n", "no column with the name"),
        ("a.npy", "nothing", "cannot be read"),
        ("a.txt", "", "no expression file"),
    ],
)
def test_other_expression_files_are_refused(tmp_path, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        read_expressions(tmp_path / name, "arkit-52", 52)


def test_names_mean_nothing_to_codes_of_another_kind(tmp_path):
    (tmp_path / "a.json").write_text('[{"jawOpen": 1}]')
    with pytest.raises(UserError, match="driven by ava-256 codes"):
        read_expressions(tmp_path / "a.json", "ava-256", 256)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["create", "MODEL", "out"], "Say where the pictures are"),
        (["create", "nowhere", "out", "--data", "SHARDS"], "holds no model.json"),
        (["create", "MODEL", "out", "--data", "SHARDS", "--input-set", "9"], "count from 0"),
        (["create", "MODEL", "out", "--pictures", "nowhere"], "pictures.json is not there"),
        (["drive", "nowhere", "out"], "holds no avatar.json"),
        (["drive", "AVATAR", "clip.avi"], "end it in .mp4"),
        (["drive", "AVATAR", "clip.png", "--size", "16", "--frames", "97"], "shows up to 96 expressions"),
        (["drive", "AVATAR", "clip.mp4", "--size", "33"], "sides must be even"),
        (["drive", "AVATAR", "clip.mp4", "--size", "3"], "--size must be at least 16"),
        (["drive", "AVATAR", "out", "--background", "2", "0", "0"], "three numbers from 0 to 1"),
    ],
)
def test_what_a_user_can_mend_is_told(
    model, avatar, tiny_shards, tmp_path, monkeypatch, capsys, words, sentence
):
    monkeypatch.chdir(tmp_path)
    stand = {"MODEL": str(model), "SHARDS": str(tiny_shards), "AVATAR": str(avatar)}
    assert main([stand.get(word, word) for word in words]) == 1
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def featured(tiny_shards, tmp_path_factory):
    """Shards with three components of a small Sapiens' features, the two files, and a network that takes those."""
    folder = tmp_path_factory.mktemp("featured")
    file = write_sapiens(folder / "sapiens_clean.pth", grid=3)
    network = Sapiens.load(file)
    inputs = open_shards(tiny_shards, "train").read("s00").input_sets[0]
    fit = ReductionFit(network.dim)
    fit.add(network(inputs.images))
    reduction = fit.result(3)
    reduction.save(folder / "features-reduction.safetensors")
    name = f"{network.name}+{reduction.name}"

    def compute(inputs):
        return PriorMaps(features=reduction(network(inputs.images)))

    write_with_priors(tiny_shards, folder / "shards", compute, PriorSettings("depth", name, 3))
    torch.manual_seed(0)
    recipe = find_recipe("avat3r-tiny").model
    model = Avat3r(replace(recipe, feature_dim=3, feature_prior=name))
    for head in model.heads.values():
        torch.nn.init.normal_(head.weight, std=0.05)
    model.save(folder / "model", {"expression_kind": "arkit-52"})
    return folder


def test_photographs_get_the_reduced_features_that_the_network_was_trained_on(
    featured, photographs, tmp_path, capsys
):
    model = str(featured / "model")
    theirs = ["create", model, str(tmp_path / "theirs"), "--data", str(featured / "shards")]
    assert main(theirs) == 0
    mine = ["create", model, str(tmp_path / "mine"), "--pictures", str(photographs)]
    weights = ["--feature-weights", str(featured / "sapiens_clean.pth")]
    reduction = ["--feature-reduction", str(featured / "features-reduction.safetensors")]
    assert main([*mine, *weights, *reduction]) == 0
    code = torch.rand(52)
    made, expected = (load_avatar(tmp_path / who).gaussians(code) for who in ("mine", "theirs"))
    assert torch.allclose(made.means, expected.means, atol=1e-4)  # shards keep features in 16 bits
    assert load_avatar(tmp_path / "mine").provenance["features"].startswith("sapiens-128x2:")

    def refused(*words):
        assert main([*mine, *words]) == 1
        return capsys.readouterr().err

    assert "with fewer channels (pca3:" in refused(*weights)
    assert "making them needs" in refused(*reduction)
    other = write_sapiens(tmp_path / "other.pth", grid=4)
    assert "trained on the features of sapiens-128x2:" in refused("--feature-weights", str(other), *reduction)
    fit = ReductionFit(8)
    fit.add(torch.randn(2, 8, 4, 4))
    fit.result(3).save(tmp_path / "another.safetensors")
    assert "holds the reduction pca3:" in refused(
        *weights, "--feature-reduction", str(tmp_path / "another.safetensors")
    )


def test_features_that_no_picture_shows_are_refused(featured, photographs, tiny_shards, tmp_path, capsys):
    path = tmp_path / "model" / "model.json"
    shutil.copytree(featured / "model", path.parent)
    described = json.loads(path.read_text())
    described["config"]["feature_prior"] = "surface:makehuman"
    path.write_text(json.dumps(described))
    words = ["create", str(path.parent), str(tmp_path / "avatar")]
    assert main([*words, "--pictures", str(photographs)]) == 1
    assert "(surface:makehuman) that cannot be computed from pictures alone" in capsys.readouterr().err
    assert main([*words, "--data", str(featured / "shards")]) == 1
    assert "features of two priors" in capsys.readouterr().err
