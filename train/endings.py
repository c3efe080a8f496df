"""How a training ends before its last step."""

from __future__ import annotations

from avatars.errors import UserError

__all__ = ["Preempted", "RunOver", "SharedFailure"]


class SharedFailure(UserError):
    """What every rank has found out alike, so that rank 0 alone tells it."""


class RunOver(SharedFailure):
    """What the watch has found out (a dead rank, a hang): the first rank of every host tells it there."""


class Preempted(Exception):
    """The run was asked to stop, wrote a checkpoint and can be started again. All ranks raise it alike."""
