import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import lightning_prune as lp
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.errors import FileFormatError, ScheduleError
from lightning_prune.schedule import KeepRates

COUNTS = (17, 26, 50, 197, 257, 577, 1025)


@pytest.mark.parametrize("prefix", [0, 1, 2, 5])
@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("rate", ["0.1", "0.3", "0.5", "0.7", "0.9", "0.99", "1", "1e-3"])
def test_the_number_kept_is_rounded_up(rate: str, tokens: int, prefix: int) -> None:
    """Of the decimal as it is written: 0.1 * 30 is 3, although floating point says a little more."""
    patches = tokens - prefix
    schedule = KeepRates.single(4, 1, float(rate)).schedule(tokens, prefix)
    assert schedule.removed == (0, patches - math.ceil(Fraction(rate) * patches), 0, 0)


def test_each_rate_applies_to_the_tokens_that_enter() -> None:
    schedule = KeepRates([1, 0.7, 1.0, 0.5]).schedule(197)
    assert schedule == lp.Schedule([0, 58, 0, 69])
    assert schedule.tokens(197) == (197, 139, 139, 70)


@pytest.mark.parametrize("tokens", COUNTS)
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_of_and_schedule_are_inverse(tokens: int, prefix: int) -> None:
    for removed in ([0, 5, 0, 3], [7, 1, 1, 1], [0, 0, 0, 0], [tokens - prefix - 1, 0, 0, 0]):
        schedule = lp.Schedule(removed, "tome", MeasurementSource(device="a", dense_tokens=tokens))
        rates = KeepRates.of(schedule, tokens, prefix) if sum(removed) < tokens - prefix else None
        if rates is not None:
            assert rates.schedule(tokens, prefix) == schedule
            assert (rates.method, rates.made_on) == (schedule.method, MeasurementSource(device="a"))


def test_of_a_schedule_without_patches_is_rejected() -> None:
    with pytest.raises(ScheduleError, match=r"`schedule` must leave .* 17, got none after block 1"):
        KeepRates.of(lp.Schedule([0, 16]), 17, 2)


def test_extremes() -> None:
    assert KeepRates([1e-7]).schedule(197).removed == (195,), "one patch token stays"
    assert KeepRates([0.9999999]).schedule(10_000_002, 1).removed == (1,)
    assert KeepRates([1 / 3]).schedule(301, 1).removed == (200,)
    assert KeepRates([np.float32(0.5), np.float64(0.7)]) == KeepRates([0.5, 0.7])


def test_equality_hash_and_repr() -> None:
    assert KeepRates([1, 0.5]) == KeepRates((1.0, 0.5), made_on=MeasurementSource(device="apart"))
    assert hash(KeepRates([1, 0.5])) == hash(KeepRates([1.0, 0.5]))
    assert KeepRates([1, 0.5]).reducing == {1: 0.5}
    assert KeepRates([1, 0.5]).depth == 2
    assert repr(KeepRates([1, 0.5])) == "KeepRates(depth=2, rates={1: 0.5})"


@pytest.mark.parametrize("entry", [0, -0.1, 1.01, True, "0.5", None, math.nan])
def test_invalid_rates_are_rejected(entry: Any) -> None:
    with pytest.raises(ScheduleError, match=r"`rates` must hold keep rates in \(0, 1\], got .* for block 1"):
        KeepRates([1, entry])


def test_invalid_lists_are_rejected() -> None:
    number: Any = 0.5
    with pytest.raises(ScheduleError, match="got an empty list"):
        KeepRates([])
    with pytest.raises(ScheduleError, match=r"`rates` must be a list with one keep rate per block, got 0\.5"):
        KeepRates(number)
    with pytest.raises(ScheduleError, match="`block` must be a block index from 0 to 3, got 4"):
        KeepRates.single(4, 4, 0.5)


def test_tokens_without_patches_are_rejected() -> None:
    with pytest.raises(ScheduleError, match=r"`tokens` must be > 5, .* got 5"):
        KeepRates([0.5]).schedule(5, 5)


@pytest.mark.parametrize("name", ["rates.yaml", "rates.json"])
def test_files(tmp_path: Path, name: str) -> None:
    rates = KeepRates([1, 0.7, 1, 0.25], "random:seed=3", MeasurementSource(device="a CPU", batch_size=4))
    path = rates.save(tmp_path / name)
    for found in (KeepRates.load(path), lp.Schedule.load(path)):
        assert found == rates
        assert found.made_on == rates.made_on
    schedule = lp.Schedule([0, 5])
    assert lp.Schedule.load(schedule.save(tmp_path / f"schedule-{name}")) == schedule


def test_files_of_another_format_are_rejected(tmp_path: Path) -> None:
    rates, schedule = KeepRates([0.5]).save(tmp_path / "r.yaml"), lp.Schedule([1]).save(tmp_path / "s.yaml")
    assert lp.Schedule.load(rates) == KeepRates([0.5])
    with pytest.raises(FileFormatError, match=r"s\.yaml is not a lightning_prune\.keep_rates file"):
        KeepRates.load(schedule)
    other = tmp_path / "o.yaml"
    other.write_text("format: other\n")
    message = "is not a lightning_prune.schedule or lightning_prune.keep_rates file: it has format 'other'"
    with pytest.raises(FileFormatError, match=message):
        lp.Schedule.load(other)
    other.write_text("format: lightning_prune.keep_rates\nversion: 1\nrates: [2.0]\n")
    with pytest.raises(
        FileFormatError,
        match=r"is not a usable lightning_prune.keep_rates file: `rates` must hold keep rates in \(0, 1\]",
    ):
        lp.Schedule.load(other)
    for text, message in (
        ("rates: 0.5", "`rates` must be a list"),
        ("rates: [0.5]\nprovenance: 3", "`provenance` must"),
    ):
        other.write_text(f"format: lightning_prune.keep_rates\nversion: 1\n{text}\n")
        with pytest.raises(FileFormatError, match=message):
            KeepRates.load(other)
