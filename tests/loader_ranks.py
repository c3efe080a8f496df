"""One rank of `test_shards_ranks.py`: runs loaders as told and writes down what came."""

import json
import os
import sys
from pathlib import Path

import torch

from shards import BatchLoader


def main() -> None:
    order = json.loads(Path(sys.argv[1]).read_text())
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.distributed.init_process_group("gloo")
    for run in order["runs"]:
        options = {"seed": 4, "micro_batch": 3, "views": 2, "world_size": world, "rank": rank}
        with BatchLoader(
            order["shards"], "train", start=run["start"], threads=run["threads"], **options
        ) as loader:
            ids = [next(loader)["ids"] for _ in range(run["count"])]
        gathered: list = [None] * world
        torch.distributed.all_gather_object(gathered, ids)
        if rank == 0:
            run["ids"] = gathered
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(order))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
