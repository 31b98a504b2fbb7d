"""The planner's own choice among the methods of a comparison: measured for real, on a small model."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.models import digits_module
from lightning_prune.comparison.variants import PlannedVariant, VariantRequest, read_methods, variant_of
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.reduction import POMT, resolve


def run(module: Any, running: Any, output: Path, messages: list[str], **more: Any) -> Any:
    trainer, _ = running(calibration=8, time_limit=1, **more)
    data, methods = lp.DigitsData(batch_size=8), ["auto", "random"]
    return lp.compare(trainer, module, data, methods, [1.2, 50.0], output=output, on_message=messages.append)


@pytest.fixture
def larger() -> lp.ImageClassifier:
    """Large enough for fewer tokens to be faster."""
    module: lp.ImageClassifier = digits_module(shape={"embed_dim": 96, "num_heads": 3})
    return module


def test_auto_is_planned_validated_and_found_again(larger: Any, running: Any, tmp_path: Path) -> None:
    before = {name: value.clone() for name, value in larger.state_dict().items()}
    found = run(larger, running, tmp_path, [])
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
    (unreached,) = (each for each in found.plan.unreached if each.method == "auto")
    assert unreached.target_speedup == 50
    assert unreached.reason.startswith("timed up to Schedule(")
    assert any(name.startswith("auto") for name in found.traces)
    assert all(torch.equal(value, before[name]) for name, value in larger.state_dict().items())

    messages: list[str] = []
    again = run(larger, running, tmp_path, messages)
    assert any("finished before" in line for line in messages)
    assert [row.to_dict() for row in again.rows] == [row.to_dict() for row in found.rows]
    messages.clear()
    run(larger, running, tmp_path, messages, seed=1)
    assert any(line.startswith("A new comparison: calibration, seed differ ") for line in messages)
    assert any(line.startswith("The latency profile was measured 20") for line in messages)


def test_a_plan_read_from_a_file_runs_as_the_method_that_was_chosen() -> None:
    schedule = lp.Schedule([0, 5, 0, 7])
    planned = PlannedVariant("auto 2x", "auto", "auto", chosen="pomt-nearest", target_speedup=2.0, schedule=schedule)
    read = PlannedVariant.from_dict(json.loads(json.dumps(planned.to_dict())))
    (entry,) = read_methods(["auto"], POMT())[1:]
    assert entry == VariantRequest("auto", None, False, AUTO_METHODS)
    assert (entry.method, entry.has_targets, entry.searches) == ("auto", True, True)
    variant = variant_of(read, entry)
    assert (variant.reduction, variant.schedule, variant.weights) == (resolve("pomt-nearest"), schedule, None)


def test_auto_in_8_bits_is_refused() -> None:
    with pytest.raises(lp.ArgumentError, match=r"`methods` must be of dense, .*, auto, int8, .* got 'auto\+int8'"):
        read_methods(["auto+int8"], POMT())
