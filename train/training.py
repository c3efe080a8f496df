"""Everything that a training is made of, put together in the order in which it is needed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from eval.provenance import versions
from shards import BatchLoader, Manifest
from shards.stores import ShardCache, location
from train import checkpoint
from train.config import TrainConfig, accumulation
from train.deepspeed_config import deepspeed_json
from train.flops import measured_peak, step_flops
from train.guards import GradientGate, LossSpikes, Watch
from train.profiling import Profiler
from train.start import agreed_checkpoint, check_precision, first_micro_batch, shared, usable
from train.task import Task
from train.telemetry import RunLog, Speed
from train.validation import Validation
from train.weights import Ema, check_ema, whole_weights

__all__ = ["Training", "prepared"]


@dataclass
class Training:
    """What the loop works with.

    Attributes:
        first: number of the first step that is taken, from 0.
        accumulate: micro-batches of a step.
        batch: examples of a step over all ranks.
        gate: shut for examples that are left out; None where the policy is to stop.
        skips: steps that were left out.
        put_aside: shards whose quarantine has been told.
    """

    task: Task
    config: TrainConfig
    run: Path
    log: RunLog
    watch: Watch
    engine: Any
    ema: Ema | None
    checkpoints: checkpoint.Checkpoints
    loader: BatchLoader
    validation: Validation
    profiler: Profiler
    gate: GradientGate | None
    spikes: LossSpikes
    provenance: dict[str, Any]
    first: int
    accumulate: int
    batch: int
    skips: int = 0
    put_aside: int = 0

    def tell_put_aside(self, done: int) -> None:
        """Shards that this rank's loader has given up since the last step, into its log and to whoever watches."""
        known = list(self.loader.quarantined.items())
        for shard, reason in known[self.put_aside :]:
            self.log.event("shard put aside", at_step=done, shard=shard, reason=reason)
            self.log.say(
                f"step {done}: {shard} is put aside ({len(known)} of {self.config.data.tolerate}): {reason}"
            )
        self.put_aside = len(known)

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = rate * group["share"]

    def save(self, done: int, validated: dict[str, float]) -> None:
        """Starts a checkpoint after `done` steps."""
        self.watch.enter("copying a checkpoint", self.config.guard.checkpoint_seconds)
        meta = checkpoint.Meta(
            step=done,
            examples=done * self.batch,
            world_size=dist.get_world_size(),
            batch=self.batch,
            config=self.config.to_json(),
            data=self.provenance["data"],
            expression_kind=self.provenance["expression_kind"],
            versions=versions(),
            tracking_run=self.log.tracking_run,
            validation=validated,
        )
        self.checkpoints.begin(meta)

    def settle(self) -> None:
        """Makes what is being written valid; all ranks have told that they are done, or wait here."""
        self.watch.enter("writing a checkpoint", self.config.guard.checkpoint_seconds)
        self.log.say(f"wrote {self.checkpoints.settle().name}")

    def evaluated(self) -> dict[str, torch.Tensor]:
        """The weights that are validated and exported: the running mean where there is one. Collective."""
        return self.ema.whole() if self.ema else whole_weights(self.engine)

    def export(self, folder: Path, step: int) -> None:
        """Writes the network for `avatars` to load. Collective."""
        self.watch.enter("writing the network", self.config.guard.checkpoint_seconds)
        state = self.evaluated()
        if dist.get_rank() == 0:
            module = self.task.build()
            module.load_state_dict(state)
            self.task.export(module, folder, self.provenance | {"step": step})
        dist.barrier()


@contextmanager
def prepared(
    task: Task, config: TrainConfig, data: Path, run: Path, log: RunLog, watch: Watch
) -> Iterator[Training]:
    """Builds the network, the engine around it and its data, from the run's last checkpoint if there is one.

    Raises:
        SharedFailure: what every rank finds alike: shards or a checkpoint that do not fit, arithmetic that does not
            divide, missing weights, a device without the precision.
    """
    rank, world_size = dist.get_rank(), dist.get_world_size()
    manifest = usable(data, task)
    with shared():
        check_precision(config)
        check_ema(config)
        task.check_weights()
    torch.manual_seed(config.seed)
    module = task.build()
    provenance = describe(config, manifest)
    resumed = agreed_checkpoint(run, config, manifest.fingerprint)
    meta = resumed.meta if resumed else None
    with shared():
        moved = meta is not None and meta.world_size != world_size
        accumulate = accumulation(config, world_size, meta.batch if meta and moved else 0)
    at_once = config.data.micro_batch * world_size
    if resumed is None and rank == 0:
        task.export(module, run / "initial", provenance | {"step": 0})
    gate = GradientGate(module) if config.guard.nonfinite == "skip" else None
    engine = deepspeed_engine(
        module,
        task.parameter_groups(module),
        deepspeed_json(config, world_size, accumulate, universal=bool(resumed and resumed.universal)),
    )
    ema = Ema(engine, config.ema) if config.ema else None
    if resumed and meta:
        checkpoint.load(engine, resumed.folder, meta, ema)
        for remark in resumed.remarks:
            log.say(remark)
        if moved and accumulate != config.accumulate:
            log.say(f"the batch stays {meta.batch} examples: {accumulate} micro-batches a step")
        log.say(f"resuming {run} at step {meta.step} of {config.steps} from {resumed.folder.stem}")
    first = meta.step if meta else 0
    speed = measure_speed(task, config, engine)
    log.start(config, resumed_at=first, speed=speed)
    checkpoints = checkpoint.Checkpoints(engine, ema, run, config.checkpoint)
    with (
        BatchLoader(
            data,
            "train",
            seed=config.data.seed,
            micro_batch=config.data.micro_batch,
            world_size=world_size,
            rank=rank,
            start=first_micro_batch(meta, at_once),
            views=config.data.views,
            threads=config.data.threads,
            cache=shard_cache(config, data),
            tolerate=config.data.tolerate,
            inputs=task.reads_inputs,
            expressions=config.data.expressions,
        ) as loader,
        Profiler(config.profile, run, rank) as profiler,
    ):
        try:
            yield Training(
                task=task,
                config=config,
                run=run,
                log=log,
                watch=watch,
                engine=engine,
                ema=ema,
                checkpoints=checkpoints,
                loader=loader,
                validation=Validation(task, config, data, run, log),
                profiler=profiler,
                gate=gate,
                spikes=LossSpikes(config.guard.spike_factor),
                provenance=provenance,
                first=first,
                accumulate=accumulate,
                batch=accumulate * at_once,
            )
        finally:
            checkpoints.close()


def shard_cache(config: TrainConfig, data: Path) -> ShardCache | None:
    """Where this host keeps copies of shards that are behind a URL; None for shards in a folder."""
    if not config.data.cache or not isinstance(location(data), str):
        return None
    return ShardCache(config.data.cache, int(config.data.cache_gb * 1e9))


def describe(config: TrainConfig, manifest: Manifest) -> dict[str, Any]:
    """What an exported network is made from."""
    return {
        "recipe": config.recipe,
        "data": manifest.fingerprint,
        "expression_kind": manifest.expression_kind,
        "versions": versions(),
    }


def deepspeed_engine(
    module: nn.Module, groups: list[tuple[float, list[nn.Parameter]]], values: dict[str, Any]
) -> Any:
    """DeepSpeed around the network; each group of the optimiser keeps its share of the learning rate."""
    import deepspeed

    trained = [
        {"share": share, "params": [p for p in parameters if p.requires_grad]} for share, parameters in groups
    ]
    engine, *_ = deepspeed.initialize(model=module, model_parameters=trained, config=values)
    if values["zero_optimization"]["stage"] == 3:
        # ZeRO 3 fetches a module's own parameters again for the backward pass only where the module returns tensors;
        # the whole network does, whatever a part of it returns.
        for part in engine.module.modules():
            for parameter in (
                part.parameters(recurse=False) if next(part.children(), None) is not None else ()
            ):
                deepspeed.zero.register_external_parameter(engine.module, parameter)
    return engine


def measure_speed(task: Task, config: TrainConfig, engine: Any) -> Speed:
    """What an example costs, and what all ranks together could do at best, measured at once. Collective."""
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    peaks = torch.tensor(measured_peak(engine.device.type, dtype), dtype=torch.float64, device=engine.device)
    dist.all_reduce(peaks)
    return Speed(flops=step_flops(task) if dist.get_rank() == 0 else 0.0, peak=float(peaks))
