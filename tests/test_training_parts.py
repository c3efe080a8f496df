"""The trainer's parts without any training: arithmetic, losses, checkpoint files, refusals."""

import json
import math
import os
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from avatars.errors import UserError
from launch.cli import main
from launch.recipes import RECIPES, find_recipe
from train.checkpoint import Meta, damage, latest, newest_first, prune
from train.config import CheckpointConfig, GuardConfig, LossConfig, accumulation
from train.deepspeed_config import KNOWN_KEYS, deepspeed_json
from train.guards import GradientGate, LossSpikes
from train.loop import accumulate, agree, judge
from train.start import check_precision, find_checkpoint, first_micro_batch
from train.tasks import config_from_json, task_for
from train.telemetry import RunLog
from train.writing import BackgroundWriter, digest, snapshot


def recipe(**changes):
    return replace(find_recipe("avat3r-tiny"), **changes)


# Batch arithmetic and DeepSpeed's JSON


def test_a_batch_becomes_micro_batches():
    assert accumulation(recipe(), 8) == 1
    assert accumulation(recipe(batch=16), 2) == 8
    assert accumulation(recipe(), 1, inherited=2) == 2
    values = deepspeed_json(recipe(batch=16), 2)
    assert values["train_batch_size"] == 16 == values["gradient_accumulation_steps"] * 2


def test_a_batch_that_does_not_divide_is_explained():
    with pytest.raises(UserError) as told:
        accumulation(recipe(batch=9), 2)
    assert "--batch is 9 examples, but 2 ranks of --data.micro-batch 1 compute 2 at once" in str(told.value)
    assert "9 / 2 = 4.50" in str(told.value)
    assert "Take --batch 8 or 10" in str(told.value)
    with pytest.raises(UserError, match="The checkpoint's batch, which a resumed run keeps, is 8 examples"):
        accumulation(recipe(), 3, inherited=8)
    with pytest.raises(UserError, match=r"takes --accumulate 4, and it is 3; leave one of them out"):
        accumulation(recipe(batch=8, accumulate=3), 2)
    with pytest.raises(UserError, match="has consumed 30 examples, which is no multiple of the 4"):
        first_micro_batch(meta(10, examples=30), 4)
    assert first_micro_batch(meta(10, examples=32), 4) == 8


@pytest.mark.parametrize("name", RECIPES)
def test_deepspeed_knows_every_key_that_it_is_given(name):
    # DeepSpeed ignores what it does not know at the top level, and names "auto" only for other libraries.
    import deepspeed.runtime.constants as constants

    names = {value for value in vars(constants).values() if isinstance(value, str)}
    names |= {"zero_optimization", "bf16", "checkpoint", "steps_per_print"}
    assert names >= KNOWN_KEYS
    for stage in range(4):
        values = deepspeed_json(replace(find_recipe(name), zero_stage=stage), 8, universal=True)
        assert values["zero_optimization"] == {"stage": stage}
        assert "auto" not in json.dumps(values)
        assert values["optimizer"]["params"]["torch_adam"] is True


# Recipes


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_json(name):
    config = find_recipe(name)
    assert config_from_json(config.to_json()) == config
    with pytest.raises(UserError, match=r"unknown fields model\.warp"):
        config_from_json(config.to_json() | {"model": config.to_json()["model"] | {"warp": 1}})
    with pytest.raises(UserError, match="of the method 'nerf'; this version trains avat3r"):
        config_from_json(config.to_json() | {"method": "nerf"})


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--optimizer.rate", "1"], "optimizer.rate"),
        (["--steps", "many"], "many"),
        (["--precision", "fp8"], "fp8"),
    ],
)
def test_an_override_that_no_recipe_has(words, told, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["train", "avat3r-tiny", "--data", "d", "--run", "r", *words])
    assert ended.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--ema", "1"], "--ema is 1.0; a decay is from 0"),
        (["--batch", "-1"], "--batch is -1"),
        (["--loss.l1", "-1"], "must not be negative"),
        (["--validation.every", "-1"], "--validation must not be negative"),
        (["--checkpoint.keep", "0"], "--checkpoint.keep is 0 and must be at least 1"),
    ],
)
def test_numbers_that_make_no_sense(words, sentence, capsys):
    try:
        status = main(["train", "avat3r-tiny", "--data", "d", "--run", "r", "--print-config", *words])
    except SystemExit as ended:
        status = ended.code
    assert status != 0
    told = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert sentence in told


def test_print_config_is_what_would_run(capsys):
    assert main(["train", "avat3r-tiny", "--print-config", "--optimizer.lr", "0.5"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["optimizer"]["lr"] == 0.5
    assert config_from_json(told).optimizer.lr == 0.5


# What is found before the first step


def test_missing_weights_of_a_later_phase(monkeypatch):
    monkeypatch.setattr("train.losses.load_lpips", lambda: (None, "vgg16.pth is nowhere."))
    task_for(recipe()).check_weights()
    with pytest.raises(UserError, match=r"--loss\.lpips 0\.01 needs weights at 86% of the steps: vgg16\.pth"):
        task_for(find_recipe("avat3r")).check_weights()


def test_precision_that_the_device_lacks(monkeypatch):
    check_precision(recipe(precision="bf16"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Old GPU")
    with pytest.raises(UserError, match=r"Old GPU has no bf16, .* take --precision fp32"):
        check_precision(recipe(precision="bf16"))
    check_precision(recipe(precision="fp32"))


# The loss


class Distance(nn.Module):
    def __init__(self):
        super().__init__()
        self.filter = nn.Conv2d(3, 4, 3)

    def forward(self, a, b):
        return (self.filter(a) - self.filter(b)).square().mean((1, 2, 3))


def test_lpips_sets_in_where_the_recipe_says(monkeypatch, tiny_shards):
    from shards import BatchLoader

    network = Distance().requires_grad_(False)
    monkeypatch.setattr("train.losses.load_lpips", lambda: (network, ""))
    torch.manual_seed(0)
    with BatchLoader(tiny_shards, "train", seed=0, micro_batch=1, views=2) as loader:
        batch = next(loader)
    module = task_for(recipe(loss=LossConfig(lpips=2.0, lpips_start=0.5))).build()
    early, parts = module(batch | {"progress": 0.49})
    assert "lpips" not in parts
    late, parts = module(batch | {"progress": 0.5})
    assert float((late - early).detach()) == pytest.approx(2.0 * float(parts["lpips"]), rel=1e-4)
    assert not any("lpips" in name for name in module.state_dict())


# Checkpoint files


def meta(step, **changes):
    values = {
        "step": step,
        "examples": step * 2,
        "world_size": 2,
        "batch": 2,
        "config": recipe().to_json(),
        "data": "d",
        "expression_kind": "arkit-52",
        "versions": {},
        "tracking_run": None,
    }
    return Meta(**(values | changes))


def lay_down(run, step, **changes):
    """A checkpoint without tensors."""
    from dataclasses import asdict

    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_bytes(b"state of step %d" % step)
    files = {"state.pt": ((folder / "state.pt").stat().st_size, digest(folder / "state.pt"))}
    (folder / "meta.json").write_text(json.dumps(asdict(meta(step, files=files, **changes))))
    (run / "checkpoints" / "LATEST").write_text(folder.name + "\n")
    return folder


def steps(run):
    return sorted(int(folder.name[5:]) for folder in (run / "checkpoints").glob("step-*"))


def test_the_policy_keeps_the_newest_every_so_many_and_the_best(tmp_path):
    for step, psnr in [(10, 20.0), (20, 25.0), (30, 21.0), (40, 22.0), (50, 23.0), (60, 24.0)]:
        lay_down(tmp_path, step, validation={"psnr": psnr, "lpips": psnr})
    prune(tmp_path / "checkpoints", CheckpointConfig(keep=2, keep_every=30))
    assert steps(tmp_path) == [20, 30, 50, 60]
    prune(tmp_path / "checkpoints", CheckpointConfig(keep=1, best="lpips"))
    assert steps(tmp_path) == [30, 60]
    prune(tmp_path / "checkpoints", CheckpointConfig(keep=1, best="ssim"))
    assert steps(tmp_path) == [60]


def test_a_run_that_goes_back_forgets_what_came_after(tmp_path):
    for step in (10, 20, 30, 15):
        lay_down(tmp_path, step)
    prune(tmp_path / "checkpoints", CheckpointConfig(keep=2))
    assert steps(tmp_path) == [10, 15]


def test_damage_is_named(tmp_path):
    folder = lay_down(tmp_path, 10)
    found = latest(tmp_path)[1]
    assert damage(folder, found) is None
    (folder / "state.pt").write_bytes(b"State of step 10")
    assert damage(folder, found) == "state.pt has changed since it was written"
    (folder / "state.pt").write_bytes(b"short")
    assert damage(folder, found) == "state.pt has 5 bytes instead of 16"
    (folder / "state.pt").unlink()
    assert damage(folder, found) == "state.pt is missing"


def test_a_broken_description_does_not_hide_the_checkpoint_before(tmp_path):
    lay_down(tmp_path, 10)
    (lay_down(tmp_path, 20) / "meta.json").write_text("{")
    lay_down(tmp_path, 30, schema=1)
    said = {folder.name[-2:]: found for folder, found in newest_first(tmp_path)}
    assert "schema 1" in said["30"]
    assert "cannot be read" in said["20"]
    assert latest(tmp_path)[1].step == 10
    found = find_checkpoint(tmp_path, recipe(), "d", 2)
    assert found.meta.step == 10
    assert len(found.remarks) == 2


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": replace(recipe().model, width=128)}, "checkpoint of another model"),
        ({"zero_stage": 2}, "was written at --zero-stage 1 in fp32 and the recipe has 2 in fp32"),
        ({"precision": "bf16"}, "go on as it was"),
    ],
)
def test_a_checkpoint_of_another_recipe(tmp_path, changes, sentence):
    lay_down(tmp_path, 10)
    with pytest.raises(UserError, match=sentence):
        find_checkpoint(tmp_path, recipe(**changes), "d", 2)
    with pytest.raises(UserError, match="trained on other shards"):
        find_checkpoint(tmp_path, recipe(), "other", 2)


def test_what_is_written_is_what_was_there_when_it_was_asked_for(tmp_path):
    writer = BackgroundWriter()
    shared = torch.arange(4.0)
    state = {"a": shared, "b": [shared, {"step": 3}], "view": torch.arange(1000.0)[:2]}
    writer.save(state, str(tmp_path / "state.pt"))
    shared.zero_()
    files = writer.collect()
    assert not writer.busy
    writer.close()
    written = torch.load(tmp_path / "state.pt", weights_only=True)
    assert written["a"].tolist() == [0, 1, 2, 3]
    assert written["b"][1] == {"step": 3}
    size, sha = files["state.pt"]
    assert (size, sha) == ((tmp_path / "state.pt").stat().st_size, digest(tmp_path / "state.pt"))
    assert size < 4000  # not the thousand numbers that the view looks into
    copied = snapshot(state, {})
    assert copied["a"] is copied["b"][0]
    assert copied["a"] is not shared


def test_a_file_that_cannot_be_written_is_told_when_it_is_collected(tmp_path):
    writer = BackgroundWriter()
    writer.save({"a": torch.ones(1)}, str(tmp_path / "nowhere" / "state.pt"))
    with pytest.raises(OSError, match="nowhere"):
        writer.collect()
    writer.close()


def test_the_disk_that_forgets_is_caught(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda file: Path(tmp_path / "state.pt").write_bytes(b"something else"))
    writer = BackgroundWriter()
    writer.save({"a": torch.ones(1)}, str(tmp_path / "state.pt"))
    with pytest.raises(OSError, match="reads back otherwise"):
        writer.collect()
    writer.close()


# A step with examples whose loss is not finite


@pytest.fixture
def alone():
    """A process group of one."""
    from torch import distributed as dist

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Line(nn.Module):
    """The loss is w * x, so the gradient of w is x."""

    device = torch.device("cpu")

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(()))
        self.micro_steps = 0

    def forward(self, batch):
        return self.w * batch["x"], {"l1": batch["x"]}

    def backward(self, loss):
        loss.backward()

    def step(self):
        self.micro_steps += 1


@pytest.fixture
def log(tmp_path):
    with closing(RunLog(tmp_path, 0)) as log:
        yield log


def training_on(values, log, **guard):
    """As much of a training as `accumulate` and `judge` look at."""
    engine = Line()
    config = recipe(accumulate=len(values), guard=GuardConfig(**guard))
    return SimpleNamespace(
        engine=engine,
        config=config,
        accumulate=len(values),
        gate=GradientGate(engine) if config.guard.nonfinite == "skip" else None,
        loader=iter([{"x": torch.tensor(value), "ids": [f"example-{value}"]} for value in values]),
        watch=SimpleNamespace(enter=lambda phase, limit: None),
        spikes=LossSpikes(0.0),
        log=log,
        skips=0,
    )


def test_a_nan_is_left_out_of_the_step_and_told(alone, log, tmp_path, capsys):
    t = training_on([2.0, math.nan, 4.0], log, nonfinite="skip")
    own = accumulate(t, progress=0.0)
    assert t.engine.micro_steps == 2  # the optimiser's own step is the loop's
    assert float(t.engine.w.grad) == 6.0
    assert own.left_out == ["example-nan"]
    means, wishes = agree(own, stop=False, skipped=bool(own.left_out))
    assert means == {"loss": 3.0, "l1": 3.0}
    assert wishes == {"stop": 0.0, "skipped": 1.0}
    judge(t, own, means, skipped=True, step=4)
    assert "step 5: left out example-nan, whose loss is not finite (1 of 10)" in capsys.readouterr().out
    assert json.loads((tmp_path / "logs" / "rank0.jsonl").read_text())["examples"] == ["example-nan"]


@pytest.mark.parametrize(
    ("values", "guard", "sentence"),
    [
        (
            [2.0, math.nan],
            {"nonfinite": "stop"},
            "The loss is nan at step 5, from the examples example-2.0, exa",
        ),
        ([math.nan], {"nonfinite": "skip"}, "from the examples example-nan; no example is left"),
        ([2.0, math.inf], {"nonfinite": "skip", "max_skips": 0}, "that is more than --guard.max-skips 0"),
    ],
)
def test_a_nan_ends_the_run_where_the_policy_says(alone, log, values, guard, sentence):
    t = training_on(values, log, **guard)
    own = accumulate(t, progress=0.0)
    means, wishes = agree(own, skipped=bool(own.left_out))
    with pytest.raises(UserError) as told:
        judge(t, own, means, wishes["skipped"] > 0, step=4)
    assert sentence in str(told.value)
    assert "The last checkpoint is whole" in str(told.value)
