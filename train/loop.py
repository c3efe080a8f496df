"""The training loop. It knows a `Task`, the plan's cursor and DeepSpeed; nothing of any model.

Every rank runs all of this. Whatever one rank decides (where to resume, whether to stop) is told to the others, so that
no rank waits for one that went another way.
"""

from __future__ import annotations

import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from avatars.errors import UserError
from train.augment import jittered
from train.config import TrainConfig, learning_rate
from train.endings import Preempted, SharedFailure
from train.guards import DATA, RECOVERY, StopSignal, Watch, require_finite
from train.start import claimed, join_ranks
from train.task import Task
from train.telemetry import RunLog, node_metrics
from train.training import Training, prepared

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
    rank, _ = join_ranks(config)
    stop = StopSignal(run, looks=rank == 0)
    watch = Watch(config.guard, log.last_words)
    with watch.over(), claimed(run), prepared(task, config, data, run, log, watch) as t:
        for step in range(t.first, config.steps):
            started, done = time.perf_counter(), step + 1
            rate = learning_rate(step, config.optimizer, config.steps)
            t.set_rate(rate)
            own = accumulate(t, step / config.steps)
            means, wishes = agree(own, stop=stop.asked, skipped=bool(own.left_out), busy=t.checkpoints.busy)
            judge(t, own, means, wishes["skipped"] > 0, step)
            watch.enter("the optimiser's step", config.guard.step_seconds)
            t.engine.step()
            means |= gradient_norm(t.engine, own.ids, step)
            if t.ema:
                t.ema.update()
            watch.warm()
            log.step(done, means, rate, time.perf_counter() - started, own.waited, t.batch)
            t.tell_put_aside(done)
            if done % config.log_every == 0:
                tell_nodes(log, done)
            t.profiler.step()
            if t.checkpoints.pending and not wishes["busy"]:
                t.settle()
            validated = t.validation.run(t, done) if t.validation.due(done) else {}
            if done == config.steps or done % config.checkpoint.every == 0 or wishes["stop"]:
                t.save(done, validated)
            if wishes["stop"] and done < config.steps:
                t.settle()
                stop.obeyed()
                raise Preempted(
                    f"stopped at step {done} of {config.steps}; the same command goes on from there"
                )
        if t.checkpoints.pending:
            t.settle()
        t.export(run / "export", max(t.first, config.steps))
        stop.obeyed()


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


def accumulate(t: Training, progress: float) -> Tally:
    """Forward and backward over the micro-batches of one step.

    Args:
        t: the training.
        progress: share of all steps that are done, which a loss may depend on.
    """
    own = Tally()
    for index in range(t.accumulate):
        if index:
            t.engine.step()  # counts the micro-batch before; the optimiser acts after the last one only
        t.watch.enter(DATA, t.config.guard.data_seconds)
        asked = time.perf_counter()
        batch = next(t.loader)
        own.waited += time.perf_counter() - asked
        t.watch.enter("forward and backward", t.config.guard.step_seconds)
        batch = {k: v.to(t.engine.device) if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        try:
            loss, parts = t.engine(jittered(batch, t.config.data.color_jitter) | {"progress": progress})
        except UserError as error:
            raise UserError(f"Examples {', '.join(batch['ids'])}: {error} {RECOVERY}") from error
        counts = t.gate is None or math.isfinite(float(loss.detach()))
        if t.gate is not None:
            t.gate.shut = not counts
        t.engine.backward(loss)
        own.add({"loss": loss.detach(), **parts}, batch["ids"], counts)
    t.watch.enter("the mean over the ranks", t.config.guard.step_seconds)
    return own


def agree(own: Tally, **wishes: bool) -> tuple[dict[str, float], dict[str, float]]:
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


def judge(t: Training, own: Tally, means: dict[str, float], skipped: bool, step: int) -> None:
    """Looks at the loss before the optimiser does.

    Raises:
        SharedFailure: it is not finite, and the policy is to stop or was stretched too far.
    """
    if t.gate is None:
        require_finite("loss", means["loss"], own.mean("loss"), own.ids, step)
    elif skipped:
        t.skips += 1
        left_out(t, own, step, nothing_left=not math.isfinite(means["loss"]))
    if (usual := t.spikes.look(means["loss"])) is not None:
        t.log.spike(step + 1, means["loss"], usual, own.ids)


def left_out(t: Training, own: Tally, step: int, nothing_left: bool) -> None:
    """Records the examples that a step goes on without.

    Raises:
        SharedFailure: no example is left, or it happened too often.
    """
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, own.left_out)
    names = ", ".join(name for report in reports for name in report)
    t.log.event("skipped", at_step=step + 1, examples=own.left_out)
    most = t.config.guard.max_skips
    if nothing_left or t.skips > most:
        why = "no example is left" if nothing_left else f"that is more than --guard.max-skips {most}"
        raise SharedFailure(
            f"The loss is not finite at step {step + 1}, from the examples {names}; {why}. {RECOVERY}"
        )
    t.log.say(f"step {step + 1}: left out {names}, whose loss is not finite ({t.skips} of {most})")


def gradient_norm(engine: Any, ids: list[str], step: int) -> dict[str, float]:
    """Norm of the step's whole gradient before clipping, where DeepSpeed tells it (not at ZeRO 0).

    Raises:
        SharedFailure: it is not finite.
    """
    told = engine.get_global_grad_norm()
    if told is None:
        return {}
    norm = float(told)
    require_finite("gradient", norm, norm, ids, step)
    return {"grad_norm": norm}


def tell_nodes(log: RunLog, done: int) -> None:
    """Every node's first rank says what its host is busy with, and rank 0 passes it on."""
    reports: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(reports, node_metrics() if os.environ.get("LOCAL_RANK", "0") == "0" else None)
    log.nodes(done, [report for report in reports if report is not None])
