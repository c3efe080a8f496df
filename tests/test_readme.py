"""What the README says is what there is: every command in it runs, every file is in its map."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch.preflight import free_port

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
ROOMS = ("avatars", "shards", "eval", "train", "cluster", "launch")
COMMANDS = [line for block in re.findall(r"```sh\n(.*?)```", README, re.S) for line in block.splitlines()]

MAP_START, MAP_END = "<!-- file map -->", "<!-- end of file map -->"

TINY = {
    "RECIPE": "avat3r-tiny",
    "DEMO": "--demo.subjects 2 --demo.heldout 1 --demo.views 12 --demo.size 48",
}


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    return tmp_path_factory.mktemp("readme") / "work"


def as_tiny(command: str, workspace: Path) -> str:
    """The same command in a workspace of its own, on data small enough for a test."""
    made = sorted((workspace / "shards").glob("demo-*"))
    shards = str(made[0]) if made else "there are no shards"
    command = re.sub(
        "work/(shards/demo-128)?", lambda match: shards if match[1] else f"{workspace}/", command
    )
    command = command.replace(".venv/bin/headsplat", f"{sys.executable} -m launch.cli")
    command = command.replace("runs/avat3r-cpu", f"runs/{TINY['RECIPE']}")
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


@pytest.mark.slow
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


def file_map() -> str:
    """A line a file: its path and the first sentence of its docstring or opening comment."""
    lines = ["| file | what it is |", "| --- | --- |"]
    for room in ROOMS:
        for path in sorted((ROOT / room).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h") and (
                path.name != "__init__.py" or path.parent == ROOT / room
            ):
                lines.append(f"| `{path.relative_to(ROOT)}` | {first_sentence(path)} |")
    return "\n".join(lines)


def first_sentence(path: Path) -> str:
    text = path.read_text()
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(text)) or ""
    else:
        text = re.sub(r"^//+ ?", "", text[: text.index("\n\n")], flags=re.M)
    return re.split(r"(?<!al)\.\s", " ".join(text.split("\n\n")[0].split()))[0].rstrip(".:").replace("|", "/")


def test_the_file_map_is_what_there_is():
    start, end = README.index(MAP_START) + len(MAP_START), README.index(MAP_END)
    if os.environ.get("HEADSPLAT_WRITE_README"):
        (ROOT / "README.md").write_text(README[:start] + f"\n\n{file_map()}\n\n" + README[end:])
    assert README[start:end].strip() == file_map()


def test_pictures_of_the_readme_are_there():
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / path).is_file()


@pytest.mark.e2e
@pytest.mark.slow
def test_the_dashboard_serves_what_was_measured(workspace):
    # After the commands above: two methods in one experiment of the evaluation protocol.
    port = free_port(None)
    words = ["make", "dashboard", f"OUT={workspace}", f"VENV={Path(sys.executable).parent.parent}"]
    server = subprocess.Popen([*words, f"ARGS=--port {port}"], cwd=ROOT, start_new_session=True)
    try:
        address = f"http://127.0.0.1:{port}/api/2.0/mlflow"
        experiments = answer(server, f"{address}/experiments/search?max_results=50")["experiments"]
        (protocol,) = [e for e in experiments if e["name"].startswith("synthetic-heldout")]
        query = {"experiment_ids": [protocol["experiment_id"]]}
        runs = answer(server, f"{address}/runs/search", query)["runs"]
        psnr = {run["info"]["run_name"].split()[0] for run in runs if has_metric(run, "eval/psnr")}
        assert {"avat3r", "flashavatar"} <= psnr
    finally:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def answer(server: subprocess.Popen, address: str, query: dict | None = None) -> dict:
    """The JSON that a server gives, asked again while it starts."""
    request = urllib.request.Request(
        address,
        data=None if query is None else json.dumps(query).encode(),
        headers={"Content-Type": "application/json"},
    )
    while True:
        try:
            with urllib.request.urlopen(request) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            if server.poll() is not None:
                raise
            time.sleep(0.5)


def has_metric(run: dict, name: str) -> bool:
    return any(metric["key"] == name for metric in run["data"].get("metrics", []))
