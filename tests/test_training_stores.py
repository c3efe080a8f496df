"""Trainings on shards behind a URL: from a cache or streamed, and with a shard that cannot be read."""

import json
import shutil

import pytest
from ranks import finish, start_several

from shards import Manifest
from train.telemetry import losses

pytestmark = pytest.mark.e2e


def test_shards_behind_a_url_train_like_a_folder(tiny_shards, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_shards, broken)
    victim = Manifest.load(broken).split("train")[0].path
    (broken / victim).write_bytes(bytes((broken / victim).stat().st_size))  # as long as it should be
    cache = ["--data.cache", str(tmp_path / "cache"), "--data.cache-gb", "0.1"]

    def order(name, data, *more):
        run = ["--run", str(tmp_path / name), "--steps", "4", "--checkpoint.every", "4"]
        return ["avat3r-tiny", "--data", data, *run, *more]

    orders = [
        order("folder", str(tiny_shards)),
        order("cached", tiny_shards.as_uri(), *cache),
        order("streamed", tiny_shards.as_uri()),
        order("tolerant", broken.as_uri(), "--data.tolerate", "1"),
        order("strict", broken.as_uri()),
    ]
    status, output = finish(start_several(orders, tmp_path / "orders.json", None))
    assert status == 0, output
    straight = losses(tmp_path / "folder")
    assert len(straight) == 4
    assert losses(tmp_path / "cached") == losses(tmp_path / "streamed") == straight
    assert list((tmp_path / "cache").glob("*.tar"))
    # A shard that cannot be read is put aside with a word where that is asked for, and ends the run elsewhere.
    assert len(losses(tmp_path / "tolerant")) == 4, output[-3000:]
    assert f"{victim} is put aside (1 of 1)" in output
    told = [json.loads(line) for line in (tmp_path / "tolerant/logs/rank0.jsonl").read_text().splitlines()]
    assert [event["shard"] for event in told if event.get("event") == "shard put aside"] == [victim]
    assert not (tmp_path / "strict" / "export").exists()
    assert victim in output.splitlines()[-1]
