"""What the trainer costs beside its network: against a bare loop, for data, for checkpoints, and for a second rank.

The loop and a bare PyTorch loop of the same model, data and optimiser take turns, step by step, in one process, so that
other load on the machine hits both alike. Two ranks are compared with two processes that know nothing of each other, as
two processes on one machine slow each other down with or without a trainer.

    python -m benchmarks.training [--data SHARDS] [--steps 30]
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.record import arguments, write
from launch.preflight import free_port
from launch.recipes import find_recipe
from launch.training import rank_environment
from shards import BatchLoader, Manifest
from train import checkpoint
from train.config import TrainConfig
from train.loop import train
from train.start import single_process_environment
from train.tasks import task_for
from train.telemetry import RunLog

RECIPE = "avat3r-cpu"
WARM_UP = 3
OWN_WORDS = [
    "--precision",
    "fp32",
    "--zero-stage",
    "0",
    "--log-every",
    "1000000",
    "--checkpoint.every",
    "1000000",
]


def configuration(steps: int) -> TrainConfig:
    """The recipe without what a bare loop does not do: no bf16 copies, no sharding, checkpoints every tenth step."""
    base = find_recipe(RECIPE)
    return replace(
        base,
        steps=steps,
        precision="fp32",
        zero_stage=0,
        log_every=10**6,
        checkpoint=replace(base.checkpoint, every=10, keep=1),
    )


def bare_steps(config: TrainConfig, data: Path) -> Iterator[float]:
    """A bare training loop; gives the loss of a step each time it is asked."""
    torch.manual_seed(config.seed)
    module: nn.Module = task_for(config).build()
    options = config.optimizer
    optimizer = torch.optim.AdamW(
        module.parameters(), options.lr, options.betas, options.eps, options.weight_decay
    )
    with BatchLoader(data, "train", seed=config.data.seed, micro_batch=1, views=config.data.views) as loader:
        for batch in loader:
            optimizer.zero_grad()
            loss, _ = module(batch | {"progress": 0.0})
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), options.clip)
            optimizer.step()
            yield float(loss.detach())


class TakingTurns(RunLog):
    """The run's log, which lets the bare loop take a step after each of the trainer's."""

    def __init__(self, run: Path, bare: Callable[[], object]) -> None:
        super().__init__(run, 0)
        self.bare = bare
        self.own_seconds: list[float] = []
        self.bare_seconds: list[float] = []
        self.waited = 0.0
        self._ended = 0.0

    def step(self, step: int, means: Any, lr: float, seconds: float, waited: float, examples: int) -> None:
        super().step(step, means, lr, seconds, waited, examples)
        now = time.perf_counter()
        # From the end of the bare step to here: everything that the loop does in an iteration.
        own = now - self._ended if self._ended else seconds
        self.bare()
        self._ended = time.perf_counter()
        if step > WARM_UP:
            self.own_seconds.append(own)
            self.bare_seconds.append(self._ended - now)
            self.waited += waited


def timed(kind: type, name: str, times: list[float]) -> None:
    """Keeps the seconds of every call of a method."""
    method = getattr(kind, name)

    def call(*arguments: Any, **options: Any) -> Any:
        started = time.perf_counter()
        try:
            return method(*arguments, **options)
        finally:
            times.append(time.perf_counter() - started)

    setattr(kind, name, call)


def against_bare(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """Loop against bare loop, wait for data, and what a checkpoint takes from the steps."""
    begins: list[float] = []
    settles: list[float] = []
    timed(checkpoint.Checkpoints, "begin", begins)
    timed(checkpoint.Checkpoints, "settle", settles)
    single_process_environment()
    config = configuration(steps)
    bare = bare_steps(config, data)
    log = TakingTurns(folder / "loop", lambda: next(bare))
    train(task_for(config), config, data, folder / "loop", log)
    log.close()
    # An iteration that holds a checkpoint's begin or end is the checkpoint's to answer for.
    plain = [
        (own, other)
        for index, (own, other) in enumerate(zip(log.own_seconds, log.bare_seconds, strict=True))
        if (index + WARM_UP) % 10 not in (0, 1, 2)
    ]
    own, other = (statistics.median(column) for column in zip(*plain, strict=True))
    weights = (folder / "loop" / "checkpoints").rglob("*")
    return {
        "steps": len(plain),
        "loop_step_ms": round(1e3 * own, 2),
        "bare_step_ms": round(1e3 * other, 2),
        "loop_over_bare": round(statistics.median(a / b for a, b in plain), 4),
        "loop_over_bare_quartiles": [
            round(q, 4) for q in statistics.quantiles([a / b for a, b in plain], n=4)
        ],
        "data_wait_percent": round(100 * log.waited / sum(log.own_seconds), 3),
        "checkpoint_mib": round(sum(f.stat().st_size for f in weights if f.is_file()) / 2**20, 1),
        "checkpoint_stall_ms": round(1e3 * statistics.median(begins), 2),
        "checkpoint_finish_ms": round(1e3 * statistics.median(settles[:-1] or settles), 2),
        "checkpoint_waiting_for_the_last_ms": round(1e3 * settles[-1], 2),
    }


def rank_command(data: Path, run: Path, steps: int, ranks: int) -> list[str]:
    """The command line of a training with one rank, or with several under the DeepSpeed launcher."""
    words = ["train", RECIPE, "--data", str(data), "--run", str(run), "--steps", str(steps), *OWN_WORDS]
    if ranks == 1:
        return [sys.executable, "-m", "launch.cli", *words]
    launcher = [str(Path(sys.executable).with_name("deepspeed")), "--log_level", "error"]
    launcher += ["--master_port", str(free_port(None)), "--no_local_rank", "--num_gpus", str(ranks)]
    return [*launcher, "--module", "launch.cli", *words]


def step_seconds(commands: dict[Path, list[str]]) -> float:
    """Runs trainings side by side; the median seconds of a step over all of them."""
    processes = [
        subprocess.Popen(command, env=rank_environment(), stdout=subprocess.DEVNULL)
        for command in commands.values()
    ]
    statuses = [process.wait() for process in processes]
    if any(statuses):
        raise SystemExit("a training of the benchmark failed; run its command by hand")
    taken = []
    for run in commands:
        lines = [json.loads(line) for line in (run / "logs" / "rank0.jsonl").read_text().splitlines()]
        taken += [line["step_seconds"] for line in lines if line.get("step", 0) > WARM_UP]
    return statistics.median(taken)


def second_rank(data: Path, folder: Path, steps: int) -> dict[str, Any]:
    """One rank alone, two that know nothing of each other, and two ranks, all with one thread and one example each."""
    alone = step_seconds({folder / "alone": rank_command(data, folder / "alone", steps, 1)})
    apart = step_seconds(
        {folder / name: rank_command(data, folder / name, steps, 1) for name in ("left", "right")}
    )
    together = step_seconds({folder / "two": rank_command(data, folder / "two", steps, 2)})
    return {
        "one_rank_step_ms": round(1e3 * alone, 2),
        "two_processes_step_ms": round(1e3 * apart, 2),
        "two_ranks_step_ms": round(1e3 * together, 2),
        "machine_contention": round(apart / alone, 4),
        "two_ranks_efficiency": round(alone / together, 4),
        "two_ranks_efficiency_without_contention": round(apart / together, 4),
    }


def made_up_shards(folder: Path, size: int) -> Path:
    """Shards of analytic heads in the recipe's size, where no others are given."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
    from tiny_captures import pack_tiny

    return pack_tiny(folder, subjects=4, timesteps=8, views=16, size=size)


def main() -> None:
    """Measures and writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument(
        "--data", type=Path, help="packed shards of 128 px, such as the demo's; made up by default"
    )
    parser.add_argument("--steps", type=int, default=33, help="steps of the comparison with the bare loop")
    parser.add_argument("--rank-steps", type=int, default=12, help="steps of each training with other ranks")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = options.data or made_up_shards(folder, find_recipe(RECIPE).model.size)
        # First, as the comparison with the bare loop makes this process a rank, which its children would inherit.
        second = second_rank(data, folder, options.rank_steps)
        content = {
            "what": "the training loop of avat3r-cpu in fp32: cost beside the network",
            "data": str(options.data.name) if options.data else "analytic heads",
            "examples": sum(shard.targets for shard in Manifest.load(data).split("train")),
            "threads": torch.get_num_threads(),
            "against_bare": against_bare(data, folder, options.steps),
            "second_rank": second,
        }
        write("training", content, ("torch", "deepspeed", "numpy"), options.out)


if __name__ == "__main__":
    os.environ |= rank_environment() | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    main()
