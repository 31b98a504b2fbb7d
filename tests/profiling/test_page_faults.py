"""Page faults: counted for each run, what one takes, and the ratios in which they matter."""

import mmap
from dataclasses import replace

import pytest

from lightning_prune.profiling import InterleavedTimer, LatencyProfile, LatencyStats, interleaved_timer, page_faults
from lightning_prune.profiling.page_faults import count_page_faults, fault_context, seconds_per_fault, unequal_faults


def test_fresh_memory_is_counted_and_takes_time():
    before = count_page_faults()
    if before is None:
        pytest.skip("this system counts no page faults")
    with mmap.mmap(-1, 2**22) as memory:
        memory[:: mmap.PAGESIZE] = bytes(2**22 // mmap.PAGESIZE)
    assert count_page_faults() > before
    if (seconds := seconds_per_fault()) is not None:  # huge pages make too few of them
        assert 1e-8 < seconds < 1e-3
        assert fault_context("cpu") == {"fault_us": pytest.approx(1e6 * seconds, abs=1e-3)}
    assert fault_context("cuda") == {}


def test_a_system_that_counts_none_knows_no_price(monkeypatch):
    monkeypatch.setattr(page_faults, "count_page_faults", lambda: None)
    seconds_per_fault.cache_clear()
    try:
        assert seconds_per_fault() is None
        assert fault_context("cpu") == {}
    finally:
        seconds_per_fault.cache_clear()


@pytest.mark.parametrize("clock", [None, "cpu"])
def test_the_timer_counts_them_for_each_alternative(monkeypatch, clock):
    """Those of the warm-up, and of what is done between two runs, are not counted."""
    state = {"faults": 0, "current": "dense", "runs": 0}
    monkeypatch.setattr(interleaved_timer, "count_page_faults", lambda: state["faults"])

    def prepare(name):
        state["current"] = name
        state["faults"] += 10_000

    def run():
        state["runs"] += 1
        state["faults"] += {"dense": 500, "a": 3}[state["current"]] + (7777 if state["runs"] <= 2 else 0)

    options = {} if clock is None else {"clock": interleaved_timer.CpuClock()}
    timer = InterleavedTimer(prepare, run, lambda: None, "dense", **options)
    timer.measure(["a"], rounds=5)
    assert (timer.result("dense").faults, timer.result("a").faults) == (500, 3)
    assert {name: stats.faults for name, stats in timer.levels().items()} == {"dense": 500, "a": 3}


def test_where_nothing_is_counted_nothing_is_said(monkeypatch):
    monkeypatch.setattr(interleaved_timer, "count_page_faults", lambda: None)
    timer = InterleavedTimer(lambda _: None, lambda: None, lambda: None, "dense")
    timer.measure([], rounds=3)
    assert timer.result("dense").faults is None
    assert timer.result("dense").fault_remark(timer.result("dense"), 0.5) == ""


@pytest.mark.parametrize(
    ("faults", "dense_faults", "without"),
    [
        (0, 8_000, (200 - 4) / 100),  # a microsecond for two
        (8_000, 0, 200 / (100 - 4)),
        (10_000, 20_000, None),  # each side pays a twentieth
        (0, 7_000, None),
        (0, 10**9, 20 / 100),
    ],
)
def test_a_ratio_is_remarked_on_where_faults_change_it_by_more_than_two_percent(faults, dense_faults, without):
    pruned = LatencyStats(100.0, 1.0, 0.5, 0.01, 9, faults=faults)
    dense = LatencyStats(200.0, 1.0, 1.0, 0.0, 9, faults=dense_faults)
    said = pruned.fault_remark(dense, 0.5)
    bound = "at most" if dense_faults > faults else "at least"
    assert said.endswith(f"without them {bound} {without:.2f}x") if without is not None else said == ""
    assert said == unequal_faults(100.0, faults, 200.0, dense_faults, 0.5)
    assert pruned.fault_remark(dense, None) == ""


def test_a_profile_says_the_count_whose_faults_differ_most():
    context = {"device_type": "cpu", "fault_us": 1.0}
    known = LatencyProfile(
        (50, 100, 197), (50.0, 100.0, 200.0), (1.0, 1.0, 1.0), (9, 9, 9), "random", 0, 12, context=context
    )
    assert known.fault_remark == ""
    faulty = replace(known, faults=(0.0, 10.0, 20_000.0))
    assert faulty.fault_remark.startswith("With 50 tokens page faults: 0 a pass, 20000 in dense")
    assert faulty.fault_remark.endswith(f"without them at most {180 / 50:.2f}x")
    assert LatencyProfile.from_dict(faulty.to_dict()) == faulty
    assert replace(faulty, context={**context, "device_type": "cuda"}).fault_remark == ""
    assert replace(faulty, faults=(5_000.0, 10_000.0, 20_000.0)).fault_remark == ""  # a tenth of each
