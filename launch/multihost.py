"""A training on the hosts of a hostfile: preflight, then all ranks, ended together; and the preflight alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from avatars.errors import UserError
from launch.hosts import Fleet, deepspeed_environment, node_command, passed_on
from launch.options import parse
from launch.preflight import Report, as_json, chosen_hosts, inspect_hosts
from launch.workspace import Workspace

if TYPE_CHECKING:
    from train.config import TrainConfig

__all__ = ["checkpoint_bytes", "preflight", "train_on_hosts"]


def train_on_hosts(
    hosts: dict[str, int],
    reach: str,
    training: list[str],
    data: Path,
    run: Path,
    tracking: str,
    port: int | None,
    need: int,
) -> None:
    """Checks all hosts, starts a rank for each slot, and waits for their end.

    Args:
        hosts: names and slots, in the order of the ranks.
        reach: `ssh` or `srun`, with options.
        training: the words after `python -m launch.cli` that are one rank's work.
        data: folder of packed shards.
        run: folder of the run, on a disk that all hosts share.
        tracking: MLflow's tracking URI.
        port: of the rendezvous on the first host, or None for any that is free.
        need: bytes that the checkpoints will take.

    Raises:
        UserError: a check failed and nothing was started, or the training ended early; the reason names the host.
    """
    from eval.tracking import mark_ended
    from launch.training import rank_environment

    environment = passed_on(rank_environment()) | deepspeed_environment()
    with Fleet(hosts, reach) as fleet:
        report = inspect_hosts(fleet, data, run, tracking, port, need)
        show(report)
        report.require()
        orders = [
            {
                "words": node_command(hosts, index, report.addresses[0], report.port, training),
                "environment": environment,
                "folder": str(Path.cwd()),
                "log": str((run / "logs" / "hosts.jsonl").resolve()),
                "address": address,
            }
            for index, address in enumerate(report.addresses)
        ]
        status, cause = fleet.run(orders)
    if status != 0:
        mark_ended(tracking, run, "FAILED", cause)  # rank 0 may have had no time to
        left = f" The same command with the hosts that are left goes on from the last checkpoint in {run}."
        raise UserError(f"The training ended on all hosts. {cause}{left}")


def show(report: Report) -> None:
    """The table, as wide as it needs to be where nobody's terminal limits it."""
    from rich.console import Console

    console = Console()
    Console(width=None if console.is_terminal else 150).print(report.table())


def checkpoint_bytes(config: TrainConfig) -> int:
    """Bytes that a run's checkpoints may take: weights, float32 copy and two moments, one more than are kept."""
    import torch

    from train.tasks import task_for

    with torch.device("meta"):
        module = task_for(config).build()
    return sum(p.numel() for p in module.parameters()) * 16 * (config.checkpoint.keep + 1)


@dataclass(frozen=True)
class PreflightOptions:
    """Runs the checks that come before a training on many hosts, and starts nothing."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of the recipe."""
    hostfile: Path
    """Lines `hostname slots=n`."""
    data: Path
    """Folder of packed shards."""
    nodes: int | None = None
    """Number of hosts, the first of the file; all by default."""
    out: Path = Path("work")
    """Folder for everything that is made."""
    run: str = ""
    """Name of the run in that folder; the recipe's name by default."""
    port: int | None = None
    """Port of the ranks' rendezvous; any free one by default."""
    reach: str = "ssh"
    """Command that reaches a host: "ssh -F config" or "srun --overlap"."""
    json: bool = False
    """Print JSON instead of a table."""


def preflight(words: list[str]) -> int:
    """`headsplat preflight RECIPE`: exit status 1 when any check of any host fails."""
    from launch.preflight import read_hostfile
    from launch.recipes import find_recipe
    from shards import Manifest

    options = parse(PreflightOptions, words, "preflight")
    config = find_recipe(options.recipe)
    Manifest.load(options.data)
    count = len(read_hostfile(options.hostfile)) if options.nodes is None else options.nodes
    hosts = chosen_hosts(count, options.hostfile)
    workspace = Workspace(options.out)
    run = workspace.run(options.run or options.recipe)
    need = checkpoint_bytes(config)
    with Fleet(hosts, options.reach) as fleet:
        report = inspect_hosts(fleet, options.data, run, workspace.tracking_uri, options.port, need)
    if options.json:
        print(as_json(report))
        return int(bool(report.problems))
    show(report)
    report.require()
    return 0
