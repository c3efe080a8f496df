"""`headsplat plan`: what a training takes on given hardware, before anybody reserves it.

Counted, not guessed: parameters, arithmetic and activations come from the recipe's own network on torch's meta device;
the loss is metered on one picture. Assumed, and said so in the output: the share of the device's peak that is reached,
and the size of a picture where no shards are given. Published: the devices' and links' figures. The rasterizer's
arithmetic is not in the count, as it depends on the pictures.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from avatars.errors import UserError
from launch.options import parse

if TYPE_CHECKING:
    from train.config import TrainConfig

__all__ = [
    "DEVICES",
    "LINKS",
    "Device",
    "Need",
    "Plan",
    "make_plan",
    "measure_need",
    "plan",
    "plan_seconds",
    "state_bytes",
    "total_bytes",
]

GIB = 2**30
DAY = 86400.0

# Ava-256's 4 TB release as Avat3r trains on it (its section 4.1); only used where no shards are given.
PAPER_SUBJECTS, PAPER_TIMESTEPS, PAPER_VIEWS = 244, 5000, 80
ASSUMED_BITS_PER_PIXEL = 1.6  # JPEG of quality 95 of a head before black
# Mean 3, quaternion 4, scale 3, opacity 1, colour 3 and their gradients, float32; one for each input pixel at most.
GAUSSIAN_BYTES = 2 * 14 * 4
INPUT_PICTURES = 4
RENDERED_PLANES = 5  # colour, alpha and depth
DEEPSPEED_BUCKET = 500_000_000  # elements; ZeRO 1 and 2 allocate a whole bucket, however small the network is
OWN_SHARE = "gradients of the own share, at the end of a step"
RESERVE = 0.08  # share of a device's memory for its context, NCCL's buffers and fragmentation


@dataclass(frozen=True)
class Device:
    """Published figures of one device, without sparsity.

    Attributes:
        memory: bytes.
        bf16: floating point operations a second of matrix products in bf16.
        fp32: the same in float32 inputs (TF32 on NVIDIA), 0 where it is measured.
        inside: bytes a second to the other devices of its host, each direction.
        per_host: devices of a usual host.
        source: where the figures are published.
    """

    memory: float
    bf16: float
    fp32: float
    inside: float
    per_host: int
    source: str


DEVICES: dict[str, Device] = {
    "a100-40": Device(40 * GIB, 312e12, 156e12, 300e9, 8, "NVIDIA A100 data sheet"),
    "a100-80": Device(80 * GIB, 312e12, 156e12, 300e9, 8, "NVIDIA A100 data sheet"),
    "h100-80": Device(80 * GIB, 989e12, 494e12, 450e9, 8, "NVIDIA H100 SXM data sheet"),
    "h200": Device(141e9, 989e12, 494e12, 450e9, 8, "NVIDIA H200 data sheet"),
    "cpu": Device(0.0, 0.0, 0.0, 10e9, 2, "measured on this machine"),
}

# Bytes a second of one device to other hosts, each direction.
LINKS: dict[str, tuple[float, str]] = {
    "eth-10": (10e9 / 8 / 8, "10 Gbit/s Ethernet, shared by 8 devices"),
    "eth-100": (100e9 / 8 / 8, "100 Gbit/s Ethernet, shared by 8 devices"),
    "ib-200": (200e9 / 8, "200 Gbit/s InfiniBand (HDR), one card a device"),
    "ib-400": (400e9 / 8, "400 Gbit/s InfiniBand (NDR), one card a device"),
}


@dataclass(frozen=True)
class Need:
    """What one rank's example takes, whatever the hardware.

    Attributes:
        parameters: of the network.
        flops: forward and backward of one example with its loss, without what checkpointing computes again.
        flops_done: with it.
        network_saved: bytes that the network's forward keeps for its backward, with the recipe's checkpointing.
        network_peak: the most bytes at any moment of the network's forward and backward.
        loss_saved: bytes that the picture loss keeps, all views.
        loss_peak: the most bytes at any moment of it.
        rendered: bytes of Gaussians and rendered pictures.
        inputs: pictures that identify a person, read with every example.
        prior_bytes: bytes of the priors that come with them.
    """

    parameters: int
    flops: float
    flops_done: float
    network_saved: float
    network_peak: float
    loss_saved: float
    loss_peak: float
    rendered: float
    inputs: int
    prior_bytes: float

    @property
    def activations(self) -> float:
        """The most bytes alive at once in an example's forward and backward, beside weights and their gradients."""
        return self.rendered + max(self.network_saved + self.loss_peak, self.network_peak)


def measure_need(config: TrainConfig) -> Need:
    """Meters a recipe's network on the meta device and its loss on one real picture."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from launch.footprint import LiveBytes
    from train.flops import step_flops
    from train.losses import picture_loss
    from train.tasks import task_for

    task = task_for(config)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in task.build().parameters())
    with LiveBytes() as network:
        out = task.dry_pass(recompute=True)
        saved = network.alive
        out.backward()
    del out
    # The dry pass makes the weights itself and leaves gradients beside them; both are counted by ZeRO stage instead.
    weights = 4 * parameters
    narrow = 0.5 if config.precision == "bf16" else 1.0

    size, views = task.size, config.data.target_pictures
    prediction, target = torch.rand(1, 3, size, size).requires_grad_(), torch.rand(1, 3, size, size)
    with LiveBytes() as loss, FlopCounterMode(display=False) as counter:
        value, _ = picture_loss(prediction, target, config.loss)
        loss_saved = loss.alive
        value.backward()
    del value
    loss_flops = views * counter.get_total_flops()
    return Need(
        parameters=parameters,
        flops=step_flops(task) + loss_flops,
        flops_done=step_flops(task, recompute=True) + loss_flops,
        network_saved=narrow * (saved - weights),
        network_peak=narrow * max(network.peak - 2 * weights, saved - weights),
        loss_saved=float(views * loss_saved),
        loss_peak=float(views * loss.peak),
        inputs=INPUT_PICTURES if task.reads_inputs else 0,
        prior_bytes=2.0 * INPUT_PICTURES * task.prior_values if task.reads_inputs else 0.0,
        rendered=config.data.expressions * task.most_gaussians * GAUSSIAN_BYTES
        + 4.0 * views * RENDERED_PLANES * size * size,
    )


def state_bytes(
    parameters: int, precision: str, stage: int, ranks: int, bucket: int = DEEPSPEED_BUCKET
) -> dict[str, float]:
    """Bytes of weights, gradients and optimiser on one rank, as DeepSpeed spreads them (ZeRO, arXiv 1910.02054, 3).

    Args:
        parameters: of the network.
        precision: "bf16" or "fp32".
        stage: ZeRO stage; 1 spreads the optimiser, 2 gradients too, 3 weights too.
        ranks: how many share.
        bucket: elements of DeepSpeed's gradient bucket.
    """
    wide = 2 if precision == "bf16" else 4
    shared = ranks if stage >= 1 else 1
    keeps_copy = stage >= 1 or precision == "bf16"
    return {
        "weights": parameters * wide / (ranks if stage == 3 else 1),
        "gradients": parameters * wide / (ranks if stage >= 2 else 1),
        "optimiser": parameters * (8 + (4 if keeps_copy else 0)) / shared,
        OWN_SHARE: 4 * parameters / shared if keeps_copy else 0.0,
        "DeepSpeed's bucket": float(bucket * wide) if stage in (1, 2) else 0.0,
    }


def total_bytes(states: dict[str, float], activations: float) -> float:
    """The most bytes at once: the optimiser's copies of gradients are made when activations are gone.

    Args:
        states: what `state_bytes` returned.
        activations: bytes of them.
    """
    return sum(states.values()) - states[OWN_SHARE] + max(states[OWN_SHARE], activations)


def sent_bytes(parameters: int, precision: str, stage: int, ranks: int) -> float:
    """Bytes that each rank sends in a step, by ring algorithms: an all-reduce is a reduce-scatter and an all-gather.

    ZeRO 3 gathers the weights in the forward and again in the backward pass (arXiv 1910.02054, section 7).
    """
    wide = 2 if precision == "bf16" else 4
    passes = 3 if stage == 3 else 2
    return passes * parameters * wide * (ranks - 1) / ranks


@dataclass(frozen=True)
class Data:
    """How much is read and stored.

    Attributes:
        picture_bytes: of one packed target picture.
        stored: bytes of all shards without priors.
        priors: bytes of the priors of all input sets.
        known: whether it was read from shards, or assumed.
    """

    picture_bytes: float
    stored: float
    priors: float
    known: bool


def data_of(config: TrainConfig, shards: Path | None) -> Data:
    """From the manifest where shards are given, otherwise at the paper's amount of data."""
    from train.tasks import task_for

    task = task_for(config)
    size, prior_planes = task.size, task.prior_values
    if shards is not None:
        from shards import Manifest

        manifest = Manifest.load(shards)
        stored = float(sum(shard.bytes for shard in manifest.shards))
        pictures = sum(sum(shard.views) + len(shard.inputs) * INPUT_PICTURES for shard in manifest.shards)
        sets = sum(len(shard.inputs) for shard in manifest.shards)
        return Data(stored / max(pictures, 1), stored, 2.0 * sets * INPUT_PICTURES * prior_planes, True)
    from shards.manifest import PackSettings

    settings = PackSettings(size=size)
    picture = ASSUMED_BITS_PER_PIXEL / 8 * size * size
    per_subject = -(-PAPER_TIMESTEPS // settings.timesteps_per_shard)
    sets = PAPER_SUBJECTS * per_subject * settings.input_sets
    pictures = PAPER_SUBJECTS * PAPER_TIMESTEPS * PAPER_VIEWS + sets * INPUT_PICTURES
    return Data(picture, picture * pictures, 2.0 * sets * INPUT_PICTURES * prior_planes, False)


@dataclass(frozen=True)
class Plan:
    """What a recipe takes on some nodes. Seconds are of one optimiser step; bytes are of one rank unless said.

    Attributes:
        nodes: hosts.
        ranks: devices.
        need: of an example.
        memory: bytes by what they are for.
        memory_total: the most bytes at once.
        memory_by_stage: the same at ZeRO 0, 1, 2 and 3.
        memory_there: bytes of the device less the reserve.
        compute_seconds: the arithmetic at the assumed share of the peak.
        sent: bytes that each rank sends.
        send_seconds: their time on the slowest link between ranks, not hidden behind the arithmetic.
        pictures_per_second: that all ranks read.
        bytes_per_second: that all ranks read.
        examples_per_second: over all ranks.
        stored: bytes of all shards.
        priors: bytes of all priors.
        data_known: whether the data's amounts were read from shards.
        steps: of the recipe.
        days: of the recipe's steps.
        device_hours: days of all devices together.
        limit: what limits, in words.
        assumptions: what was assumed.
    """

    nodes: int
    ranks: int
    need: Need
    memory: dict[str, float]
    memory_by_stage: dict[str, float]
    memory_total: float
    memory_there: float
    compute_seconds: float
    sent: float
    send_seconds: float
    pictures_per_second: float
    bytes_per_second: float
    examples_per_second: float
    stored: float
    priors: float
    data_known: bool
    steps: int
    days: float
    device_hours: float
    limit: str
    assumptions: tuple[str, ...]

    @property
    def step_seconds(self) -> float:
        """Of one optimiser step."""
        return self.compute_seconds + self.send_seconds


def make_plan(
    config: TrainConfig,
    need: Need,
    data: Data,
    device: Device,
    link: tuple[float, str],
    nodes: int,
    per_node: int,
    share: float,
    store: float,
) -> Plan:
    """Pure arithmetic from what is needed and what there is; `store` is bytes a second that each host can read."""
    ranks = nodes * per_node
    examples = config.data.micro_batch * config.accumulate
    peak = device.bf16 if config.precision == "bf16" else device.fp32
    compute = examples * need.flops_done / (peak * share)
    sent = sent_bytes(need.parameters, config.precision, config.zero_stage, ranks)
    slowest = device.inside if nodes == 1 else min(device.inside, link[0])
    send = sent / slowest
    states = state_bytes(need.parameters, config.precision, config.zero_stage, ranks)
    activations = need.activations * config.data.micro_batch
    memory = states | {"activations": activations}
    by_stage = {
        f"ZeRO {stage}": total_bytes(
            state_bytes(need.parameters, config.precision, stage, ranks), activations
        )
        for stage in range(4)
    }
    there = device.memory * (1 - RESERVE)
    rate = examples * ranks / (compute + send)
    pictures = rate * (config.data.target_pictures + need.inputs)
    read = pictures * data.picture_bytes + rate * need.prior_bytes
    days = config.steps * (compute + send) / DAY
    total = total_bytes(states, activations)
    if device.memory and total > there:
        limit = f"memory: {total / GIB:.1f} GiB a device and {there / GIB:.1f} GiB are usable"
    elif read > store * nodes:
        limit = f"reading: {amount(read / nodes)}/s a host, and --store-gb is {store / 1e9:g}"
    elif send > compute:
        limit = f"communication: {send / (compute + send):.0%} of a step"
    else:
        limit = f"arithmetic: {compute / (compute + send):.0%} of a step"
    assumptions = [f"{share:.0%} of the device's peak is reached ({device.source})"]
    if nodes > 1:
        assumptions.append(f"hosts are linked by {link[1]}, and sending is not hidden behind computing")
    if not data.known:
        assumptions.append(
            f"data: {PAPER_SUBJECTS} people x {PAPER_TIMESTEPS} timesteps x {PAPER_VIEWS} views, "
            f"{ASSUMED_BITS_PER_PIXEL} bits a pixel"
        )
    assumptions.append("the rasterizer's arithmetic is not counted")
    return Plan(
        nodes=nodes,
        ranks=ranks,
        need=need,
        memory=memory,
        memory_by_stage=by_stage,
        memory_total=total,
        memory_there=there,
        compute_seconds=compute,
        sent=sent,
        send_seconds=send,
        pictures_per_second=pictures,
        bytes_per_second=read,
        examples_per_second=rate,
        stored=data.stored,
        priors=data.priors,
        data_known=data.known,
        steps=config.steps,
        days=days,
        device_hours=days * 24 * ranks,
        limit=limit,
        assumptions=tuple(assumptions),
    )


def plan_seconds(
    world_size: int, subjects: int = PAPER_SUBJECTS, timesteps: int = PAPER_TIMESTEPS
) -> tuple[float, float]:
    """Times the shard plan of one rank on a made-up manifest of the paper's size.

    Returns:
        Seconds to set it up, and seconds of one example at a step a million micro-batches in.
    """
    from shards.manifest import PackSettings, ShardInfo
    from shards.plans import Plan as ShardPlan

    settings = PackSettings(size=512)
    shards = []
    for subject in range(subjects):
        for first in range(0, timesteps, settings.timesteps_per_shard):
            count = min(settings.timesteps_per_shard, timesteps - first)
            shards.append(
                ShardInfo(
                    path=f"s{subject:03d}-{first:05d}.tar",
                    subject=f"s{subject:03d}",
                    bytes=0,
                    sha256="",
                    index=(0, 0),
                    views=(PAPER_VIEWS,) * count,
                    inputs=tuple(tuple(range(4 * j, 4 * j + 4)) for j in range(settings.input_sets)),
                )
            )
    started = time.perf_counter()
    made = ShardPlan(shards, seed=0)
    made.batch(10**6, micro_batch=1, world_size=world_size, rank=world_size - 1)
    ready = time.perf_counter()
    rounds = 50
    for step in range(rounds):
        made.batch(10**6 + step, micro_batch=1, world_size=world_size, rank=world_size - 1)
    return ready - started, (time.perf_counter() - ready) / rounds


@dataclass(frozen=True)
class PlanOptions:
    """Tells memory, time, bandwidth, storage and cost of a training, without a GPU."""

    recipe: Annotated[str, tyro.conf.Positional]
    """Name of the recipe."""
    nodes: str = "1"
    """Number of hosts; several, as 1,8,64,512, draw a scaling curve."""
    device: Literal["a100-40", "a100-80", "h100-80", "h200", "cpu"] = "a100-80"
    """What every rank has."""
    link: Literal["eth-10", "eth-100", "ib-200", "ib-400"] = "ib-200"
    """What joins the hosts."""
    per_node: int | None = None
    """Devices of a host; the usual number of the device by default."""
    share: float = 0.35
    """Share of the device's peak that a training reaches; an assumption until it is measured."""
    store_gb: float = 5.0
    """Gigabytes a second that each host can read from where the shards are; an assumption."""
    data: Path | None = None
    """Folder of packed shards; without it the paper's amount of data is assumed."""
    args: str = ""
    """Overrides of the recipe, as one string: "--zero-stage 2 --data.micro-batch 4"."""
    chart: Path | None = None
    """Also draw the scaling curve into this PNG file."""
    json: bool = False
    """Print JSON instead of tables."""


def plan(words: list[str]) -> int:
    """`headsplat plan RECIPE --nodes 8 --device a100-80`."""
    import shlex

    import torch

    from launch.recipes import find_recipe
    from launch.training import TrainOptions
    from train.flops import measured_peak

    options = parse(PlanOptions, words, "plan")
    counts = node_counts(options.nodes)
    if not 0 < options.share <= 1:
        raise UserError(f"--share is {options.share} and must be more than 0 and at most 1.")
    given = TrainOptions(config=find_recipe(options.recipe), data=Path(), run=Path())
    config = parse(TrainOptions, shlex.split(options.args), f"train {options.recipe}", given).config
    device = DEVICES[options.device]
    if options.device == "cpu":
        device = replace(
            device,
            bf16=measured_peak("cpu", torch.bfloat16),
            fp32=measured_peak("cpu", torch.float32),
            memory=host_memory() / (options.per_node or device.per_host),
        )
    per_node = options.per_node or device.per_host
    need, data = measure_need(config), data_of(config, options.data)
    plans = [
        make_plan(
            config,
            need,
            data,
            device,
            LINKS[options.link],
            nodes,
            per_node,
            options.share,
            options.store_gb * 1e9,
        )
        for nodes in counts
    ]
    timings = [plan_seconds(p.ranks) for p in plans]
    if options.json:
        print(
            json.dumps(
                [asdict(p) | {"shard_plan_seconds": t} for p, t in zip(plans, timings, strict=True)], indent=1
            )
        )
    else:
        title = f"{options.recipe} on {options.device}, {per_node} a host, ZeRO {config.zero_stage}, {config.precision}"
        show(plans, timings, title)
    if options.chart is not None:
        draw(plans, f"{options.recipe} on {options.device}", options.chart)
        if not options.json:
            print(f"Chart: {options.chart}")
    return 0


def node_counts(text: str) -> list[int]:
    """`1,8,64` as numbers.

    Raises:
        UserError: something else stands there.
    """
    try:
        counts = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise UserError(f"--nodes is {text!r}; it takes a number, or several: 1,8,64.") from error
    if min(counts) < 1:
        raise UserError(f"--nodes is {text!r}; every number of hosts must be at least 1.")
    return counts


def host_memory() -> float:
    """Bytes of this machine's memory."""
    import psutil

    return float(psutil.virtual_memory().total)


def amount(value: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e15, "PB"), (1e12, "TB"), (1e9, "GB"), (1e6, "MB")):
        if value >= unit:
            return f"{value / unit:.3g} {name}"
    return f"{value / 1e3:.3g} kB"


def length(seconds: float) -> str:
    """A time in words."""
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    if seconds < 120:
        return f"{seconds:.3g} s"
    return f"{seconds / 3600:.3g} h" if seconds < DAY else f"{seconds / DAY:.3g} days"


def show(plans: list[Plan], timings: list[tuple[float, float]], title: str) -> None:
    """The first plan in full, and a row each where there are several."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = Console(width=None if console.is_terminal else 120)
    first, need = plans[0], plans[0].need
    table = Table(
        "",
        "",
        title=f"{title}, {first.nodes} host{'s' if first.nodes > 1 else ''}",
        box=box.SIMPLE,
        show_header=False,
    )
    table.add_row("parameters", f"{need.parameters / 1e6:.4g} M")
    again = need.flops_done / need.flops - 1
    recomputed = f", {again:.0%} more for recomputed activations" if again > 0.005 else ""
    table.add_row("arithmetic", f"{need.flops / 1e9:.4g} GFLOP an example{recomputed}")
    for name, value in first.memory.items():
        if value:
            table.add_row(f"memory: {name}", amount(value))
    table.add_row("memory a device", f"{amount(first.memory_total)} of {amount(first.memory_there)} usable")
    table.add_row(
        "  by stage", ", ".join(f"{name} {amount(value)}" for name, value in first.memory_by_stage.items())
    )
    table.add_row("step", f"{length(first.compute_seconds)} computing, {length(first.send_seconds)} sending")
    table.add_row("sent by a rank", f"{amount(first.sent)} a step")
    table.add_row(
        "read by all", f"{first.pictures_per_second:.4g} pictures/s, {amount(first.bytes_per_second)}/s"
    )
    table.add_row("stored", f"shards {amount(first.stored)}, priors {amount(first.priors)}")
    table.add_row(
        f"{first.steps} steps", f"{length(first.days * DAY)}, {first.device_hours:.4g} device-hours"
    )
    table.add_row("what limits", first.limit)
    table.add_row("assumed", "\n".join(first.assumptions))
    console.print(table)
    if len(plans) == 1:
        return
    curve = Table(
        "hosts",
        "ranks",
        "examples/s",
        "of linear",
        "",
        "step",
        "days",
        "same examples",
        "shard plan",
        box=box.SIMPLE,
    )
    for p, (ready, each) in zip(plans, timings, strict=True):
        linear = p.examples_per_second / p.ranks / (first.examples_per_second / first.ranks)
        curve.add_row(
            str(p.nodes),
            str(p.ranks),
            f"{p.examples_per_second:.4g}",
            f"{linear:.0%}",
            "#" * max(round(10 * linear), 1),
            length(p.step_seconds),
            f"{p.days:.3g}",
            f"{p.days * first.ranks / p.ranks:.3g} days",
            f"{length(ready)} + {length(each)}",
        )
    console.print(curve)
    print(
        "days: of the recipe's steps. same examples: days until as many were seen as by the first row.\n"
        "shard plan: seconds until a rank knows where it is, and for each example, measured now on this machine."
    )


def draw(plans: list[Plan], title: str, path: Path) -> None:
    """Examples a second over hosts, beside the straight line.

    Raises:
        UserError: matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise UserError("--chart needs matplotlib: pip install matplotlib.") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    nodes = [p.nodes for p in plans]
    single = plans[0].examples_per_second / plans[0].nodes
    axes.loglog(nodes, [single * n for n in nodes], "--", color="grey", label="linear")
    axes.loglog(nodes, [p.examples_per_second for p in plans], "o-", label="planned")
    axes.set(xlabel="hosts", ylabel="examples a second", title=title)
    axes.set_xticks(nodes, [str(n) for n in nodes])
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
