"""The search for cliffs, on devices whose every latency is known: 2% noise, 10% drift, load spikes; and hardly any."""

import numpy as np
import pytest

from lightning_prune.planning import Utility
from lightning_prune.profiling import InterleavedTimer, SimulatedClock, SimulatedDevice, Workload
from lightning_prune.profiling.count_search import coarse_grid, profile_builder, search_counts

N, BLOCK, DEPTH, LOWEST = 197, 3, 12, 3
ROUGH = {"noise": 0.02, "drift": 0.1, "spikes": 0.02}


class Bench:
    """Explores a known curve; says what was measured."""

    timer: type[InterleavedTimer[int]] = InterleavedTimer

    def __init__(self, seconds, seed, batch=1, time_limit=30.0, rough=None):
        self.clock = SimulatedClock(SimulatedDevice(seed=seed, **(ROUGH if rough is None else rough)))
        self.running, self.measured = N, set()
        timer = self.timer(self.prepare, lambda: self.clock.spend(seconds(self.running)), lambda: None, N, self.clock)
        build = profile_builder("pomt", BLOCK, DEPTH, "deployed")
        self.profile = search_counts(timer, build, None, LOWEST, N, time_limit, lambda: None, batch)

    def prepare(self, count):
        self.running = count
        self.measured.add(count)

    def found(self):
        return [(cliff.above, cliff.below) for cliff in self.profile.cliffs()]


def planted(seed, slope):
    """Up to four cliffs of 5% anywhere, and a slope that saves so much over all tokens."""
    random = np.random.default_rng(seed)
    cliffs, drop = sorted({int(count) for count in random.integers(24, 195, random.integers(0, 5))}), 0.05
    base = 1 - slope - drop * len(cliffs)
    return cliffs, lambda tokens: 0.01 * (base + slope / N * tokens + drop * sum(tokens > cliff for cliff in cliffs))


def waves(seed):
    """Hardware that works in waves, and a model for it."""
    random = np.random.default_rng(seed)
    device = SimulatedDevice(
        multiprocessors=int(random.integers(2, 133)),
        tile=int(random.choice([16, 32, 64, 128])),
        gigaflops=float(random.uniform(20, 200)),
        launch=float(random.choice([0, 1e-6, 5e-6])),
    )
    work = Workload.plain(int(random.choice([1, 1, 2, 3, 4, 8, 16])), width=int(random.choice([192, 384, 768])))

    def seconds(tokens):
        return device.seconds(
            work,
            [N] * (BLOCK + 1) + [tokens] * (DEPTH - BLOCK - 1),
            [N] * BLOCK + [tokens] * (DEPTH - BLOCK),
        )

    return seconds, work.batch


@pytest.mark.parametrize("slope", [0.0, 0.4])
@pytest.mark.parametrize("seed", range(20))
def test_every_planted_cliff_is_found_to_the_token_and_no_other(seed, slope):
    cliffs, seconds = planted(seed, slope)
    bench = Bench(seconds, seed)
    assert bench.found() == [(cliff + 1, cliff) for cliff in cliffs[::-1]]
    assert len(bench.measured) <= 40
    assert bench.clock.now < 31.0


@pytest.mark.parametrize("noise", [0.0, 0.001])
@pytest.mark.parametrize("seed", range(5))
def test_cliffs_are_found_without_noise(seed, noise):
    cliffs, seconds = planted(seed, slope=0.4)
    bench = Bench(seconds, seed, rough={"noise": noise})
    assert bench.found() == [(cliff + 1, cliff) for cliff in cliffs[::-1]]
    profile = bench.profile
    for count in profile.tokens:
        assert profile.latency_ms(count) / profile.dense_ms == pytest.approx(
            seconds(count) / seconds(N), rel=1e-9 + 2 * noise
        )


@pytest.mark.parametrize("seconds_a_run", [0.5, 1.0, 2.0, 4.0])
def test_few_rounds_of_a_slow_model_rarely_show_cliffs_or_gains(seconds_a_run):
    line = [Bench(lambda count: seconds_a_run * (0.6 + 0.4 * count / N), seed).profile for seed in range(20)]
    assert sum(bool(curve.cliffs()) for curve in line) <= 2
    flat = [Bench(lambda _: seconds_a_run, seed).profile for seed in range(20)]
    assert sum(any(curve.is_faster_than_dense(count) for count in curve.tokens) for curve in flat) <= 4
    for curve in (*line, *flat):
        assert len(curve.tokens) >= 4
        assert min(curve.rounds) >= 3
        assert not curve.converged


class TimedSwitch(InterleavedTimer[int]):
    """Times the switch to an alternative as well, where the others time the run alone."""

    def once(self, alternative: int) -> float:
        start = self.clock()
        self.prepare(alternative)
        self.run()
        return self.clock() - start


class Compiling(Bench):
    """Every count is compiled before it runs for the first time."""

    timer = TimedSwitch

    def __init__(self, compiling, **kwargs):
        self.compiling = compiling
        super().__init__(lambda count: 0.01 * (0.5 + 0.5 * count / N + 0.1 * (count > 100)), 0, **kwargs)

    def prepare(self, count):
        if count not in self.measured:
            self.clock.now += self.compiling
        super().prepare(count)


@pytest.mark.parametrize(("compiling", "least", "most"), [(15.0, 4, 61.0), (3.0, 6, 31.0), (1.0, 12, 31.0)])
def test_compilation_is_part_of_the_time_limit(compiling: float, least: int, most: float) -> None:
    bench = Compiling(compiling)
    assert bench.clock.now < most
    assert len(bench.profile.tokens) >= least
    assert min(bench.profile.rounds) >= 3


def test_profile_that_more_time_would_not_change_has_converged():
    _, seconds = planted(0, slope=0.4)
    assert Bench(seconds, 0).profile.converged
    assert not Bench(seconds, 0, time_limit=2.0).profile.converged


@pytest.fixture(scope="module")
def wave_benches():
    found = []
    for seed in range(50):
        seconds, batch = waves(seed)
        found.append((Bench(seconds, seed, batch), {count: 1e3 * seconds(count) for count in range(LOWEST, N + 1)}))
    return found


@pytest.mark.long
def test_cliffs_of_waves_are_found_with_at_most_40_counts(wave_benches):
    missed = cliffs = 0
    for bench, exact in wave_benches:
        large = [(c + 1, c) for c in range(N - 1, N // 10, -1) if exact[c + 1] - exact[c] >= 0.05 * exact[N]]
        cliffs, missed = cliffs + len(large), missed + len(set(large) - set(bench.found()))
        assert len(bench.measured) <= 40
    assert cliffs >= 100
    assert missed <= 1  # forty counts do not always suffice for seven cliffs among smaller ones


@pytest.mark.long
def test_curves_without_cliffs_have_none(wave_benches):
    for bench, exact in wave_benches:
        for above, below in bench.found():
            assert exact[above] - exact[below] > 0.005 * exact[N]


@pytest.mark.long
def test_latencies_are_those_of_the_device_in_spite_of_drift(wave_benches):
    for bench, exact in wave_benches:
        profile = bench.profile
        for count in profile.tokens:
            error = profile.stderr_ms(count) / profile.dense_ms
            assert profile.latency_ms(count) / profile.dense_ms == pytest.approx(
                exact[count] / exact[N], abs=0.01 + 5 * error
            )


@pytest.mark.parametrize(("loss", "power"), [(0.3, 2), (0.6, 3), (1.0, 4)])
def test_the_best_measured_count_is_nearly_the_best_there_is(wave_benches, loss, power):
    for bench, exact in wave_benches:
        profile, counts = bench.profile, [count for count in exact if count >= N // 10]

        def score(tokens, latency):
            accuracy = np.array([1 - loss * ((N - count) / N) ** power for count in tokens])
            return Utility().score(np.array(latency), accuracy)

        chosen = profile.tokens[int(np.argmax(score(profile.tokens, profile.milliseconds)))]
        truth = dict(zip(counts, score(counts, [exact[count] for count in counts]), strict=True))
        assert truth[chosen] >= 0.99 * max(truth.values())


def test_the_grid_lies_where_tiles_may_end():
    for batch in (1, 2, 4, 16):
        grid = coarse_grid(LOWEST, N, 20, batch)
        assert 12 <= len(grid) <= 30
        assert {N, N - 1} <= set(grid)
        assert min(grid) >= N // 10
        inner = [count for count in grid if count < N - 1]
        assert len({count * batch % 8 for count in inner}) == 1
    assert coarse_grid(16, 17, 20, 1) == [16, 17]
    assert coarse_grid(17, 17, 20, 1) == [17]


def test_a_profile_has_the_quartiles_of_what_was_timed():
    """Interference only ever makes a run slower: the quartiles of such runs are not symmetric about their median."""
    counts, slow, now, running = list(range(10, 30)), 10, [0.0], [29]
    drawn = iter(0.005 * (1 + np.random.default_rng(0).exponential(0.2, 501)))
    seconds = []

    def run():
        seconds.append(next(drawn)) if running[0] == slow else None
        now[0] += seconds[-1] if running[0] == slow else 0.01

    timer = InterleavedTimer[int](lambda count: running.__setitem__(0, count), run, lambda: None, 29, lambda: now[0])
    timer.measure(counts, 500)
    profile = profile_builder("pomt", BLOCK, DEPTH, "deployed")(timer, counts)
    low, high = np.percentile(1e3 * np.array(seconds[1:]), (25, 75))  # the first run only warms up
    assert (profile.low_ms[0], profile.high_ms[0]) == pytest.approx((low, high), rel=0.02)
    assert profile.high_ms[0] - profile.milliseconds[0] > 1.2 * (profile.milliseconds[0] - profile.low_ms[0])
    assert profile.low_ms[1:] == pytest.approx(profile.milliseconds[1:], rel=1e-3)
