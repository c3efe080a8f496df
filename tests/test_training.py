"""Real trainings of a tiny network: two ranks under the DeepSpeed launcher, killed, resumed, refused."""

import fcntl
import json
import math
import os
import shutil
import signal
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from ranks import finish, kill_group_when, start, start_module, wait_until

from avatars.avat3r import Avat3rMethod
from avatars.errors import UserError
from eval.protocol import synthetic_heldout
from launch.cli import main
from launch.export import export_checkpoint
from launch.recipes import RECIPES, find_recipe
from shards import open_shards
from train.checkpoint import latest
from train.config import OptimizerConfig, learning_rate
from train.deepspeed_config import check_top_level, deepspeed_json
from train.endings import SharedFailure
from train.guards import require_finite
from train.start import find_checkpoint
from train.tasks import config_from_json, task_for
from train.telemetry import losses
from train.validation import METRICS

GOLDEN = Path(__file__).parent / "golden" / "avat3r-tiny.json"

pytestmark = pytest.mark.e2e


def events(run):
    """What rank 0 wrote down, in order."""
    return [json.loads(line) for line in (run / "logs" / "rank0.jsonl").read_text().splitlines()]


def stepped_beyond(run, step):
    """Whether the run has told a step after `step`."""
    log = run / "logs" / "rank0.jsonl"
    return log.is_file() and any(event.get("step", 0) > step for event in events(run))


@pytest.fixture(scope="module")
def straight(tiny_shards, tmp_path_factory):
    """Twenty steps that nothing interrupts, with all that a run can do beside its steps."""
    run = tmp_path_factory.mktemp("straight") / "run"
    extras = ["--ema", "0.9", "--profile", "--validation.every", "10", "--validation.views", "2"]
    status, output = finish(start(tiny_shards, run, *extras))
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
def test_validation_has_the_protocol_and_the_pictures_of_an_evaluation(straight, tiny_shards):
    heldout = open_shards(tiny_shards, "heldout")
    protocol = synthetic_heldout(heldout, views=2, timesteps=2, metrics=METRICS)
    told = [event for event in events(straight) if event.get("event") == "validation"]
    assert [event["at_step"] for event in told] == [10, 20]
    assert {event["protocol"] for event in told} == {protocol.id}
    rows = [
        json.loads(row.read_text()) for row in (straight / "validation" / "step-00000020").rglob("row.json")
    ]
    assert [row["protocol_id"] for row in rows] == [protocol.id]
    assert told[-1]["psnr"] == pytest.approx(rows[0]["values"]["psnr"])
    assert latest(straight)[1].validation["psnr"] == told[-1]["psnr"]
    assert list((straight / "validation").rglob("sheet.png"))


@pytest.mark.world_size(2)
def test_a_profile_is_a_trace_and_a_table_of_memory(straight):
    for rank in range(2):
        trace = json.loads((straight / "profile" / f"trace-rank{rank}.json").read_text())
        assert any("mm" in event.get("name", "") for event in trace["traceEvents"])
        assert json.loads((straight / "profile" / f"memory-rank{rank}.json").read_text())[0]["bytes"] > 0


@pytest.mark.world_size(2)
def test_export_writes_what_was_trained(straight, tmp_path, capsys):
    assert main(["export", str(straight), str(tmp_path / "mean")]) == 0
    assert "read back, every name and a forward pass are equal" in capsys.readouterr().out
    assert main(["export", str(straight), str(tmp_path / "plain"), "--no-ema", "--step", "10"]) == 0
    mean, plain, last = (
        Avat3rMethod.load(folder).model.state_dict()
        for folder in (tmp_path / "mean", tmp_path / "plain", straight / "export")
    )
    assert all(torch.equal(mean[name], last[name]) for name in last)
    assert not all(torch.equal(plain[name], last[name]) for name in last)
    description = json.loads((tmp_path / "plain" / "model.json").read_text())
    assert description["provenance"]["step"] == 10
    for words, sentence in [
        ([str(tmp_path / "mean")], "is there already"),
        ([str(tmp_path / "other"), "--step", "7"], "has no checkpoint of step 7; it has 20, 10"),
    ]:
        assert main(["export", str(straight), *words]) == 1
        assert sentence in capsys.readouterr().err


@pytest.mark.world_size(2)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(straight, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(straight, run)
    config = config_from_json(latest(run)[1].config)
    data = latest(run)[1].data
    assert find_checkpoint(run, config, data, 2).meta.step == 20
    weights = next((run / "checkpoints" / "step-00000020").glob("*optim_states.pt"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 1
    weights.write_bytes(content)
    found = find_checkpoint(run, config, data, 2)
    assert found.meta.step == 10
    assert "step-00000020 is damaged" in found.remarks[0]
    assert f"{weights.name} has changed since it was written" in found.remarks[0]
    (run / "checkpoints" / "step-00000010" / "state-rank1.pt").unlink()
    with pytest.raises(UserError, match=r"No checkpoint in .* is whole"):
        find_checkpoint(run, config, data, 2)
    with pytest.raises(UserError, match="is damaged"):
        export_checkpoint(run, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.world_size(2)
def test_sigterm_writes_a_checkpoint_and_is_no_error(tiny_shards, tmp_path):
    words = ["avat3r-tiny", "--data", str(tiny_shards), "--out", str(tmp_path), "--run", "r"]
    words += ["--args=--steps 100000 --checkpoint.every 100000"]
    run = tmp_path / "runs" / "r"
    stopped = []
    for whole_group in (False, True):  # the launcher alone, or everything, as a scheduler does
        process = start_module("launch.cli", ["launch", *words], None)
        wait_until(process, lambda: stepped_beyond(run, sum(stopped[-1:])))
        (os.killpg if whole_group else os.kill)(process.pid, signal.SIGTERM)
        status, output = finish(process)
        assert status == 0, output
        assert "the same command goes on" in output
        assert "Traceback" not in output
        stopped.append(latest(run)[1].step)
        assert events(run)[-1]["event"] == "preempted"
    assert 0 < stopped[0] < stopped[1]
    assert not (run / "stop").exists()


@pytest.mark.world_size(2)
def test_the_loss_trace_is_the_golden_one(straight):
    trace = losses(straight)
    if os.environ.get("HEADSPLAT_WRITE_GOLDEN"):
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(json.dumps([round(value, 6) for value in trace]) + "\n")
    golden = json.loads(GOLDEN.read_text())
    # Processors round sums differently; twenty steps of training make a little of it, a change of meaning makes more.
    assert trace == pytest.approx(golden, rel=5e-3)


@pytest.mark.slow
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


@pytest.mark.slow
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


@pytest.mark.slow
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
