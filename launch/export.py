"""`headsplat export`: a checkpoint's network as safetensors and JSON, checked before it is called done."""

from __future__ import annotations

import io
import re
import shutil
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    from torch import Tensor

    from train.checkpoint import Meta

__all__ = ["export", "export_checkpoint"]


@dataclass(frozen=True)
class ExportOptions:
    """Writes the network of a run's checkpoint for `avatars` to load, without any rank or launcher."""

    run: Annotated[Path, tyro.conf.Positional]
    """Folder of the run."""
    out: Annotated[Path, tyro.conf.Positional]
    """Folder for model.safetensors and model.json; it must not be there yet."""
    step: int | None = None
    """Which checkpoint; the newest whole one by default."""
    ema: bool = True
    """The running mean of the weights where the checkpoint has one, or always the weights themselves (--no-ema)."""


def export(words: list[str]) -> int:
    """`headsplat export RUN OUT [--step n] [--no-ema]`."""
    options = parse(ExportOptions, words, "export")
    meta, kind = export_checkpoint(options.run, options.out, options.step, options.ema)
    print(
        f"wrote step {meta.step} ({kind}) to {options.out}; read back, every name and a forward pass are equal"
    )
    return 0


def export_checkpoint(run: Path, out: Path, step: int | None = None, ema: bool = True) -> tuple[Meta, str]:
    """Writes the network of a checkpoint and compares what was written with what it was written from.

    Returns:
        What the checkpoint is of, and whether its weights or their mean were written, in words.

    Raises:
        UserError: no such checkpoint, one that is damaged, or `out` is there already.
    """
    from train.tasks import config_from_json, task_for

    if out.exists():
        raise UserError(f"{out} is there already; name a new folder.")
    folder, meta = whole_checkpoint(run, step)
    use_mean = ema and "ema.pt" in meta.files
    config = config_from_json(meta.config)
    task = task_for(config)
    module = task.build()
    module.load_state_dict(mean_weights(folder) if use_mean else weights(folder, config.zero_stage))
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    provenance = {
        "recipe": config.recipe,
        "data": meta.data,
        "expression_kind": meta.expression_kind,
        "versions": meta.versions,
        "step": meta.step,
    }
    task.export(module, partial, provenance)
    task.verify_export(module, partial)
    partial.rename(out)
    return meta, "the running mean of the weights" if use_mean else "the weights"


def whole_checkpoint(run: Path, step: int | None) -> tuple[Path, Meta]:
    """The checkpoint of that step, or the newest whole one.

    Raises:
        UserError: there is none, or it is damaged.
    """
    from train.checkpoint import Meta, damage, newest_first

    there = list(newest_first(run))
    chosen = [entry for entry in there if step is None or entry[0].name == f"step-{step:08d}"]
    if not chosen:
        steps = ", ".join(str(int(re.sub(r"\D", "", folder.name))) for folder, _ in there) or "none"
        raise UserError(
            f"{run} has no checkpoint{'' if step is None else f' of step {step}'}; it has {steps}."
        )
    wrong = ""
    for folder, meta in chosen:
        wrong = meta if isinstance(meta, str) else damage(folder, meta) or ""
        if isinstance(meta, Meta) and not wrong:
            return folder, meta
    raise UserError(f"{chosen[-1][0]} is damaged: {wrong}. Name another with --step.")


def weights(folder: Path, zero_stage: int) -> dict[str, Tensor]:
    """Float32 weights by name, put together from the ranks' shards.

    DeepSpeed's converter leaves out what ZeRO does not spread and repeats nothing that is tied, so the names are
    checked by the strict load that follows.
    """
    import torch

    if zero_stage == 0:
        state = torch.load(folder / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        return {name: value.float() for name, value in state["module"].items()}
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with redirect_stdout(io.StringIO()):
        return get_fp32_state_dict_from_zero_checkpoint(str(folder.parent), tag=folder.name)


def mean_weights(folder: Path) -> dict[str, Tensor]:
    """The running mean by name."""
    import torch

    return torch.load(folder / "ema.pt", map_location="cpu", weights_only=True)
