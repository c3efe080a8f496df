"""`headsplat completion`: a script that completes commands, recipes and options in bash and zsh."""

from __future__ import annotations

import io
import re
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from typing import Annotated, Literal

import tyro

from launch.options import parse

__all__ = ["completion", "option_names", "script"]

TAKES_A_RECIPE = ("train", "launch", "plan", "preflight", "demo")

BASH = """\
# Completion of headsplat, printed by `headsplat completion`.
_headsplat() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} command=${{COMP_WORDS[1]}} place=$COMP_CWORD
    local known=""
    COMPREPLY=()
    if [ "$place" -gt 1 ]; then
        case $command in
{groups}
        esac
    fi
    if [ "$place" -eq 1 ]; then
        known="{first}"
    else
        case $command in
{cases}
        esac
    fi
    while IFS= read -r found; do COMPREPLY+=("$found"); done < <(compgen -W "$known" -- "$word")
    if [ "${{#COMPREPLY[@]}}" -eq 0 ] && [ "$place" -gt 1 ]; then
        while IFS= read -r found; do COMPREPLY+=("$found"); done < <(compgen -f -- "$word")
    fi
}}
complete -o filenames -F _headsplat headsplat
"""

ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


@dataclass(frozen=True)
class CompletionOptions:
    """Prints a script that completes commands, recipes and options."""

    shell: Annotated[Literal["bash", "zsh"], tyro.conf.Positional]
    """Which shell's."""


def completion(words: list[str]) -> None:
    """`headsplat completion bash`."""
    from launch.cli import COMMANDS
    from launch.recipes import RECIPES

    shell = parse(CompletionOptions, words, "completion").shell
    print(script(shell, {name: option_names(name) for name in COMMANDS}, list(RECIPES)), end="")


def option_names(command: str) -> list[str]:
    """The options that a command's own help tells, `--no-` forms included."""
    from launch.cli import COMMANDS

    module, function = COMMANDS[command][0].split(":")
    words = ["avat3r-cpu", "--help"] if command == "train" else ["--help"]
    told = io.StringIO()
    try:
        with redirect_stdout(told):
            getattr(import_module(module), function)(words)
    except SystemExit:
        pass
    return sorted(set(re.findall(r"(?<![\w-])--[a-z][a-z0-9.-]*", told.getvalue())))


def script(shell: str, options: dict[str, list[str]], recipes: list[str]) -> str:
    """The script of a shell.

    Args:
        shell: "bash" or "zsh", which runs bash's completions.
        options: of every command; a command may be of two words.
        recipes: what comes after the commands that take one.
    """
    groups: dict[str, list[str]] = {}
    for name in options:
        group, _, rest = name.partition(" ")
        if rest:
            groups.setdefault(group, []).append(rest)
    first = sorted({name.split()[0] for name in options})
    # From the second word on, a group's name and its word are one command.
    grouped = [
        f'            {group}) if [ "$place" -gt 2 ]; then command="{group} ${{COMP_WORDS[2]}}"; fi ;;'
        for group in groups
    ]
    cases = [f'            {group}) known="{" ".join(rest)}" ;;' for group, rest in groups.items()]
    for name, names in options.items():
        known = [*names, *(recipes if name in TAKES_A_RECIPE else [])]
        cases.append(f'            "{name}") known="{" ".join(known)}" ;;')
    text = BASH.format(groups="\n".join(grouped), first=" ".join(first), cases="\n".join(cases))
    return ZSH + text if shell == "zsh" else text
