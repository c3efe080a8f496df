"""The rooms import one way only, and light commands stay light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ORDER = ["avatars", "shards", "eval", "train", "cluster", "launch"]
HEAVY = {"torchvision", "lpips", "facenet_pytorch", "timm", "gsplat"} | {
    "deepspeed",
    "ray",
    "mlflow",
    "mitsuba",
    "matplotlib",
}
MODULES = sorted(path for room in ORDER for path in (ROOT / room).rglob("*.py"))


def imported(path: Path, *, top_level: bool) -> set[str]:
    """First names of what a module imports, everywhere in it or when it is loaded."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_import_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    above = set(ORDER[ORDER.index(room) + 1 :])
    assert not imported(path, top_level=False) & above


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_where_they_are_used(path):
    assert not imported(path, top_level=True) & HEAVY


def test_help_loads_neither_torch_nor_numpy():
    code = "import sys, launch.cli; launch.cli.main(['--help']); print({'torch', 'numpy', 'tyro'} & set(sys.modules))"
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    ).stdout
    assert out.strip().endswith("set()")


def test_public_names_are_where_the_design_says():
    from avatars import Cameras, Gaussians, ParametricHead, load_avatar, rasterize
    from eval import Protocol, metrics
    from shards import Manifest, open_shards, pack, plan, read_capture
    from train import Task, train

    functions = (load_avatar, rasterize, metrics.psnr, open_shards, pack, plan, read_capture, train)
    assert all(callable(thing) for thing in functions)
    assert all(
        isinstance(thing, type) for thing in (Cameras, Gaussians, ParametricHead, Protocol, Manifest, Task)
    )
