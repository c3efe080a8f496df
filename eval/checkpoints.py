"""What can be evaluated: trained networks, folders of fitted avatars, and baselines, found by what lies in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from avatars.errors import UserError
from eval.hashing import short_hash

if TYPE_CHECKING:
    from avatars.inputs import InputSet

__all__ = ["ANY", "BASELINES", "NEAREST", "Checkpoint", "find_checkpoint", "load_maker"]

NEAREST = "nearest-input"
BASELINES = (NEAREST,)
ANY = "any"
"""In place of a method's name: each checkpoint's own."""
MODEL, RESULT = "model.json", "result.json"
AVATAR_FILES = ("avatar.json", "avatar.safetensors")
EVERYBODY = ""


@dataclass(frozen=True)
class Checkpoint:
    """Something that makes avatars, found and not loaded yet; the same value means the same files.

    Attributes:
        method: what rows call the method.
        name: what rows call the checkpoint: the run with its step, the configuration of fits, "none" for a baseline.
        folder: a trained network's folder, or that of fits with a folder a person; None for a baseline.
        recipe: name of the training's recipe, or the method of the fits.
        step: the training step, None where there is none.
        hashes: (subject, hash of the files that make the subject's avatar); a network has one for everybody, whose
            subject is "".
    """

    method: str
    name: str
    folder: Path | None
    recipe: str
    step: int | None
    hashes: tuple[tuple[str, str], ...]

    @property
    def is_network(self) -> bool:
        """Whether it makes anybody's avatar, rather than holding those that were fitted."""
        return self.folder is not None and self.hashes[0][0] == EVERYBODY

    @property
    def hash(self) -> str:
        """12 hexadecimal digits over everything."""
        return self.hashes[0][1] if self.hashes[0][0] == EVERYBODY else short_hash(self.hashes)

    def hash_for(self, subject: str) -> str:
        """12 hexadecimal digits over what makes one person's avatar; empty where nothing does."""
        known = dict(self.hashes)
        return known.get(EVERYBODY, known.get(subject, ""))


def find_checkpoint(method: str, folder: Path | None = None) -> Checkpoint:
    """What a folder holds, without loading it.

    Args:
        method: name for rows, which starts with the method's own ("avat3r-untrained"); `ANY` takes the method's own. A
            baseline's name needs no folder.
        folder: an exported model, a run's folder that holds one, or a folder of fitted avatars.

    Raises:
        UserError: no folder, nothing in it that makes avatars, something of another method, or something that is not
            whole.
    """
    if method in BASELINES:
        return Checkpoint(method, "none", None, method, None, ((EVERYBODY, short_hash(method)),))
    if folder is None:
        raise UserError(
            f"Name a checkpoint of {method}: `headsplat eval {method} CHECKPOINT --protocol NAME`."
        )
    if not folder.is_dir():
        raise UserError(
            f"{folder} is no folder. Name an exported model, a run or a folder of fitted avatars."
        )
    network = next((at for at in (folder, folder / "export") if (at / MODEL).is_file()), None)
    if network is not None:
        return _network(method, network)
    results = sorted(folder.glob(f"*/{RESULT}"))
    if results:
        return _fits(method, folder, results)
    raise UserError(
        f"{folder} holds neither a {MODEL} nor fitted avatars. Name the export folder of a finished training, which "
        "`make train` writes at its end, or make avatars with `make fit`."
    )


def load_maker(checkpoint: Checkpoint, device: str = "cpu") -> Callable[[InputSet], Any]:
    """What makes a checkpoint's avatars, for `eval.evaluate`.

    Raises:
        UserError: the checkpoint is gone, was changed since it was found, or is not whole.
    """
    if checkpoint.folder is None:
        from eval.baselines import nearest_input

        return nearest_input
    if not checkpoint.folder.is_dir():
        raise UserError(f"{checkpoint.folder} is gone; it was there when the evaluation began.")
    if checkpoint.is_network:
        return _load_network(checkpoint, device)
    return _load_fits(checkpoint, device)


def _network(method: str, folder: Path) -> Checkpoint:
    from avatars.weights import file_sha256

    try:
        described = json.loads((folder / MODEL).read_text())
        own, provenance = str(described["method"]), described["provenance"]
        recipe, step = str(provenance.get("recipe", own)), provenance.get("step")
        files = sorted(path for path in folder.iterdir() if path.suffix in (".json", ".safetensors"))
        content = [[path.name, file_sha256(path)] for path in files]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise _broken(folder, error) from error
    if not any(path.suffix == ".safetensors" for path in files):
        raise UserError(f"{folder} holds a {MODEL} and no weights. Export it again.")
    run = folder.parent.name if folder.name in ("export", "initial") else folder.name
    name = run if step is None else f"{run}-step{step}"
    return Checkpoint(
        _name_in_rows(method, own, folder), name, folder, recipe, step, ((EVERYBODY, short_hash(content)),)
    )


def _broken(folder: Path, error: Exception) -> UserError:
    return UserError(f"{folder} is not a whole model ({type(error).__name__}: {error}). Export it again.")


def _load_network(checkpoint: Checkpoint, device: str) -> Callable[[InputSet], Any]:
    from torch import nn

    from avatars.method import load_method

    assert checkpoint.folder is not None
    if _network(ANY, checkpoint.folder).hashes != checkpoint.hashes:
        raise UserError(f"{checkpoint.folder} was changed during the evaluation. Evaluate it again.")
    try:
        method = load_method(checkpoint.folder)
    except UserError:
        raise
    except Exception as error:  # files that end too early fail in torch and safetensors, each in its own way
        raise _broken(checkpoint.folder, error) from error
    for part in vars(method).values():
        if isinstance(part, nn.Module):
            part.to(device)
    return method.create


def _fits(method: str, folder: Path, files: list[Path]) -> Checkpoint:
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        try:
            result = json.loads(file.read_text())
            _ = result["config"], float(result["seconds"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{file} lacks the recipe or the seconds of its fit ({type(error).__name__}: {error}). Fit again with "
                f"`make fit METHOD={method}`."
            ) from error
        found[file.parent.name] = result
    configurations = {short_hash(result["config"]) for result in found.values()}
    if len(configurations) > 1:
        raise UserError(
            f"{folder} holds fits of {len(configurations)} configurations; run `make fit METHOD={method}`."
        )
    own = str(next(iter(found.values())).get("method", folder.name))
    hashes = tuple((subject, _avatar_hash(folder / subject)) for subject in sorted(found))
    return Checkpoint(_name_in_rows(method, own, folder), configurations.pop(), folder, own, None, hashes)


def _avatar_hash(folder: Path) -> str:
    """Over a fitted avatar's files; empty where one is gone, which is told when it is loaded."""
    try:
        content = [hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in AVATAR_FILES]
    except OSError:
        return ""
    return short_hash(content)


def _load_fits(checkpoint: Checkpoint, device: str) -> Callable[[InputSet], Any]:
    from torch import nn

    from avatars.method import load_avatar
    from eval.evaluate import Made

    folder = checkpoint.folder
    assert folder is not None

    def read(inputs: InputSet) -> Made:
        subject = inputs.subject
        if not (folder / subject / RESULT).is_file():
            raise UserError(
                f"{folder} holds no avatar of {subject}. Fit everybody with `make fit METHOD={checkpoint.recipe}`."
            )
        result = json.loads((folder / subject / RESULT).read_text())
        avatar: Any = load_avatar(folder / subject)
        if isinstance(avatar, nn.Module):
            avatar.to(device)
        return Made(avatar, result["seconds"], result.get("hardware"))

    return read


def _name_in_rows(method: str, own: str, folder: Path) -> str:
    if method == ANY:
        return own
    if not method.startswith(own):
        raise UserError(
            f"{folder} holds {own}, not {method}. Name the method {own}, or `{ANY}` for each checkpoint's own."
        )
    return method
