import time

import numpy as np
import pytest
import torch

from helpers.models import tiny_vit
from lightning_prune.comparison.final_run import FinalTimer
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import InterleavedTimer, LatencyStats, Variant, interleaved_timer
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY, OWN_THREADS
from lightning_prune.profiling.model_variants import variant_timer
from lightning_prune.runtimes import parse_runtime


class Bench:
    """A device of known speed under a clock of its own; the machine's drift multiplies every time."""

    def __init__(self, seconds, drift=lambda run: 1.0):
        self.seconds, self.drift = seconds, drift
        self.now, self.current, self.runs, self.order = 0.0, None, 0, []

    def prepare(self, alternative):
        self.current = alternative

    def run(self):
        self.order.append(self.current)
        self.now += self.seconds[self.current] * self.drift(self.runs)
        self.runs += 1

    def timer(self, reference="dense"):
        return InterleavedTimer(self.prepare, self.run, lambda: None, reference, clock=lambda: self.now)


def test_reports_median_and_quartile_spread():
    bench = Bench({"dense": 0.010, "a": 0.005})
    timer = bench.timer()
    assert timer.measure(["a"], rounds=5) == 5
    timing = timer.result("a")
    assert timing.milliseconds == pytest.approx(5.0)
    assert timing.ratio == pytest.approx(0.5)
    assert timing.spread == pytest.approx(0.0, abs=1e-9)
    assert timing.rounds == 5


def test_an_alternative_may_have_references_of_its_own():
    """They are part of its rounds, and its ratio refers to the first."""
    bench = Bench({"dense": 0.010, "a": 0.005, "own": 0.008, "b": 0.002})
    timer = bench.timer()
    timer.references = lambda alternative: ["own", "dense"] if alternative == "b" else []
    timer.measure(["a"], rounds=3)
    assert not timer.has("own")
    timer.measure(["b"], rounds=3)
    assert set(bench.order[-3:]) == {"dense", "own", "b"}
    assert timer.result("a").ratio == pytest.approx(0.5)
    assert timer.result("b").ratio == pytest.approx(0.25)
    assert timer.result("b", "dense").ratio == pytest.approx(0.2)
    assert timer.result("b").rounds == timer.result("own").rounds == 3
    assert timer.result("dense").rounds == 6


def test_untimed_runs_settle_what_came_before():
    """The first run of an alternative is timed as it is: it is the one that converts."""
    bench = Bench({"dense": 0.010, "a": 0.005})
    bench.seconds["a"] = 5.0
    timer = bench.timer()
    timer.settle_seconds = OWN_MEMORY
    assert timer.warm_up("a") == pytest.approx(5)
    bench.seconds["a"] = 0.005
    timer.measure(["a"], rounds=2)
    assert sorted(bench.order[:2]) == ["a", "dense"]
    assert {name: bench.order[2:].count(name) for name in ("a", "dense")} == {"dense": 4, "a": 4}
    assert timer.result("a").milliseconds == pytest.approx(5.0)
    assert timer.pace == pytest.approx(2)


@pytest.mark.parametrize(("seconds", "runs"), [(0.0, 9), (0.012, 3), (0.03, 2)])
def test_untimed_runs_go_on_for_some_time(monkeypatch, seconds, runs):
    bench = Bench({"dense": seconds})
    monkeypatch.setattr(interleaved_timer.time, "perf_counter", lambda: bench.now)
    timer = bench.timer()
    timer.settle_seconds = OWN_THREADS
    timer.measure([], rounds=1)
    assert len(bench.order) == 1 + runs


def test_a_pause_takes_the_place_of_long_runs(monkeypatch):
    bench, paused = Bench({"dense": 0.5}), []
    monkeypatch.setattr(interleaved_timer.time, "perf_counter", lambda: bench.now)
    monkeypatch.setattr(interleaved_timer.time, "sleep", paused.append)
    timer = bench.timer()
    timer.settle_seconds = OWN_THREADS
    timer.measure([], rounds=3)
    assert len(bench.order) == 1 + 2 + 1 + 1  # how long a run takes is known after the first that converts nothing
    assert paused == [OWN_THREADS] * 2


def test_timers_of_runtimes_settle():
    transformer = find_vision_transformer(tiny_vit(depth=1))
    images, onnx = torch.zeros(1, 3, 32, 32), parse_runtime("onnxruntime")
    for reference, others, expected in (
        (None, (), None),
        (onnx, (), OWN_MEMORY),
        (onnx, (onnx.quantized(),), OWN_THREADS),
    ):
        with variant_timer(transformer, images, reference=Variant(runtime=reference), runtimes=others) as timer:
            assert timer.settle_seconds == expected
    for runtimes, expected in (([parse_runtime("torch")], None), ([onnx], OWN_THREADS)):
        final = FinalTimer(transformer, images, runtimes, time.perf_counter)
        assert final.timer.settle_seconds == expected
        final.close()


def test_spread_is_half_the_distance_between_the_quartiles():
    bench = Bench({"dense": 1.0}, drift=lambda run: (0, 1, 2, 3, 4, 5)[run] or 9)  # warm-up, then 1 to 5 seconds
    timer = bench.timer()
    timer.measure([], rounds=5)
    assert timer.result("dense").milliseconds == pytest.approx(3000)
    assert timer.result("dense").spread == pytest.approx(1000)


def test_quartiles_are_of_the_times_themselves_and_not_symmetric():
    bench = Bench({"dense": 1.0}, drift=lambda run: [9, 1, 1, 1, 5, 13][run])  # a warm-up, then the rounds
    timer = bench.timer()
    timer.measure([], rounds=5)
    found = timer.result("dense")
    assert (found.milliseconds, found.low_ms, found.high_ms) == pytest.approx((1000, 1000, 5000))
    assert found.milliseconds - found.spread < 1000  # what a symmetric bar would show, though nothing was as fast


def test_quartiles_of_levels_are_free_of_drift():
    bench = Bench({"dense": 0.010, "a": 0.005}, drift=lambda run: 1 + run / 10)
    timer = bench.timer()
    timer.measure(["a"], rounds=20)
    for stats in timer.levels().values():
        assert stats.low_ms <= stats.milliseconds <= stats.high_ms
        assert (stats.high_ms - stats.low_ms) / 2 == pytest.approx(stats.spread, rel=0.05)


def test_drift_cancels_in_the_ratio():
    """The machine becomes four times slower while it is measured; a plain median would not notice which is faster."""
    bench = Bench({"dense": 0.010, "a": 0.008}, drift=lambda run: 1 + run / 20)
    timer = bench.timer()
    timer.measure(["a"], rounds=31)
    assert timer.result("a").ratio == pytest.approx(0.8, rel=0.02)


def test_every_alternative_warms_up_once_and_untimed():
    bench = Bench({"dense": 1.0, "a": 1.0}, drift=lambda run: 100.0 if run < 2 else 1.0)  # the first runs are slow
    timer = bench.timer()
    timer.measure(["a"], rounds=3)
    assert timer.result("dense").milliseconds == pytest.approx(1000)
    assert timer.result("a").milliseconds == pytest.approx(1000)
    timer.measure(["a"], rounds=1)
    assert len(bench.order) == 2 + 3 * 2 + 2  # no second warm-up


def test_rounds_are_shuffled_and_complete():
    bench = Bench(dict.fromkeys(["dense", "a", "b", "c"], 1.0))
    bench.timer().measure(["a", "b", "c"], rounds=6)
    rounds = [tuple(bench.order[4 + 4 * i : 8 + 4 * i]) for i in range(6)]
    assert all(sorted(order) == ["a", "b", "c", "dense"] for order in rounds)
    assert len(set(rounds)) > 1


def test_deadline_drops_the_round_it_cuts_but_never_the_first():
    bench = Bench({"dense": 1.0, "a": 1.0})
    timer = bench.timer()
    assert timer.measure(["a"], rounds=50, deadline=6.5) == 2  # two to warm up, two a round, the third round is cut
    assert timer.result("a").rounds == 2
    late = bench.timer()
    assert late.measure(["a"], rounds=50, deadline=0.0) == 1
    assert late.result("a").rounds == 1


def test_alternatives_that_join_later_are_comparable():
    """An alternative measured only when the machine had become slower is put on the common baseline."""
    bench = Bench({"dense": 1.0, "a": 0.5, "b": 0.5}, drift=lambda run: 1.0 if run < 20 else 3.0)
    timer = bench.timer()
    timer.measure(["a"], rounds=9)  # 20 runs
    timer.measure(["b"], rounds=3)
    assert timer.result("b").milliseconds == pytest.approx(timer.result("a").milliseconds)


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.02])
def test_levels_are_exact_also_where_there_is_no_noise(noise):
    """Two groups that only the reference links, measured in two states of the machine."""
    seconds = {"dense": 1.0, "a": 0.9, "b": 0.8, "c": 0.7, "d": 0.6}
    random = np.random.default_rng(0)
    bench = Bench(seconds, drift=lambda run: (1.0 if run < 200 else 1.1) * np.exp(noise * random.standard_normal()))
    timer = bench.timer()
    timer.measure([], rounds=2)
    timer.measure(["a", "b"], rounds=66)
    timer.measure(["c", "d"], rounds=66)
    levels = timer.levels()
    for name, exact in seconds.items():
        assert levels[name].ratio == pytest.approx(exact, rel=1e-9 + noise / 2)
        assert levels[name].spread / levels[name].milliseconds == pytest.approx(0.6745 * noise, abs=1e-9 + 0.2 * noise)


def test_a_load_spike_does_not_move_the_levels():
    bench = Bench({"dense": 1.0, "a": 0.9}, drift=lambda run: 5.0 if run in (7, 12) else 1.0)
    timer = bench.timer()
    timer.measure(["a"], rounds=15)
    assert timer.levels()["a"].ratio == pytest.approx(0.9, rel=1e-3)


def test_rounds_of_the_reference_alone_are_left_out_of_the_levels():
    """What is left of a round that was fitted to its only run is 0."""
    bench = Bench({"dense": 1.0, "a": 0.9})
    timer = bench.timer()
    timer.measure([], rounds=2)
    assert timer.levels()["dense"].rounds == 2
    timer.measure(["a"], rounds=1)
    assert {name: timing.rounds for name, timing in timer.levels().items()} == {"dense": 1, "a": 1}


def test_some_rounds_can_be_asked_for_whatever_the_deadline():
    bench = Bench({"dense": 1.0, "a": 1.0})
    timer = bench.timer()
    assert timer.measure(["a"], rounds=5, deadline=0.0, min_rounds=3) == 3
    assert timer.measure(["a"], rounds=5, deadline=0.0, min_rounds=3) == 0


def test_the_deadline_holds_where_there_are_figures_already():
    bench = Bench({"dense": 1.0, "a": 1.0})
    timer = bench.timer()
    timer.measure(["a"], rounds=1)
    assert timer.measure(["a"], rounds=5, deadline=0.0) == 0
    assert len(bench.order) == 4


def test_the_first_run_is_timed_but_counts_nowhere():
    bench = Bench({"dense": 1.0, "a": 1.0}, drift=lambda run: 50.0 if run == 0 else 1.0)
    timer = bench.timer()
    assert timer.warm_up("dense") == 50.0
    assert timer.warm_up("dense") == 50.0
    timer.measure([], rounds=3)
    assert bench.order == ["dense"] * 4
    assert timer.result("dense").milliseconds == pytest.approx(1000)


def test_p90_is_of_the_same_runs_as_the_median():
    times = [1.0, 3.0, 2.0, 5.0, 4.0, 9.0, 7.0, 8.0, 6.0, 10.0, 11.0]
    bench = Bench({"dense": 1.0}, drift=lambda run: 50.0 if run == 0 else times[run - 1])
    timer = bench.timer()
    timer.measure([], rounds=len(times))
    stats = timer.result("dense")
    assert (stats.milliseconds, stats.p90_ms) == (pytest.approx(6000), pytest.approx(10_000))
    ordered = sorted(times)
    assert stats.p90_ms == pytest.approx(1e3 * ordered[round(0.9 * (len(times) - 1))])


def test_p90_of_levels_is_free_of_drift():
    bench = Bench({"dense": 0.010, "a": 0.008}, drift=lambda run: 1 + run / 20)
    timer = bench.timer()
    timer.measure(["a"], rounds=31)
    stats = timer.levels()["a"]
    assert stats.milliseconds <= stats.p90_ms < 1.05 * stats.milliseconds
    plain = timer.result("a")
    assert plain.p90_ms > 1.3 * plain.milliseconds


def test_the_standard_error_is_that_of_a_median_of_normal_samples():
    rng = np.random.default_rng(0)
    medians = np.median(rng.normal(0.8, 0.05, (4000, 25)), axis=1)
    stats = LatencyStats(8.0, 0.0, 0.8, 0.6745 * 0.05, 25)
    assert stats.ratio_stderr == pytest.approx(float(medians.std()), rel=0.05)
