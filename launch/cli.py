"""`headsplat`: finds the command, loads only what it needs, and turns what a user can mend into a sentence."""

from __future__ import annotations

import difflib
import os
import sys
from importlib import import_module

__all__ = ["COMMANDS", "main"]

BROKEN_PIPE = 141  # what a shell says of a program that the signal has ended

COMMANDS: dict[str, tuple[str, str]] = {
    "doctor": ("launch.doctor:doctor", "what works on this machine, and why not"),
    "synth": ("launch.data:synth", "makes synthetic multi-view captures of people that do not exist"),
    "shards pack": ("launch.data:pack", "packs captures into self-contained shards"),
    "shards check": ("launch.data:check", "validates packed shards"),
    "shards info": ("launch.data:info", "tells what is in packed shards"),
    "priors": ("launch.priors:priors", "computes position and feature maps of input sets into new shards"),
    "train": ("launch.training:train", "one process group's worth of training; `launch` starts the ranks"),
    "export": (
        "launch.export:export",
        "writes a checkpoint's network as safetensors and JSON, and checks it",
    ),
    "launch": (
        "launch.training:launch",
        "prepares data, starts every rank with DeepSpeed and evaluates: `make train`",
    ),
    "create": ("launch.driving:create", "makes an avatar of a few pictures with cameras"),
    "drive": ("launch.driving:drive", "shows an avatar with other expressions: video, pictures, Gaussians"),
    "template": (
        "launch.editing:template",
        "averages fits of all training people into FastAvatar's template",
    ),
    "interpolate": ("launch.editing:interpolate", "makes the people between two of FastAvatar's"),
    "attributes": (
        "launch.editing:attributes",
        "finds how FastAvatar's latents move with age, hair and more",
    ),
    "edit": ("launch.editing:edit", "changes one attribute of a person that FastAvatar made"),
    "plan": (
        "launch.plan:plan",
        "tells memory, time, bandwidth, storage and cost of a training, without a GPU",
    ),
    "preflight": (
        "launch.multihost:preflight",
        "checks all hosts of a hostfile, as `launch` does before a rank starts",
    ),
    "view": ("launch.viewing:view", "shows an avatar in the browser, with a slider for every expression"),
    "fit": ("launch.fitting:fit", "fits a per-subject method to held-out people on Ray"),
    "eval": ("launch.evaluation:evaluate", "measures a trained model or fitted avatars on held-out people"),
    "report": ("launch.evaluation:report", "compares everything that was evaluated"),
    "dashboard": ("launch.evaluation:dashboard", "opens the MLflow dashboard"),
    "completion": ("launch.completion:completion", "prints a script that completes commands in bash or zsh"),
    "demo": ("launch.demo:demo", "captures to compared avatars, all of it: `make demo`"),
}


def usage() -> str:
    """The text of `headsplat --help`."""
    width = max(map(len, COMMANDS)) + 2
    lines = [f"  {name:<{width}}{line}" for name, (_, line) in COMMANDS.items()]
    return "\n".join(
        [
            "headsplat: multi-view head captures to animatable 3D Gaussian avatars.",
            "",
            "usage: headsplat COMMAND [options]",
            "",
            *lines,
            "",
            "`headsplat COMMAND --help` tells a command's options.",
        ]
    )


def find(words: list[str]) -> tuple[str, list[str]]:
    """The command that the first one or two words name, and the words after it.

    Raises:
        UserError: there is no such command; the nearest is named.
    """
    for length in (2, 1):
        name = " ".join(words[:length])
        if len(words) >= length and name in COMMANDS:
            return name, words[length:]
    from avatars.errors import UserError  # here, as the room loads torch and `--help` should not

    asked = " ".join(words[:2]) if words[0] == "shards" else words[0]
    nearest = difflib.get_close_matches(asked, COMMANDS, n=1, cutoff=0.4)
    hint = f" Did you mean `headsplat {nearest[0]}`?" if nearest else ""
    raise UserError(f"There is no command {asked!r}.{hint} `headsplat --help` lists them.")


def run(words: list[str]) -> int:
    """Runs the command that `words` name; what a user can mend becomes a sentence and status 1."""
    from avatars.errors import UserError

    try:
        name, rest = find(words)
        module, function = COMMANDS[name][0].split(":")
        command = getattr(import_module(module), function)
        status = int(command(rest) or 0)
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"headsplat: {error}", file=sys.stderr, flush=True)
        return 1
    except BrokenPipeError:
        # Whoever read the output has had enough, as `| head` has; what is still buffered has nowhere to go.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE


def main(words: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        words: the command line without the program's name; the process's own when None.

    Returns:
        The exit status: 0 only on success.
    """
    words = sys.argv[1:] if words is None else words
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    try:
        return run(words)
    except KeyboardInterrupt:
        print("headsplat: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
