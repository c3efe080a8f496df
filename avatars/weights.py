"""Weight files that a user brings: what they are called, what needs them, their terms and where to get them.

Nothing here downloads. A file is taken from an explicit path, from the folder HEADSPLAT_WEIGHTS, or from torch's
own hub folder, in this order; what is missing is told in one sentence with the command that fetches it.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from avatars.errors import UserError
from avatars.files import write_whole
from avatars.head.cache import cache_folder

__all__ = [
    "WEIGHTS",
    "WEIGHTS_VARIABLE",
    "Found",
    "MissingWeights",
    "Weights",
    "file_sha256",
    "find",
    "find_file",
    "missing",
    "report",
]

WEIGHTS_VARIABLE = "HEADSPLAT_WEIGHTS"
HASHES_FILE = "sha256.json"


class MissingWeights(UserError):
    """A weight file is not here, or is not the published one; the message says what to do."""


@dataclass(frozen=True)
class Weights:
    """A published weight file.

    Attributes:
        name: key in `WEIGHTS`, for example "lpips-alex".
        files: names under which it is looked for below the folder, as published first; may hold a `/`.
        used_by: what needs it, in words.
        licence: terms in short.
        source: page that publishes it.
        fetch: shell command that puts it where it is looked for, on a machine with an internet.
        sha256: start of the published sha256, empty where none was published.
    """

    name: str
    files: tuple[str, ...]
    used_by: str
    licence: str
    source: str
    fetch: str
    sha256: str = ""


@dataclass(frozen=True)
class Found:
    """A weight file on this machine."""

    path: Path

    @property
    def sha256(self) -> str:
        """64 hexadecimal digits; read from the file once and remembered while it does not change."""
        return file_sha256(self.path)


def find(name: str, path: str | Path | None = None) -> Found:
    """A registered weight file.

    Args:
        name: key in `WEIGHTS`.
        path: the file where it is known, or a folder to look in instead of HEADSPLAT_WEIGHTS.

    Raises:
        MissingWeights: no such file, or one whose hash is not the published one.
        KeyError: the name is not registered.
    """
    entry = WEIGHTS[name]
    return _find(entry.files, entry.sha256, path, missing(name, path))


def find_file(file: str, sha256: str = "", path: str | Path | None = None) -> Found:
    """A weight file by its own name, registered or not.

    Args:
        file: name as published.
        sha256: start of the published sha256, empty where none is known.
        path: as in `find`.

    Raises:
        MissingWeights: no such file, or one with another hash.
    """
    known = next((entry.name for entry in WEIGHTS.values() if file in entry.files), None)
    return _find((file,), sha256, path, missing(known, path) if known else _absent((file,), path))


def missing(name: str, path: str | Path | None = None) -> str:
    """One or two sentences for a user who lacks the file: where it was looked for and how to get it."""
    entry = WEIGHTS[name]
    return f"{_absent(entry.files, path)}. Get it with: {entry.fetch} ({entry.licence}; {entry.source})"


def report() -> Iterator[tuple[Weights, Found | None, str]]:
    """Every registered file: its entry, where it is (None when missing) and what is wrong or missing."""
    for name, entry in WEIGHTS.items():
        try:
            yield entry, find(name), ""
        except MissingWeights as reason:
            yield entry, None, str(reason)


def file_sha256(path: Path) -> str:
    """sha256 of a file's bytes, remembered in the cache folder by size, times and inode.

    Raises:
        OSError: the file cannot be read.
    """
    path = path.resolve()
    status = path.stat()
    stamp = [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
    known = _known_hashes()
    entry = known.get(str(path))
    if entry and entry[:-1] == stamp:
        return str(entry[-1])
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    # A cache that cannot be written costs the next process time and nothing else.
    with suppress(OSError, UserError):
        write_whole(
            cache_folder() / HASHES_FILE, json.dumps({**_known_hashes(), str(path): [*stamp, digest]})
        )
    return digest


def _known_hashes() -> dict[str, list[int | str]]:
    try:
        known = json.loads((cache_folder() / HASHES_FILE).read_text(encoding="utf-8"))
    except (OSError, UserError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _find(files: tuple[str, ...], sha256: str, path: str | Path | None, sentence: str) -> Found:
    for candidate in _candidates(files, path):
        if candidate.is_file():
            found = Found(candidate)
            if sha256 and not found.sha256.startswith(sha256):
                raise MissingWeights(
                    f"{candidate} has sha256 {found.sha256[:12]}…, the published file starts with {sha256}"
                )
            return found
    raise MissingWeights(sentence)


def _candidates(files: tuple[str, ...], path: str | Path | None) -> Iterator[Path]:
    if path is not None and not Path(path).is_dir():
        yield Path(path)
        return
    for folder in [Path(path)] if path is not None else _folders():
        yield from (folder / file for file in files)


def _folders() -> list[Path]:
    import torch

    given = os.environ.get(WEIGHTS_VARIABLE)
    return [*([Path(given)] if given else []), Path(torch.hub.get_dir()) / "checkpoints"]


def _absent(files: tuple[str, ...], path: str | Path | None) -> str:
    names = " or ".join(files)
    if path is not None:
        return f"{names} is not in {path}" if Path(path).is_dir() else f"{path} is no file ({names} is meant)"
    given = os.environ.get(WEIGHTS_VARIABLE)
    if given:
        return f"{names} is not in {given}, the folder that {WEIGHTS_VARIABLE} names"
    return f"it needs {names} in a folder that {WEIGHTS_VARIABLE} names"


def _torchvision(network: str, builder: str, file: str, what: str) -> Weights:
    """A network of torchvision, which fetches its own file into torch's hub folder."""
    return Weights(
        name=f"lpips-{network}",
        files=(file,),
        used_by=what,
        licence="BSD-3-Clause",
        source="https://pytorch.org/vision/stable/models.html",
        fetch=f"python -c \"from torchvision.models import {builder}; {builder}(weights='IMAGENET1K_V1')\"",
        sha256=file.rsplit("-", 1)[1].removesuffix(".pth"),
    )


def _sapiens(size: str, epoch: int) -> Weights:
    file = f"sapiens_{size}_epoch_{epoch}_clean.pth"
    page = f"https://huggingface.co/facebook/sapiens-pretrain-{size}"
    return Weights(
        name=f"sapiens-{size}",
        files=(file,),
        used_by=f"feature prior sapiens-{size}",
        licence="CC BY-NC 4.0",
        source=page,
        fetch=f'curl -fL -o "$HEADSPLAT_WEIGHTS/{file}" {page}/resolve/main/{file}',
    )


def _dinov2(size: str, letter: str, registers: bool) -> Weights:
    file = f"dinov2_vit{letter}14{'_reg4' if registers else ''}_pretrain.pth"
    name = f"dinov2-{size}{'-registers' if registers else ''}"
    return Weights(
        name=name,
        files=(file,),
        used_by=f"feature prior {name}",
        licence="Apache-2.0",
        source="https://github.com/facebookresearch/dinov2",
        fetch=f'curl -fL -o "$HEADSPLAT_WEIGHTS/{file}" '
        f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vit{letter}14/{file}",
    )


def _sapiens2(size: str) -> Weights:
    file = f"sapiens2_{size}_pretrain.safetensors"
    page = f"https://huggingface.co/facebook/sapiens2-pretrain-{size}"
    return Weights(
        name=f"sapiens2-{size}",
        files=(file,),
        used_by=f"feature prior sapiens2-{size}, never by default",
        licence="Sapiens2 License: no biometric processing, no surveillance, no impersonation; audits",
        source=page,
        fetch=f'curl -fL -o "$HEADSPLAT_WEIGHTS/{file}" {page}/resolve/main/{file}',
    )


_DUST3R = "DUSt3R_ViTLarge_BaseDecoder_512_dpt"
_MAST3R = "MASt3R_ViTLarge_BaseDecoder_512_catmlpdpt_metric"

WEIGHTS: dict[str, Weights] = {
    entry.name: entry
    for entry in (
        _torchvision(
            "alex", "alexnet", "alexnet-owt-7be5be79.pth", "LPIPS (alex), the default LPIPS of evaluation"
        ),
        _torchvision(
            "vgg", "vgg16", "vgg16-397923af.pth", "LPIPS (vgg), and the LPIPS loss of training and fits"
        ),
        _torchvision("squeeze", "squeezenet1_1", "squeezenet1_1-b8a52dc0.pth", "LPIPS (squeeze)"),
        Weights(
            name="facenet-vggface2",
            files=("20180402-114759-vggface2.pt",),
            used_by="csim/facenet-vggface2",
            licence="code MIT; trained on VGGFace2, research use",
            source="https://github.com/timesler/facenet-pytorch",
            fetch='curl -fL -o "$HEADSPLAT_WEIGHTS/20180402-114759-vggface2.pt" '
            "https://github.com/timesler/facenet-pytorch/releases/download/v2.2.9/20180402-114759-vggface2.pt",
        ),
        Weights(
            name="pipnet-98",
            files=("pipnet-wflw-r18-nb10.pth",),
            used_by="akd/pipnet-98",
            licence="code MIT; trained on WFLW, research use",
            source="https://github.com/jhb86253817/PIPNet",
            fetch="from the page's model zoo: cp snapshots/WFLW/pip_32_16_60_r18_l2_l1_10_1_nb10/epoch59.pth "
            '"$HEADSPLAT_WEIGHTS/pipnet-wflw-r18-nb10.pth"',
        ),
        Weights(
            name="pipnet-98-meanface",
            files=("pipnet-wflw-meanface.txt",),
            used_by="akd/pipnet-98",
            licence="MIT",
            source="https://github.com/jhb86253817/PIPNet",
            fetch='curl -fL -o "$HEADSPLAT_WEIGHTS/pipnet-wflw-meanface.txt" '
            "https://raw.githubusercontent.com/jhb86253817/PIPNet/master/data/WFLW/meanface.txt",
        ),
        Weights(
            name="arcface",
            files=("w600k_r50.onnx",),
            used_by="csim/arcface",
            licence="InsightFace models: non-commercial research",
            source="https://github.com/deepinsight/insightface",
            fetch="curl -fLO https://github.com/deepinsight/insightface/releases/download/v0.7/buffalo_l.zip "
            '&& unzip -j buffalo_l.zip "*w600k_r50.onnx" -d "$HEADSPLAT_WEIGHTS"',
        ),
        Weights(
            name="dust3r",
            files=(f"{_DUST3R}.pth", f"{_DUST3R}/model.safetensors"),
            used_by="position prior dust3r",
            licence="CC BY-NC-SA 4.0",
            source="https://github.com/naver/dust3r",
            fetch=f'curl -fL -o "$HEADSPLAT_WEIGHTS/{_DUST3R}.pth" '
            f"https://download.europe.naverlabs.com/ComputerVision/DUSt3R/{_DUST3R}.pth",
        ),
        Weights(
            name="mast3r",
            files=(f"{_MAST3R}.pth", f"{_MAST3R}/model.safetensors"),
            used_by="position prior mast3r",
            licence="CC BY-NC-SA 4.0",
            source="https://github.com/naver/mast3r",
            fetch=f'curl -fL -o "$HEADSPLAT_WEIGHTS/{_MAST3R}.pth" '
            f"https://download.europe.naverlabs.com/ComputerVision/MASt3R/{_MAST3R}.pth",
        ),
        _sapiens("0.3b", 1600),
        _sapiens("0.6b", 1600),
        _sapiens("1b", 173),
        _sapiens("2b", 660),
        *(
            _dinov2(size, letter, registers)
            for size, letter in (("small", "s"), ("base", "b"), ("large", "l"), ("giant", "g"))
            for registers in (False, True)
        ),
        *(_sapiens2(size) for size in ("0.1b", "0.4b", "0.8b", "1b", "5b")),
    )
}
"""All weight files that this version can use, by name."""
