"""Runs a headsplat command on the head of a Ray cluster; the one file that `ray submit` copies there.

    ray submit cluster/ray-cluster.yaml cluster/submit.py -- fit flashavatar --data /shared/shards --out /shared/work

It imports nothing of headsplat: the copy lies in the home folder, and the command comes with the cluster's environment.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PATIENCE = 300.0
"""Seconds to wait for the machines that were asked for."""


def main(words: list[str]) -> int:
    """Waits for the cluster, then runs `headsplat WORDS` on it; returns its exit status.

    `--nodes N` before the command waits for N machines, and goes on with a warning when not all of them come.
    """
    nodes = 1
    if words[:1] == ["--nodes"]:
        if len(words) < 3 or not words[1].isdigit():
            print(
                "submit.py: --nodes takes a number and is followed by a headsplat command.", file=sys.stderr
            )
            return 2
        nodes, words = int(words[1]), words[2:]
    if not words:
        print(
            "submit.py: name a headsplat command, for example: -- fit flashavatar --data SHARDS",
            file=sys.stderr,
        )
        return 2
    program = shutil.which("headsplat")
    if program is None:
        print(
            "submit.py: there is no headsplat in the PATH of the head's login shell; the cluster file's setup_commands "
            "put it there.",
            file=sys.stderr,
        )
        return 1
    if "RAY_ADDRESS" not in os.environ:
        noted = Path(os.environ.get("HEADSPLAT_RAY_HOME", Path.home() / ".headsplat-ray")) / "address"
        if not noted.is_file():
            print(
                "submit.py: no Ray was started here; run `ray up` with the cluster file first.",
                file=sys.stderr,
            )
            return 1
        os.environ["RAY_ADDRESS"] = noted.read_text().strip()
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    there = wait_for_nodes(nodes)
    if there < nodes:
        print(
            f"submit.py: {there} of {nodes} machines have joined within {PATIENCE:.0f} seconds; going on with these. "
            "~/.headsplat-ray/log on the others says why.",
            file=sys.stderr,
        )
    return subprocess.run([program, *words]).returncode


def wait_for_nodes(count: int) -> int:
    """How many machines the cluster has, after waiting for `count` of them for at most `PATIENCE` seconds."""
    import ray

    ray.init(log_to_driver=False, logging_level="ERROR")
    end = time.monotonic() + PATIENCE
    try:
        while True:
            there = sum(node["Alive"] for node in ray.nodes())
            if there >= count or time.monotonic() > end:
                return there
            time.sleep(0.5)
    finally:
        ray.shutdown()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
