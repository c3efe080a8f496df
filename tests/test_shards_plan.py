import itertools
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avatars.errors import UserError
from shards.manifest import ShardInfo
from shards.plans import Plan


def shard(
    number: int, targets: int, inputs: tuple[tuple[int, ...], ...] = ((),), views: int = 12
) -> ShardInfo:
    return ShardInfo(
        path=f"p{number:03d}.tar",
        subject=f"p{number // 2}",
        bytes=0,
        sha256="",
        index=(0, 0),
        views=(views,) * targets,
        inputs=inputs,
    )


@st.composite
def shard_lists(draw):
    shards = []
    for number in range(draw(st.integers(1, 12))):
        targets = draw(st.integers(1, 20))
        steps = st.lists(st.integers(0, targets - 1), unique=True, max_size=min(4, targets - 1)).map(tuple)
        inputs = draw(st.lists(steps, min_size=1, max_size=3).map(tuple))
        shards.append(shard(number, targets, inputs))
    return shards


@settings(max_examples=60, deadline=None)
@given(shard_lists(), st.integers(0, 5), st.integers(1, 70))
def test_an_epoch_is_covered_exactly(shards, seed, lanes):
    plan = Plan(shards, seed=seed, views=3, lanes=lanes)
    for epoch in range(2):
        examples = [plan.example(epoch * plan.epoch_length + i) for i in range(plan.epoch_length)]
        seen = Counter((e.shard, e.target) for e in examples)
        wanted = {(i, t) for i, s in enumerate(shards) for t in range(s.targets) if t not in s.excluded}
        assert seen == dict.fromkeys(wanted, 1)
        for e in examples:
            assert e.epoch == epoch
            assert e.target not in shards[e.shard].inputs[e.input_set]
            assert len(set(e.views)) == 3
            assert all(0 <= v < 12 for v in e.views)


@settings(max_examples=20, deadline=None)
@given(shard_lists(), st.integers(0, 5), st.integers(1, 3))
def test_the_order_is_the_same_at_any_world_size(shards, seed, micro_batch):
    plan = Plan(shards, seed=seed, views=2)
    length = 64 * micro_batch * 2  # two steps of the largest world
    orders = []
    for world_size in (1, 2, 4, 8, 64):
        steps = length // (world_size * micro_batch)
        batches = [
            [
                plan.batch(step, micro_batch=micro_batch, world_size=world_size, rank=rank)
                for rank in range(world_size)
            ]
            for step in range(steps)
        ]
        assert {len(batch) for ranks in batches for batch in ranks} == {micro_batch}
        orders.append([e for ranks in batches for batch in ranks for e in batch])
    assert all(order == orders[0] for order in orders)


@settings(max_examples=20, deadline=None)
@given(shard_lists(), st.integers(0, 10**6))
def test_any_place_can_be_asked_for_first(shards, position):
    through = Plan(shards, seed=1, views=2)
    for before in (0, position // 2, position + 1):
        through.example(before)
    assert through.example(position) == Plan(shards, seed=1, views=2).example(position)


def test_epochs_and_seeds_differ():
    shards = [shard(i, 10) for i in range(8)]
    plan, other = Plan(shards, seed=0, views=2), Plan(shards, seed=1, views=2)
    order = [
        [(e.shard, e.target) for e in map(p.example, range(start, start + 80))]
        for p, start in ((plan, 0), (plan, 80), (other, 0))
    ]
    assert order[0] != order[1]
    assert order[0] != order[2]


def test_lanes_read_their_shards_from_front_to_back():
    plan = Plan([shard(i, 16) for i in range(16)], seed=0, views=2, lanes=8)
    for lane in range(8):
        read = [plan.example(p) for p in range(lane, plan.epoch_length, 8)]
        for a, b in itertools.pairwise(read):
            assert b.shard != a.shard or b.target == a.target + 1
        assert len({e.shard for e in read}) <= 3


def test_a_batch_mixes_people():
    plan = Plan([shard(i, 64) for i in range(32)], seed=0, views=2)
    people = [plan.shards[e.shard].subject for e in plan.batch(0, micro_batch=16)]
    assert len(set(people)) >= 8


def test_all_views_and_sets_are_used_evenly():
    plan = Plan([shard(0, 2000, ((0,), (1,), (2,), (3,)), views=10)], seed=0, views=2)
    examples = [plan.example(i) for i in range(2000)]
    views = Counter(v for e in examples for v in e.views)
    sets = Counter(e.input_set for e in examples)
    assert all(330 < views[v] < 470 for v in range(10))
    assert all(430 < sets[j] < 570 for j in range(4))


def test_shards_without_an_example_are_refused():
    with pytest.raises(UserError, match="no training example"):
        Plan([shard(0, 2, ((0, 1),))], seed=0)
    with pytest.raises(UserError, match=r"p000.tar has a timestep with 12 views where 13 are asked for"):
        Plan([shard(0, 2)], seed=0, views=13)


def test_a_large_manifest_is_planned_at_any_step_at_once():
    # 244 people of 5,000 timesteps with 80 views, as in Ava-256
    shards = [shard(i, 250, tuple((j, 200 + j) for j in range(8)), views=80) for i in range(244 * 20)]
    plan = Plan(shards, seed=0)
    assert plan.epoch_length == 1_220_000
    batch = plan.batch(10**6, micro_batch=1, world_size=64, rank=63)
    assert batch[0].position == 64 * 10**6 + 63
    assert batch[0].epoch == 52


@settings(max_examples=30, deadline=None)
@given(shard_lists(), st.integers(2, 4))
def test_further_expressions_of_an_example_are_none_of_its_input_set(shards, expressions):
    if any(s.targets - max(map(len, s.inputs)) < expressions for s in shards):
        with pytest.raises(UserError, match=rf"where {expressions} more are asked for"):
            Plan(shards, seed=1, expressions=expressions)
        return
    alone = Plan(shards, seed=1, views=3)
    plan = Plan(shards, seed=1, views=3, expressions=expressions)
    for position in range(plan.epoch_length):
        example, one = plan.example(position), alone.example(position)
        assert one.others == ()
        assert (example.shard, example.target, example.input_set) == (one.shard, one.target, one.input_set)
        targets = {example.target, *example.others}
        assert len(targets) == expressions
        assert not targets & set(shards[example.shard].inputs[example.input_set])


def test_all_further_expressions_are_used_evenly():
    plan = Plan([shard(0, 12, ((0, 1),))], seed=0, views=2, expressions=3)
    drawn = Counter(t for p in range(2000) for t in plan.example(p).others)
    assert set(drawn) == set(range(2, 12))
    assert all(330 < count < 470 for count in drawn.values())
    with pytest.raises(UserError, match="one expression"):
        Plan([shard(0, 12)], seed=0, expressions=0)
