"""What a run tells: a line on the terminal, a JSON line a step and rank on disk, and the tracker on rank 0."""

from __future__ import annotations

import json
import os
import resource
import socket
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Protocol

from train.config import TrainConfig
from train.endings import RunOver, SharedFailure

__all__ = ["RunLog", "Speed", "Tracker", "losses", "node_metrics"]


class Tracker(Protocol):
    """Where rank 0 sends its numbers; MLflow in practice."""

    run_id: str

    def log_metrics(self, metrics: dict[str, float], step: int) -> None:
        """Numbers of one step."""
        ...

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """A file."""
        ...

    def end(self, status: str, reason: str) -> None:
        """The run's last status, from whatever thread."""
        ...


@dataclass(frozen=True)
class Speed:
    """What the arithmetic of a step is compared with.

    Attributes:
        flops: of one example, forward and backward; 0 where nobody asks (only rank 0 tells).
        peak: of all ranks together, a second.
    """

    flops: float = 0.0
    peak: float = 0.0


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
        self._speed = Speed()
        self._began = time.perf_counter()

    @property
    def tracking_run(self) -> str | None:
        """MLflow's id of the run, where it is tracked."""
        return self.tracker.run_id if self.tracker else None

    def start(self, config: TrainConfig, *, resumed_at: int, speed: Speed) -> None:
        """Told once, before the first step."""
        self._steps, self._first, self._every = config.steps, resumed_at, config.log_every
        self._speed = speed
        self._began = time.perf_counter()
        self._write({"event": "start", "at_step": resumed_at, "recipe": config.recipe, **asdict(speed)})

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
        self, step: int, means: dict[str, float], lr: float, seconds: float, waited: float, examples: int
    ) -> None:
        """One optimiser step: a JSON line of every rank, a line on the terminal now and then.

        Args:
            step: steps taken so far, this one included.
            means: loss and parts, averaged over the ranks, and the gradient's norm.
            lr: learning rate of the step.
            seconds: wall time of the step on this rank.
            waited: seconds of it that this rank waited for data.
            examples: examples of the step over all ranks.
        """
        rest = (time.perf_counter() - self._began) / (step - self._first) * (self._steps - step)
        numbers = {
            **means,
            "lr": lr,
            "step_seconds": seconds,
            "data_wait_seconds": waited,
            "data_wait_percent": 100 * waited / seconds,
            "examples_per_second": examples / seconds,
            "memory_gib": memory_gib(),
        }
        if self._speed.flops:
            rate = self._speed.flops * examples / seconds
            numbers |= {"tflops": rate / 1e12, "percent_of_peak": 100 * rate / self._speed.peak}
        self._write({"step": step, "percent": 100 * step / self._steps, **numbers, "eta_seconds": rest})
        if self.rank != 0:
            return
        if self.tracker is not None:
            self.tracker.log_metrics({f"train/{name}": value for name, value in numbers.items()}, step)
        if step % self._every == 0 or step in (self._first + 1, self._steps):
            self.say(self._line(step, means, numbers, rest))

    def _line(self, step: int, means: dict[str, float], numbers: dict[str, float], rest: float) -> str:
        parts = "  ".join(f"{name} {value:.4g}" for name, value in means.items() if name != "loss")
        speed = (
            f"{numbers['tflops']:.3g} TFLOP/s ({numbers['percent_of_peak']:.0f}% of peak)  "
            if "tflops" in numbers
            else ""
        )
        return (
            f"step {step:>6}/{self._steps}  {step / self._steps:4.0%}  loss {means['loss']:.4f}  {parts}  "
            f"lr {numbers['lr']:.2e}  {numbers['step_seconds'] * 1000:.0f} ms  "
            f"data {numbers['data_wait_percent']:.0f}%  {numbers['examples_per_second']:.2f} examples/s  "
            f"{speed}{numbers['memory_gib']:.2f} GiB  eta {int(rest // 60)}:{int(rest % 60):02d}"
        )

    def validation(
        self, step: int, means: dict[str, float], protocol: str, seconds: float, pictures: list[Path]
    ) -> None:
        """The evaluation of a step.

        Args:
            step: steps taken so far.
            means: over the people, by metric.
            protocol: its id.
            seconds: what it took.
            pictures: prediction beside target, a file a person.
        """
        self.event("validation", at_step=step, protocol=protocol, seconds=seconds, **means)
        if self.rank != 0:
            return
        told = "  ".join(f"{name} {value:.4g}" for name, value in means.items())
        self.say(f"step {step}: validation {protocol}  {told}  ({seconds:.0f} s)")
        if self.tracker is not None:
            self.tracker.log_metrics({f"validation/{name}": value for name, value in means.items()}, step)
            for picture in pictures:
                self.tracker.log_artifact(picture, f"validation/step-{step:08d}/{picture.parent.name}")

    def nodes(self, step: int, reports: list[dict[str, float | str]]) -> None:
        """What each node is busy with, for rank 0's tracker."""
        if self.tracker is not None:
            for report in reports:
                node = str(report["node"])
                values = {f"system/{node}/{k}": v for k, v in report.items() if isinstance(v, float)}
                self.tracker.log_metrics(values, step)

    def _write(self, values: dict[str, object]) -> None:
        # A line at a time and flushed: a killed run keeps all that it said.
        self._file.write(json.dumps(values) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Ends the file."""
        self._file.close()
        sys.stdout.flush()


def memory_gib() -> float:
    """Most memory that this process has held so far: of its GPU where it has one, else of the host."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux tells KiB


def node_metrics() -> dict[str, float | str]:
    """What this host is busy with since the last call: processor, memory, network, and the GPU's memory."""
    import psutil
    import torch

    sent = psutil.net_io_counters()
    values: dict[str, float | str] = {
        "node": socket.gethostname(),
        "cpu_percent": float(psutil.cpu_percent()),
        "memory_percent": float(psutil.virtual_memory().percent),
        "network_sent_gib": sent.bytes_sent / 2**30,
        "network_received_gib": sent.bytes_recv / 2**30,
    }
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info()
        values["gpu_memory_percent"] = 100 * (1 - free / total)
    return values


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
