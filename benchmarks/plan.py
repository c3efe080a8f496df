"""The capacity plan against real steps: memory by what it is for, arithmetic, and the time of the shard plan.

Run: `python benchmarks/plan.py [--out FOLDER]`, a minute or two. One rank under DeepSpeed for ZeRO 0, 1 and 2, each in
a process of its own. Bytes are of tensors (`launch.footprint.LiveBytes`); the process's own peak is told beside them.
Where a CUDA device is there, its allocator's peak is told as well.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from record import arguments, write

ROOT = Path(__file__).resolve().parent.parent
# ZeRO 3 is left out: the meters look at parameters while DeepSpeed has them spread.
CASES = [("avat3r-tiny", "fp32", stage) for stage in range(3)] + [("avat3r-tiny", "bf16", 1)]


def status(field: str) -> float:
    """MiB of this process, out of /proc."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(field + ":")[1].split()[0]) / 1024


def measure(recipe: str, precision: str, stage: int, shards: Path) -> dict[str, object]:
    """Plan and measurement of one rank's steps."""
    import deepspeed
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from launch.footprint import LiveBytes
    from launch.plan import measure_need, state_bytes, total_bytes
    from launch.recipes import find_recipe
    from shards import BatchLoader
    from train.deepspeed_config import deepspeed_json
    from train.start import single_process_environment
    from train.tasks import task_for

    config = replace(find_recipe(recipe), precision=precision, zero_stage=stage)
    need = measure_need(config)
    # A bucket just large enough: what it takes is DeepSpeed's choice and no question to a measurement.
    settings = deepspeed_json(config, 1)
    settings["zero_optimization"]["reduce_bucket_size"] = need.parameters
    planned = state_bytes(need.parameters, precision, stage, 1, bucket=need.parameters)
    single_process_environment()
    deepspeed.init_distributed(dist_backend="nccl" if torch.cuda.is_available() else "gloo", verbose=False)
    batches = iter(
        BatchLoader(
            shards, "train", seed=0, micro_batch=1, world_size=1, rank=0, start=0, views=config.data.views
        )
    )
    before = status("VmRSS")
    meter = LiveBytes()
    with meter:
        module = task_for(config).build()
        engine, *_ = deepspeed.initialize(
            model=module, model_parameters=list(module.parameters()), config=settings
        )
    for step in range(3):
        batch = {
            k: v.to(engine.device) if isinstance(v, torch.Tensor) else v for k, v in next(batches).items()
        }
        with meter, FlopCounterMode(display=False) as counter:
            if step == 2:
                meter.peak = meter.alive
            loss, _ = engine(batch | {"progress": 0.0})
            engine.backward(loss)
            del loss
            engine.step()
    total = total_bytes(planned, need.activations)
    found: dict[str, object] = {
        "recipe": recipe,
        "precision": precision,
        "zero_stage": stage,
        "planned_bytes": round(total),
        "measured_bytes": meter.peak,
        "planned_to_measured_bytes": round(total / meter.peak, 3),
        "planned_flops": need.flops,
        "measured_flops": counter.get_total_flops(),
        "planned_to_measured_flops": round(need.flops / counter.get_total_flops(), 3),
        "process_mib_above_imports": round(status("VmHWM") - before, 1),
    }
    if torch.cuda.is_available():
        found["cuda_peak_bytes"] = torch.cuda.max_memory_allocated()
    return found


def main() -> None:
    if len(sys.argv) == 6 and sys.argv[1] == "--one":
        print("RESULT " + json.dumps(measure(sys.argv[2], sys.argv[3], int(sys.argv[4]), Path(sys.argv[5]))))
        return
    options = arguments(str(__doc__)).parse_args()
    from launch.plan import plan_seconds
    from launch.training import rank_environment

    sys.path.insert(0, str(ROOT / "tests"))
    from tiny_captures import pack_tiny

    with tempfile.TemporaryDirectory() as folder:
        shards = pack_tiny(Path(folder) / "tiny", subjects=2, timesteps=6, views=12)
        rows = []
        for recipe, precision, stage in CASES:
            words = [sys.executable, __file__, "--one", recipe, precision, str(stage), str(shards)]
            ran = subprocess.run(words, capture_output=True, text=True, env=rank_environment(), cwd=ROOT)
            if ran.returncode:
                raise SystemExit(ran.stderr[-3000:])
            rows.append(json.loads(ran.stdout.split("RESULT ")[1]))
            print(json.dumps(rows[-1]), flush=True)
    timed = {nodes: plan_seconds(8 * nodes) for nodes in (1, 8, 64, 512)}
    results = {
        "what": "capacity plan against measurement",
        "steps": rows,
        "shard_plan_seconds": {
            str(8 * n): {"start": round(a, 4), "example": round(b, 7)} for n, (a, b) in timed.items()
        },
    }
    write("plan", results, ("torch", "deepspeed"), options.out)


if __name__ == "__main__":
    main()
