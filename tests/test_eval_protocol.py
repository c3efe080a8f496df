"""Protocols: ids, files, and which timesteps and cameras they choose."""

import json
import math
from dataclasses import fields, replace

import pytest
import torch

from avatars.cameras import Cameras
from avatars.errors import UserError
from eval.metrics import PSNR, SSIM
from eval.protocol import (
    ALL_METRICS,
    Protocol,
    choose_timesteps,
    choose_views,
    frontal_first,
    head_directions,
    read_protocol,
    write_protocol,
)

PROTOCOL = Protocol("p", "heldout", ("a", "b"), "0" * 12, (48, 64))


def dome(directions: list[tuple[float, float, float]]) -> Cameras:
    positions = torch.nn.functional.normalize(torch.tensor(directions, dtype=torch.float32), dim=-1)
    K = torch.tensor([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    return Cameras.look_at(K, positions, torch.zeros(3), torch.tensor([0.0, 1.0, 0.0]))


def test_every_field_changes_the_id():
    other = {
        "name": "q",
        "split": "train",
        "subjects": ("a",),
        "data": "1" * 12,
        "size": (64, 48),
        "input_set": 1,
        "inputs": 3,
        "crop": "x",
        "last": 500,
        "cameras": ("c0",),
        "input_cameras": True,
        "timesteps": 3,
        "timestep_rule": "x",
        "views": 4,
        "view_rule": "x",
        "background": (1.0, 1.0, 1.0),
        "mask_rule": "x",
        "color_space": "linear",
        "rounding": "none",
        "seed": 1,
        "metrics": (PSNR, SSIM),
    }
    assert set(other) == {field.name for field in fields(Protocol)}
    ids = [PROTOCOL.id, *(replace(PROTOCOL, **{name: value}).id for name, value in other.items())]
    assert len(set(ids)) == len(ids)


def test_another_network_or_another_definition_is_another_protocol():
    for index, metric in enumerate(ALL_METRICS):
        changed = replace(metric, weights=(*metric.weights, ("extra.pth", "00")))
        metrics = (*ALL_METRICS[:index], changed, *ALL_METRICS[index + 1 :])
        assert replace(PROTOCOL, metrics=metrics).id != PROTOCOL.id


def test_the_id_is_the_same_everywhere():
    plain = Protocol("p", "heldout", ("a",), "0", (8, 8), metrics=(replace(PSNR, text="t"),))
    assert plain.id == "74626aa92d58"


def test_a_file_gives_the_same_protocol_back(tmp_path):
    write_protocol(PROTOCOL, tmp_path / "p.json")
    assert read_protocol(tmp_path / "p.json") == PROTOCOL


def test_a_file_edited_after_its_id_was_written_is_refused(tmp_path):
    path = tmp_path / "p.json"
    write_protocol(PROTOCOL, path)
    values = json.loads(path.read_text())
    values["views"] = 4
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was edited after its id was written"):
        read_protocol(path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"id": "x"}', '{"id": "x", "metrics": [], "color": 1}'])
def test_a_file_that_is_no_protocol_is_refused(tmp_path, text):
    (tmp_path / "p.json").write_text(text)
    with pytest.raises(UserError, match="is not a protocol file"):
        read_protocol(tmp_path / "p.json")
    with pytest.raises(UserError, match="is not a protocol file"):
        read_protocol(tmp_path / "absent.json")


def test_an_empty_split_has_no_protocol():
    with pytest.raises(UserError, match="'heldout' is empty"):
        replace(PROTOCOL, subjects=())
    with pytest.raises(UserError, match="distinct keys"):
        replace(PROTOCOL, metrics=(PSNR, PSNR))
    with pytest.raises(UserError, match="negative"):
        replace(PROTOCOL, views=-1)


def test_timesteps_leave_the_input_out_and_keep_an_even_stride():
    names = [f"{i:03d}" for i in range(10)]
    assert choose_timesteps(names, ["000", "003"], 0) == [1, 2, 4, 5, 6, 7, 8, 9]
    assert choose_timesteps(names, ["000", "003"], 2) == [4, 8]
    assert choose_timesteps(names, [], 10) == list(range(10))
    assert choose_timesteps(names, [], 99) == list(range(10))
    assert choose_timesteps(names, ["elsewhere"], 1) == [5]
    assert choose_timesteps(names, ["003", "008"], 0, last=4) == [6, 7, 9]
    assert choose_timesteps(names, [], 2, last=4) == [7, 9]
    assert choose_timesteps(names, [], 0, last=99) == list(range(10))
    with pytest.raises(UserError, match="No target timestep is left"):
        choose_timesteps(names, names, 3)


def test_views_spread_from_the_front_and_leave_the_input_out():
    ring = dome([(math.sin(a), 0.0, math.cos(a)) for a in (i * math.pi / 4 for i in range(8))])
    assert choose_views(ring, [], 1) == [0]
    assert choose_views(ring, [], 2) == [0, 4]
    assert choose_views(ring, [], 4) == [0, 2, 4, 6]
    assert choose_views(ring, [0], 2) == [1, 5]  # 1 and 7 are equally frontal: the lower index
    assert choose_views(ring, [1, 2], 0) == [0, 3, 4, 5, 6, 7]
    assert frontal_first(ring)[:3] == [0, 1, 7]
    assert frontal_first(ring)[-1] == 4
    torch.testing.assert_close(
        head_directions(ring)[2], torch.tensor([1.0, 0, 0]).double(), atol=1e-6, rtol=0
    )
    with pytest.raises(UserError, match="No target camera is left"):
        choose_views(ring, list(range(8)), 2)


def test_views_are_a_k_farthest_choice():
    torch.manual_seed(0)
    cameras = dome(torch.randn(40, 3).tolist())
    chosen = choose_views(cameras, [3, 5], 6)
    assert len(set(chosen)) == 6
    assert not {3, 5} & set(chosen)
    toward = head_directions(cameras)
    spread = torch.acos((toward[chosen] @ toward[chosen].T - 2 * torch.eye(6)).clamp(-1, 1)).min()
    assert spread > math.radians(45)  # six random ones come to about 15 degrees
