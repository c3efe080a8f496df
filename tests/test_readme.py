"""What the README says is what there is: every command in it runs, every file is in its map."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = ("avatars", "shards", "eval", "train", "cluster", "launch")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]

TINY = {
    "RECIPE": "avat3r-tiny",
    "DEMO": "--demo.subjects 2 --demo.heldout 1 --demo.views 12 --demo.size 48",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("readme") / "work"


def as_tiny(command: str, workspace: Path) -> str:
    """The same command in a workspace of its own, on data small enough for a test."""
    command = command.replace("work/", f"{workspace}/").replace("demo-96", "demo-48")
    command = command.replace(".venv/bin/headsplat", f"{sys.executable} -m launch.cli")
    if command.startswith("make "):
        venv = Path(sys.executable).parent.parent
        command += f" OUT={workspace} VENV={venv}"
        if command.split()[1] in ("demo", "train"):
            command += "".join(f' {name}="{value}"' for name, value in TINY.items())
        elif command.split()[1] == "fit":
            command += f' DEMO="{TINY["DEMO"]}"'
        elif command.split()[1] == "eval":
            command += ' ARGS="--run avat3r-tiny"'
    return command


def test_the_readme_opens_with_the_two_commands():
    assert COMMANDS[:2] == ["make demo", "make test"]


@pytest.mark.e2e
@pytest.mark.parametrize("command", [c for c in COMMANDS if c != "make test"])  # this is `make test`
def test_a_command_of_the_readme_runs(command, workspace):
    tiny = as_tiny(command, workspace)
    ran = subprocess.run(
        tiny, shell=True, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"CI": "true"}
    )
    assert ran.returncode == 0, f"{tiny}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    if command == "make demo":
        table = ran.stdout
        assert all(
            method in table for method in ("avat3r", "avat3r-untrained", "nearest-input", "flashavatar")
        )
        assert "make dashboard" in table


def test_the_file_map_is_complete():
    listed = set(re.findall(r"^\| `([\w/.]+)` \|", README, re.M))
    there = {str(p.relative_to(ROOT)) for room in ROOMS for p in (ROOT / room).rglob("*") if p.is_file()}
    there = {
        name for name in there if "__pycache__" not in name and not name.endswith(("__init__.py", "py.typed"))
    }
    assert listed == there


def test_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()
