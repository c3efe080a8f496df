"""Videos that were tracked with FLAME: expression, jaw, eyes and eyelids all move what is fitted.

FLAME's own files cannot be here, so the model is an egg in their format, with 400 shapes, five joints and eyelids.
"""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
import pytest
import torch
from egg_head import cameras_around
from PIL import Image
from scipy import sparse
from scipy.spatial.transform import Rotation

from avatars.errors import UserError
from avatars.flashavatar import FlashAvatar, FlashAvatarConfig
from avatars.gaussians import rgb_to_sh
from avatars.head.tracked import CODE_LENGTH, TrackedFlame, load_head, rotation_vectors
from avatars.method import load_avatar, render
from shards import read_capture
from train.fits import FitSource, run_fit
from train.fits.flashavatar import FlashAvatarFitConfig
from train.fits.heldout import measure_held_out
from train.fits.mouth import lip_points
from train.fits.pictures import from_capture

ROWS, COLUMNS = 12, 16
MODEL = FlashAvatarConfig(head="flame2020", uv_resolution=32, sh_degree=0, mlp_width=16, mlp_layers=2)
FIT = FlashAvatarFitConfig(
    model=MODEL,
    steps=80,
    checkpoint_every=80,
    pictures_per_step=2,
    look="pictures",
    opacity=0.9,
    background="random",
    lpips_weight=0.0,
    rate_color=0.01,
    rate_offsets=1e-3,
)
REST = np.eye(3)[:2].reshape(-1)
FRAMES, SIZE = 12, 40


def egg():
    """Vertices (V, 3) in a frame whose origin is 3 cm below the egg's middle, faces, UVs and the faces' UV ids."""
    v, u = np.meshgrid(np.linspace(0, 1, ROWS + 1), np.linspace(0, 1, COLUMNS + 1), indexing="ij")
    polar, azimuth = np.pi * (0.1 + 0.9 * v), 2 * np.pi * (u - 0.5)
    points = np.stack([np.sin(polar) * np.sin(azimuth), -np.cos(polar), np.sin(polar) * np.cos(azimuth)], -1)
    points = points[:, :-1] * (0.075, 0.105, 0.09)
    points[-1, :, [0, 2]] = 0  # closed at the top
    row, column = np.meshgrid(np.arange(ROWS), np.arange(COLUMNS), indexing="ij")

    def quads(width):
        corners = [(row, column), (row, column + 1), (row + 1, column + 1), (row + 1, column)]
        return np.stack([r * width + c % width for r, c in corners], -1).reshape(-1, 4)

    def halves(q):
        return np.stack([q[:, [0, 1, 2]], q[:, [0, 2, 3]]], 1).reshape(-1, 3)

    uv = np.stack([u, v], -1).reshape(-1, 2)
    return (
        points.reshape(-1, 3) + np.array([0, 0.03, 0]),
        halves(quads(COLUMNS)),
        uv,
        halves(quads(COLUMNS + 1)),
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder for HEADSPLAT_WEIGHTS with `flame2020` in it: the chin hangs on the jaw, two spots on the eyes."""
    folder = tmp_path_factory.mktemp("weights") / "flame2020"
    folder.mkdir()
    points, faces, uv, uv_faces = egg()
    rng = np.random.default_rng(0)
    middle = points - points.mean(0)
    chin = np.clip(-middle[:, 1] / 0.04, 0, 1) * (middle[:, 2] > 0.02)
    eye = [np.exp(-(((middle - (x, 0.03, 0.08)) / 0.02) ** 2).sum(1)) for x in (0.035, -0.035)]
    moving = np.stack([np.zeros(len(points)), chin, *[0.9 * (1 - chin) * e for e in eye]], 1)
    skinning = np.concatenate([1 - moving.sum(1, keepdims=True), moving], 1)
    near = [middle, middle - (0, -0.02, 0.02), middle - (0, 0, -0.02)]
    joints = [np.argsort((near[k] ** 2).sum(1))[:8] for k in (0, 0, 1, 2, 2)]
    regressor = np.zeros((5, len(points)))
    for joint, ids in enumerate(joints):
        regressor[joint, ids] = 1 / 8
    smooth = rng.normal(size=(3, 400)) * 0.002
    directions = middle[:, :, None] / 0.1 * smooth[None]
    model = {
        "f": faces.astype(np.uint32), "v_template": points, "shapedirs": directions,
        "posedirs": np.zeros((len(points), 3, 36)), "J_regressor": sparse.csc_matrix(regressor),
        "weights": skinning, "kintree_table": np.array([[-1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }  # fmt: skip
    (folder / "generic_model.pkl").write_bytes(pickle.dumps(model, protocol=2))
    lines = [f"vt {a} {b}" for a, b in uv]
    lines += [
        "f " + " ".join(f"{a + 1}/{b + 1}" for a, b in zip(face, texture, strict=True))
        for face, texture in zip(faces, uv_faces, strict=True)
    ]
    (folder / "head_template_mesh.obj").write_text("\n".join(lines))
    lips = np.flatnonzero(
        (np.abs(middle[:, 0]) < 0.04) & (np.abs(middle[:, 1] + 0.03) < 0.03) & (middle[:, 2] > 0)
    )
    masks = {"boundary": np.arange(COLUMNS), "lips": lips}
    (folder / "FLAME_masks.pkl").write_bytes(pickle.dumps(masks, protocol=2))
    for name, weight in (("l_eyelid", eye[0]), ("r_eyelid", eye[1])):
        np.save(folder / f"{name}.npy", (weight[:, None] * (0, -0.01, 0.01)).astype(np.float32))
    return folder.parent


@pytest.fixture
def head(weights, monkeypatch):
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(weights))
    return load_head("flame2020")


def six(vector):
    return Rotation.from_rotvec(vector).as_matrix()[:2].reshape(-1)


def code(t):
    """A face that talks, looks around and blinks."""
    rng = np.random.default_rng(t)
    looks = [six([0.2 * np.sin(t), 0.3 * np.cos(2 * t), 0]) for _ in range(2)]
    jaw = six([0.5 * (0.5 - 0.5 * np.cos(1.3 * t)), 0, 0])
    return {
        "exp": rng.normal(size=(1, 100)),
        "eyes": np.concatenate(looks)[None],
        "eyelids": [[0.5 + 0.5 * np.sin(2.1 * t), 0.5 + 0.5 * np.sin(2.1 * t)]],
        "jaw": jaw[None],
        "shape": np.zeros((1, 300)),
    }


@pytest.fixture
def video(head, tmp_path):
    """`dataset/anna` as metrical-tracker leaves it: pictures of a painted egg, the camera in FLAME's own frame."""
    folder = tmp_path / "dataset" / "anna"
    frames = tmp_path / "metrical-tracker" / "output" / "anna" / "checkpoint"
    for path in (folder / "imgs", folder / "alpha", frames):
        path.mkdir(parents=True)
    torch.manual_seed(0)
    truth = FlashAvatar(dataclasses.replace(MODEL, uv_resolution=48), head, torch.zeros(300), "flame-135")
    camera = cameras_around([0.0], SIZE)
    with torch.no_grad():
        neutral = truth.posed_centers(torch.zeros(1, CODE_LENGTH))[0]
        stripes = torch.stack([(k * neutral[:, axis]).sin() for k, axis in ((90, 1), (120, 0), (70, 1))], -1)
        truth.sh_dc.copy_(rgb_to_sh(0.5 + 0.4 * stripes)[:, None])
        truth.log_scale.fill_(np.log(0.004))
        truth.opacity_logit.fill_(4.0)
    for t in range(FRAMES):
        flame = {name: np.asarray(value, np.float32) for name, value in code(t).items()}
        content = {
            "flame": flame,
            "opencv": {
                "R": camera.world_to_camera[:, :3, :3].numpy(),
                "t": camera.world_to_camera[:, :3, 3].numpy(),
                "K": camera.K.numpy(),
            },
            "img_size": np.array([SIZE, SIZE]),
            "frame_id": t,
            "global_step": t,
        }
        torch.save(content, frames / f"{t:05d}.frame")
        made = render(truth, torch.from_numpy(read_code(flame)), camera, (SIZE, SIZE))
        # The matte multiplies the picture, so the picture stands on a grey wall.
        image = made.image[0] + (1 - made.alpha[0]) * 0.5
        pixels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "imgs" / f"{t + 1:05d}.jpg", quality=98, subsampling=0)
        alpha = (made.alpha[0, 0] * 255).round().byte().numpy()
        Image.fromarray(alpha).save(folder / "alpha" / f"{t + 1:05d}.jpg", quality=98)
    return folder


def read_code(flame):
    parts = [flame["exp"], flame["eyes"], flame["eyelids"], flame["jaw"]]
    return np.concatenate([*[part.reshape(-1) for part in parts], REST, REST, np.zeros(3)]).astype(np.float32)


def test_six_numbers_of_a_rotation_are_its_vector():
    rng = np.random.default_rng(0)
    turns = np.concatenate([rng.normal(size=(20, 3)), 1e-5 * rng.normal(size=(3, 3)), [[np.pi - 1e-3, 0, 0]]])
    rows = torch.from_numpy(np.stack([six(turn) for turn in turns]))
    found = Rotation.from_rotvec(rotation_vectors(rows).numpy())
    assert np.abs((found * Rotation.from_rotvec(turns).inv()).magnitude()).max() < 1e-7
    stretched = rows * torch.tensor([2.0, 2, 2, 0.5, 0.5, 0.5])
    torch.testing.assert_close(rotation_vectors(stretched), rotation_vectors(rows))
    assert rotation_vectors(torch.zeros(2, 6)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_expression_jaw_eyes_and_eyelids_move_their_parts_of_the_face(head):
    rest = head.vertices(torch.zeros(1, 300), torch.zeros(1, CODE_LENGTH))[0]
    torch.testing.assert_close(rest, torch.from_numpy(egg()[0]).float(), rtol=0, atol=1e-6)
    middle = rest - rest.mean(0)
    parts = {
        "exp": (slice(0, 1), [3.0]),
        "eyes": (slice(100, 106), six([0, 0.4, 0])),
        "eyelids": (slice(112, 113), [1.0]),
        "jaw": (slice(114, 120), six([0.3, 0, 0])),
    }
    moved = {}
    for name, (place, values) in parts.items():
        one = torch.zeros(1, CODE_LENGTH)
        one[0, place] = torch.tensor(np.asarray(values)).float()
        moved[name] = (head.vertices(torch.zeros(1, 300), one)[0] - rest).norm(dim=1)
        assert moved[name].max() > 1e-3, name
    assert middle[moved["jaw"].argmax(), 1] < -0.03  # the chin
    for name in ("eyes", "eyelids"):
        assert middle[moved[name].argmax(), 0] > 0.01, name  # the subject's left
        assert middle[moved[name].argmax(), 1] > 0, name
        assert moved[name][middle[:, 2] < 0].max() < 1e-3, name
    jaw = torch.zeros(1, CODE_LENGTH)
    jaw[0, 114:120] = torch.from_numpy(six([0.3, 0, 0]))
    posed = head.flame.vertices(torch.zeros(1, 300), torch.zeros(1, 100), jaw=torch.tensor([[0.3, 0, 0]]))
    torch.testing.assert_close(
        head.vertices(torch.zeros(1, 300), jaw), posed + head.origin, rtol=0, atol=1e-6
    )


def test_a_tracked_video_drives_all_of_the_face(video, tmp_path):
    source = FitSource("video", held_timesteps=0.25)
    fitted, held = from_capture(read_capture(video), source)
    assert held is not None
    assert (fitted.head, fitted.expression_kind, len(fitted), len(held)) == ("flame2020", "flame-135", 9, 3)
    result = run_fit(FIT, fitted, tmp_path / "fit")
    assert result.notes == ()
    quality = measure_held_out(result.avatar, held)[0]["psnr"]

    def without(pictures):
        codes = pictures.expressions.clone()
        codes[:, 100:120] = 0  # a reader that dropped eyes, eyelids and jaw
        return dataclasses.replace(pictures, expressions=codes)

    poorer = run_fit(FIT, without(fitted), tmp_path / "poorer").avatar
    assert quality > measure_held_out(poorer, without(held))[0]["psnr"] + 2
    assert quality > 24

    result.avatar.save(tmp_path / "fit")
    again = load_avatar(tmp_path / "fit")  # the head is found by its name
    first, second = again.sequence(held.expressions[:2])
    assert (first.means - second.means).norm(dim=1).max() > 1e-3


def test_without_eyelid_files_the_result_says_so(weights, tmp_path, monkeypatch):
    folder = tmp_path / "flame2020"
    folder.mkdir()
    for file in (weights / "flame2020").iterdir():
        if "eyelid" not in file.name:
            (folder / file.name).symlink_to(file)
    without = TrackedFlame.load(folder)
    shut = torch.zeros(1, CODE_LENGTH)
    shut[0, 112:114] = 1
    rest = without.vertices(torch.zeros(1, 300), torch.zeros(1, CODE_LENGTH))
    assert torch.equal(without.vertices(torch.zeros(1, 300), shut), rest)
    assert without.notes == [
        "tracked eyelids move nothing: metrical-tracker's l_eyelid.npy and r_eyelid.npy are not with the model"
    ]
    (folder / "blendshapes").mkdir()
    for name in ("l_eyelid.npy", "r_eyelid.npy"):
        (folder / "blendshapes" / name).symlink_to(weights / "flame2020" / name)
    assert TrackedFlame.load(folder).notes == []


def test_what_is_wrong_with_flames_files_is_a_sentence(weights, tmp_path, monkeypatch):
    monkeypatch.delenv("HEADSPLAT_WEIGHTS", raising=False)
    with pytest.raises(UserError, match="'flame2020' needs your FLAME 2020 in a folder flame2020"):
        load_head("flame2020")
    monkeypatch.setenv("HEADSPLAT_WEIGHTS", str(tmp_path))
    with pytest.raises(UserError, match="flame2020 is not a folder"):
        load_head("flame2020")
    with pytest.raises(UserError, match="the heads 'makehuman' and 'flame2020', not with 'flame2023'"):
        load_head("flame2023")
    folder = tmp_path / "flame2020"
    folder.mkdir()
    for file in (weights / "flame2020").iterdir():
        if file.name not in ("l_eyelid.npy", "FLAME_masks.pkl"):
            (folder / file.name).symlink_to(file)
    np.save(folder / "l_eyelid.npy", np.zeros((5, 3)))
    with pytest.raises(UserError, match=r"l_eyelid\.npy has the shape \(5, 3\)"):
        load_head("flame2020")
    (folder / "l_eyelid.npy").unlink()
    with pytest.raises(UserError, match=r"put FLAME_masks\.pkl beside its model"):
        lip_points(load_head("flame2020"))
    with pytest.raises(UserError, match=r"must be \(B, 135\), not \(1, 100\)"):
        load_head("flame2020").vertices(torch.zeros(1, 300), torch.zeros(1, 100))
