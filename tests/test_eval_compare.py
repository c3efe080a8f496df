"""Intervals, paired tests and failures: what the comparison page claims."""

import json

import numpy as np
import pytest

from avatars.errors import UserError
from eval.compare import differences, interval, paired
from eval.failures import note_failures, read_failures
from eval.published import published


def test_an_interval_is_what_scipy_says():
    from scipy.stats import bootstrap

    values = np.random.default_rng(1).normal(25, 2, 12)
    low, high = interval(values.tolist())
    theirs = bootstrap((values,), np.mean, method="percentile", n_resamples=9999, rng=3).confidence_interval
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=0.06)
    assert interval(values.tolist()) == (low, high)  # the same each time
    assert interval([20.0, 21.0]) is None
    assert interval([20.0, 20.0, 20.0]) == (20.0, 20.0)


def test_an_interval_holds_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(60):
        low, high = interval(rng.normal(0, 1, 24).tolist())
        held += low <= 0 <= high
    assert 51 <= held <= 60  # 95 % of 60 is 57


def test_a_paired_test_counts_signs():
    # All eight subjects lose: of 2^8 signs only two are as extreme.
    worse = paired([20.0 - 0.1 * i for i in range(1, 9)], [20.0] * 8)
    assert worse.mean == pytest.approx(-0.45)
    assert worse.p == pytest.approx(2 / 2**8)
    assert worse.low < worse.mean < worse.high < 0
    # Pairing sees through differences between subjects that dwarf the difference between methods.
    base = np.array([10.0, 20.0, 30.0, 40.0, 50.0, 60.0])
    assert paired((base + 0.1 + 0.01 * np.arange(6)).tolist(), base.tolist()).p == pytest.approx(2 / 2**6)
    assert paired([1.0, 2.0], [1.0, 2.0]).p == 1.0
    assert paired([1.0, -1.0, 1.0, -1.0], [0.0] * 4).p == 1.0


@pytest.mark.parametrize("subjects", [7, 40])
def test_p_is_what_scipy_says(subjects):
    from scipy.stats import permutation_test

    rng = np.random.default_rng(5)
    shifts = (0.0, 0.2, 0.4)
    columns = [rng.normal(shift, 1, subjects).tolist() for shift in shifts]
    found = differences(columns, [[0.0] * subjects] * len(shifts))
    for values, ours in zip(columns, found, strict=True):
        theirs = permutation_test((values,), np.mean, permutation_type="samples", n_resamples=9999, rng=1)
        assert ours.p == pytest.approx(theirs.pvalue, abs=0.02 if subjects > 13 else 1e-9)
        alone = paired(values, [0.0] * subjects)
        assert (alone.p, alone.mean) == (ours.p, ours.mean)
        assert (alone.low, alone.high) == pytest.approx((ours.low, ours.high), rel=1e-12)


def test_many_subjects_fit_into_memory():
    rng = np.random.default_rng(2)
    found = paired(rng.normal(0.1, 1, 20_000).tolist(), [0.0] * 20_000)
    assert found.p < 0.001
    assert found.low < 0.1 < found.high


def test_failures_are_kept_by_method_and_go_when_mended(tmp_path):
    note_failures(tmp_path, "flashavatar", {"s02": "no face", "s01": "no mask"})
    note_failures(tmp_path, "gasp", {"s02": "no prior"})
    assert [(f.method, f.subject) for f in read_failures(tmp_path)] == [
        ("flashavatar", "s01"), ("flashavatar", "s02"), ("gasp", "s02"),
    ]  # fmt: skip
    note_failures(tmp_path, "flashavatar", {"s01": None, "s03": None})
    assert [(f.method, f.subject) for f in read_failures(tmp_path)] == [
        ("flashavatar", "s02"),
        ("gasp", "s02"),
    ]
    note_failures(tmp_path, "flashavatar", {"s02": None})
    assert [f.reason for f in read_failures(tmp_path)] == ["no prior"]
    note_failures(tmp_path, "gasp", {"s02": None})
    assert not list(tmp_path.iterdir())
    (tmp_path / "failures.json").write_text(json.dumps([{"method": "x"}])[:-3])
    with pytest.raises(UserError, match=r"failures\.json cannot be read"):
        read_failures(tmp_path)


def test_published_tables_are_whole():
    for table in published():
        assert table.source
        assert table.protocol
        assert all(len(numbers) == len(table.columns) for _, numbers in table.rows)
    methods = {name.split(",")[0] for table in published() for name, _ in table.rows}
    assert {
        "Avat3r",
        "GPAvatar",
        "HeadNeRF",
        "InvertAvatar",
        "FlashAvatar",
        "GASP",
        "DiffusionRig",
        "INSTA",
    } <= methods
    assert {"FastGHA", "FlexAvatar"} <= methods
