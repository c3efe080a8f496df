"""What each part of Avat3r is worth at the scale of `avat3r-cpu`: every ablation recipe trained alike and compared.

    python benchmarks/ablations.py [--out FOLDER] [--work work/ablations] [--steps 300] [--seeds 2]

All recipes see the same synthetic people in the same order, start from the same seed, take the same number of steps by
the real trainer (one rank, one thread), and are measured on people, expressions and cameras that none has seen, from
input pictures of different timesteps, with every input set in turn. The position maps are the true depth and the
features are places on the tracked head (`headsplat priors --features surface`): better than DUSt3R's, other than
Sapiens'. The table therefore says what a part is worth in this code and on these data, not what the paper measured.

A command that was stopped goes on where it was: captures, shards, each training's checkpoints and each run's result are
kept in --work. The result file is written anew after every run.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from record import arguments, write

from avatars.avat3r import Avat3rMethod
from eval.evaluate import measure_subject
from eval.meter import Meter
from eval.metrics import AKD_MTCNN, PSNR, PSNR_MASKED, SSIM
from eval.protocol import Protocol, data_hash
from launch.cli import main as headsplat
from launch.recipes.avat3r import ABLATIONS
from shards import ShardSet, open_shards, pack, read_capture
from shards.synth import synthesize

PEOPLE, HELDOUT, TIMESTEPS, CAMERAS, SIZE, INPUT_SETS = 16, 4, 6, 40, 128, 4
METRICS = (PSNR, PSNR_MASKED, SSIM, AKD_MTCNN)
FULL, PREFIX = "avat3r-cpu-full", "avat3r-cpu"
ROWS = (FULL, *(f"{PREFIX}-{row}" for row in ABLATIONS))


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        recipe: its recipe.
        seed: of the weights and of the order of examples.
        folder: of the run.
    """

    recipe: str
    seed: int
    folder: Path


def make_shards(work: Path) -> dict[str, Path]:
    """Shards with both priors, by the timesteps of their input sets; made where they are not there yet."""
    made = {}
    for timesteps in ("different", "same"):
        bare, out = work / f"{timesteps}-bare", work / timesteps
        made[timesteps] = out
        if (out / "manifest.json").is_file():
            continue
        if not (bare / "manifest.json").is_file():
            captures = synthesize(
                work / "captures", subjects=PEOPLE, timesteps=TIMESTEPS, views=CAMERAS, size=SIZE
            )
            pack(
                [read_capture(path) for path in captures],
                bare,
                size=SIZE,
                heldout=sorted(path.name for path in captures)[-HELDOUT:],
                input_sets=INPUT_SETS,
                input_timesteps=timesteps,  # type: ignore[arg-type]
            )
        if headsplat(["priors", str(bare), "--out", str(out), "--features", "surface"]):
            raise SystemExit(f"the features of {bare} could not be made")
        shutil.rmtree(bare)
    return made


def train(run: Run, data: Path, steps: int) -> float:
    """Trains in a process of its own, from the last checkpoint; processor seconds of what was done now."""
    words = ["train", run.recipe, "--data", str(data), "--run", str(run.folder), "--steps", str(steps)]
    words += ["--seed", str(run.seed), "--data.seed", str(run.seed), "--log-every", "50"]
    before = os.times()
    subprocess.run(
        [sys.executable, "-m", "launch.cli", *words], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def protocols(shards: ShardSet) -> Iterator[Protocol]:
    """The same measurement from each input set."""
    for number in range(INPUT_SETS):
        yield Protocol(
            name="ablations",
            split=shards.split,
            subjects=tuple(shards.subjects),
            data=data_hash(shards),
            size=(SIZE, SIZE),
            input_set=number,
            metrics=METRICS,
        )


def measure(folder: Path, data: Path) -> list[dict[str, Any]]:
    """One entry a picture: whose, of which input set, timestep and camera, with every metric or None."""
    method, shards = Avat3rMethod.load(folder), open_shards(data, "heldout")
    found = []
    for protocol in protocols(shards):
        meter = Meter(protocol.metrics, "cpu")
        for subject in protocol.subjects:
            measured = measure_subject("avat3r", method.create, shards, subject, protocol, meter)
            keep = ("timestep", "camera", *(metric.key for metric in METRICS))
            found += [
                {"subject": subject, "set": protocol.input_set} | {key: picture.get(key) for key in keep}
                for picture in measured.pictures
            ]
    return found


def result_of(run: Run, shards: dict[str, Path], steps: int) -> dict[str, Any]:
    """A run's pictures and cost, trained and measured where that has not been done."""
    path = run.folder / "result.json"
    if path.is_file():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    same = run.recipe.endswith("no-random-timesteps")
    started = time.perf_counter()
    cpu = train(run, shards["same" if same else "different"], steps)
    seconds = time.perf_counter() - started
    result = {
        "train_cpu_seconds": round(cpu, 1),
        "train_seconds": round(seconds, 1),
        "pictures": measure(run.folder / "export", shards["different"]),
    }
    if run.recipe == FULL:
        result["untrained"] = measure(run.folder / "initial", shards["different"])
    path.write_text(json.dumps(result))
    return result


def mean_of(pictures: list[dict[str, Any]], key: str) -> float:
    """Mean of a metric over the pictures."""
    return statistics.fmean(picture[key] for picture in pictures)


def by_person(pictures: list[dict[str, Any]], key: str) -> dict[str, float]:
    """Mean of a metric over each person's pictures."""
    people = sorted({picture["subject"] for picture in pictures})
    return {name: mean_of([p for p in pictures if p["subject"] == name], key) for name in people}


def compared(pictures: list[dict[str, Any]], whole: list[dict[str, Any]]) -> dict[str, float]:
    """One training's numbers, and their differences to those of the whole on the same pictures."""
    values = {metric.key: mean_of(pictures, metric.key) for metric in METRICS[:3]}
    values["psnr_minus_full"] = values[PSNR.key] - mean_of(whole, PSNR.key)
    own, full = by_person(pictures, PSNR.key), by_person(whole, PSNR.key)
    values["people_better_with_full"] = sum(own[name] < full[name] for name in own)
    # A picture in which no face was found has no AKD: only those that have one in both are compared.
    found = [picture[AKD_MTCNN.key] is not None for picture in pictures]
    pairs = [
        (one[AKD_MTCNN.key], other[AKD_MTCNN.key])
        for one, other in zip(pictures, whole, strict=True)
        if one[AKD_MTCNN.key] is not None and other[AKD_MTCNN.key] is not None
    ]
    values["faces_found"] = sum(found)
    if pairs:
        values["akd_pairs"] = len(pairs)
        values["akd_minus_full"] = statistics.fmean(one - other for one, other in pairs)
    return values


def table(found: dict[int, dict[str, dict[str, Any]]]) -> list[dict[str, Any]]:
    """A line a recipe: means over the seeds that all recipes have, and what is gained or lost against the whole.

    Args:
        found: results by seed and recipe.
    """
    lines = []
    for recipe in ("untrained", *ROWS):
        per_seed = [
            compared(
                rows[FULL]["untrained"] if recipe == "untrained" else rows[recipe]["pictures"],
                rows[FULL]["pictures"],
            )
            for rows in found.values()
        ]
        line: dict[str, Any] = {"recipe": recipe}
        for key in per_seed[0]:
            values = [round(one[key], 4) for one in per_seed if key in one]
            line |= {key: round(statistics.fmean(values), 4), f"{key}_per_seed": values}
        if recipe != "untrained":
            line["train_cpu_seconds"] = [rows[recipe]["train_cpu_seconds"] for rows in found.values()]
        lines.append(line)
    return lines


def markdown(lines: list[dict[str, Any]]) -> str:
    """The table as docs/avat3r.md has it; with several seeds a cell is their mean and, in brackets, each of them."""
    shown = {
        "PSNR [dB]": (PSNR.key, 2),
        "less the whole [dB]": ("psnr_minus_full", 2),
        "PSNR in the mask [dB]": (PSNR_MASKED.key, 2),
        "SSIM": (SSIM.key, 3),
        "faces found": ("faces_found", 0),
        "AKD-5 less the whole's [px]": ("akd_minus_full", 2),
        "of pairs": ("akd_pairs", 0),
        "people better with the whole": ("people_better_with_full", 0),
    }
    rows = ["| recipe | " + " | ".join(shown) + " |", "| --- |" + " --: |" * len(shown)]
    for line in lines:
        cells = []
        for key, digits in shown.values():
            seeds = line.get(f"{key}_per_seed", [])
            each = f" ({', '.join(f'{value:.{digits}f}' for value in seeds)})" if len(seeds) > 1 else ""
            cells.append(f"{line[key]:.{digits}f}{each}" if key in line else "")
        rows.append(f"| `{line['recipe']}` | " + " | ".join(cells) + " |")
    return "\n".join(rows)


def main() -> None:
    """Trains and measures what is missing, seed by seed, and writes the table of the seeds that are whole."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--work", type=Path, default=Path("work/ablations"), help="folder of data and runs")
    parser.add_argument("--steps", type=int, default=300, help="training steps of each run")
    parser.add_argument("--seeds", type=int, default=2, help="trainings of each recipe")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards = make_shards(options.work)
    found: dict[int, dict[str, dict[str, Any]]] = {}
    for seed in range(options.seeds):
        rows = {}
        for recipe in ROWS:
            folder = options.work / f"steps-{options.steps}" / f"{recipe}-seed{seed}"
            rows[recipe] = result_of(Run(recipe, seed, folder), shards, options.steps)
            psnr = mean_of(rows[recipe]["pictures"], PSNR.key)
            print(f"{recipe} seed {seed}: PSNR {psnr:.3f} dB", flush=True)
        found[seed] = rows
        pictures = rows[FULL]["pictures"]
        content: dict[str, Any] = {
            "what": "Avat3r's ablations at the scale of avat3r-cpu, on synthetic held-out people",
            "steps": options.steps,
            "seeds": list(found),
            "people": {"train": PEOPLE - HELDOUT, "heldout": HELDOUT},
            "pictures_measured": len(pictures),
            "rows": table(found),
        }
        write("ablations", content, ("torch", "deepspeed"), options.out)
        print(markdown(content["rows"]), flush=True)


if __name__ == "__main__":
    main()
