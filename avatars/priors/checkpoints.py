"""Published weight files, read without running anything that is in them.

A `.pth` is a pickle: it is read by PyTorch's restricted unpickler, which builds tensors and the few harmless
classes that the published files need, and refuses everything else. The constructor call that DUSt3R's files carry
as text is parsed, never evaluated.
"""

from __future__ import annotations

import argparse
import ast
import json
import math
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from avatars.errors import UserError
from avatars.weights import file_sha256

__all__ = ["DUSt3RConfig", "fill", "parse_model_string", "read_dust3r", "read_pickle", "read_safetensors"]

CONSTRUCTORS = ("AsymmetricCroCo3DStereo", "AsymmetricMASt3R")
IGNORED_KEYS = re.compile(r"downstream_head[12]\.head_local_features\.")
"""MASt3R's descriptors: points and confidence do not depend on them."""
TWICE = re.compile(r"\.scratch\.layer_rn\.([0-3])\.")
"""The second name of the convolutions `layer1_rn` to `layer4_rn`, in `.pth` files only."""
WITHOUT_EFFECT = {
    "patch_embed_cls", "landscape_only", "freeze", "mask_ratio", "norm_im2_in_dec",
    "two_confs", "desc_conf_mode", "desc_mode", "local_feat_dim",
}  # fmt: skip
"""Of training, of other picture shapes, or of MASt3R's descriptors."""
NUMBERS = (
    "enc_depth",
    "dec_depth",
    "enc_embed_dim",
    "dec_embed_dim",
    "enc_num_heads",
    "dec_num_heads",
)


@dataclass(frozen=True)
class DUSt3RConfig:
    """The shape of a DUSt3R network; the defaults are the published `DUSt3R_ViTLarge_BaseDecoder_512_dpt`."""

    enc_depth: int = 24
    dec_depth: int = 12
    enc_embed_dim: int = 1024
    dec_embed_dim: int = 768
    enc_num_heads: int = 16
    dec_num_heads: int = 12
    rope_base: float = 100.0
    img_size: tuple[int, int] = (512, 512)
    head: Literal["dpt", "linear"] = "dpt"

    def __post_init__(self) -> None:
        for side in ("enc", "dec"):
            width, heads = getattr(self, f"{side}_embed_dim"), getattr(self, f"{side}_num_heads")
            if min(width, heads, getattr(self, f"{side}_depth")) < 1 or width % (4 * heads):
                raise ValueError(
                    f"{side}_embed_dim {width} is not a multiple of 4 x {side}_num_heads {heads}"
                )
        if self.head == "dpt" and self.dec_depth <= 9:
            raise ValueError(f"dec_depth {self.dec_depth} is too shallow for the dpt head")


def parse_model_string(text: str) -> tuple[str, dict[str, Any]]:
    """Constructor name and keyword arguments of DUSt3R's model string, for example `Name(img_size=(512, 512))`.

    Args:
        text: one call with keyword arguments that are literals, `inf` or `-inf`.

    Raises:
        ValueError: it is anything else; the message quotes the part.
    """
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ValueError("it is no Python expression") from None
    if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name) or call.args:
        raise ValueError("it is not one constructor with named arguments")
    arguments: dict[str, Any] = {}
    for keyword in call.keywords:
        if keyword.arg is None or keyword.arg in arguments:
            raise ValueError("it is not one constructor with named arguments")
        try:
            arguments[keyword.arg] = _literal(keyword.value)
        except RecursionError:
            raise ValueError(f"{keyword.arg} in it is no plain value") from None
    return call.func.id, arguments


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Constant) and isinstance(node.value, bool | int | float | str | None):
        return node.value
    if isinstance(node, ast.Name) and node.id == "inf":
        return math.inf
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = _literal(node.operand)
        if isinstance(value, int | float):
            return -value
    if isinstance(node, ast.Tuple | ast.List):
        return tuple(_literal(element) for element in node.elts)
    raise ValueError(f"{ast.unparse(node)[:60]!r} in it is no plain value")


def config_from_arguments(arguments: Mapping[str, Any]) -> DUSt3RConfig:
    """The network that the published constructor's arguments describe.

    Raises:
        ValueError: an argument that this version does not know, or a variant that it does not have.
    """
    given = {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT}
    head = {"dpt": "dpt", "linear": "linear", "catmlp+dpt": "dpt"}.get(given.pop("head_type", "linear"))
    if head is None:
        raise ValueError(f"head_type {arguments['head_type']!r} is neither dpt nor linear")
    rope = re.fullmatch(r"RoPE([0-9.]+)", str(given.pop("pos_embed", "")))
    if rope is None:
        raise ValueError(f"pos_embed {arguments.get('pos_embed')!r} is not RoPE")
    numbers = {name: int(given.pop(name)) for name in NUMBERS if name in given}
    if missing := [name for name in NUMBERS if name not in numbers]:
        raise ValueError(f"{missing[0]} is missing")
    size = given.pop("img_size", (224, 224))
    height, width = (size, size) if isinstance(size, int) else map(int, size)
    expected = {
        "output_mode": ("pts3d", "pts3d+desc24"),
        "depth_mode": (("exp", -math.inf, math.inf),),
        "conf_mode": (("exp", 1, math.inf),),
        "patch_size": (16,),
        "mlp_ratio": (4,),
    }
    for name, value in given.items():
        if isinstance(value, list):
            value = tuple(value)
        if name not in expected or value not in expected[name]:
            raise ValueError(f"{name}={value!r} is no setting of the published checkpoints")
    return DUSt3RConfig(
        **numbers,
        rope_base=float(rope[1]),
        img_size=(height, width),
        head="dpt" if head == "dpt" else "linear",
    )


def read_dust3r(path: Path) -> tuple[DUSt3RConfig, dict[str, Tensor], str]:
    """Shape, weights under the hub's names, and sha256 of a DUSt3R or MASt3R file (see `DUSt3R.load`).

    Raises:
        UserError: as `DUSt3R.load`.
    """
    file = _dust3r_file(path)
    if file.suffix == ".safetensors":
        description = file.with_name("config.json")
        arguments = _hub_arguments(description)
        source, name, weights = description, CONSTRUCTORS[0], read_safetensors(file)
    else:
        content = read_pickle(file)
        args = content.get("args")
        if not isinstance(args, argparse.Namespace) or not isinstance(content.get("model"), Mapping):
            raise UserError(
                f"{file} is no DUSt3R checkpoint: it has no args and model. "
                "Give DUSt3R_ViTLarge_BaseDecoder_512_dpt.pth as published."
            )
        source, weights = file, dict(content["model"])
        try:
            name, arguments = parse_model_string(str(getattr(args, "model", "")))
        except ValueError as error:
            raise UserError(
                f"{file}: its model string is not the published one, {error}. It was not evaluated; "
                "get the file from its authors' page again."
            ) from None
    try:
        if name not in CONSTRUCTORS:
            raise ValueError(f"{name} is not {CONSTRUCTORS[0]}")
        config = config_from_arguments(arguments)
    except (ValueError, TypeError) as error:
        raise UserError(f"{source} describes another network than DUSt3R's: {error}.") from None
    return config, canonical(weights, file), file_sha256(file)


def canonical(weights: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """Weights under one name each, in fp32, without what points and confidence do not depend on."""
    found: dict[str, Tensor] = {}
    for key, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(f"{file}: {key!r} is {type(value).__name__} where a tensor is expected.")
        if not IGNORED_KEYS.match(key):
            key = TWICE.sub(lambda match: f".scratch.layer{int(match[1]) + 1}_rn.", key)
            found.setdefault(key, value.float())
    if not any(key.startswith("dec_blocks2.") for key in found):  # first files: one decoder for both views
        for key in [key for key in found if key.startswith("dec_blocks.")]:
            found[key.replace("dec_blocks.", "dec_blocks2.", 1)] = found[key].clone()
    return found


def read_pickle(file: Path) -> dict[str, Any]:
    """The dictionary in a `.pth` or `.pt` file, with tensors and nothing that could run.

    Raises:
        UserError: not there, cut short, or holding a class that no weight file needs.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there. `headsplat doctor` lists where weights come from.")
    try:
        # Only zip files can be mapped: the format before PyTorch 1.6 is read whole.
        with file.open("rb") as start:
            mapped = start.read(4) == b"PK\x03\x04"
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL ([\w.]+)", str(error)) or re.search(r"class '?([\w.]+)", str(error))
        if foreign:
            raise UserError(
                f"{file} holds {foreign[1]}, which is no part of a weight file. It was not loaded, because "
                "loading it could run a program; get the file from its authors' page again."
            ) from None
        raise UserError(f"{file} is no weight file or was cut short. Copy it again.") from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, AttributeError, TypeError):
        raise UserError(f"{file} is no weight file or was cut short. Copy it again.") from None
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a {type(content).__name__}, not a dictionary of weights.")
    return content


def read_safetensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Raises:
        UserError: not there or cut short.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not file.is_file():
        raise UserError(f"{file} is not there. `headsplat doctor` lists where weights come from.")
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}): it was cut short. Copy it again.") from None


def fill(model: nn.Module, weights: Mapping[str, Tensor], file: Path) -> None:
    """Gives a model built on the meta device its weights; each of the right shape, none missing, none left over.

    Raises:
        UserError: that is not so; the first key is named.
    """
    expected = model.state_dict()
    missing, foreign = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
    if missing or foreign:
        what = f"lacks {missing[0]}" if missing else f"has {foreign[0]}"
        raise UserError(
            f"{file} is of another architecture: it {what} ({len(missing)} names missing, "
            f"{len(foreign)} unknown). Give the file that belongs to this prior."
        )
    for key, value in weights.items():
        if value.shape != expected[key].shape:
            raise UserError(
                f"{file} is of another architecture: {key} is {tuple(value.shape)} where "
                f"{tuple(expected[key].shape)} is expected."
            )
    model.load_state_dict(dict(weights), strict=True, assign=True)


def _dust3r_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    if (path / "model.safetensors").is_file():
        return path / "model.safetensors"
    raise UserError(f"{path} holds no model.safetensors. Give the published .pth file or the hub's folder.")


def _hub_arguments(description: Path) -> dict[str, Any]:
    """The constructor's arguments in a hub folder."""
    if not description.is_file():
        raise UserError(f"{description} is not there; it belongs beside model.safetensors.")
    try:
        content = json.loads(description.read_text())
    except (OSError, ValueError):
        content = None
    if not isinstance(content, dict):
        raise UserError(f"{description} cannot be read. Copy it again.")
    return content
