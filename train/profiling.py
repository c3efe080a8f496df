"""A trace and a memory snapshot of a few steps, for `--profile`."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

__all__ = ["Profiler"]

WAIT, WARM_UP, ACTIVE = 2, 1, 3  # steps
TOP = 40


class Profiler:
    """Torch's profiler over steps 4 to 6 of a start; does nothing when it is not asked for.

    Writes, into `profile/` of the run's folder: `trace-rank<r>.json` for chrome://tracing or Perfetto;
    `memory-rank<r>.json`, the operators that allocate most; on a GPU also `memory-rank<r>.pickle` for https://pytorch.org/memory_viz.
    """

    def __init__(self, asked: bool, run: Path, rank: int) -> None:
        self._folder, self._rank = run / "profile", rank
        self._profiler: Any = None
        if not asked:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._gpu = torch.cuda.is_available()
        activities = [torch.profiler.ProfilerActivity.CPU]
        if self._gpu:
            activities.append(torch.profiler.ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history()
        self._profiler = torch.profiler.profile(
            activities=activities,
            schedule=torch.profiler.schedule(wait=WAIT, warmup=WARM_UP, active=ACTIVE, repeat=1),
            on_trace_ready=self._write,
            profile_memory=True,
            record_shapes=True,
        )

    def step(self) -> None:
        """After every step."""
        if self._profiler is not None:
            self._profiler.step()

    def _write(self, profiler: Any) -> None:
        profiler.export_chrome_trace(str(self._folder / f"trace-rank{self._rank}.json"))
        rows = sorted(profiler.key_averages(), key=lambda row: -row.self_cpu_memory_usage)
        table = [
            {
                "operator": row.key,
                "calls": row.count,
                "bytes": row.self_cpu_memory_usage,
                "device_bytes": row.self_device_memory_usage,
                "cpu_ms": row.self_cpu_time_total / 1000,
            }
            for row in rows[:TOP]
        ]
        name = f"memory-rank{self._rank}"
        (self._folder / f"{name}.json").write_text(json.dumps(table, indent=1) + "\n")
        if self._gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / f"{name}.pickle"))

    def __enter__(self) -> Profiler:
        if self._profiler is not None:
            self._profiler.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._profiler is not None:
            self._profiler.__exit__(kind, error, trace)
