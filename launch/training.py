"""`headsplat train` is one rank's work; `headsplat launch` (`make train`) starts all ranks and evaluates."""

from __future__ import annotations

import json
import logging
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import tyro

from avatars.errors import UserError
from launch.data import DEMO, DemoCaptures, shards_for
from launch.options import parse
from launch.preflight import check_hosts, chosen_hosts, free_port
from launch.recipes import CAPTURES, RECIPES, find_recipe
from launch.workspace import Workspace
from train.config import TrainConfig

__all__ = ["LaunchOptions", "launch", "run_training", "train"]

PREEMPTION = "preempted"  # the event in rank 0's log
PREEMPTED = 0  # a scheduler that stops a run does not want to see an error


@dataclass(frozen=True)
class TrainOptions:
    """One process group's worth of training."""

    config: Annotated[TrainConfig, tyro.conf.arg(name="")]
    """The recipe, with every field open to change."""
    data: Path
    """Folder of packed shards."""
    run: Path
    """Folder of the run; training goes on from its last checkpoint."""
    tracking: str = ""
    """MLflow tracking URI; empty for no tracking."""
    print_config: bool = False
    """Print the resolved recipe and stop."""


def train(words: list[str]) -> int:
    """`headsplat train RECIPE --data D --run R [--dotted.overrides]`."""
    if words and words[0] in ("-h", "--help"):
        print("usage: headsplat train RECIPE --data SHARDS --run FOLDER [overrides]\n")
        width = max(map(len, RECIPES)) + 2
        for name, make in RECIPES.items():
            print(f"  {name:<{width}}{(make.__doc__ or '').splitlines()[0]}")
        print("\n`headsplat train RECIPE --help` tells every field of a recipe.")
        return 0
    if not words or words[0].startswith("-"):
        raise UserError(f"Name a recipe: headsplat train RECIPE. There are {', '.join(RECIPES)}.")
    config = find_recipe(words[0])
    default = TrainOptions(config=config, data=tyro.MISSING, run=tyro.MISSING)
    if "--print-config" in words:
        default = replace(default, data=Path(), run=Path())
    options = parse(TrainOptions, words[1:], f"train {words[0]}", default)
    if options.print_config:
        print(json.dumps(options.config.to_json(), indent=1))
        return 0
    return train_rank(options)


def train_rank(options: TrainOptions) -> int:
    """This process as one rank of a training."""
    import torch

    from shards import Manifest
    from train.endings import Preempted
    from train.loop import train as run_loop
    from train.start import single_process_environment
    from train.tasks import settled, task_for
    from train.telemetry import RunLog

    single_process_environment()
    if not torch.cuda.is_available():
        # Building extensions, torch warns of a CUDA toolkit without a device; nobody here wants that device.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    rank = int(os.environ["RANK"])
    config = options.config
    log = RunLog(options.run, rank)
    try:
        with tracked(options, rank) as log.tracker:
            config = settled(config, Manifest.load(options.data))
            run_loop(task_for(config), config, options.data, options.run, log)
    except Preempted as stop:
        log.event(PREEMPTION)
        log.say(str(stop))
        return PREEMPTED
    except UserError as error:
        log.fail(error)
        return 1
    finally:
        log.close()
    return 0


def tracked(options: TrainOptions, rank: int) -> AbstractContextManager[Any]:
    """The MLflow run of a training; only rank 0 has one, as every writer more would be a run more."""
    if rank != 0 or not options.tracking:
        return nullcontext()
    from eval.tracking import TrainingRun
    from train.checkpoint import latest
    from train.endings import Preempted

    newest = latest(options.run)
    return TrainingRun(
        options.tracking,
        options.config.recipe,
        options.run,
        options.config.to_json(),
        resume=newest[1].tracking_run if newest else None,
        killed_by=(Preempted,),
    )


@dataclass(frozen=True)
class LaunchOptions:
    """Prepares data, starts every rank with DeepSpeed, then evaluates on held-out people."""

    recipe: Annotated[str, tyro.conf.Positional] = "avat3r-cpu"
    """Name of the recipe."""
    data: Path | None = None
    """Folder of packed shards; demo captures are made and packed when it is not given."""
    nodes: int = 1
    """Number of hosts."""
    hostfile: Path | None = None
    """Lines `hostname slots=n`; needed for more than one host."""
    out: Path = Path("work")
    """Folder for everything that is made."""
    run: str = ""
    """Name of the run in that folder; the recipe's name by default."""
    port: int | None = None
    """Port of the ranks' rendezvous; any free one by default."""
    reach: str = "ssh"
    """Command that reaches a host of the hostfile: "ssh -F config" or "srun --overlap"."""
    args: str = ""
    """Overrides of the recipe, as one string: "--steps 100 --optimizer.lr 1e-4"."""
    demo: DemoCaptures = DEMO
    """What to make when no data are given."""


def launch(words: list[str]) -> int:
    """`headsplat launch RECIPE`: what `make train` runs."""
    from launch.evaluation import evaluate_training, show_table

    recipe = words[0] if words and not words[0].startswith("-") else LaunchOptions.recipe
    default = LaunchOptions(recipe=recipe, demo=CAPTURES.get(recipe, DEMO))
    options = parse(LaunchOptions, words, "launch", default)
    from train.endings import Preempted
    from train.tasks import task_for

    try:
        shards, run = run_training(options)
    except Preempted as stop:
        print(f"headsplat: {stop}", flush=True)
        return PREEMPTED
    task = task_for(find_recipe(options.recipe))
    if not task.makes_avatars:
        print(f"Trained: {run / 'export'}    {task.next_step}")
        return 0
    workspace = Workspace(options.out)
    rows = evaluate_training(run, shards, workspace)
    show_table(rows, workspace)
    return 0


def run_training(options: LaunchOptions) -> tuple[Path, Path]:
    """Everything of `make train` but the evaluation.

    Returns:
        The shards and the run's folder.

    Raises:
        UserError: a check failed, or the training ended without finishing.
        Preempted: SIGTERM came; the ranks have written a checkpoint and stopped.
    """
    from avatars.priors.surface import SURFACE_CHANNELS
    from eval.tracking import mark_ended
    from launch.multihost import checkpoint_bytes, train_on_hosts
    from shards import Manifest
    from train.tasks import settled, task_for

    config = find_recipe(options.recipe)
    check_hosts(options.nodes, options.hostfile)
    # On other hosts the port is the preflight's to try.
    port = free_port(options.port) if options.hostfile is None else 0
    workspace = Workspace(options.out)
    run = workspace.run(options.run or options.recipe)
    # Wrong overrides are told here once, not by every rank after minutes of preparing data.
    overrides = shlex.split(options.args)
    given = TrainOptions(config=config, data=Path(), run=Path())
    config = parse(TrainOptions, overrides, f"train {options.recipe}", given).config
    shards = shards_for(
        options.data,
        workspace,
        task_for(config).size,
        options.demo,
        input_timesteps=config.data.input_timesteps,
        surface=getattr(config.model, "feature_dim", 0) == SURFACE_CHANNELS,
    )
    manifest = Manifest.load(shards)
    task = task_for(settled(config, manifest))
    task.check_weights()
    task.check(manifest)
    words = rank_words(options, shards, run, workspace, overrides)
    with stopping_gently(run):
        if options.hostfile is not None:
            hosts = chosen_hosts(options.nodes, options.hostfile)
            need = checkpoint_bytes(config)
            train_on_hosts(
                hosts, options.reach, words, shards, run, workspace.tracking_uri, options.port, need
            )
        else:
            command = deepspeed_command(config, port, words)
            status = subprocess.run(command, env=rank_environment()).returncode
            if status != 0:
                mark_ended(workspace.tracking_uri, run, "FAILED", f"the ranks ended with status {status}")
                raise UserError(f"The training in {run} ended with status {status}; what it said is above.")
    if exported_step(run) < config.steps:
        raise UserError(
            f"The training in {run} was stopped before its last step; the same command goes on from there."
        )
    return shards, run


@contextmanager
def stopping_gently(run: Path) -> Iterator[None]:
    """Within this, SIGTERM asks the ranks to write a checkpoint and stop, and waits for it.

    The ranks are asked by a file in the run's folder, as DeepSpeed's launcher would kill them 30 s after a signal.
    Where a scheduler signals every process, they have heard it themselves; the launcher's status is then an error
    although all went well, so it is the ranks' own log that counts.

    Raises:
        Preempted: they have done so.
    """
    from train.endings import Preempted
    from train.guards import STOP_FILE

    log = run / "logs" / "rank0.jsonl"
    before = log.stat().st_size if log.is_file() else 0
    (run / STOP_FILE).unlink(missing_ok=True)

    def ask(signum: int, frame: object) -> None:
        run.mkdir(parents=True, exist_ok=True)
        (run / STOP_FILE).touch()

    def stopped() -> bool:
        told = log.read_bytes()[before:].splitlines() if log.is_file() else []
        return bool(told) and json.loads(told[-1]).get("event") == PREEMPTION

    handler = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    except UserError:
        if not stopped():
            raise
    finally:
        signal.signal(signal.SIGTERM, handler)
    if stopped():
        raise Preempted(
            f"the training in {run} was stopped; the same command goes on from its last checkpoint"
        )


def exported_step(run: Path) -> int:
    """The step of the network that a run has exported, 0 where it has none."""
    description = run / "export" / "model.json"
    return int(json.loads(description.read_text())["provenance"]["step"]) if description.is_file() else 0


def rank_words(
    options: LaunchOptions, shards: Path, run: Path, workspace: Workspace, overrides: list[str]
) -> list[str]:
    """What one rank is told after `python -m launch.cli`."""
    from shards.stores import location

    where = location(shards)
    place = where if isinstance(where, str) else str(where.resolve())
    words = ["train", options.recipe, "--data", place, "--run", str(run.resolve())]
    return [*words, "--tracking", workspace.tracking_uri, *overrides]


def deepspeed_command(config: TrainConfig, port: int, words: list[str]) -> list[str]:
    """The real launcher's command line for the ranks of this machine."""
    import torch

    ranks = torch.cuda.device_count() or config.ranks_without_gpu
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
    launcher += ["--master_port", str(port), "--no_local_rank", "--num_gpus", str(ranks)]
    return [*launcher, "--module", "launch.cli", *words]


def rank_environment() -> dict[str, str]:
    """The ranks' environment: as many threads a rank as cores allow, and none of DeepSpeed's chatter."""
    import torch

    environment = dict(os.environ)
    # DeepSpeed calls collectives by names that torch has deprecated; nothing that a user could mend.
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning:torch.distributed.c10d_logger")
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
        environment.setdefault("OMP_NUM_THREADS", "1")
    # The launcher is found by its folder, not by an activated environment.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    return environment
