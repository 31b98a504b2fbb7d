from dataclasses import replace
from io import StringIO
from typing import Any

import pytest
from rich.console import Console

import lightning_prune as lp
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.decision_panel import print_decision

CONTEXT: dict[str, Any] = {
    "device": "Abacus",
    "device_type": "cpu",
    "threads": 3,
    "batch_size": 16,
    "precision": "bf16-mixed",
    "compiled": False,
    "model": "VisionTransformer",
    "parameters": 22_050_664,
}
DECISION = Decision(
    schedule=lp.Schedule([0, 30, 0, 26]),
    method="pomt",
    dense_tokens=197,
    tokens=141,
    dense_ms=20.0,
    latency_ms=15.5,
    speedup=1.29,
    predicted_ms=15.25,
    reason="Best by utility, alpha 0.5.",
    context=CONTEXT,
    seconds=12.4,
    calibration="512 images sampled from the dataset, seed 0",
)


def rows(decision: Decision, width: int = 100) -> dict[str, str]:
    """First word of each line of the panel -> the rest."""
    out = StringIO()
    print_decision(decision, Console(file=out, width=width))
    lines = out.getvalue().splitlines()
    assert "Token pruning" in lines[0]
    assert max(map(len, lines)) <= width
    pairs = [line.strip("│ ").split("  ", 1) for line in lines[1:-1]]
    return {pair[0]: pair[1].strip() for pair in pairs if len(pair) == 2}


def test_the_panel_of_a_plan() -> None:
    assert rows(DECISION) == {
        "device": "Abacus, 3 threads",
        "model": "VisionTransformer, 22.1 M parameters",
        "batch": "16 images, bf16-mixed",
        "tokens": "197 -> 141",
        "removed": "R = 56 (pomt: 30 at block 1, 26 at block 3)",
        "latency": "dense 20.00 ms, pruned 15.50 ms (predicted 15.25 ms): 1.29x",
        "because": "Best by utility, alpha 0.5.",
        "judged by": "512 images sampled from the dataset, seed 0",
        "took": "12 s",
    }


def test_the_panel_of_a_dense_decision_has_no_speed_up() -> None:
    dense = replace(DECISION, schedule=lp.Schedule([0] * 4), tokens=197, reason="The curve is flat.")
    said = rows(dense)
    assert (said["removed"], said["latency"], said["tokens"]) == ("R = 0", "dense 20.00 ms", "197 -> 197")


def test_the_panel_of_several_methods_lists_block_method_and_count() -> None:
    schedule = lp.Schedule([0, 30, 0, 26], [None, "tome:order=concatenated", None, "topk"])
    mixed = replace(DECISION, schedule=schedule, method="mixed", reduction=None)
    assert rows(mixed)["removed"] == "R = 56 (mixed: block 1: tome:order=concatenated: 30, block 3: topk: 26)"


def test_the_panel_of_a_given_schedule_has_no_prediction_and_no_calibration() -> None:
    said = rows(replace(DECISION, predicted_ms=None, calibration=""))
    assert said["latency"] == "dense 20.00 ms, pruned 15.50 ms: 1.29x"
    assert "judged by" not in said


def test_the_panel_shows_threads_on_a_cpu_only_and_compilation() -> None:
    said = rows(replace(DECISION, context={**CONTEXT, "device_type": "cuda", "compiled": True}))
    assert said["device"] == "Abacus"
    assert said["model"].endswith("parameters, compiled")


@pytest.mark.parametrize("width", [40, 60])
def test_the_panel_wraps_in_a_narrow_terminal(width: int) -> None:
    assert set(rows(DECISION, width)) >= {"device", "model", "took"}
