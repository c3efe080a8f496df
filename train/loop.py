"""The training loop. It knows a `Task`, the plan's cursor and DeepSpeed; nothing of any model.

Every rank runs all of this. Whatever one rank decides (where to resume, whether to stop) is told to the others, so that
no rank waits for one that went another way.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from avatars.errors import UserError
from eval.provenance import versions
from shards import BatchLoader
from train import checkpoint
from train.config import TrainConfig, learning_rate
from train.deepspeed_config import deepspeed_json
from train.endings import Preempted, SharedFailure
from train.guards import DATA, RECOVERY, GradientGate, LossSpikes, StopSignal, Watch, require_finite
from train.start import agreed_checkpoint, claimed, join_ranks, usable
from train.task import Batch, Task
from train.telemetry import RunLog
from train.weights import whole_weights

__all__ = ["train"]


def train(task: Task, config: TrainConfig, data: Path, run: Path, log: RunLog) -> None:
    """Trains `task` on the shards in `data`, from the run's last checkpoint if there is one.

    Args:
        task: the model and its loss.
        config: the resolved recipe.
        data: folder of packed shards.
        run: folder of the run: checkpoints, logs, `initial/` and `export/`.
        log: where every step is told.

    Raises:
        UserError: what a user can mend: other data, a loss that is not finite, no space, a rank that died.
        Preempted: SIGTERM came; a checkpoint is written.
    """
    rank, world_size = join_ranks(config)
    stop = StopSignal(run)
    watch = Watch(config.guard, log.last_words)
    with watch.over(), claimed(run):
        manifest = usable(data, task)
        torch.manual_seed(config.seed)
        module = task.build()
        provenance = {
            "recipe": config.recipe,
            "data": manifest.fingerprint,
            "expression_kind": manifest.expression_kind,
            "versions": versions(),
        }
        newest = agreed_checkpoint(run, config, manifest.fingerprint)
        if newest is None and rank == 0:
            task.export(module, run / "initial", provenance | {"step": 0})
        gate = GradientGate(module) if config.guard.nonfinite == "skip" else None
        engine = deepspeed_engine(module, config, world_size)
        first = 0
        if newest is not None:
            folder, meta = newest
            checkpoint.load(engine, folder, meta)
            first = meta.step
            log.say(f"resuming {run} at step {first} of {config.steps} from {folder.name}")
        log.start(config, resumed_at=first)
        spikes = LossSpikes(config.guard.spike_factor)
        skips = 0
        loader = iter(
            BatchLoader(
                data,
                "train",
                seed=config.data.seed,
                micro_batch=config.data.micro_batch,
                world_size=world_size,
                rank=rank,
                start=first * config.accumulate,
                views=config.data.views,
            )
        )
        for step in range(first, config.steps):
            started = time.perf_counter()
            rate = learning_rate(step, config.optimizer, config.steps)
            for group in engine.optimizer.param_groups:
                group["lr"] = rate
            own = accumulate(engine, loader, config, watch, gate)
            means, wishes = agree(own, {"stop": float(stop.asked), "skipped": float(bool(own.left_out))})
            if gate is None:
                require_finite("loss", means["loss"], own.mean("loss"), own.ids, step)
            elif wishes["skipped"]:
                skips += 1
                tell_skipped(log, own, step, skips, config, lost=not math.isfinite(means["loss"]))
            if (usual := spikes.look(means["loss"])) is not None:
                log.spike(step + 1, means["loss"], usual, own.ids)
            watch.enter("the optimiser's step", config.guard.step_seconds)
            engine.step()
            norm = float(engine.get_global_grad_norm() or 0.0)
            require_finite("gradient", norm, norm, own.ids, step)
            watch.warm()
            log.step(
                step + 1,
                means | {"grad_norm": norm},
                lr=rate,
                seconds=time.perf_counter() - started,
                waited=own.waited,
                examples=config.data.micro_batch * config.accumulate * world_size,
            )
            done = step + 1
            if done == config.steps or done % config.checkpoint.every == 0 or wishes["stop"]:
                watch.enter("writing a checkpoint", config.guard.checkpoint_seconds)
                meta = checkpoint.Meta(
                    step=done,
                    micro_batches=done * config.accumulate,
                    world_size=world_size,
                    config=config.to_json(),
                    data=manifest.fingerprint,
                    versions=versions(),
                    tracking_run=log.tracking_run,
                )
                where = checkpoint.save(engine, run, meta, config.checkpoint.keep)
                log.say(f"wrote {where.name}")
            if wishes["stop"] and done < config.steps:
                if rank == 0:
                    stop.obeyed()
                raise Preempted(
                    f"stopped at step {done} of {config.steps}; the same command goes on from there"
                )
        watch.enter("writing the network", config.guard.checkpoint_seconds)
        with whole_weights(engine, config.zero_stage):
            if rank == 0:
                task.export(engine.module, run / "export", provenance | {"step": max(first, config.steps)})
        dist.barrier()


def deepspeed_engine(module: torch.nn.Module, config: TrainConfig, world_size: int) -> Any:
    """DeepSpeed around the network."""
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module,
        model_parameters=list(module.parameters()),
        config=deepspeed_json(config, world_size),
    )
    return engine


@dataclass
class Tally:
    """What this rank's micro-batches of a step gave.

    Attributes:
        sums: loss and parts, summed over the micro-batches that count.
        count: how many count.
        waited: seconds spent waiting for data.
        ids: the examples.
        left_out: those of micro-batches whose loss is not finite, where the policy is to go on without them.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    count: int = 0
    waited: float = 0.0
    ids: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    def add(self, parts: dict[str, torch.Tensor], ids: list[str], counts: bool) -> None:
        """One micro-batch."""
        self.ids += ids
        self.count += counts
        if not counts:
            self.left_out += ids
        for name, value in parts.items():
            value = value.float() if counts else torch.zeros((), device=value.device)
            self.sums[name] = self.sums.get(name, torch.zeros((), device=value.device)) + value

    def mean(self, name: str) -> float:
        """This rank's mean over the micro-batches that count."""
        return float(self.sums[name]) / self.count if self.count else math.nan


def accumulate(
    engine: Any, loader: Iterator[Batch], config: TrainConfig, watch: Watch, gate: GradientGate | None
) -> Tally:
    """Forward and backward over the micro-batches of one step."""
    own = Tally()
    for index in range(config.accumulate):
        if index:
            engine.step()  # counts the micro-batch before; the optimiser acts after the last one only
        watch.enter(DATA, config.guard.data_seconds)
        asked = time.perf_counter()
        batch = next(loader)
        own.waited += time.perf_counter() - asked
        watch.enter("forward and backward", config.guard.step_seconds)
        batch = {k: v.to(engine.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        try:
            loss, parts = engine(batch)
        except UserError as error:
            raise UserError(f"Examples {', '.join(batch['ids'])}: {error} {RECOVERY}") from error
        counts = gate is None or math.isfinite(float(loss))
        if gate is not None:
            gate.shut = not counts
        engine.backward(loss)
        own.add({"loss": loss.detach(), **parts}, batch["ids"], counts)
    watch.enter("the mean over the ranks", config.guard.step_seconds)
    return own


def agree(own: Tally, wishes: dict[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """One small all-reduce for everything that ranks tell each other about a step.

    Returns:
        Means of loss and parts over all micro-batches that count (NaN where none does), and the wishes summed.
    """
    device = own.sums["loss"].device
    told = torch.tensor([own.count, *wishes.values()], dtype=torch.float64, device=device)
    values = torch.cat([torch.stack(list(own.sums.values())).double(), told])
    dist.all_reduce(values)
    *sums, count = values[: len(own.sums) + 1].tolist()
    means = {name: value / count if count else math.nan for name, value in zip(own.sums, sums, strict=True)}
    return means, dict(zip(wishes, values[len(own.sums) + 1 :].tolist(), strict=True))


def tell_skipped(log: RunLog, own: Tally, step: int, skips: int, config: TrainConfig, lost: bool) -> None:
    """Records the examples that a step leaves out.

    Raises:
        SharedFailure: no example is left, or it happened too often.
    """
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, own.left_out)
    names = ", ".join(name for report in reports for name in report)
    log.event("skipped", at_step=step + 1, examples=own.left_out)
    if lost or skips > config.guard.max_skips:
        why = (
            "no example is left" if lost else f"that is more than --guard.max-skips {config.guard.max_skips}"
        )
        raise SharedFailure(
            f"The loss is not finite at step {step + 1}, from the examples {names}; {why}. {RECOVERY}"
        )
    log.say(
        f"step {step + 1}: left out {names}, whose loss is not finite ({skips} of {config.guard.max_skips})"
    )
