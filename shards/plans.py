"""Which training example comes when: a pure function of the manifest and a few integers.

The examples of all epochs form one endless sequence. Micro-batch `m` of all ranks together is the next
`world_size * micro_batch` of it, and every rank takes its own stretch of that, so

- the global order is the same at any world size, and every rank has the same number of batches for ever;
- a run may start at any step, because any place of the sequence is computed directly;
- an epoch is covered exactly. Where it does not end with a batch, the batch goes on with the next epoch.

Within an epoch, the shards are put in random order and the examples, one a target timestep, are numbered
through them. That line is cut into `lanes` stretches of equal length (to one), and the sequence goes round
the lanes: each lane reads its shards from front to back, and neighbours in a batch come from different
shards and mostly different people. A rank reads few lanes when `world_size * micro_batch` divides the number
of lanes, but every number is right.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from avatars.errors import UserError
from shards.draws import Draws
from shards.manifest import Manifest, ShardInfo

__all__ = ["LANES", "Example", "Plan", "plan"]

LANES = 64


@dataclass(frozen=True)
class Example:
    """One training example.

    Attributes:
        position: its place in the endless sequence.
        epoch: which pass over the data it belongs to.
        shard: the shard, as a place in `Manifest.split(split)`.
        target: the target timestep, as a place in the shard.
        input_set: the input set of the shard; it does not contain the target timestep.
        views: which of the target's views to compare.
        lane: which of the stretches that are read side by side it comes from.
        others: further target timesteps of the same shard, compared in the same views; none of them is in the input
            set either.
    """

    position: int
    epoch: int
    shard: int
    target: int
    input_set: int
    views: tuple[int, ...]
    lane: int
    others: tuple[int, ...] = ()


class Plan:
    """The endless sequence of examples.

    Args:
        shards: the shards of one split.
        seed: of the order and all draws.
        views: target views of an example.
        lanes: how many stretches of an epoch are read side by side. Part of the order.
        expressions: target timesteps of an example. The first one is what an epoch counts; the others are drawn.

    Raises:
        UserError: there is no example, or a target has fewer views than asked for, or a shard too few timesteps.
    """

    def __init__(
        self,
        shards: Sequence[ShardInfo],
        *,
        seed: int,
        views: int = 8,
        lanes: int = LANES,
        expressions: int = 1,
    ) -> None:
        self.shards, self.seed, self.views, self.lanes = tuple(shards), seed, views, lanes
        self.expressions = expressions
        if min(lanes, views, expressions) < 1:
            raise UserError(
                f"A plan needs at least one lane, one view and one expression, not {lanes}, {views} and {expressions}."
            )
        for shard in self.shards:
            most = max((len(set(steps)) for steps in shard.inputs), default=0)
            if expressions > 1 and shard.targets - most < expressions:
                raise UserError(
                    f"{shard.path} has {shard.targets} timesteps, {most} of them in an input set, where {expressions}"
                    " more are asked for. Ask for fewer expressions an example, or pack larger shards."
                )
            if shard.views and min(shard.views) < views:
                raise UserError(
                    f"{shard.path} has a timestep with {min(shard.views)} views where {views} are asked for."
                    " Ask for fewer target views."
                )
        self._counts = np.array([shard.targets - len(shard.excluded) for shard in self.shards], np.int64)
        self.epoch_length = int(self._counts.sum())
        if self.epoch_length == 0:
            raise UserError(
                "These shards hold no training example: no target timestep is outside all input sets of its"
                " shard."
                " Pack captures with more timesteps."
            )
        self._starts = _lane_starts(self.epoch_length, lanes)
        # of the epoch asked for last: its shards in order, and how many examples are in them up to each
        # one's end
        self._latest: tuple[int, np.ndarray, np.ndarray] = (-1, np.empty(0, np.int64), np.empty(0, np.int64))

    def example(self, position: int) -> Example:
        """The example at a place of the sequence."""
        epoch, place = divmod(position, self.epoch_length)
        order, ends = self._epoch_order(epoch)
        line = self._starts[place % self.lanes] + place // self.lanes
        nth = int(np.searchsorted(ends, line, side="right"))
        index = int(order[nth])
        shard = self.shards[index]
        target = line - int(ends[nth] - self._counts[index])
        for left_out in shard.excluded:  # sorted, and few
            target += left_out <= target
        draws = Draws("example", self.seed, epoch, shard.path, target)
        sets = [j for j, steps in enumerate(shard.inputs) if target not in steps]
        input_set = draws.choice(sets)
        others: tuple[int, ...] = ()
        if self.expressions > 1:
            free = [t for t in range(shard.targets) if t != target and t not in shard.inputs[input_set]]
            others = tuple(free[i] for i in draws.sample(len(free), self.expressions - 1))
        seen = min(shard.views[t] for t in (target, *others))
        return Example(
            position=position,
            epoch=epoch,
            shard=index,
            target=target,
            input_set=input_set,
            views=tuple(draws.sample(seen, self.views)),
            lane=place % self.lanes,
            others=others,
        )

    def batch(self, step: int, *, micro_batch: int, world_size: int = 1, rank: int = 0) -> list[Example]:
        """The examples of one rank's micro-batch number `step`, counted from the beginning of training."""
        if micro_batch < 1 or not 0 <= rank < world_size or step < 0:
            raise ValueError(f"no micro-batch {step} of {micro_batch} for rank {rank} of {world_size}")
        first = (step * world_size + rank) * micro_batch
        return [self.example(first + i) for i in range(micro_batch)]

    def _epoch_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        latest = self._latest
        if latest[0] != epoch:
            order = np.array(Draws("epoch", self.seed, epoch).permutation(len(self.shards)), np.int64)
            self._latest = latest = (epoch, order, np.cumsum(self._counts[order]))  # at once: threads may ask
        return latest[1], latest[2]


def _lane_starts(length: int, lanes: int) -> list[int]:
    """Where each lane's stretch of a line of `length` examples starts.

    Lanes that follow each other in the sequence lie far apart on the line (a step of about the golden
    section), so that a batch mixes people even where one shard is longer than a lane.
    """
    step = next(s for s in range(round(lanes * 0.618), 2 * lanes + 1) if s > 0 and math.gcd(s, lanes) == 1)
    starts, start = [0] * lanes, 0
    for lane in sorted(range(lanes), key=lambda lane: lane * step % lanes):
        starts[lane] = start
        start += length // lanes + (lane < length % lanes)  # the first lanes have one more
    return starts


def plan(
    manifest: Manifest,
    split: str,
    *,
    seed: int,
    step: int,
    micro_batch: int,
    epoch: int = 0,
    world_size: int = 1,
    rank: int = 0,
    views: int = 8,
    lanes: int = LANES,
) -> list[Example]:
    """The examples of one rank's micro-batch: a pure function of its arguments.

    Args:
        manifest: of the shards.
        split: "train" or "heldout".
        seed: of the order and all draws.
        step: number of the micro-batch, counted from the beginning of `epoch`; may be larger than an epoch.
        micro_batch: examples in it.
        epoch: the pass to count from. 0 is the beginning of training.
        world_size: number of ranks.
        rank: of these.
        views: target views of an example.
        lanes: stretches of an epoch that are read side by side; part of the order.

    Returns:
        `micro_batch` examples. Input sets never contain their target timestep.
    """
    whole = Plan(manifest.split(split), seed=seed, views=views, lanes=lanes)
    first = epoch * whole.epoch_length + (step * world_size + rank) * micro_batch
    return [whole.example(first + i) for i in range(micro_batch)]
