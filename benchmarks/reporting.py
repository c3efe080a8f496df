"""Evaluation in bulk, the report and the dashboard: two workers against one, 10,000 rows to a page, 1,000 runs listed.

    python benchmarks/reporting.py [--out FOLDER] [--part bulk|report|dashboard]      about four minutes on two cores

Bulk: an Avat3r network of the CPU recipe's size on synthetic people, a row a job, by one Ray worker and by two, beside
the same rows by one plain process and by two. What the machine's cores share (memory bandwidth, clock, other load) is
in both ratios, and what Ray and the driver cost is in their quotient. The dashboard needs Chromium, without which it is
left out.
"""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import arguments, write

from avatars.avat3r import Avat3r
from cluster.evaluate import evaluate_all, evaluate_one
from cluster.pool import Event, Job, run_jobs
from cluster.session import ray_session
from eval.checkpoints import Checkpoint, find_checkpoint
from eval.metrics import PSNR, PSNR_MASKED, SSIM, SSIM_MASKED
from eval.protocol import synthetic_heldout
from eval.report import write_report
from eval.rows import ROW_FILE, Row, read_rows, row_folder, write_row
from eval.runs import log_evaluation
from eval.tracking import dashboard_command, dashboard_pages
from launch.preflight import free_port
from launch.recipes import find_recipe
from shards import open_shards, pack, read_capture
from shards.synth import synthesize

PEOPLE = 6
ROUNDS = 2
SIZE = 128
METHODS, SUBJECTS = 10, 1000
RUNS = 1000
PICTURES = 32
"""Pictures a row is about, in the rows that are made up for the report."""


def people(folder: Path) -> Path:
    """Packed shards of synthetic people, all held out."""
    captures = synthesize(
        folder / "captures", subjects=PEOPLE, timesteps=6, views=16, size=SIZE, progress=False
    )
    names = [path.name for path in captures]
    pack([read_capture(path) for path in captures], folder / "shards", size=SIZE, heldout=names)
    return folder / "shards"


def network(folder: Path) -> Checkpoint:
    """An exported network as `make train` leaves it, before its first step."""
    torch.manual_seed(0)
    model = Avat3r(find_recipe("avat3r-cpu").model)
    export = folder / "run" / "export"
    export.mkdir(parents=True)
    model.save(export, {"expression_kind": "arkit-52", "recipe": "avat3r-cpu", "step": 0})
    return find_checkpoint("any", export)


def plain(jobs: list[dict[str, Any]]) -> list[float]:
    """One process of its own: seconds of each row but the first, for which everything is loaded."""
    torch.set_num_threads(1)
    times = []
    for job in jobs:
        started = time.perf_counter()
        evaluate_one(job, lambda **_: None)
        times.append(time.perf_counter() - started)
    return times[1:]


def on_ray(jobs: list[dict[str, Any]], workers: int) -> float:
    """Seconds that a worker spends on a row, seen by the driver.

    While all are busy, rows come `workers` times as often as one worker gives them. The first of each is left out, for
    which everything is loaded, and what comes after the first worker has run out of rows.
    """
    done: list[float] = []

    def on_event(event: Event) -> None:
        assert event.kind != "failed", event.report
        if event.kind == "done":
            done.append(time.perf_counter())

    with ray_session(workers):
        run_jobs(
            evaluate_one,
            [Job(f"row {number}", job) for number, job in enumerate(jobs)],
            slots=workers,
            on_event=on_event,
        )
    rows = done[workers : len(done) - workers + 1]
    return workers * (rows[-1] - rows[0]) / (len(rows) - 1)


def bulk(folder: Path) -> dict[str, Any]:
    shards, checkpoint = people(folder), network(folder)
    protocol = synthetic_heldout(
        open_shards(shards, "heldout"), metrics=(PSNR, SSIM, PSNR_MASKED, SSIM_MASKED)
    )

    def rows(name: str) -> list[dict[str, Any]]:
        common = {"checkpoint": checkpoint, "protocol": protocol, "shards": str(shards), "split": "heldout"}
        common |= {"results": str(folder / name), "device": "cpu", "batch": 0}
        return [{**common, "subject": subject} for subject in protocol.subjects]

    seconds: dict[str, list[float]] = {"ray_1": [], "plain_1": [], "ray_2": [], "plain_2": []}
    for turn in range(ROUNDS):
        for workers in (1, 2):
            jobs = [rows(f"{turn}-{workers}-{number}") for number in range(workers)]
            seconds[f"ray_{workers}"].append(on_ray([job for share in jobs for job in share], workers))
            with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
                times = [statistics.mean(taken) for taken in pool.map(plain, jobs)]
            seconds[f"plain_{workers}"].append(statistics.mean(times))
    one = {name: statistics.median(times) for name, times in seconds.items()}
    ray, alone = 2 * one["ray_1"] / one["ray_2"], 2 * one["plain_1"] / one["plain_2"]
    return {
        "what": f"seconds a row of Avat3r (CPU recipe) on synthetic people, {SIZE} px, one thread a worker",
        "seconds_a_row": {name: round(value, 3) for name, value in one.items()},
        "two_workers_times_one": round(ray, 3),
        "two_plain_processes_times_one": round(alone, 3),
        "two_workers_times_one_without_contention": round(2 * ray / alone, 3),
    }


def made_up(method: str, subject: str, values: dict[str, float], protocol_id: str = "0123456789ab") -> Row:
    """A row as an evaluation leaves it, with as much in it."""
    entries: list[dict[str, Any]] = [
        {"timestep": f"{n // 8:05d}", "camera": f"c{n % 8:02d}", **values} for n in range(PICTURES)
    ]
    for n in range(4):
        entries[n]["file"] = f"{n:02d}"
    return Row(
        method=method,
        checkpoint="none",
        subject=subject,
        protocol="synthetic-heldout",
        protocol_id=protocol_id,
        values=values,
        missing={},
        counts={"pictures": PICTURES, "timesteps": 4, "views": 8},
        create_seconds=0.5,
        drive_fps=30.0,
        pictures=entries,
        weights={},
        hardware="made up",
        versions={"commit": "made up"},
        threads=1,
    )


def numbers(rng: np.random.Generator, method: int) -> dict[str, float]:
    psnr = float(20 + method / 2 + rng.normal())
    return {
        "psnr": psnr,
        "ssim": psnr / 40,
        "psnr_masked": psnr - 1,
        "ssim_masked": psnr / 41,
        "lpips": 4 / psnr,
    }


def report(folder: Path) -> dict[str, Any]:
    """Seconds from 10,000 row files with their pictures to a page."""
    shards = people(folder)
    protocol = synthetic_heldout(open_shards(shards, "heldout"), metrics=(PSNR,))
    (row,) = evaluate_all(
        [find_checkpoint("nearest-input")],
        [protocol],
        shards,
        folder / "one",
        subjects=protocol.subjects[:1],
    ).rows
    source = row_folder(folder / "one", row.method, row.checkpoint, row.subject, row.protocol, protocol.id)
    rng = np.random.default_rng(0)
    for method in range(METHODS):
        for subject in range(SUBJECTS):
            row = made_up(f"method-{method}", f"p{subject:04d}", numbers(rng, method))
            at = write_row(row, folder / "results").parent
            for path in source.iterdir():
                if path.name != ROW_FILE:
                    os.link(path, at / path.name)
    started, cpu = time.perf_counter(), time.process_time()
    rows = read_rows(folder / "results")
    read = time.perf_counter() - started
    page = write_report(rows, folder / "results", folder / "report")
    return {
        "what": f"{METHODS} methods on {SUBJECTS} people, {PICTURES} pictures a row, five metrics",
        "rows": len(rows),
        "read_seconds": round(read, 2),
        "seconds": round(time.perf_counter() - started, 2),
        "processor_seconds": round(time.process_time() - cpu, 2),
        "page_megabytes": round(page.stat().st_size / 1e6, 1),
    }


def dashboard(folder: Path) -> dict[str, Any] | str:
    """Seconds until the page with the run list of an experiment of 1,000 runs shows its table."""
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))  # the browser that tests drive
    from browser import CHROMIUM, Browser

    if CHROMIUM is None:
        return "left out: Chromium is not installed"
    rng = np.random.default_rng(0)
    uri = f"sqlite:///{folder}/mlflow.db"
    each = 20  # a parent and 19 children
    for method in range(RUNS // each):
        rows = [made_up(f"m{method:02d}", f"p{n:02d}", numbers(rng, method)) for n in range(each - 1)]
        log_evaluation(rows, folder / "results", uri)
    port = free_port(None)
    address = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        server = subprocess.Popen(
            dashboard_command(uri, port), stdout=log, stderr=log, cwd=folder, start_new_session=True
        )
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/health").close()
                break
            except OSError:
                assert server.poll() is None, (folder / "log").read_text()
                time.sleep(0.2)
        (page,) = dashboard_pages(uri, address).values()
        (folder / "browser").mkdir()
        browser = Browser(folder / "browser")
        times = []
        listed = "['m49', 'm46', 'matching runs'].every(words => document.body.innerText.includes(words))"
        try:
            for turn in range(4):  # the first also fetches the dashboard's program
                browser.open("about:blank", 1400)
                started = time.perf_counter()
                browser.open(f"{page}&turn={turn}", 1400)
                browser.wait(listed)
                times.append(time.perf_counter() - started)
        finally:
            browser.close()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait()
    return {
        "what": "from the address to the first runs on the page, MLflow's own server and headless Chromium here",
        "runs": RUNS,
        "first_seconds": round(times[0], 2),
        "seconds": round(statistics.median(times[1:]), 2),
    }


PARTS = {"bulk": bulk, "report": report, "dashboard": dashboard}


def main() -> None:
    """Measures, writes."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--part", choices=PARTS, help="only this; prints instead of writing")
    options = parser.parse_args()
    found = {}
    for name, part in PARTS.items():
        if options.part in (None, name):
            with tempfile.TemporaryDirectory() as folder:
                found[name] = part(Path(folder))
                print(name, found[name], flush=True)
    if options.part is None:
        write("reporting", found, ("torch", "ray", "mlflow", "numpy"), options.out)


if __name__ == "__main__":
    main()
