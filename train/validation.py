"""Evaluation inside a training: the evaluation's own code and protocol ids, on a few held-out people."""

from __future__ import annotations

import statistics
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import distributed as dist

from avatars.errors import UserError
from eval.metrics import LPIPS, PSNR, SSIM
from eval.protocol import Protocol, synthetic_heldout
from shards import ShardSet, open_shards
from train.config import TrainConfig
from train.task import Task
from train.telemetry import RunLog

if TYPE_CHECKING:
    from train.training import Training

__all__ = ["Validation"]

FOLDER = "validation"
METRICS = (PSNR, SSIM, LPIPS)


class Validation:
    """Evaluates the weights of a step; the held-out people are shared out over the ranks."""

    def __init__(self, task: Task, config: TrainConfig, data: Path, run: Path, log: RunLog) -> None:
        self.task, self.config, self.run_folder, self.log = task, config.validation, run, log
        self.recipe, self.steps = config.recipe, config.steps
        self.heldout: ShardSet | None = None
        self.protocol: Protocol | None = None
        if self.config.every and not task.makes_avatars:
            raise UserError(
                f"The task {task.name} makes no avatars before a fit, so there is nothing to evaluate; take "
                "--validation.every 0."
            )
        if self.config.every:
            self.heldout = open_shards(data, "heldout")
            self.protocol = synthetic_heldout(
                self.heldout, views=self.config.views, timesteps=self.config.timesteps, metrics=METRICS
            )

    def due(self, done: int) -> bool:
        """Whether the weights after `done` steps are evaluated."""
        return bool(self.config.every) and (done % self.config.every == 0 or done == self.steps)

    def run(self, t: Training, done: int) -> dict[str, float]:
        """Evaluates; every rank must call it.

        Returns:
            Means over the people, by metric; one that is not available here (LPIPS without weights) is left out.

        Raises:
            UserError: an avatar cannot be made or measured. The other ranks hear of it from the watch.
        """
        from eval.evaluate import evaluate

        assert self.heldout is not None, "validation is off"
        assert self.protocol is not None, "validation is off"
        t.watch.enter("validation", t.config.guard.checkpoint_seconds)
        started = time.perf_counter()
        device = str(t.engine.device)
        method = self.task.method(t.evaluated(), t.provenance["expression_kind"], device)
        people = self.protocol.subjects[: self.config.subjects or None]
        mine = people[dist.get_rank() :: dist.get_world_size()]
        folder = self.run_folder / FOLDER / f"step-{done:08d}"
        rows = (
            evaluate(
                method.name,
                method.create,
                self.heldout,
                self.protocol,
                checkpoint=f"{self.recipe}-step{done}",
                out=folder,
                subjects=mine,
                device=device,
            )
            if mine
            else []
        )
        reports: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(reports, [row.values for row in rows])
        values = [value for report in reports for value in report]
        means = {
            key: statistics.fmean(value[key] for value in values)
            for key in values[0]
            if all(key in value for value in values)
        }
        self.log.validation(done, means, self.protocol.id, time.perf_counter() - started, sheets(folder))
        return means


def sheets(folder: Path) -> list[Path]:
    """The contact sheets of a validation: prediction beside target."""
    return sorted(folder.rglob("sheet.png"))
