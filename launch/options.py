"""Turns the words after a command into its typed options."""

from __future__ import annotations

from typing import TypeVar

__all__ = ["parse"]

Options = TypeVar("Options")


def parse(options: type[Options], words: list[str], command: str, default: Options | None = None) -> Options:
    """Options of a command out of its command line.

    Args:
        options: a dataclass; the string under a field is its help.
        words: the command line after the command's name.
        command: the name, for the help text.
        default: values of what is not given.

    Raises:
        SystemExit: after `--help` (0), or after telling what is wrong with the words (2).
    """
    import tyro

    # A recipe's model is one of several kinds; which one is the recipe's and no choice of the command line.
    config = (tyro.conf.AvoidSubcommands,)
    if default is None:
        return tyro.cli(options, args=words, prog=f"headsplat {command}", config=config)
    return tyro.cli(options, args=words, prog=f"headsplat {command}", default=default, config=config)
