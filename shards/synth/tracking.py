"""Synthetic captures in the layouts of other people's trackers, so that every reader and baseline is fed from one.

What is exact: cameras, head poses, pictures, masks, expression codes, identity. What is not: our head is not FLAME and
has no Meta encoder. Where a layout has room for FLAME's expression or for Ava-256's code, it carries our 52 ARKit
weights followed by zeros, where it has FLAME's shape the identity code, and FLAME's joints are at rest. A file
`headsplat.json` beside the capture says so; `shards.read_capture` reads it and gives the codes back as what they are.
"""

from __future__ import annotations

import io
import json
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from avatars.errors import UserError
from avatars.head import ParametricHead
from shards.readers.ava256 import BLACK, CODE_LENGTH, CODES, GAIN, GAMMA, NATIVE_HEIGHT, SCALE
from shards.readers.synthetic import MARK, MARK_LAYOUT, MARK_SCHEMA, SyntheticCapture

__all__ = ["LAYOUTS", "export_tracking"]

Array = NDArray[np.float64]
Pixels = NDArray[np.uint8]

N_EXPRESSION, N_SHAPE = 100, 300  # FLAME's
REST_6D = np.eye(3, dtype=np.float32)[:2].reshape(1, 6)  # no rotation, as the first two rows of its matrix
STUDIO = 26  # sRGB of the grey behind the heads of Ava-256's pictures, which its background pictures take out again
MILLIMETRES = 1000.0  # a metre


def export_tracking(capture: SyntheticCapture | Path | str, layout: str, out: Path | str) -> Path:
    """Write a synthetic capture as a tracker or a data set would have left it.

    Args:
        capture: a finished capture or its folder.
        layout: 'metrical' (metrical-tracker as FlashAvatar reads it: the video of the frontal camera), 'vhap' (the
            export that GaussianAvatars reads) or 'ava256' (the release's zips with masks, backgrounds and codes).
        out: folder for captures of this layout.

    Returns:
        The folder to give to `read_capture`. One that is complete is kept; an incomplete one is written again.

    Raises:
        UserError: the layout is unknown, the capture is not finished, or the folder cannot be written.
    """
    if layout not in LAYOUTS:
        raise UserError(f"unknown tracking layout {layout!r}; there are {', '.join(LAYOUTS)}")
    if not isinstance(capture, SyntheticCapture):
        capture = SyntheticCapture(Path(capture))
    if capture.identity is None:
        raise UserError(f"{capture.path} has no identity code; make it again with `headsplat synth`")
    folder = Path(out) / LAYOUTS[layout][0](capture.subject)
    mark = {
        "layout": MARK_LAYOUT,
        "schema": MARK_SCHEMA,
        "subject": capture.subject,
        "as": layout,
        "expression_kind": capture.expression_kind,
        "expression_length": capture.expressions.shape[1],
        "head": capture.head,
        "identity": capture.identity.tolist(),
        "note": "Codes are the head's own, in the first places of the layout's code; they are not FLAME's or Meta's.",
    }
    try:
        if (folder / MARK).is_file() and json.loads((folder / MARK).read_text()) == mark:
            return folder
        part = folder.with_name(f".{folder.name}.part")  # a name that packing does not take for a capture
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        LAYOUTS[layout][1](capture, part, Path(out))
        (part / MARK).write_text(json.dumps(mark))
        shutil.rmtree(folder, ignore_errors=True)
        part.replace(folder)
    except OSError as error:
        raise UserError(
            f"cannot write tracking files into {folder}: {error.strerror or error}; free space and run again"
        ) from error
    return folder


def _padded(code: NDArray | None, length: int) -> NDArray[np.float32]:
    out = np.zeros(length, np.float32)
    if code is not None:
        out[: len(code)] = code
    return out


def _head_vertices(capture: SyntheticCapture) -> tuple[ParametricHead, NDArray[np.float32]]:
    """The head and its vertices at every timestep, (T, V, 3) in the head frame."""
    import torch

    head = ParametricHead.load()
    assert capture.identity is not None
    identity = torch.from_numpy(capture.identity)[None].expand(len(capture.expressions), -1)
    with torch.no_grad():
        return head, head.vertices(identity, torch.from_numpy(capture.expressions)).numpy()


# ---------------------------------------------------------------------------------------------- metrical-tracker


def _write_metrical(capture: SyntheticCapture, folder: Path, out: Path) -> None:
    """`dataset/<id>` with pictures, mattes and parsed masks; the tracker's checkpoints beside it.

    The `.frame` files hold what metrical-tracker's `save_checkpoint` writes. Its cameras are PyTorch3D's: row vectors,
    x left, y up, focal length and principal point in halves of the shorter side.
    """
    import torch

    tracker = out / "metrical-tracker" / "output" / capture.subject
    shutil.rmtree(tracker, ignore_errors=True)
    (tracker / "checkpoint").mkdir(parents=True)
    for name in ("imgs", "alpha", "parsing"):
        (folder / name).mkdir()
    _, poses = capture.camera_matrices(0)
    frontal = int(np.argmax([(-pose[:3, :3].T @ pose[:3, 3])[2] for pose in poses]))
    head, vertices = _head_vertices(capture)
    lips = vertices[:, head.landmarks68[48:60].numpy()]
    height, width = capture.size
    scale = min(height, width) / 2
    zeros = {"tex": (1, 140), "sh": (1, 9, 3), "eyelids": (1, 2)}
    for t, code in enumerate(capture.expressions):
        K, pose = (matrices[frontal] for matrices in capture.camera_matrices(t))
        image, mask = _straight(capture, t, frontal)
        number = f"{t + 1:05d}"
        Image.fromarray(image).save(folder / "imgs" / f"{number}.jpg", quality=97, subsampling=0)
        Image.fromarray(mask).save(folder / "alpha" / f"{number}.jpg", quality=97)
        # Whatever the head covers a little of: the matte keeps its soft outline, as the two are multiplied.
        binary = np.where(mask > 0, 255, 0).astype(np.uint8)
        Image.fromarray(binary).save(folder / "parsing" / f"{number}_neckhead.png")
        mouth = Image.new("L", (width, height))
        camera = lips[t] @ pose[:3, :3].T + pose[:3, 3]
        pixel = (camera @ K.T)[:, :2] / camera[:, 2:]
        ImageDraw.Draw(mouth).polygon([(float(x), float(y)) for x, y in pixel], fill=255)
        mouth.save(folder / "parsing" / f"{number}_mouth.png")
        turned = pose[:3, :3].T * [-1.0, -1.0, 1.0]
        frame = {
            "flame": {
                "exp": _padded(code, N_EXPRESSION)[None],
                "shape": _padded(capture.identity, N_SHAPE)[None],
                "eyes": np.tile(REST_6D, 2),
                "jaw": REST_6D,
                **{name: np.zeros(shape, np.float32) for name, shape in zeros.items()},
            },
            "camera": {
                "R": turned[:2].reshape(1, 6).astype(np.float32),
                "t": (pose[:3, 3] * [-1.0, -1.0, 1.0])[None].astype(np.float32),
                "fl": np.array([[K[0, 0] / scale]], np.float32),
                "pp": ((np.array([width, height]) / 2 - K[:2, 2]) / scale)[None].astype(np.float32),
            },
            "opencv": {
                "R": pose[None, :3, :3].astype(np.float32),
                "t": pose[None, :3, 3].astype(np.float32),
                "K": K[None].astype(np.float32),
            },
            "img_size": np.array([height, width]),
            "frame_id": f"{t:05d}",
            "global_step": t + 1,
        }
        torch.save(frame, tracker / "checkpoint" / f"{t:05d}.frame")


def _straight(capture: SyntheticCapture, t: int, v: int) -> tuple[Pixels, Pixels]:
    """A picture whose colours times the mask are the capture's picture over black, and the mask."""
    view = capture.view(t, v, depth=False)
    coverage = np.maximum(view.mask, 1)[..., None].astype(np.float32) / 255
    return np.clip(np.round(view.image / coverage), 0, 255).astype(np.uint8), view.mask


# ---------------------------------------------------------------------------------------------- VHAP


def _write_vhap(capture: SyntheticCapture, folder: Path, out: Path) -> None:
    """Pictures over white, masks, lists of frames with OpenGL cameras, FLAME parameters a timestep.

    As in the published exports camera 8 is held out for validation; the last fifth of the timesteps is the test
    sequence.
    """
    for name in ("images", "fg_masks", "flame_param"):
        (folder / name).mkdir()
    studio_K, studio = capture.studio_cameras()
    height, width = capture.size
    count = len(capture.timestep_ids)
    n_test = count // 5
    lists: dict[str, list[dict]] = {"train": [], "val": [], "test": []}
    for t in range(count):
        parameters = f"flame_param/{t:05d}.npz"
        flame = _flame_parameters(capture.expressions[t], capture.identity, capture.head_to_world(t))
        np.savez(folder / parameters, allow_pickle=False, **flame)
        for v, camera in enumerate(capture.camera_ids):
            name = f"{t:05d}_{v:02d}.png"
            view = capture.view(t, v, depth=False)
            white = view.image.astype(np.int16) + (255 - view.mask.astype(np.int16))[..., None]
            Image.fromarray(np.minimum(white, 255).astype(np.uint8)).save(folder / "images" / name)
            Image.fromarray(view.mask).save(folder / "fg_masks" / name)
            K = studio_K[v]
            to_world = np.linalg.inv(studio[v]) * [1.0, -1.0, -1.0, 1.0]
            frame = {
                "timestep_index": t,
                "timestep_index_original": t,
                "timestep_id": f"{t:06d}",
                "camera_index": v,
                "camera_id": camera,
                "cx": K[0, 2],
                "cy": height - K[1, 2],
                "fl_x": K[0, 0],
                "fl_y": K[1, 1],
                "h": height,
                "w": width,
                "camera_angle_x": 2 * math.atan(width / (2 * K[0, 0])),
                "camera_angle_y": 2 * math.atan(height / (2 * K[1, 1])),
                "transform_matrix": to_world.tolist(),
                "file_path": f"images/{name}",
                "fg_mask_path": f"fg_masks/{name}",
                "flame_param_path": parameters,
            }
            held = "test" if t >= count - n_test else "val" if v == 8 else "train"
            lists[held].append(frame)
    everything = [frame for frames in lists.values() for frame in frames]
    for name, frames in {**lists, "": everything}.items():
        shared = {key: frames[0][key] for key in ("cx", "cy", "fl_x", "fl_y", "h", "w")} if frames else {}
        content = {
            **shared,
            "timestep_indices": sorted({frame["timestep_index"] for frame in frames}),
            "camera_indices": sorted({frame["camera_index"] for frame in frames}),
            "frames": frames,
        }
        path = folder / f"transforms_{name}.json" if name else folder / "transforms.json"
        path.write_text(json.dumps(content))
    canonical = _flame_parameters(None, capture.identity, np.eye(4))
    canonical["jaw_pose"] = np.array([[0.3, 0, 0]], np.float32)
    np.savez(folder / "canonical_flame_param.npz", allow_pickle=False, **canonical)


def _flame_parameters(
    code: NDArray | None, identity: NDArray | None, head_to_world: Array
) -> dict[str, NDArray]:
    from scipy.spatial.transform import Rotation

    turn = Rotation.from_matrix(head_to_world[:3, :3]).as_rotvec()
    return {
        "translation": head_to_world[None, :3, 3].astype(np.float32),
        "rotation": turn[None].astype(np.float32),
        "neck_pose": np.zeros((1, 3), np.float32),
        "jaw_pose": np.zeros((1, 3), np.float32),
        "eyes_pose": np.zeros((1, 6), np.float32),
        "shape": _padded(identity, N_SHAPE),
        "expr": _padded(code, N_EXPRESSION)[None],
        "static_offset": np.zeros((1, 5143, 3), np.float32),
    }


# ---------------------------------------------------------------------------------------------- Ava-256


def srgb_to_linear(srgb: NDArray[np.floating]) -> NDArray[np.float32]:
    """The inverse of `shards.readers.ava256.linear_to_srgb`, (..., 3) in [0, 1]."""
    return ((srgb ** (1 / GAMMA) * (1 - BLACK) / SCALE + BLACK) / GAIN).astype(np.float32)


def _write_ava(capture: SyntheticCapture, folder: Path, out: Path) -> None:
    """The 4TB release's decoder folder with the masks, backgrounds and codes of its pull request.

    Pictures hold the release's linear colours before a grey studio. World and mesh are in millimetres, K is for
    pictures 4,096 pixels high. The tracked mesh and keypoints are our head's vertices and 68 landmarks, not Meta's
    topology. There are no headset pictures, segmentations or textures.
    """
    decoder = folder / "decoder"
    for name in ("head_pose", "image", "foreground_masks", "background_image", "expression_codes", "keypoints_3d",
                 "kinematic_tracking"):  # fmt: skip
        (decoder / name).mkdir(parents=True)
    count, frames = len(capture.timestep_ids), [f"{t:06d}" for t in range(len(capture.timestep_ids))]
    ids = [f"4{v:05d}" for v in range(len(capture.camera_ids))]
    studio_K, studio = capture.studio_cameras()
    entries = []
    for v, camera in enumerate(ids):
        K, T = studio_K[v].copy(), studio[v].copy()
        K[:2] *= NATIVE_HEIGHT / capture.size[0]
        T[:3, 3] *= MILLIMETRES
        entries.append(
            {
                "cameraId": camera,
                "projectionModel": "Pinhole",
                "distortionModel": "RadialAndTangential",
                "K": K.T.tolist(),
                "distortion": [0.0, 0.0, 0.0, 0.0],
                "T": T.T.tolist(),
            }
        )
    (decoder / "camera_calibration.json").write_text(json.dumps({"KRT": entries}))
    rows = [f"{'EXP_free_face' if t else 'EXP_neutral_peak'},{t}" for t in range(count)]
    (decoder / "frame_list.csv").write_text("\n".join(["seg_id,frame_id", *rows]) + "\n")
    codes = {t: _padded(code, CODE_LENGTH) for t, code in enumerate(capture.expressions)}
    (decoder / CODES).write_bytes(pickle.dumps(codes))
    head, vertices = _head_vertices(capture)
    local = vertices * MILLIMETRES
    with _Zip(decoder / "head_pose" / "head_pose.zip") as poses:
        for t, frame in enumerate(frames):
            matrix = capture.head_to_world(t)[:3].copy()
            matrix[:, 3] *= MILLIMETRES
            poses.add(f"{frame}.txt", "\n".join(" ".join(map(repr, row)) for row in matrix.tolist()).encode())
    with _Zip(decoder / "kinematic_tracking" / "registration_vertices.zip") as meshes:
        for t, frame in enumerate(frames):
            meshes.add(f"{frame}.ply", _ply(local[t]))
    np.save(decoder / "kinematic_tracking" / "registration_vertices_mean.npy", local.mean(axis=0))
    (decoder / "kinematic_tracking" / "registration_vertices_variance.txt").write_text(
        f"{local.var(axis=0).mean()}\n"
    )
    with _Zip(decoder / "keypoints_3d" / "keypoints_3d.zip") as keypoints:
        for t, frame in enumerate(frames):
            pose = capture.head_to_world(t)
            points = (vertices[t, head.landmarks68.numpy()] @ pose[:3, :3].T + pose[:3, 3]) * MILLIMETRES
            seen = np.full((68, 1), len(ids))
            keypoints.add(f"{frame}.npy", _npy(np.hstack([np.arange(68)[:, None], points, seen, seen])))
    grey = srgb_to_linear(np.full((1, 1, 3), STUDIO / 255))
    with _Zip(decoder / "background_image" / "background_image.zip") as backgrounds:
        for camera in ids:
            backgrounds.add(f"{camera}.avif", _avif(np.broadcast_to(grey, (*capture.size, 3))))
    for v, camera in enumerate(ids):
        with (
            _Zip(decoder / "image" / f"cam{camera}.zip") as images,
            _Zip(decoder / "foreground_masks" / f"cam{camera}.zip") as masks,
        ):
            for t, frame in enumerate(frames):
                view = capture.view(t, v, depth=False)
                coverage = view.mask[..., None] / np.float32(255)
                linear = np.where(coverage > 0, srgb_to_linear(view.image / np.float32(255)), 0)
                images.add(f"cam{camera}/{frame}.avif", _avif(linear + (1 - coverage) * grey))
                masks.add(f"{frame}.avif", _avif(coverage[..., 0]))


class _Zip:
    """A zip of stored members with fixed dates: the same content is the same file."""

    def __init__(self, path: Path) -> None:
        self.archive = zipfile.ZipFile(path, "w", zipfile.ZIP_STORED)

    def add(self, name: str, data: bytes) -> None:
        self.archive.writestr(zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0)), data)

    def __enter__(self) -> _Zip:
        return self

    def __exit__(self, *_: object) -> None:
        self.archive.close()


def _avif(linear: NDArray[np.floating]) -> bytes:
    """An AVIF of values in [0, 1], (H, W) or (H, W, 3), at its best quality."""
    pixels = Image.fromarray(np.round(np.clip(linear, 0, 1) * 255).astype(np.uint8))
    data = io.BytesIO()
    pixels.save(data, "AVIF", quality=100, subsampling="4:4:4", speed=8)
    return data.getvalue()


def _npy(values: NDArray) -> bytes:
    data = io.BytesIO()
    np.save(data, values)
    return data.getvalue()


def _ply(points: NDArray[np.float32]) -> bytes:
    """A binary PLY of vertices without faces."""
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(points)}",
             *(f"property float {axis}" for axis in "xyz"), "end_header", ""]  # fmt: skip
    return "\n".join(lines).encode() + np.ascontiguousarray(points, "<f4").tobytes()


# Where a subject's capture of each layout lies below the folder for it, and what writes it.
LAYOUTS: dict[str, tuple[Callable[[str], str], Callable[[SyntheticCapture, Path, Path], None]]] = {
    "metrical": (lambda subject: f"dataset/{subject}", _write_metrical),
    "vhap": (lambda subject: subject, _write_vhap),
    "ava256": (lambda subject: f"20000101--0000--{subject}", _write_ava),
}
