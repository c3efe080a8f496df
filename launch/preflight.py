"""What must be true before a rank starts. Each check is a sentence that names the remedy."""

from __future__ import annotations

import re
import socket
from pathlib import Path

from avatars.errors import UserError

__all__ = ["check_hosts", "free_port", "read_hostfile"]


def read_hostfile(path: Path) -> dict[str, int]:
    """Hosts and their slots, in the order of the file.

    Raises:
        UserError: the file is missing, or a line is not `host slots=n`, or a host is named twice.
    """
    if not path.is_file():
        raise UserError(f"HOSTFILE={path} is not there. Write one line a host into it: `hostname slots=8`.")
    hosts: dict[str, int] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if match is None:
            raise UserError(f"{path}, line {number}: {text!r} is not of the form `hostname slots=8`.")
        if match[1] in hosts:
            raise UserError(f"{path}, line {number}: host {match[1]} stands there twice.")
        hosts[match[1]] = int(match[2])
    return hosts


def check_hosts(nodes: int, hostfile: Path | None) -> None:
    """Refuses what DeepSpeed would pass over in silence: more nodes asked for than the hostfile has.

    Raises:
        UserError: NODES and HOSTFILE do not agree.
    """
    if nodes < 1:
        raise UserError(f"NODES={nodes} must be at least 1.")
    if hostfile is None:
        if nodes > 1:
            raise UserError(
                f"NODES={nodes} needs HOSTFILE=: a file with one line a host, `hostname slots=8`."
            )
        return
    hosts = read_hostfile(hostfile)
    if len(hosts) < nodes:
        raise UserError(
            f"NODES={nodes} but {hostfile} names {len(hosts)} host{'s' if len(hosts) != 1 else ''}; "
            "add hosts or lower NODES."
        )


def free_port(asked: int | None) -> int:
    """The port for the ranks' rendezvous on this host.

    Args:
        asked: the user's PORT, or None for any free one.

    Raises:
        UserError: the port asked for is in use.
    """
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", asked or 0))
        except OSError as error:
            raise UserError(
                f"PORT={asked} cannot be used ({error.strerror}); choose another or leave PORT out."
            ) from error
        return probe.getsockname()[1]
