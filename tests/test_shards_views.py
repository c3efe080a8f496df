import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shards.draws import Draws
from shards.packing import draw_input_timesteps
from shards.views import facing, k_farthest, view_directions


def directions(seed: int, count: int) -> np.ndarray:
    towards = np.random.default_rng(seed).normal(size=(count, 3))
    return towards / np.linalg.norm(towards, axis=1, keepdims=True)


def test_draws_are_pinned_for_ever():
    # A change here changes every shard and every training order: it needs a new manifest schema.
    assert Draws("pinned", 3).sample(100, 5) == [11, 93, 74, 41, 10]
    assert Draws("pinned", 4).sample(100, 5) != [11, 93, 74, 41, 10]


@given(st.integers(0, 1000), st.integers(1, 60), st.data())
def test_samples_are_different_numbers_in_range(seed, n, data):
    count = data.draw(st.integers(0, n))
    drawn = Draws(seed).sample(n, count)
    assert len(set(drawn)) == count
    assert all(0 <= i < n for i in drawn)


def test_samples_are_uniform():
    counts = np.zeros((6, 6))
    for seed in range(3000):
        for place, value in enumerate(Draws("uniform", seed).permutation(6)):
            counts[place, value] += 1
    chi_square = ((counts - 500) ** 2 / 500).sum()
    assert chi_square < 60  # 25 degrees of freedom: exceeded once in ten thousand


def test_keys_do_not_run_together():
    assert Draws(1, 23).word() != Draws(12, 3).word()
    assert Draws("1").word() != Draws(1).word()


@settings(max_examples=50)
@given(st.integers(0, 1000), st.integers(4, 40), st.integers(1, 6))
def test_k_farthest_is_among_the_k_farthest(seed, count, k):
    towards = directions(seed, count)
    chosen = k_farthest(towards, 4, k, Draws(seed))
    assert len(set(chosen)) == 4
    for i in range(1, 4):
        nearest = np.arccos(np.clip(towards @ towards[chosen[:i]].T, -1, 1)).min(axis=1)
        better = [v for v in range(count) if v not in chosen[:i] and nearest[v] > nearest[chosen[i]] + 1e-6]
        assert len(better) < k


def test_farthest_point_sampling_by_hand():
    angles = np.radians([0, 10, 20, 90, 180])
    towards = np.stack([np.cos(angles), np.sin(angles), 0 * angles], 1)
    for seed in range(20):
        chosen = k_farthest(towards, 3, 1, Draws(seed))
        if chosen[0] == 0:
            assert chosen == [0, 4, 3]


def test_only_allowed_cameras_are_drawn():
    towards = directions(0, 30)
    allowed = facing(towards, 80)
    assert 4 <= allowed.sum() < 30
    for seed in range(20):
        assert allowed[k_farthest(towards, 4, 3, Draws(seed), allowed)].all()
    with pytest.raises(ValueError, match="too few"):
        k_farthest(towards, 4, 3, Draws(0), np.arange(30) < 3)


def test_view_directions_point_from_the_head_to_the_camera():
    pose = np.eye(4)
    pose[:3, :3] = np.diag([1.0, -1.0, -1.0])  # looks along -z of the head frame, at the face
    pose[2, 3] = 2.0
    np.testing.assert_allclose(view_directions(pose[None]), [[0, 0, 1]])
    assert facing(view_directions(pose[None]), 1).all()


@given(st.integers(0, 100), st.integers(5, 30), st.integers(1, 8))
def test_input_timesteps_differ_and_leave_targets(seed, timesteps, input_sets):
    drawn = draw_input_timesteps(timesteps, 4, input_sets, Draws(seed))
    assert all(len(set(steps)) == 4 for steps in drawn)
    in_all = set(range(timesteps)).intersection(*drawn)
    if input_sets >= 5 or (timesteps >= 8 and input_sets >= 2):
        assert not in_all  # every timestep can be the target of some set
