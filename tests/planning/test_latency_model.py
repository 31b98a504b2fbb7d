"""Latency of schedules from one curve: against loops, and against a device whose every latency is known."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from lightning_prune import LatencyProfile, Schedule
from lightning_prune.planning.dynamic_program import optimal_schedules
from lightning_prune.planning.latency_model import LatencyModel, ReductionOverhead
from lightning_prune.planning.mixed_latency import MixedLatency
from lightning_prune.profiling import SimulatedDevice, Workload
from lightning_prune.profiling.simulated_device import attention_share

N, DEPTH = 197, 12


def curve(seconds, tokens):
    """What is measured when all tokens go before block 0."""
    tokens = tuple(sorted({*tokens, N}))
    milliseconds = tuple(1e3 * seconds([count] * DEPTH) for count in tokens)
    return LatencyProfile(tokens, milliseconds, (1e-3,) * len(tokens), (31,) * len(tokens), "random", 0, DEPTH)


def model(**kwargs):
    profile = curve(lambda counts: 1e-3 * (2.0 + sum(0.01 * c + 1e-5 * c * c for c in counts)), range(20, N))
    return LatencyModel.from_profile(profile, **{"attention_share": 0.4, **kwargs})


SCHEDULES = [
    Schedule([0] * DEPTH),
    Schedule.single(DEPTH, 3, 100),
    Schedule([13] * DEPTH),
    Schedule([0, 0, 50, 0, 0, 0, 60, 0, 0, 0, 0, 0]),
    Schedule([0] * 11 + [30]),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_prediction_adds_up_what_every_block_costs(schedule):
    known = model(overhead=ReductionOverhead(per_block=0.3, per_tokens=0.5, per_later_block=0.1))
    block = lambda count: 0.01 * count + 1e-5 * count * count  # noqa: E731
    total, entering = 2.0, N
    for removed in schedule.removed:
        leaving = entering - removed
        total += 0.4 * block(entering) + 0.6 * block(leaving)
        total += 0.3 + 0.5 * entering / N if removed else 0.0
        total += 0.1 if entering < N else 0.0
        entering = leaving
    assert known.predict(schedule) == pytest.approx(total, rel=1e-6)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_steps_add_up_to_the_prediction(schedule):
    known = model(overhead=ReductionOverhead(per_block=0.3, per_tokens=0.5, per_later_block=0.1))
    steps, places = known.steps(), {int(count): place for place, count in enumerate(known.levels)}
    tokens = (N, *schedule.tokens(N))
    total = sum(steps[places[a], places[b]] for a, b in pairwise(tokens))
    assert known.dense_ms + total == pytest.approx(known.predict(schedule))


def test_no_step_adds_tokens():
    steps = model().steps()
    places = np.arange(len(steps))
    assert np.isinf(steps[places[:, None] < places[None, :]]).all()
    assert np.isfinite(steps[places[:, None] >= places[None, :]]).all()


def test_levels_can_be_fewer_and_dense_is_always_one():
    assert model(levels=[50, 100]).levels.tolist() == [50, 100, N]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("tile", [16, 64])
def test_predicts_what_a_device_that_works_in_waves_takes(schedule, tile):
    device, work = SimulatedDevice(multiprocessors=6, tile=tile), Workload.plain(batch=4)
    known = LatencyModel.from_profile(
        curve(lambda counts: device.seconds(work, counts), range(20, N)), attention_share(work, N)
    )
    leaving = schedule.tokens(N)
    exact = 1e3 * device.seconds(work, (N, *leaving[:-1]), leaving)
    entering = (N, *leaving)
    alone = 1e3 * (device.seconds(work, [N], [N - 1]) - device.seconds(work, [N], [N]))
    price = sum(alone * entering[block] / N for block in schedule.reducing)
    assert known.predict(schedule) + price == pytest.approx(exact, rel=0.06)


def test_the_exact_tail_saves_the_same_wherever_tokens_were_removed_and_nothing_more_in_the_last_block() -> None:
    levels, block_ms = np.array([20, 50, 100, 200]), np.array([-1.8, -1.5, -1.0, 0.0])
    plain = LatencyModel(levels, block_ms, 20.0, 4, 0.25, ReductionOverhead(0.1, 0.2, 0.05))
    model = replace(plain, tail_share=0.75)
    assert model.predict(Schedule([0] * 4)) == 20.0
    for removed, left in (([100, 0, 0, 0], 100), ([100, 50, 0, 0], 50), ([0, 0, 150, 0], 50)):
        saved = plain.predict(Schedule(removed)) - model.predict(Schedule(removed))
        assert saved == pytest.approx(0.75 * (1.8 + float(np.interp(left, levels, block_ms))))
    expected = model.predict(Schedule([100, 0, 0, 0]))
    assert model.predict(Schedule([100, 0, 0, 50])) == pytest.approx(expected)
    assert model.predict(Schedule([0, 0, 0, 50])) == pytest.approx(20 - 0.75 * 1.8)


@pytest.mark.parametrize("weighs", [(False,), (True,), (False, True)])
def test_steps_with_the_exact_tail_add_up_to_what_is_predicted(weighs: tuple[bool, ...]) -> None:
    levels, block_ms = np.array([20, 50, 100, 200]), np.array([-1.8, -1.5, -1.0, 0.0])
    model = LatencyModel(levels, block_ms, 20.0, 4, 0.25, ReductionOverhead(0.1, 0.2, 0.05), tail_share=0.75)
    mixed = MixedLatency(tuple(model for _ in weighs), weighs)
    steps = mixed.steps()
    assert steps.shape == (len(set(weighs)), 4, len(weighs), 4, 4)
    costs = np.full((4, len(weighs), 4, 4), np.inf)
    for entering in range(4):
        costs[:, :, entering, : entering + 1] = 1.0
        costs[:, :, entering, entering] = 0.0
    costs[3, :, 3, :3] = 1e-9
    found = optimal_schedules(levels.tolist(), steps, costs, 20.0, weighs)
    assert found[0].levels == (200, 200, 200, 200)
    assert found[1].levels[:3] == (200, 200, 200)  # the tail alone costs next to nothing
    for solution in found:
        entering_counts = (200, *solution.levels[:-1])
        schedule = Schedule([a - b for a, b in zip(entering_counts, solution.levels, strict=True)])
        assert mixed.predict(schedule, solution.methods) == pytest.approx(solution.milliseconds)
        assert schedule.removed[3] == 0 or schedule.total_removed == schedule.removed[3]
