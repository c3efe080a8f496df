"""What a step's arithmetic is counted as, against a count by hand."""

from dataclasses import replace

import pytest
import torch

from launch.recipes import RECIPES, find_recipe
from train.flops import measured_peak, step_flops
from train.tasks import task_for


def flops(config, **changes):
    return step_flops(task_for(replace(config, model=replace(config.model, **changes))))


def test_a_layer_more_costs_what_its_matrices_say():
    config = find_recipe("avat3r-tiny")
    model = config.model
    tokens, width = 4 * model.grid**2, model.width
    linear = 2 * tokens * 12 * width**2  # q, k, v, out and an MLP four times as wide
    attention = 2 * 2 * tokens**2 * width
    extra = flops(config, self_layers=2) - flops(config, self_layers=1)
    # Backward does the linear layers twice more; attention's recomputes the scores, 2.5 times where it is fused.
    assert 3 * (linear + attention) <= extra <= 3 * linear + 3.5 * attention


def test_checkpointing_counts_only_where_it_is_asked_for():
    config = find_recipe("avat3r-tiny")
    task = task_for(replace(config, model=replace(config.model, checkpoint_activations=True)))
    assert step_flops(task) == flops(config)
    assert 1.02 < step_flops(task, recompute=True) / step_flops(task) < 4 / 3 + 0.01


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_can_be_counted(name):
    assert step_flops(task_for(find_recipe(name))) > 1e7


def test_the_peak_is_measured_once():
    rate = measured_peak("cpu", torch.float32)
    assert rate > 1e8
    assert measured_peak("cpu", torch.float32) == rate
