"""Real trainings of a tiny network: two ranks under the DeepSpeed launcher, killed, resumed, refused."""

import fcntl
import json
import math
import os
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import finish, kill_group_when, start

from avatars.avat3r import Avat3rMethod
from launch.recipes import RECIPES, find_recipe
from train.checkpoint import latest
from train.config import OptimizerConfig, learning_rate
from train.deepspeed_config import check_top_level, deepspeed_json
from train.endings import SharedFailure
from train.guards import require_finite
from train.tasks import task_for
from train.telemetry import losses

GOLDEN = Path(__file__).parent / "golden" / "avat3r-tiny.json"

pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def straight(tiny_shards, tmp_path_factory):
    """Twenty steps that nothing interrupts."""
    run = tmp_path_factory.mktemp("straight") / "run"
    status, output = finish(start(tiny_shards, run))
    assert status == 0, output
    return run


@pytest.mark.world_size(2)
def test_training_learns_and_exports(straight):
    trace = losses(straight)
    assert len(trace) == 20
    assert sum(trace[-5:]) < sum(trace[:5])
    assert latest(straight)[1].step == 20
    kept = sorted(f.name for f in (straight / "checkpoints").glob("step-*"))
    assert kept == ["step-00000010", "step-00000020"]
    for name in ("initial", "export"):
        assert Avat3rMethod.load(straight / name).expression_kind == "arkit-52"
    start_state = Avat3rMethod.load(straight / "initial").model.state_dict()
    end_state = Avat3rMethod.load(straight / "export").model.state_dict()
    assert any(not torch.equal(start_state[n], end_state[n]) for n in start_state)


@pytest.mark.world_size(2)
def test_the_loss_trace_is_the_golden_one(straight):
    trace = losses(straight)
    if os.environ.get("HEADSPLAT_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps([round(value, 6) for value in trace]) + "\n")
    golden = json.loads(GOLDEN.read_text())
    # Processors round sums differently; twenty steps of training make a little of it, a change of meaning makes more.
    assert trace == pytest.approx(golden, rel=5e-3)


@pytest.mark.world_size(2)
def test_a_killed_run_goes_on_as_if_it_had_not_been(straight, tiny_shards, tmp_path):
    run = tmp_path / "run"
    first = start(tiny_shards, run)
    kill_group_when(first, run / "checkpoints" / "LATEST")
    assert not (run / "export").exists()
    step = latest(run)[1].step
    status, output = finish(start(tiny_shards, run))
    assert status == 0, output
    assert f"resuming {run} at step {step} of 20" in output
    assert losses(run) == losses(straight)


@pytest.mark.world_size(2)
def test_a_network_that_diverges_stops_the_run(straight, tiny_shards, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    status, output = finish(
        start(tiny_shards, run, "--steps", "30", "--optimizer.lr", "1e30", "--optimizer.clip", "0")
    )
    assert status != 0
    assert "headsplat: " in output
    assert "The last checkpoint is whole" in output
    assert "Traceback" not in output
    assert latest(run)[1].step == 20


def test_a_loss_that_is_not_finite_names_the_examples(monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)

    def gather(reports, own):
        reports[:] = [own, (0.5, ["s01-t00002"])]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    require_finite("loss", 0.5, 0.5, ["s00-t00001"], step=3)
    with pytest.raises(
        SharedFailure, match=r"loss is nan at step 4, from the examples s00-t00001\. The last"
    ):
        require_finite("loss", math.nan, math.nan, ["s00-t00001"], step=3)


def test_no_space_keeps_the_older_checkpoint(straight, tiny_shards, tmp_path):
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=6m tmpfs {tmp_path} 2>/dev/null") != 0:
        pytest.skip("needs the right to mount a small file system")
    try:
        run = tmp_path / "run"
        shutil.copytree(straight / "checkpoints" / "step-00000010", run / "checkpoints" / "step-00000010")
        (run / "checkpoints" / "LATEST").write_text("step-00000010\n")
        status, output = finish(start(tiny_shards, run))
        assert status != 0
        assert "headsplat: No space for a checkpoint" in output
        assert "The checkpoint of step 10 is whole" in output
        assert "Traceback" not in output
        assert latest(run)[1].step == 10
    finally:
        os.system(f"umount {tmp_path}")


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["--model.width", "96", "--model.upsample-min-width", "96"], "checkpoint of another model"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_does_not_fit_is_told_once(straight, tiny_shards, tmp_path, overrides, sentence):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    status, output = finish(start(tiny_shards, run, *overrides, ranks=None))
    assert status == 1
    assert sentence in output
    assert output.count("headsplat:") == 1
    assert "Traceback" not in output


def test_a_run_folder_that_is_in_use(tiny_shards, tmp_path):
    with (tmp_path / "lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        status, output = finish(start(tiny_shards, tmp_path, ranks=None))
    assert status == 1
    assert f"Another training is running in {tmp_path}" in output
    assert "Traceback" not in output


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_built(name):
    config = find_recipe(name)
    with torch.device("meta"):
        module = task_for(config).build()
    assert sum(p.numel() for p in module.parameters()) > 1000
    values = deepspeed_json(config, 8)
    assert values["train_batch_size"] == 8 * config.accumulate * config.data.micro_batch


def test_the_learning_rate_is_a_function_of_the_step():
    config = OptimizerConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr_fraction=0.1)
    rates = [learning_rate(step, config, 24) for step in range(25)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(a > b for a, b in pairwise(rates[4:]))
    assert math.isclose(rates[24], 0.1)
    assert learning_rate(10**6, replace(config, schedule="constant"), 24) == 1.0


def test_a_misspelt_deepspeed_key_is_refused():
    with pytest.raises(Exception, match="zero_optimisation"):
        check_top_level({"zero_optimisation": {}})
