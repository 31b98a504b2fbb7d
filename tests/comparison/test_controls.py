"""The rows of `random` and `resize` that a comparison adds by itself."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lightning_prune as lp
from helpers.clock import TickingClock
from lightning_prune.callbacks import PruningConfig
from lightning_prune.comparison import api
from lightning_prune.comparison.best_variant import choose_best
from lightning_prune.comparison.request_reading import in_runtimes, read_requests
from lightning_prune.patching.models.timm_vit import TimmAdapter
from lightning_prune.reduction import RandomDrop, Resize
from lightning_prune.reduction.visual_words import VWTInter
from lightning_prune.reduction.word_learning import learn_vocabulary
from lightning_prune.runtimes import parse_runtime

from .conftest import clock_of

pytestmark = pytest.mark.usefixtures("with_controls")

BUDGET = lp.AccuracyBudget(0.01)


def names(config: PruningConfig, methods: Any, speedups: Any = None, controls: bool = True) -> list[str]:
    """The names of what is compared, without dense."""
    return [request.name for request in read_requests(config, methods, speedups, BUDGET, controls)[1:]]


def rows(module: Any, running: Any, methods: Any = None, speedups: Any = None, **more: Any) -> Any:
    arguments = {name: more.pop(name) for name in ("controls", "objective", "output", "runtimes") if name in more}
    messages = more.pop("messages", [])
    trainer, _ = running(**{"calibration": 8, "limit_val_batches": 1, **more})
    clock = clock_of(module) if any(hasattr(m, "clock") for m in module.modules()) else TickingClock()
    options = {"clock": clock, "on_message": messages.append, **arguments}
    return lp.compare(trainer, module, lp.DigitsData(batch_size=8), methods, speedups, **options)


@pytest.mark.parametrize(
    ("methods", "expected"),
    [
        (["tome", "pomt"], ["tome", "pomt", "random", "resize"]),
        (["tome", "random"], ["tome", "random", "resize"]),
        (["resize", "random"], ["resize", "random"]),
        (["auto", "int8"], ["auto", "int8", "random", "resize"]),
        (["int8", "exact"], ["int8", "exact"]),  # nothing that a control could be compared with
        (["tome+int8"], ["tome+int8", "random+int8", "resize+int8"]),
        (["tome", "random+int8"], ["tome", "random+int8", "random", "resize"]),
        ([RandomDrop(seed=3), "tome"], ["random", "tome", "resize"]),
    ],
)
def test_controls_stand_after_the_methods_at_the_same_targets(methods: Any, expected: list[str]) -> None:
    assert names(PruningConfig(), methods, [1.5]) == expected
    assert names(PruningConfig(), methods, [1.5], controls=False) == expected[: len(methods)]


def test_controls_are_planned_by_the_objective_of_the_methods() -> None:
    found = read_requests(PruningConfig(), None, None, BUDGET, controls=True)[1:]
    assert [request.name for request in found] == [
        *("pomt utility", "auto accuracy budget", "random accuracy budget", "resize accuracy budget")
    ]
    assert [request.is_control for request in found] == [False, False, True, True]
    assert [request.objective for request in found[1:]] == [BUDGET] * 3
    paper = PruningConfig(method="pomt", objective=lp.Utility(0.3), protocol="paper")
    assert [r.tail for r in read_requests(paper, None, None, lp.Utility(0.3), True)[1:]] == [False] * 4


def test_nothing_is_added_to_a_schedule_that_is_given_or_that_the_images_decide() -> None:
    given = PruningConfig(method="tome", schedule=56)
    assert names(given, None) == ["tome given"]
    assert names(given, None, [1.5]) == ["tome", "tome given", "random", "resize"]
    words = learn_vocabulary([torch.rand(4, 1, 56, 56)], 4, words=4, progress=False)
    assert names(PruningConfig(method=VWTInter(words)), None, [1.5]) == ["vwt-inter"]


def test_the_settings_of_the_pruners_own_method_hold_for_a_control() -> None:
    found = read_requests(PruningConfig(method=RandomDrop(seed=3)), ["tome"], [1.5], BUDGET, controls=True)
    assert [request.reduction for request in found[2:]] == [RandomDrop(seed=3), Resize()]


def test_each_runtime_has_its_controls() -> None:
    requests = read_requests(PruningConfig(), ["tome"], [1.5], BUDGET, controls=True)
    runtimes = [parse_runtime("torch"), parse_runtime("torch.compile")]
    assert [each.name for each in in_runtimes(requests, runtimes) if each.is_control] == [
        *("random [torch]", "resize [torch]", "random [torch.compile]", "resize [torch.compile]")
    ]


@pytest.mark.usefixtures("clockwork")
def test_rows_of_controls_reach_the_targets(module: Any, running: Any, tmp_path: Path) -> None:
    found = rows(module(), running, ["pomt"], [1.25, 1.5], output=tmp_path)
    assert [row.variant for row in found.rows] == [
        *("dense", "pomt 1.25x", "pomt 1.5x", "random 1.25x", "random 1.5x", "resize 1.25x", "resize 1.5x")
    ]
    assert all(row.speedup >= 0.995 * (row.target_speedup or 1) and row.top1 is not None for row in found.rows)
    assert found.config["methods"] == ["dense", "pomt", "random", "resize"]
    assert [row.method for row in rows(module(), running, ["pomt"], [1.25], controls=False).rows] == ["", "pomt"]


@pytest.mark.usefixtures("clockwork")
def test_a_control_that_the_model_does_not_support_is_left_out_with_one_message(
    module: Any, running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> Any:
        raise lp.UnsupportedModelError("its positions are fixed")

    monkeypatch.setattr(TimmAdapter, "scaling_sites", refuse)
    messages: list[str] = []
    found = rows(module(), running, ["pomt"], [1.25], messages=messages)
    assert [row.method for row in found.rows] == ["", "pomt", "random"]
    assert len([text for text in messages if "resize: " in text and "its positions are fixed" in text]) == 1
    named = rows(module(), running, ["pomt", "resize"], [1.25])
    assert [row.method for row in named.rows] == ["", "pomt", "resize", "random"]
    assert "its positions are fixed" in named.rows[2].note


def test_a_control_that_nobody_named_is_not_the_best_variant(
    clocked_module: Callable[..., Any], running: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged: list[list[str]] = []

    def choose(rows: Any, planned: Any, objective: Any) -> Any:
        judged.append([each.variant for each in planned])
        return choose_best(rows, planned, objective)

    monkeypatch.setattr(api, "choose_best", choose)
    found = rows(clocked_module(), running, ["topk", "resize"], objective=lp.Utility(1.0))
    assert [row.variant for row in found.rows] == ["dense", "topk utility", "resize utility", "random utility"]
    assert all(row.speedup > 2 for row in found.rows[1:])
    assert judged == [["dense", "topk utility", "resize utility"]]


@pytest.mark.parametrize("controls", ["no", 1, None])
def test_whether_there_are_controls_is_true_or_false(controls: Any, module: Any, running: Any) -> None:
    with pytest.raises(lp.ArgumentError, match="`controls` must be"):
        rows(module(), running, ["pomt"], [1.25], controls=controls)
