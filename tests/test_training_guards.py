"""Each way in which a group of ranks gets stuck ends on every rank, with a sentence that names the cause."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from avatars.errors import UserError
from train.config import GuardConfig
from train.guards import DATA, LossSpikes, StopSignal, Word, overdue

WATCHED = Path(__file__).parent / "watched.py"


SENTENCES = {
    "none": ("finished", "finished"),
    "die": ("Rank 1 on", ""),
    "silence": ("has not been heard of for", ""),
    "stall": ("for data: look at the disk", "for data: look at the disk"),
    "hang": ("The step hangs: ", "rank 1 on"),
    "refuse": ("cannot read its shard", "cannot read its shard"),
}


@pytest.mark.slow
def test_each_trouble_ends_every_rank_with_its_name(tmp_path):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(WATCHED.parent.parent)}
    subprocess.run([sys.executable, str(WATCHED), str(tmp_path)], env=environment, check=True)
    statuses = json.loads((tmp_path / "statuses.json").read_text())
    for trouble, sentences in SENTENCES.items():
        for rank, sentence in enumerate(sentences):
            output = (tmp_path / f"{trouble}-{rank}.txt").read_text()
            status = statuses[f"{trouble}-{rank}"]
            assert sentence in output, (trouble, rank, output)
            assert (status == 0) == (trouble == "none"), (trouble, rank, status, output)
            assert "Traceback" not in output, (trouble, rank, output)
            assert ("finished" in output) == (trouble == "none")


def words(**changes):
    now = time.monotonic()
    made = {rank: Word(f"host{rank}", "forward and backward", now, 10.0, now) for rank in range(3)}
    for name, values in changes.items():
        for key, value in values.items():
            setattr(made[int(name[1:])], key, value)
    return made, now


def test_all_is_well_while_nobody_is_late():
    made, now = words()
    assert overdue(made, now + 5, silence=25) is None


def test_a_starved_rank_is_named_and_not_those_that_wait_for_it():
    made, now = words()
    made[2].phase, made[2].limit = DATA, 6.0
    assert "Rank 2 on host2 has waited 11 s for data" in overdue(made, now + 11, silence=25)


def test_a_silent_rank_is_named():
    made, now = words()
    for rank in (0, 2):
        made[rank].heard = now + 30
    assert overdue(made, now + 30, silence=25).startswith("Rank 1 on host1 has not been heard of for 30 s")


def test_a_spike_is_told_once_there_is_something_to_compare_with():
    spikes = LossSpikes(factor=3.0)
    assert spikes.look(100.0) is None
    assert [spikes.look(1.0) for _ in range(30)] == [None] * 30
    assert spikes.look(2.9) is None
    assert spikes.look(3.1) == 1.0
    assert LossSpikes(factor=0.0).look(1.0) is None


def test_the_stop_file_is_obeyed_once(tmp_path):
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    try:
        stop = StopSignal(tmp_path)
        assert not stop.asked
        (tmp_path / "stop").touch()
        assert stop.asked
        stop.obeyed()
        assert not stop.asked
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    finally:
        signal.signal(signal.SIGTERM, handlers[0])
        signal.signal(signal.SIGINT, handlers[1])


def test_limits_that_contradict_each_other_are_refused():
    with pytest.raises(UserError, match=r"--guard\.data-seconds must be less"):
        GuardConfig(data_seconds=700)
    with pytest.raises(UserError, match=r"--guard\.silence-seconds must be more than 0"):
        GuardConfig(silence_seconds=0)
