"""Colour changes of training examples."""

import pytest
import torch

from avatars.errors import UserError
from train.augment import jittered
from train.config import DataConfig


def batch(ids=("a/0/inputs-000/0,1@3", "b/0/inputs-000/0,1@4")):
    generator = torch.Generator().manual_seed(0)
    made = {
        "input_images": torch.rand(len(ids), 4, 3, 8, 8, generator=generator),
        "target_images": torch.rand(len(ids), 2, 3, 8, 8, generator=generator),
        "expression": torch.zeros(len(ids), 5),
        "ids": list(ids),
    }
    made["target_images"][:, 0] = made["input_images"][:, 0]
    made["input_images"][..., 0] = 0
    return made


def test_none_by_default_and_nothing_is_touched():
    before = batch()
    assert jittered(before, DataConfig().color_jitter) is before


def test_one_change_for_all_pictures_of_an_example():
    before = batch()
    after = jittered(before, 0.5)
    assert torch.equal(after["input_images"][:, 0, ..., 1:], after["target_images"][:, 0, ..., 1:])
    assert not after["input_images"][..., 0].any()  # black stays black
    assert (after["input_images"] >= 0).all()
    assert (after["input_images"] <= 1).all()
    changes = [(after["target_images"][i] - before["target_images"][i]).abs().mean() for i in range(2)]
    assert min(changes) > 0.01
    assert changes[0] != changes[1]
    assert after["expression"] is before["expression"]


def test_a_change_belongs_to_the_example_and_to_no_batch():
    both = jittered(batch(), 0.5)
    alone = jittered({name: value[1:] for name, value in batch().items()}, 0.5)
    assert torch.equal(both["target_images"][1:], alone["target_images"])
    again = jittered(batch(ids=("a/0/inputs-000/0,1@9", "b/0/inputs-000/0,1@4")), 0.5)
    assert torch.equal(both["target_images"][1], again["target_images"][1])
    assert not torch.equal(both["target_images"][0], again["target_images"][0])


def test_several_targets_of_an_example_change_as_its_inputs_do():
    before = batch(ids=("a/0/inputs-000/0,1@3", "b/0/inputs-000/0,1@4"))
    pictures = before["input_images"][:, :2].repeat_interleave(3, 0)
    names = [f"{name[0]}/{t}/{name[4:]}" for name in before["ids"] for t in range(3)]
    after = jittered(before | {"target_images": pictures, "ids": names}, 0.5)
    assert torch.equal(after["target_images"], after["input_images"][:, :2].repeat_interleave(3, 0))


def test_batches_without_input_pictures_and_strengths_that_are_none():
    before = batch()
    del before["input_images"]
    assert "input_images" not in jittered(before, 0.5)
    with pytest.raises(UserError, match=r"--data\.color-jitter is -1"):
        DataConfig(color_jitter=-1)
