"""The planner's own choice among the methods of a comparison."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune.comparison.planned_variants import PlannedVariant, variant_of
from lightning_prune.comparison.request_reading import read_methods
from lightning_prune.comparison.requests import VariantRequest
from lightning_prune.comparison.target_search import merged_front
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.profiling import Estimate, LatencyStats
from lightning_prune.reduction import POMT, resolve

from .conftest import clock_of


def run(module: Any, running: Any, output: Path, messages: list[str], **more: Any) -> Any:
    trainer, _ = running(calibration=8, **more)
    data, methods, clock = lp.DigitsData(batch_size=8), ["auto", "random", "auto+int8"], clock_of(module)
    return lp.compare(
        trainer, module, data, methods, [1.2, 50.0], output=output, on_message=messages.append, clock=clock
    )


@pytest.mark.long
def test_auto_is_planned_validated_and_found_again(
    clocked_module: Any, running: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = clocked_module()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    found = run(module, running, tmp_path, [])
    rows = {row.variant: row for row in found.rows}
    auto = rows["auto 1.2x"]
    assert auto.method == "auto"
    assert auto.note.split("; ")[0] in AUTO_METHODS
    assert auto.images == 16
    assert auto.removed > 0
    assert auto.speedup == pytest.approx(found.plan.planned[1].timing.ratio ** -1)
    planned = next(each for each in found.plan.planned if each.variant == "auto 1.2x")
    assert str(planned.schedule.method) == planned.chosen == auto.note.split("; ")[0]
    assert planned.schedule.total_removed == auto.removed
    assert planned.schedule.tokens(197)[-1] == auto.tokens
    both = rows["auto+int8 1.2x"]
    assert (both.method, both.int8) == ("auto", True)
    assert both.note.split("; ")[0] in AUTO_METHODS
    assert both.speedup >= 0.98 * 1.2
    (unreached,) = (each for each in found.plan.unreached if each.method == "auto")
    assert unreached.target_speedup == 50
    assert unreached.reason.startswith("timed up to Schedule(")
    assert any(name.startswith("auto") for name in found.traces)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())

    messages: list[str] = []
    again = run(module, running, tmp_path, messages)
    assert any("finished before" in line for line in messages)
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in found.rows]
    messages.clear()
    proxies: list[str] = []
    fronts = Measurements.fronts
    monkeypatch.setattr(
        Measurements, "fronts", lambda self, *given: proxies.append(self.proxy_name) or fronts(self, *given)
    )
    run(module, running, tmp_path, messages, seed=1, proxy="cosine")
    (new,) = (line for line in messages if line.startswith("A new comparison: "))
    changed = new.removeprefix("A new comparison: ").split(" differ ")[0]
    assert set(changed.split(", ")) == {"calibration", "proxy", "seed"}
    assert proxies == ["cosine"]  # of both: the front in 8 bits is that in floating point


def test_a_plan_read_from_a_file_runs_as_the_method_that_was_chosen() -> None:
    schedule = lp.Schedule([0, 5, 0, 7])
    planned = PlannedVariant("auto 2x", "auto", "auto", chosen="pomt-nearest", target_speedup=2.0, schedule=schedule)
    read = PlannedVariant.from_dict(json.loads(json.dumps(planned.to_dict())))
    (request,) = read_methods(["auto"], POMT())[1:]
    assert request == VariantRequest("auto", None, False, AUTO_METHODS)
    assert (request.method, request.has_targets, request.searches) == ("auto", True, True)
    variant = variant_of(read, request)
    assert (variant.reduction, variant.schedule, variant.weights) == (resolve("pomt-nearest"), schedule, None)


class FrontOf:
    """A front whose candidates and proxies are given."""

    def __init__(self, *points: tuple[int, float, float]) -> None:
        self.candidates = [
            Candidate("topk", resolve("topk"), lp.Schedule.single(2, 0, removed), ratio) for removed, ratio, _ in points
        ]
        self._proxies = {candidate.key: proxy for candidate, (_, _, proxy) in zip(self.candidates, points, strict=True)}

    def cautious_estimate(self, candidate: Candidate) -> Estimate:
        return Estimate(self._proxies[candidate.key], 0.01)


def test_a_timed_candidate_leaves_those_predicted_to_be_faster_on_the_front() -> None:
    """A target that the timed one misses is then met by the next, and not by one that is far faster than asked."""
    timed = replace(
        Candidate("tome", resolve("tome"), lp.Schedule.single(2, 0, 30), 0.6, accuracy=0.97),
        timing=LatencyStats(7.0, spread=0.1, ratio=0.7, ratio_spread=0.01, rounds=9),
    )
    front: Any = FrontOf((60, 0.3, 0.7), (40, 0.6, 0.972), (35, 0.65, 0.96), (30, 0.75, 0.975), (20, 0.8, 0.96))
    again = replace(timed, timing=None, ratio=0.7 - 1e-16)  # the same schedule, on the front of its method
    front.candidates.append(again)
    front._proxies[again.key] = 0.97
    found = merged_front([front], [timed])
    # Left out are 35, which another prediction beats, and 20, which both beat.
    assert [(one.method, one.schedule.total_removed) for one in found] == [
        ("topk", 30), ("tome", 30), ("topk", 40), ("topk", 60)
    ]  # fmt: skip


def test_no_faster_candidate_wins_by_the_noise_of_its_proxy() -> None:
    """All lose nothing: the slower ones cost less, and one of them may be what a target asks for."""
    front: Any = FrontOf((60, 0.4, 1.0), (40, 0.6, 1.003), (20, 0.8, 1.001))
    front.candidates = [replace(one, cost=one.schedule.total_removed / 1000) for one in front.candidates]
    assert [one.schedule.total_removed for one in merged_front([front], [])] == [20, 40, 60]
