"""The training loop. It knows a `Task`, the plan's cursor and DeepSpeed; nothing of any model.

Every rank runs all of this. Whatever one rank decides (where to resume, whether to stop) is told to the others, so that
no rank waits for one that went another way.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from avatars.errors import UserError
from eval.provenance import versions
from shards import BatchLoader, Manifest
from train import checkpoint
from train.config import TrainConfig, learning_rate
from train.deepspeed_config import deepspeed_json
from train.task import Batch, Task
from train.telemetry import RunLog, SharedFailure

__all__ = ["Preempted", "train"]


RECOVERY = (
    "The last checkpoint is whole: lower --optimizer.lr or look at these examples with `headsplat shards check`, "
    "then run the same command again."
)


class Preempted(Exception):
    """The run was asked to stop, wrote a checkpoint and can be started again."""


def train(task: Task, config: TrainConfig, data: Path, run: Path, log: RunLog) -> None:
    """Trains `task` on the shards in `data`, from the run's last checkpoint if there is one.

    Args:
        task: the model and its loss.
        config: the resolved recipe.
        data: folder of packed shards.
        run: folder of the run: checkpoints, logs, `initial/` and `export/`.
        log: where every step is told.

    Raises:
        UserError: what a user can mend: other data, a loss that is not finite, no space.
        Preempted: SIGTERM came; a checkpoint is written.
    """
    import deepspeed

    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    manifest = usable(data, task)
    fingerprint = manifest.fingerprint
    stop = StopSignal()

    with claimed(run):
        torch.manual_seed(config.seed)
        module = task.build()
        provenance = {
            "recipe": config.recipe,
            "data": fingerprint,
            "expression_kind": manifest.expression_kind,
            "versions": versions(),
        }
        newest = agreed_checkpoint(run, config, fingerprint)
        if newest is None and rank == 0:
            task.export(module, run / "initial", provenance | {"step": 0})
        engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=list(module.parameters()),
            config=deepspeed_json(config, world_size),
        )
        first = 0
        if newest is not None:
            folder, meta = newest
            checkpoint.load(engine, folder, meta)
            first = meta.step
            log.say(f"resuming {run} at step {first} of {config.steps} from {folder.name}")
        log.start(config, resumed_at=first)

        batches = BatchLoader(
            data,
            "train",
            seed=config.data.seed,
            micro_batch=config.data.micro_batch,
            world_size=world_size,
            rank=rank,
            start=first * config.accumulate,
            views=config.data.views,
        )
        loader = iter(batches)
        for step in range(first, config.steps):
            started = time.perf_counter()
            for group in engine.optimizer.param_groups:
                group["lr"] = learning_rate(step, config.optimizer, config.steps)
            parts, waited, ids = accumulate(engine, loader, config.accumulate)
            parts["stop"] = torch.tensor(float(stop.asked))
            means = mean_over_ranks(parts)
            stopping = means.pop("stop") > 0
            require_finite(means["loss"], float(parts["loss"]), ids, step)
            engine.step()
            log.step(
                step + 1,
                means,
                lr=learning_rate(step, config.optimizer, config.steps),
                seconds=time.perf_counter() - started,
                waited=waited,
                examples=config.data.micro_batch * config.accumulate * world_size,
            )
            done = step + 1
            if done == config.steps or done % config.checkpoint.every == 0 or stopping:
                meta = checkpoint.Meta(
                    step=done,
                    micro_batches=done * config.accumulate,
                    world_size=world_size,
                    config=config.to_json(),
                    data=fingerprint,
                    versions=versions(),
                    tracking_run=log.tracking_run,
                )
                where = checkpoint.save(engine, run, meta, config.checkpoint.keep)
                log.say(f"wrote {where.name}")
            if stopping and done < config.steps:
                raise Preempted(
                    f"stopped at step {done} of {config.steps}; the same command goes on from there"
                )
        with whole_weights(engine, config.zero_stage):
            if rank == 0:
                task.export(engine.module, run / "export", provenance | {"step": max(first, config.steps)})
        dist.barrier()


def usable(data: Path, task: Task) -> Manifest:
    """The shards' manifest, when the task can be trained on them.

    Raises:
        SharedFailure: it cannot. Every rank looks and finds the same.
    """
    try:
        manifest = Manifest.load(data)
        task.check(manifest)
        return manifest
    except UserError as error:
        raise SharedFailure(str(error)) from error


def accumulate(
    engine: Any, loader: Iterator[Batch], micro_batches: int
) -> tuple[dict[str, torch.Tensor], float, list[str]]:
    """Forward and backward over the micro-batches of one step.

    Returns:
        Mean loss and parts of this rank, seconds spent waiting for data, and the ids of the examples.
    """
    sums: dict[str, torch.Tensor] = {}
    waited, ids = 0.0, []
    for _ in range(micro_batches):
        asked = time.perf_counter()
        batch = next(loader)
        waited += time.perf_counter() - asked
        ids += batch["ids"]
        batch = {k: v.to(engine.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        try:
            loss, parts = engine(batch)
        except UserError as error:
            # Only this rank may have seen it, so it speaks for itself; the launcher ends the others.
            raise UserError(f"Examples {', '.join(batch['ids'])}: {error} {RECOVERY}") from error
        engine.backward(loss)
        for name, value in {"loss": loss.detach(), **parts}.items():
            sums[name] = sums.get(name, torch.zeros((), device=value.device)) + value.float() / micro_batches
    return sums, waited, ids


def mean_over_ranks(parts: dict[str, torch.Tensor]) -> dict[str, float]:
    """One small all-reduce for everything that is reported, the wish to stop included."""
    device = parts["loss"].device
    values = torch.stack([p.to(device=device, dtype=torch.float64) for p in parts.values()])
    dist.all_reduce(values)
    return dict(zip(parts, (values / dist.get_world_size()).tolist(), strict=True))


def require_finite(mean: float, own: float, ids: list[str], step: int) -> None:
    """Ends the run on every rank when any rank's loss is not finite, naming the examples.

    Raises:
        UserError: on all ranks alike, as the mean over ranks carries a NaN to everybody.
    """
    if math.isfinite(mean):
        return
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, (own, ids))
    culprits = [name for loss, names in reports if not math.isfinite(loss) for name in names]
    raise SharedFailure(
        f"The loss is {mean} at step {step + 1}, from the examples {', '.join(culprits)}. {RECOVERY}"
    )


def agreed_checkpoint(run: Path, config: TrainConfig, data: str) -> tuple[Path, checkpoint.Meta] | None:
    """Rank 0 looks for a checkpoint and tells the others, as ranks may see a shared disk differently.

    Raises:
        UserError: the run's checkpoint is of another model or of other data.
    """
    found: list[Any] = [None]
    if dist.get_rank() == 0:
        try:
            found = [checkpoint.latest(run)]
        except UserError as error:
            found = [SharedFailure(str(error))]
    dist.broadcast_object_list(found, src=0)
    if isinstance(found[0], SharedFailure):
        raise found[0]
    newest = found[0]
    if newest is None:
        return None
    meta = newest[1]
    if not config.same_model_as(meta.config):
        raise SharedFailure(
            f"{run} holds a checkpoint of another model (recipe {meta.config.get('recipe')}); choose another RUN=."
        )
    if meta.data != data:
        raise SharedFailure(
            f"{run} was trained on other shards than the ones given; choose another RUN= or the same DATA=."
        )
    return newest


@contextmanager
def claimed(run: Path) -> Iterator[None]:
    """Keeps a second training out of the same folder; the lock goes with the process, however it dies.

    Raises:
        UserError: another run holds it. Every rank raises.
    """
    busy = [False]
    handle = None
    if dist.get_rank() == 0:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / "lock").open("w")
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            busy = [True]
    dist.broadcast_object_list(busy, src=0)
    if busy[0]:
        raise SharedFailure(f"Another training is running in {run}; wait for it, or choose another RUN=.")
    try:
        yield
    finally:
        if handle is not None:
            handle.close()


@contextmanager
def whole_weights(engine: Any, zero_stage: int) -> Iterator[None]:
    """Within this, every rank sees the whole parameters, also where ZeRO 3 has spread them."""
    if zero_stage < 3:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield


class StopSignal:
    """Remembers that SIGTERM came, so that the step under way may end."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._remember)

    def _remember(self, signum: int, frame: Any) -> None:
        self.asked = True


def single_process_environment() -> None:
    """Lets `headsplat train` run without a launcher, as a world of one."""
    import socket

    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(
        RANK="0",
        LOCAL_RANK="0",
        WORLD_SIZE="1",
        LOCAL_SIZE="1",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def losses(run: Path, rank: int = 0) -> list[float]:
    """The loss of every step that a run has logged, the last telling of a step counting.

    Args:
        run: the run's folder.
        rank: whose log.
    """
    told: dict[int, float] = {}
    for line in (run / "logs" / f"rank{rank}.jsonl").read_text().splitlines():
        values = json.loads(line)
        if "loss" in values:
            told[values["step"]] = values["loss"]
    return [told[step] for step in sorted(told)]
