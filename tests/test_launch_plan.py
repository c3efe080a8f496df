"""The capacity plan: against what a real step of the tiny recipe counts and keeps, and its arithmetic."""

import json
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from avatars.errors import UserError
from launch.cli import main
from launch.footprint import LiveBytes
from launch.plan import (
    DEVICES,
    GIB,
    LINKS,
    Need,
    data_of,
    make_plan,
    measure_need,
    plan_seconds,
    sent_bytes,
    state_bytes,
)
from launch.recipes import find_recipe
from shards import BatchLoader
from train.tasks import task_for


def test_live_bytes_counts_what_is_alive():
    with LiveBytes() as meter:
        first = torch.empty(1000)
        second = first * 2
        view = second.view(10, 100)
        assert meter.alive == 8000
        del first, second
        assert meter.alive == 4000  # the view keeps its storage
        del view
    assert meter.alive == 0
    assert meter.peak == 8000


@pytest.mark.parametrize(("views", "precision"), [(4, "fp32"), (8, "fp32"), (4, "bf16")])
def test_the_plan_is_within_15_percent_of_a_real_step(views, precision, tiny_shards):
    base = find_recipe("avat3r-tiny")
    config = replace(base, precision=precision, data=replace(base.data, views=views))
    need = measure_need(config)
    module = task_for(config).build().to(torch.bfloat16 if precision == "bf16" else torch.float32)
    loader = BatchLoader(
        tiny_shards, "train", seed=0, micro_batch=1, world_size=1, rank=0, start=0, views=views
    )
    batch = next(iter(loader))
    with FlopCounterMode(display=False) as counter:
        module(batch | {"progress": 0.0})[0].backward()
    assert need.flops == pytest.approx(counter.get_total_flops(), rel=0.15)
    # Gradients are there already, as from the second micro-batch on, so that only activations come and go.
    with LiveBytes() as meter:
        loss, _ = module(batch | {"progress": 0.0})
        loss.backward()
    assert need.activations == pytest.approx(meter.peak, rel=0.15)


NEED = Need(
    parameters=10**8,
    flops=1e12,
    flops_done=1.2e12,
    network_saved=1 * GIB,
    network_peak=1.5 * GIB,
    loss_saved=0.0,
    loss_peak=0.25 * GIB,
    rendered=0.5 * GIB,
    inputs=4,
    prior_bytes=8.0 * (4 * 512**2 + 1920 * 32**2),
)


def planned(nodes=1, need=NEED, link="ib-200", store=1e12, **changes):
    config = replace(find_recipe("avat3r"), **changes)
    return make_plan(
        config, need, data_of(config, None), DEVICES["a100-80"], LINKS[link], nodes, 8, 0.5, store
    )


def test_memory_by_stage_is_zeros_published_arithmetic():
    # ZeRO (arXiv 1910.02054), figure 1: 7.5 B parameters, 64 ranks, K = 12: 120, 31.4, 16.6 and 1.9 GB.
    published = {0: 120e9, 1: 31.4e9, 2: 16.6e9, 3: 1.9e9}
    for stage, total in published.items():
        found = state_bytes(7_500_000_000, "bf16", stage, 64, bucket=0)
        theirs = found["weights"] + found["gradients"] + found["optimiser"]
        assert theirs == pytest.approx(total, rel=0.02)


def test_communication_is_the_ring_algorithms():
    assert sent_bytes(10**9, "bf16", 1, 2) == pytest.approx(2e9)
    assert sent_bytes(10**9, "bf16", 3, 4) == pytest.approx(4.5e9)
    assert sent_bytes(10**9, "fp32", 0, 1) == 0


def test_what_limits_is_told():
    assert planned().limit.startswith("arithmetic")
    assert planned(8, link="eth-10").limit.startswith("communication")
    assert planned(need=replace(NEED, parameters=5 * 10**9), zero_stage=0).limit.startswith("memory")
    assert planned(store=1e6).limit.startswith("reading")


def test_time_and_cost_follow_from_the_step():
    plan = planned(8)
    assert plan.ranks == 64
    assert plan.compute_seconds == pytest.approx(1.2e12 / (312e12 * 0.5))
    assert plan.days == pytest.approx(3_500_000 * plan.step_seconds / 86400)
    assert plan.device_hours == pytest.approx(plan.days * 24 * 64)
    assert plan.examples_per_second < 64 / plan.compute_seconds


def test_the_shard_plan_of_the_papers_size_is_quick():
    ready, each = plan_seconds(512, subjects=20)
    assert 0 < each < ready


def test_the_command_prints_curve_and_json(tmp_path, capsys):
    words = ["plan", "avat3r-tiny", "--nodes", "1,8", "--chart", str(tmp_path / "curve.png")]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "what limits" in shown
    assert "of linear" in shown
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert main([*words, "--json", "--args=--data.views 8"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["ranks"] for entry in told] == [8, 64]
    assert set(told[0]["memory_by_stage"]) == {"ZeRO 0", "ZeRO 1", "ZeRO 2", "ZeRO 3"}


def test_a_plan_reads_the_amounts_from_shards(tiny_shards):
    data = data_of(find_recipe("avat3r-tiny"), tiny_shards)
    assert data.known
    assert data.stored == sum(f.stat().st_size for f in tiny_shards.glob("*.tar"))
    assert 100 < data.picture_bytes < 20_000


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--nodes", "1,x"], "--nodes is '1,x'"),
        (["--nodes", "0"], "at least 1"),
        (["--share", "2"], "--share is 2"),
    ],
)
def test_a_plan_that_cannot_be_made_is_a_sentence(words, sentence, capsys):
    assert main(["plan", "avat3r-tiny", *words]) == 1
    assert sentence in capsys.readouterr().err


def test_node_counts_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr("launch.plan.measure_need", lambda config: pytest.fail("measured"))
    from launch.plan import plan

    with pytest.raises(UserError, match="--nodes"):
        plan(["avat3r-tiny", "--nodes", "many"])
