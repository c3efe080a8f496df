"""Every command has a page in docs/commands, and what stands in the pages runs, one story on tiny data."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from launch.cli import COMMANDS, main
from launch.completion import option_names, script
from launch.preflight import free_port

ROOT = Path(__file__).resolve().parent.parent
PAGES = ROOT / "docs" / "commands"

# Pages in the order of the story; each uses what those before it have made.
STORY = [
    *("doctor", "completion", "synth", "shards pack", "shards check", "shards info", "plan", "preflight"),
    *(
        "priors",
        "train",
        "launch",
        "export",
        "create",
        "template",
        "interpolate",
        "drive",
        "view",
        "fit",
        "eval",
        "report",
        "dashboard",
    ),
]
ELSEWHERE = {
    "demo": "test_readme.py runs `make demo`, which is nothing else",
    "attributes": "test_fastavatar.py runs it, on more people than the story has",
    "edit": "test_fastavatar.py runs it on the directions of `attributes`",
}
SERVERS = {"view": 8080, "dashboard": 5000}
# Commands that start processes, set up a process group or Ray run as a user runs them; the others in this process.
PROCESSES = {"priors", "train", "launch", "fit", "eval", "template"}

TINY = {
    "avat3r-cpu": "avat3r-tiny",
    "fastavatar-encoder-cpu": "fastavatar-encoder-tiny",
    "--subjects 8 --timesteps 6 --views 80 --size 128": "--subjects 2 --timesteps 6 --views 12 --size 48",
    "--size 128 --heldout 2": "--size 48 --heldout 1",
    "headsplat plan avat3r ": "headsplat plan avat3r-tiny ",
}


def page(command: str) -> Path:
    return PAGES / f"{command.replace(' ', '-')}.md"


def examples(path: Path) -> list[str]:
    """The lines of a page's sh blocks, at a size for tests."""
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", path.read_text(), re.S)
        for line in block.splitlines()
    ]
    for long, short in TINY.items():
        lines = [line.replace(long, short) for line in lines]
    return lines


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """One folder for the whole story, with the hostfile that the pages speak of."""
    folder = tmp_path_factory.mktemp("docs")
    (folder / "hosts").write_text("localhost slots=1\n")
    return folder


def run(line: str, command: str, capsys) -> None:
    words = shlex.split(line)
    assert words[0] == "headsplat"
    if command in SERVERS:
        serve(words[1:], free_port(None))
    elif command in PROCESSES:
        ran = subprocess.run(
            [sys.executable, "-m", "launch.cli", *words[1:]],
            capture_output=True,
            text=True,
            env=environment(),
        )
        assert ran.returncode == 0, f"{line}\n{ran.stdout[-3000:]}\n{ran.stderr[-3000:]}"
    else:
        assert not main(words[1:]), f"{line}\n{capsys.readouterr().err}"


def environment() -> dict[str, str]:
    return os.environ | {"CI": "true", "PYTHONPATH": str(ROOT)}


def serve(words: list[str], port: int) -> None:
    """Starts a server, waits for its first answer and ends it."""
    process = subprocess.Popen(
        [sys.executable, "-m", "launch.cli", *words, "--port", str(port)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        while True:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/") as answer:
                    assert answer.status == 200
                    return
            except (urllib.error.URLError, ConnectionError):
                assert process.poll() is None, process.communicate()[0]
                time.sleep(0.3)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_every_command_has_a_page_and_every_page_a_command():
    assert {path.stem for path in PAGES.glob("*.md")} == {name.replace(" ", "-") for name in COMMANDS}
    assert set(STORY) | set(ELSEWHERE) == set(COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_page_names_its_command_and_shows_it(command):
    text = page(command).read_text()
    assert text.startswith(f"# headsplat {command}\n")
    shown = examples(page(command))
    assert shown
    assert all(line.startswith(f"headsplat {command}") for line in shown)


@pytest.mark.parametrize("command", COMMANDS)
def test_options_that_a_page_speaks_of_are_there(command):
    text = page(command).read_text()
    known = set(option_names(command))
    for line in re.findall(r"```sh\n(.*?)```", text, re.S) + re.findall(r"`(--[^`]*)`", text):
        spoken = set(re.findall(r"(?<![\w-])--[a-z][a-z.-]*", line))
        # `--args="--steps 100"` holds options of the recipe.
        assert spoken <= known | set(option_names("train")), f"{command}: {spoken - known}"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "docs").rglob("*.md")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_links_between_pages_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text()):
        assert target.startswith("http") or (path.parent / target).exists(), target


@pytest.mark.e2e
@pytest.mark.slow
@pytest.mark.parametrize("command", STORY)
def test_what_a_page_shows_runs(command, story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    for line in examples(page(command)):
        run(line, command, capsys)


@pytest.mark.e2e
@pytest.mark.slow
def test_what_the_page_on_launching_shows_runs(story, monkeypatch, capsys):
    monkeypatch.chdir(story)
    for line in examples(ROOT / "docs" / "launching.md"):
        if line.startswith("headsplat"):
            run(line, "plan", capsys)
        else:
            subprocess.run(line, shell=True, check=True)


def completed(tmp_path: Path, *words: str) -> list[str]:
    """What bash offers for the last of these words."""
    options = {"shards pack": ["--size", "--seed"], "shards check": [], "train": ["--data", "--run"]}
    text = script("bash", options, ["avat3r", "avat3r-cpu"])
    typed = " ".join(f"'{word}'" for word in words)
    code = f"{text}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words) - 1}; _headsplat\n"
    code += "printf '%s\\n' \"${COMPREPLY[@]}\""
    found = subprocess.run(["bash", "-c", code], capture_output=True, text=True, check=True, cwd=tmp_path)
    return found.stdout.split()


def test_bash_completes_commands_recipes_options_and_files(tmp_path):
    assert completed(tmp_path, "headsplat", "") == ["shards", "train"]
    assert completed(tmp_path, "headsplat", "shards", "p") == ["pack"]
    assert completed(tmp_path, "headsplat", "shards", "pack", "--s") == ["--size", "--seed"]
    assert completed(tmp_path, "headsplat", "train", "avat3r-") == ["avat3r-cpu"]
    (tmp_path / "captures").mkdir()
    assert completed(tmp_path, "headsplat", "shards", "check", "cap") == ["captures"]
    assert script("zsh", {"train": []}, []).startswith("autoload")


def test_option_names_are_those_of_the_help():
    assert {"--nodes", "--hostfile", "--reach"} <= set(option_names("launch"))
    assert "--optimizer.lr" in option_names("train")
