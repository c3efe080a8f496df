"""Builds the compiled CPU rasterizer once for this kind of processor and finds it again.

The kernels are plain C++ behind a C interface: no torch or Python header is read, so a build takes seconds,
needs nothing but a compiler, and stays valid when torch is updated.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

__all__ = ["BuildError", "build", "cache_folder", "load_library"]

SOURCES = [Path(__file__).parent / "kernels.cpp", *sorted(Path(__file__).parent.glob("*.h"))]
FLAGS = [
    *("-O3", "-march=native", "-std=c++20", "-fPIC", "-shared", "-pthread"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
]
COMPILE_SECONDS = 600


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message is one sentence for `headsplat doctor`."""


def cache_folder() -> Path:
    """Where builds are kept: $HEADSPLAT_CACHE, or headsplat in the user's cache folder."""
    chosen = os.environ.get("HEADSPLAT_CACHE")
    if chosen:
        return Path(chosen) / "kernels"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "headsplat" / "kernels"


def build(folder: Path | None = None, sources: list[Path] | None = None, name: str = "rasterize") -> Path:
    """Compiles the kernels unless a build for these sources, flags and this processor is there.

    Any number of processes may call this at once: the operating system's file lock lets one compile while the
    others wait, and it falls with the process that holds it, so a killed build blocks nobody. The library
    appears under its name in one step.

    Args:
        folder: where to keep builds, `cache_folder()` when None.
        sources: the file to compile, then what it includes; the rasterizer's when None.
        name: what the library's name starts with.

    Returns:
        Path of the shared library.

    Raises:
        BuildError: no compiler, or it failed.
    """
    folder, sources = folder or cache_folder(), sources or SOURCES
    library = folder / f"{name}-{_fingerprint(sources)}.so"
    if library.is_file():
        return library
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++") or shutil.which("c++")
    if not compiler:
        raise BuildError("no C++ compiler was found: install g++ or clang++, or set CXX")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not library.is_file():  # another process may have built it meanwhile
                for leftover in folder.glob("build-*"):  # of a build that was killed
                    shutil.rmtree(leftover, ignore_errors=True)
                _compile(compiler, library, sources[0])
    except OSError as error:
        raise BuildError(
            f"the build folder {folder} cannot be used ({error}): set HEADSPLAT_CACHE to a writable folder"
        ) from error
    return library


@cache
def load_library() -> ctypes.CDLL:
    """The kernels, compiled if need be, with their signatures declared.

    Raises:
        BuildError: see `build`.
    """
    library = build()
    try:
        kernels = ctypes.CDLL(str(library))
    except OSError as error:
        raise BuildError(f"{library} cannot be loaded ({error}): delete it to have it built again") from error
    pointer: Any = ctypes.c_void_p
    integer: Any = ctypes.c_int
    kernels.headsplat_forward.argtypes = [integer] * 7 + [pointer] * 14
    kernels.headsplat_forward.restype = integer
    kernels.headsplat_backward.argtypes = [pointer, integer] + [pointer] * 14
    kernels.headsplat_backward.restype = integer
    kernels.headsplat_count.argtypes = [pointer, pointer]
    kernels.headsplat_count.restype = None
    kernels.headsplat_release.argtypes = [pointer]
    kernels.headsplat_release.restype = None
    kernels.headsplat_vector_width.argtypes = []
    kernels.headsplat_vector_width.restype = integer
    return kernels


def _compile(compiler: str, library: Path, source: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent, prefix="build-") as scratch:
        target = Path(scratch) / library.name
        command = [*compiler.split(), *FLAGS, "-o", str(target), str(source)]
        try:
            for openmp in (["-fopenmp"], []):  # some compilers come without it
                result = subprocess.run(
                    [*command, *openmp], capture_output=True, text=True, timeout=COMPILE_SECONDS
                )
                if result.returncode == 0:
                    break
        except OSError as error:
            raise BuildError(f"the compiler {compiler} cannot be run ({error.strerror})") from error
        except subprocess.TimeoutExpired as error:
            raise BuildError(f"{compiler} did not finish in {COMPILE_SECONDS} s") from error
        if result.returncode != 0:
            lines = [line for line in result.stderr.splitlines() if "error" in line] or [
                f"exit {result.returncode}"
            ]
            raise BuildError(f"{compiler} could not compile {source.name}: {lines[0].strip()}")
        target.replace(library)


def _fingerprint(sources: list[Path] | None = None) -> str:
    """Changes with the sources, the flags and the processor's instruction sets."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for source in sources or SOURCES:
        digest.update(source.read_bytes())
    digest.update("".join([platform.system(), platform.machine(), _instruction_sets()]).encode())
    return digest.hexdigest()[:20]


def _instruction_sets() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
