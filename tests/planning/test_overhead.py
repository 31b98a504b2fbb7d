from dataclasses import replace

import pytest

from helpers.models import tiny_vit
from lightning_prune import LatencyProfile, Schedule
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning.latency_model import NO_OVERHEAD, LatencyModel, ReductionOverhead
from lightning_prune.planning.mixed_latency import fit_overhead
from lightning_prune.planning.overhead_probes import given_probes
from lightning_prune.planning.probed_schedules import probe_schedules
from lightning_prune.profiling import LatencyStats
from lightning_prune.profiling.latency_profile import OverheadProbe
from lightning_prune.reduction import resolve

N, DEPTH = 197, 12


def model(overhead=NO_OVERHEAD):
    tokens = tuple(range(20, N + 1))
    profile = LatencyProfile(
        tokens, tuple(5 + 0.1 * c for c in tokens), (0.01,) * len(tokens), (9,) * len(tokens), "random", 0, DEPTH
    )
    return LatencyModel.from_profile(profile, 0.4, overhead=overhead)


def timed(schedules, known, noise=lambda index: 1.0):
    """As measured on a machine that now runs at two thirds of its speed."""
    found = []
    for index, schedule in enumerate(schedules):
        ratio = known.predict(schedule) / known.dense_ms * noise(index)
        found.append((schedule, LatencyStats(1.5 * known.dense_ms * ratio, 0.1, ratio, 0.01, 9)))
    return found


OVERHEADS = [
    ReductionOverhead(),
    ReductionOverhead(per_block=0.4),
    ReductionOverhead(per_tokens=0.4),
    ReductionOverhead(per_later_block=0.1),
    ReductionOverhead(per_block=0.2, per_tokens=0.3),
    ReductionOverhead(per_block=0.2, per_tokens=0.3, per_later_block=0.1),
]


@pytest.mark.parametrize("overhead", OVERHEADS)
@pytest.mark.parametrize("method", ["pomt", "tome", "topk"])
def test_planted_overheads_are_found(overhead, method):
    schedules = probe_schedules(resolve(method), N, 1, range(DEPTH), DEPTH)
    found = fit_overhead(model(), timed(schedules, model(overhead)))
    assert found == pytest.approx(overhead, abs=1e-6)


@pytest.mark.parametrize("tilt", [-0.02, 0.02])
def test_noise_makes_no_overhead_negative(tilt):
    schedules = probe_schedules(resolve("tome"), N, 1, range(DEPTH), DEPTH)
    found = fit_overhead(model(), timed(schedules, model(), lambda index: 1 + tilt * (1.5 - index)))
    assert min(found) >= 0


@pytest.mark.parametrize(("spread", "rounds"), [(0.5, 2), (0.0, 1)])  # a single round has no spread
def test_what_was_timed_badly_counts_for_little(spread, rounds):
    schedules = probe_schedules(resolve("topk"), N, 1, range(DEPTH), DEPTH)
    right = timed(schedules, model(ReductionOverhead(per_block=0.4)))
    wrong = [(schedule, replace(t, ratio=1.1 * t.ratio, ratio_spread=spread, rounds=rounds)) for schedule, t in right]
    sure = [(schedule, replace(t, ratio_spread=0.001, rounds=99)) for schedule, t in right]
    assert fit_overhead(model(), sure + wrong) == pytest.approx(ReductionOverhead(per_block=0.4), abs=0.05)


@pytest.mark.parametrize(("tokens", "depth", "first"), [(197, 12, 0), (17, 4, 1), (5, 2, 0), (50, 3, 2), (3, 1, 0)])
def test_probes_are_schedules_that_the_method_can_run(tokens, depth, first):
    for method in ("pomt", "tome", "topk", "pomt-nearest"):
        reduction = resolve(method)
        for schedule in probe_schedules(reduction, tokens, 1, range(first, depth), depth):
            assert schedule.depth == depth
            left = tokens
            for block, removed in enumerate(schedule.removed):
                assert not removed or block >= first
                assert removed <= reduction.max_removed(left, 1)
                left -= removed


def test_without_a_probe_that_reduces_there_is_no_overhead():
    assert fit_overhead(model(), [(Schedule([0] * DEPTH), LatencyStats(10, 0, 1, 0, 9))]) == ReductionOverhead()


@pytest.mark.parametrize("overhead", [ReductionOverhead(per_block=0.4), ReductionOverhead(per_later_block=0.1)])
@pytest.mark.parametrize("depth", [DEPTH, 12 // 3])
def test_overheads_that_another_device_measured_are_found(overhead, depth):
    """In the whole model, or in a copy of its first blocks, whose dense latency is 30% of the whole."""
    transformer = find_vision_transformer(tiny_vit(depth=DEPTH, img_size=224, patch_size=16, embed_dim=8))
    methods = {"topk": (resolve("topk"), range(DEPTH)), "pomt": (resolve("pomt"), range(DEPTH))}
    share, known = (1.0 if depth == DEPTH else 0.3), model()
    there = replace(known, depth=depth, dense_ms=share * known.dense_ms, overhead=overhead)
    probes = [
        OverheadProbe("topk", schedule.removed, share, there.predict(schedule) / there.dense_ms, 0.001, 31)
        for schedule in probe_schedules(resolve("topk"), N, 1, range(depth), depth)[::2]
    ]
    profile = LatencyProfile((20, N), (5, 10), (0.1, 0.1), (9, 9), "random", 0, DEPTH, probes=tuple(probes))
    found = given_probes(profile, transformer, methods, dict.fromkeys(methods, known))
    assert found.keys() == {"topk"}
    assert fit_overhead(known, found["topk"]) == pytest.approx(overhead, abs=1e-3)
