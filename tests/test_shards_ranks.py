"""The order of examples over two real ranks with two decoding threads each, stopped and gone on."""

import json

import pytest
from ranks import finish, start_module
from tiny_captures import pack_tiny

from shards import BatchLoader, Manifest
from shards.plans import Plan

STEPS = 14  # of 2 ranks with 3 examples each: more than three epochs


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("tiny"), subjects=4, timesteps=7, views=4, size=16, timesteps_per_shard=4
    )


def flat(ranks):
    """Ids of all ranks in the global order: steps, in a step ranks, in a rank examples."""
    return [name for step in zip(*ranks, strict=True) for batch in step for name in batch]


@pytest.mark.world_size(2)
def test_stopping_and_going_on_is_never_having_stopped(shards, tmp_path):
    runs = [{"start": 0, "count": STEPS, "threads": 2}]
    for k, before, after in ((1, 2, 2), (6, 2, 2), (9, 2, 1), (13, 1, 3)):
        runs += [
            {"start": 0, "count": k, "threads": before},
            {"start": k, "count": STEPS - k, "threads": after},
        ]
    file = tmp_path / "runs.json"
    file.write_text(json.dumps({"shards": str(shards), "runs": runs}))
    status, output = finish(start_module("tests.loader_ranks", [str(file)], 2))
    assert status == 0, output
    straight, *pairs = [run["ids"] for run in json.loads(file.read_text())["runs"]]
    for first, second in zip(pairs[::2], pairs[1::2], strict=True):
        for rank in (0, 1):
            assert first[rank] + second[rank] == straight[rank]
    options = {"seed": 4, "views": 2}
    with BatchLoader(shards, "train", micro_batch=6, **options) as loader:  # one rank with all of it
        alone = [next(loader)["ids"] for _ in range(STEPS)]
    order = flat(straight)
    assert flat([alone]) == order
    with BatchLoader(shards, "train", micro_batch=3, start=2 * 5, threads=3, **options) as loader:
        assert flat([[next(loader)["ids"] for _ in range(2 * (STEPS - 5))]]) == order[5 * 6 :]  # fewer ranks
    length = Plan(Manifest.load(shards).split("train"), seed=4, views=2).epoch_length
    assert 3 * length <= len(order)
    for epoch in range(3):
        names = [name.split("/inputs")[0] for name in order[epoch * length : (epoch + 1) * length]]
        assert len(set(names)) == length  # no example twice, none left out
