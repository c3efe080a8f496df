"""Where the commands keep what they make: one folder, with one place for each kind of thing."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Workspace"]


@dataclass(frozen=True)
class Workspace:
    """A folder of captures, shards, runs, fits, results and the tracking store."""

    root: Path

    @property
    def captures(self) -> Path:
        """Demo captures, one folder a subject."""
        return self.root / "captures"

    @property
    def shards(self) -> Path:
        """Packed demo captures."""
        return self.root / "shards"

    def run(self, recipe: str) -> Path:
        """Checkpoints, logs and exports of one training."""
        return self.root / "runs" / recipe

    @property
    def fits(self) -> Path:
        """Fitted avatars: fits/METHOD/SUBJECT."""
        return self.root / "fits"

    @property
    def results(self) -> Path:
        """Result rows, contact sheets and the comparison page."""
        return self.root / "results"

    @property
    def tracking_uri(self) -> str:
        """MLflow's store: `MLFLOW_TRACKING_URI`, or SQLite in this folder."""
        return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{(self.root / 'mlflow.db').resolve()}"
