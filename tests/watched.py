"""Groups of two ranks that do nothing but get into trouble, side by side: `python watched.py FOLDER` for a test.

All are forked from one process, as importing torch a dozen times takes longer than everything they do.
"""

import json
import os
import signal
import sys
import time
import traceback
from datetime import timedelta
from pathlib import Path

import torch
from torch import distributed as dist

from avatars.errors import UserError
from launch.preflight import free_port
from train.config import GuardConfig
from train.guards import DATA, Watch

TROUBLES = ("none", "die", "silence", "stall", "hang", "refuse")


def be_a_rank(trouble: str, rank: int, port: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    dist.init_process_group("gloo", timeout=timedelta(seconds=300))
    config = GuardConfig(data_seconds=5.0, step_seconds=20.0, first_step_seconds=20.0, silence_seconds=12.0)
    watch = Watch(config, lambda reason: print(f"told: {reason}", flush=True))
    culprit = rank == 1
    with watch.over():
        for _ in range(100):
            watch.enter(DATA, config.data_seconds)
            if culprit and trouble == "stall":
                time.sleep(600)
            watch.enter("forward and backward", config.step_seconds)
            dist.all_reduce(torch.ones(1))
            watch.warm()
            if culprit and trouble == "hang":
                time.sleep(600)
            if culprit and trouble == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if culprit and trouble == "silence":
                os.kill(os.getpid(), signal.SIGSTOP)
            if culprit and trouble == "refuse":
                raise UserError("this rank cannot read its shard")
            if trouble == "none":
                break
            time.sleep(0.05)
    print("finished", flush=True)


def forked(folder: Path, trouble: str, rank: int, port: int) -> int:
    child = os.fork()
    if child:
        return child
    out = os.open(folder / f"{trouble}-{rank}.txt", os.O_CREAT | os.O_WRONLY)
    os.dup2(out, 1)
    os.dup2(out, 2)
    try:
        be_a_rank(trouble, rank, port)
    except UserError as error:
        print(f"raised: {error}", flush=True)
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(3)
    os._exit(0)


def main() -> None:
    folder = Path(sys.argv[1])
    ports = {trouble: free_port(None) for trouble in TROUBLES}
    ranks = {(t, rank): forked(folder, t, rank, ports[t]) for t in TROUBLES for rank in range(2)}
    statuses = {}
    for (trouble, rank), child in ranks.items():
        if (trouble, rank) == ("silence", 1):
            os.kill(child, signal.SIGCONT)  # it wakes up when the run is over, and must not go on alone
        statuses[f"{trouble}-{rank}"] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (folder / "statuses.json").write_text(json.dumps(statuses))


if __name__ == "__main__":
    main()
