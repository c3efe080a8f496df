"""Several trainings one after the other in one start of the ranks: `python several.py ORDERS.json`, for tests.

Each order is the command line of a `headsplat train`, without the command.
"""

import json
import os
import sys
from pathlib import Path

import torch

from avatars.errors import UserError
from launch.options import parse
from launch.recipes import find_recipe
from launch.training import TrainOptions
from train.endings import Preempted
from train.loop import train
from train.start import single_process_environment
from train.tasks import task_for
from train.telemetry import RunLog


def main() -> None:
    single_process_environment()
    torch.set_num_threads(1)
    for words in json.loads(Path(sys.argv[1]).read_text()):
        options = parse(TrainOptions, words[1:], "train", TrainOptions(find_recipe(words[0]), Path(), Path()))
        log = RunLog(options.run, int(os.environ["RANK"]))
        try:
            train(task_for(options.config), options.config, options.data, options.run, log)
        except (UserError, Preempted) as error:
            log.fail(error)
        finally:
            log.close()


if __name__ == "__main__":
    main()
