"""What trainings and fits leave behind, made in no time: networks with random heads and unfitted avatars."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from avatars.avat3r import Avat3r, Avat3rMethod
from launch.recipes import find_recipe
from shards import open_shards


def write_network(folder: Path, *, seed: int = 0, step: int = 100) -> Path:
    """An exported Avat3r of the tiny recipe whose Gaussians differ with the seed."""
    torch.manual_seed(seed)
    network = Avat3r(find_recipe("avat3r-tiny").model)
    for head in network.heads.values():
        torch.nn.init.normal_(head.weight, std=0.05)
    folder.mkdir(parents=True)
    network.save(folder, {"expression_kind": "arkit-52", "recipe": "avat3r-tiny", "step": step})
    return folder


def write_fits(folder: Path, shards: Path, split: str, method: str = "flashavatar") -> Path:
    """A folder of fits of everybody in a split; any avatar will do, and the quickest one is Avat3r's."""
    torch.manual_seed(2)
    maker = Avat3rMethod(Avat3r(find_recipe("avat3r-tiny").model), "arkit-52")
    people = open_shards(shards, split)
    for subject in people.subjects:
        maker.create(people.read(subject).input_sets[0]).save(folder / subject)
        result = {"format": "headsplat-fit", "method": method, "config": {"steps": 1}, "seconds": 1.5}
        (folder / subject / "result.json").write_text(json.dumps(result))
    return folder
