"""The planner's own choice among the methods of a comparison."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from lightning_prune.comparison.planned_variants import PlannedVariant, variant_of
from lightning_prune.comparison.requests import VariantRequest, read_methods
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_selection import AUTO_METHODS
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
