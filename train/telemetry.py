"""What a run tells: a line on the terminal, a JSON line a step and rank on disk, and the tracker on rank 0."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import IO, Protocol

from train.config import TrainConfig
from train.endings import RunOver, SharedFailure

__all__ = ["RunLog", "Tracker", "losses"]


class Tracker(Protocol):
    """Where rank 0 sends its numbers; MLflow in practice."""

    run_id: str

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step."""
        ...

    def end(self, status: str, reason: str) -> None:
        """The run's last status, from whatever thread."""
        ...


class RunLog:
    """One rank's voice. Only rank 0 speaks on the terminal and to the tracker."""

    def __init__(self, run: Path, rank: int, tracker: Tracker | None = None) -> None:
        folder = run / "logs"
        folder.mkdir(parents=True, exist_ok=True)
        self._file: IO[str] = (folder / f"rank{rank}.jsonl").open("a")
        self.rank = rank
        self.tracker = tracker
        self._steps = 0
        self._first = 0
        self._every = 1
        self._began = time.perf_counter()

    @property
    def tracking_run(self) -> str | None:
        """MLflow's id of the run, where it is tracked."""
        return self.tracker.run_id if self.tracker else None

    def start(self, config: TrainConfig, *, resumed_at: int) -> None:
        """Told once, before the first step."""
        self._steps, self._first, self._every = config.steps, resumed_at, config.log_every
        self._began = time.perf_counter()
        self._write({"event": "start", "step": resumed_at, "recipe": config.recipe})

    def say(self, text: str) -> None:
        """A sentence for whoever watches."""
        if self.rank == 0:
            print(text, flush=True)

    def fail(self, error: Exception) -> None:
        """Why the run ends. What all ranks know is told once, or once a host; another rank tells what it alone saw."""
        self._write({"event": "failed", "reason": str(error)})
        once_a_host = isinstance(error, RunOver) and os.environ.get("LOCAL_RANK", "0") == "0"
        if self.rank == 0 or once_a_host or not isinstance(error, SharedFailure):
            print(f"headsplat: {error}", file=sys.stderr, flush=True)

    def last_words(self, reason: str) -> None:
        """The same where the main thread is stuck and the process ends at once."""
        self.fail(RunOver(reason))
        if self.tracker is not None:
            self.tracker.end("FAILED", reason)

    def event(self, name: str, **values: object) -> None:
        """Something worth finding later in this rank's log."""
        self._write({"event": name, **values})

    def spike(self, step: int, loss: float, usual: float, ids: list[str]) -> None:
        """A loss far above what it has been; every rank writes down its own examples."""
        self.event("spike", at_step=step, spike=loss, usual=usual, examples=ids)
        self.say(
            f"step {step}: the loss is {loss:.4g}, lately {usual:.4g}; the examples are in the ranks' logs"
        )

    def step(
        self, step: int, means: dict[str, float], *, lr: float, seconds: float, waited: float, examples: int
    ) -> None:
        """One optimiser step.

        Args:
            step: steps taken so far, this one included.
            means: loss and parts, averaged over the ranks.
            lr: learning rate of the step.
            seconds: wall time of the step.
            waited: seconds of it that the data took.
            examples: examples of the step over all ranks.
        """
        numbers = {**means, "lr": lr, "step_seconds": seconds, "data_wait_seconds": waited}
        self._write({"step": step, **numbers})
        if self.rank != 0:
            return
        if self.tracker is not None:
            self.tracker.log_metrics({f"train/{name}": value for name, value in numbers.items()}, step)
        if step % self._every == 0 or step in (self._first + 1, self._steps):
            self.say(self._line(step, means, lr, seconds, waited, examples))

    def _line(
        self, step: int, means: dict[str, float], lr: float, seconds: float, waited: float, examples: int
    ) -> str:
        rest = (time.perf_counter() - self._began) / (step - self._first) * (self._steps - step)
        parts = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "loss")
        return (
            f"step {step:>6}/{self._steps}  {step / self._steps:4.0%}  loss {means['loss']:.4f}  {parts}  lr {lr:.2e}  "
            f"{seconds * 1000:.0f} ms  data {waited / seconds:.0%}  {examples / seconds:.2f} examples/s  "
            f"eta {int(rest // 60)}:{int(rest % 60):02d}"
        )

    def _write(self, values: dict[str, object]) -> None:
        # A line at a time and flushed: a killed run keeps all that it said.
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
        sys.stdout.flush()


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
