import json
import subprocess
import sys
import threading
from collections import deque

import pytest
import torch
from tiny_captures import pack_tiny

from avatars.errors import UserError
from shards import BatchLoader, Manifest, open_shards, plan, to_float


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return pack_tiny(
        tmp_path_factory.mktemp("tiny"), subjects=4, timesteps=7, views=6, size=32, timesteps_per_shard=5
    )


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """Shards of more timesteps than an input set and an example with three expressions need."""
    return pack_tiny(
        tmp_path_factory.mktemp("wide"), subjects=3, timesteps=9, views=6, size=32, timesteps_per_shard=9
    )


def ids(shards, count, **options):
    options = {"seed": 5, "micro_batch": 2, "views": 3, **options}
    with BatchLoader(shards, "train", **options) as loader:
        return [next(loader)["ids"] for _ in range(count)]


def test_batches_have_the_promised_shapes(shards):
    with BatchLoader(shards, "train", seed=0, micro_batch=2, views=3) as loader:
        batch = next(loader)
    shapes = {name: tuple(value.shape) for name, value in batch.items() if name != "ids"}
    assert shapes == {
        "identity": (2, 10),
        "input_images": (2, 4, 3, 32, 32),
        "input_masks": (2, 4, 1, 32, 32),
        "input_K": (2, 4, 3, 3),
        "input_world_to_camera": (2, 4, 4, 4),
        "input_positions": (2, 4, 3, 32, 32),
        "input_confidence": (2, 4, 1, 32, 32),
        "expression": (2, 52),
        "target_images": (2, 3, 3, 32, 32),
        "target_masks": (2, 3, 1, 32, 32),
        "target_K": (2, 3, 3, 3),
        "target_world_to_camera": (2, 3, 4, 4),
    }
    assert all(value.dtype == torch.float32 for name, value in batch.items() if name != "ids")
    assert len(batch["ids"]) == 2
    assert 0 <= batch["target_images"].min() <= batch["target_images"].max() <= 1


def test_input_sets_are_left_out_when_nobody_needs_them_and_nothing_else_changes(shards):
    options: dict = {"seed": 0, "micro_batch": 2, "views": 3}
    with (
        BatchLoader(shards, "train", **options) as whole,
        BatchLoader(shards, "train", inputs=False, **options) as some,
    ):
        batch, without = next(whole), next(some)
    assert {name for name in batch if not name.startswith("input_")} == set(without)
    assert batch["ids"] == without["ids"]
    assert torch.equal(batch["target_images"], without["target_images"])
    subject = open_shards(shards, "train").read(batch["ids"][0].split("/")[0])
    assert torch.equal(without["identity"][0], subject.input_sets[0].identity)


def test_several_expressions_of_an_example_are_rows_one_after_the_other(wide):
    options: dict = {"seed": 0, "micro_batch": 2, "views": 3}
    with (
        BatchLoader(wide, "train", expressions=3, **options) as several,
        BatchLoader(wide, "train", expressions=3, raw=True, **options) as raw,
        BatchLoader(wide, "train", **options) as single,
    ):
        batch, one, floats = next(several), next(single), to_float(next(raw))
    for name in one:
        if name.startswith("input_"):
            assert torch.equal(batch[name], one[name])
    assert torch.equal(batch["expression"][::3], one["expression"])
    assert batch["target_images"].shape == (6, 3, 3, 32, 32)
    assert batch["identity"].shape == (6, 10)
    assert torch.equal(batch["identity"][:3], one["identity"][:1].expand(3, -1))
    assert torch.equal(batch["target_images"], floats["target_images"])
    shards = open_shards(wide, "train")
    for row, name in enumerate(batch["ids"]):
        subject, timestep, inputs, rest = name.split("/")
        cameras = rest.split("@")[0].split(",")
        assert name.split("@")[1] == batch["ids"][row // 3 * 3].split("@")[1]
        assert inputs == batch["ids"][row // 3 * 3].split("/")[2]
        target = next(t for t in shards.read(subject).targets if t.timestep == timestep)
        images = target.images([target.camera_ids.index(c) for c in cameras])
        assert torch.equal(batch["target_images"][row], images)
        assert torch.equal(batch["expression"][row], target.expression)
    assert len({name.split("@")[0] for name in batch["ids"]}) == 6


def test_a_batch_is_what_the_plan_says(shards):
    manifest = Manifest.load(shards)
    opened = open_shards(shards, "train")
    with BatchLoader(shards, "train", seed=3, micro_batch=3, views=2) as loader:
        for step in range(4):
            batch = next(loader)
            for i, example in enumerate(plan(manifest, "train", seed=3, step=step, micro_batch=3, views=2)):
                info = manifest.split("train")[example.shard]
                data = opened.read(info.subject)
                inputs = next(
                    s
                    for s in data.input_sets
                    if s.provenance["shard"] == info.path
                    and s.provenance["id"].endswith(f"inputs-{example.input_set:03d}")
                )
                timestep = batch["ids"][i].split("/")[1]
                target = next(t for t in data.targets if t.timestep == timestep)
                assert timestep not in inputs.provenance["timesteps"]
                torch.testing.assert_close(batch["input_images"][i], inputs.images)
                torch.testing.assert_close(batch["input_masks"][i], inputs.masks)
                torch.testing.assert_close(batch["input_positions"][i], inputs.positions)
                torch.testing.assert_close(batch["input_confidence"][i], inputs.confidence)
                torch.testing.assert_close(batch["input_K"][i], inputs.cameras.K)
                torch.testing.assert_close(batch["input_world_to_camera"][i], inputs.cameras.world_to_camera)
                torch.testing.assert_close(batch["expression"][i], target.expression)
                torch.testing.assert_close(batch["target_images"][i], target.images(example.views))
                torch.testing.assert_close(batch["target_masks"][i], target.masks(example.views))
                cameras = target.cameras[list(example.views)]
                torch.testing.assert_close(batch["target_K"][i], cameras.K)
                torch.testing.assert_close(batch["target_world_to_camera"][i], cameras.world_to_camera)


def test_raw_batches_are_the_same_in_fewer_bytes(shards):
    options = {"seed": 0, "micro_batch": 2, "views": 3}
    with (
        BatchLoader(shards, "train", **options) as loader,
        BatchLoader(shards, "train", raw=True, **options) as raw,
    ):
        batch, bytes_ = next(loader), next(raw)
    assert bytes_["target_images"].dtype == torch.uint8
    assert bytes_["input_positions"].dtype == torch.float16
    made = to_float(bytes_)
    assert made["ids"] == batch["ids"]
    for name in set(batch) - {"ids"}:
        assert torch.equal(made[name], batch[name]), name
        assert bytes_[name].shape == batch[name].shape
    outside = (batch["target_masks"] == 0).expand_as(batch["target_images"])
    assert (batch["target_images"][outside] == 0).all()


def test_resuming_equals_never_having_stopped(shards):
    straight = ids(shards, 12)
    for k in (1, 5, 11):
        assert ids(shards, k) + ids(shards, 12 - k, start=k) == straight


def test_threads_and_prefetch_change_nothing(shards):
    straight = ids(shards, 8, threads=1, prefetch=0)
    assert ids(shards, 8, threads=2) == straight
    assert ids(shards, 8, threads=5, prefetch=7) == straight


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_interleave_to_the_order_of_one(shards, world_size):
    one = [name for batch in ids(shards, 4 * world_size) for name in batch]
    ranks = [ids(shards, 4, world_size=world_size, rank=rank) for rank in range(world_size)]
    assert [name for step in zip(*ranks, strict=True) for batch in step for name in batch] == one


def test_it_can_start_anywhere(shards):
    assert ids(shards, 1, start=10**7)[0][0].endswith(f"@{2 * 10**7}")


def test_a_shard_cut_short_after_the_start_ends_with_a_sentence(tmp_path):
    shards = pack_tiny(tmp_path, subjects=2, heldout=1, views=4, size=24)
    loader = BatchLoader(shards, "train", seed=0, micro_batch=1, views=2)
    next(loader)
    path = shards / "s00-0000.tar"
    path.write_bytes(path.read_bytes()[:6000])
    with pytest.raises(UserError, match=r"s00-0000.tar is cut short"):
        deque(loader, maxlen=0)
    loader.close()


def test_a_damaged_picture_ends_with_a_sentence(tmp_path):
    shards = pack_tiny(tmp_path, subjects=1, heldout=0, views=2, size=24, n_inputs=2)
    path = shards / "s00-0000.tar"
    content = bytearray(path.read_bytes())
    at = -1
    while (at := content.find(b"\xff\xd8\xff", at + 1)) >= 0:
        content[at : at + 3] = b"bad"
    path.write_bytes(content)
    with (
        BatchLoader(shards, "train", seed=0, micro_batch=1, views=2) as loader,
        pytest.raises(UserError, match=r"s00-0000.tar: inputs-.*jpg is not a readable JPEG"),
    ):
        next(loader)


def test_too_many_views_are_a_sentence(shards):
    with pytest.raises(UserError, match="6 views where 7 are asked for"):
        BatchLoader(shards, "train", seed=0, micro_batch=1, views=7)


def test_a_split_that_is_not_there_is_a_sentence(shards):
    with pytest.raises(UserError, match="no split 'test'"):
        BatchLoader(shards, "test", seed=0, micro_batch=1)


def test_no_thread_is_left_behind(shards):
    before = threading.active_count()
    loader = BatchLoader(shards, "train", seed=0, micro_batch=2, views=3, threads=3)
    next(loader)
    assert threading.active_count() > before
    assert loader.wait_seconds > 0
    loader.close()
    assert threading.active_count() == before


def test_no_loaded_subject_is_held_out(shards):
    manifest = Manifest.load(shards)
    for split in ("train", "heldout"):
        with BatchLoader(shards, split, seed=0, micro_batch=4, views=2) as loader:
            names = {name.split("/")[0] for _ in range(10) for name in next(loader)["ids"]}
        assert names == set(manifest.subjects(split))


RANK = """
import json, sys
from shards import BatchLoader

folder, rank, start, stop, threads = sys.argv[1], *map(int, sys.argv[2:])
with BatchLoader(
    folder, "train", seed=5, micro_batch=2, views=3, world_size=2, rank=rank, start=start, threads=threads
) as loader:
    print(json.dumps([next(loader)["ids"] for _ in range(start, stop)]))
"""


@pytest.mark.e2e
def test_two_processes_resume_to_the_order_of_one(shards):
    def started(rank, start, stop, threads):
        words = [sys.executable, "-c", RANK, str(shards), *map(str, (rank, start, stop, threads))]
        return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)

    processes = [
        [started(rank, 0, 4, 2), started(rank, 4, 9, 3)] for rank in (0, 1)
    ]  # other threads after the stop
    ranks = [
        [step for process in parts for step in json.loads(process.communicate()[0])] for parts in processes
    ]
    assert all(process.returncode == 0 for parts in processes for process in parts)
    one = [name for batch in ids(shards, 18) for name in batch]
    assert [name for step in zip(*ranks, strict=True) for batch in step for name in batch] == one
