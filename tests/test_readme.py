"""The Python of the README runs as it stands, and does what the README says."""

import dataclasses
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from timm.models.vision_transformer import Block
from torch import Tensor, nn

import lightning_prune as lp
from helpers import ROOT
from lightning_prune.callbacks import TokenPruning
from lightning_prune.patching.class_swap import is_patched_module

README = ROOT / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
Names = dict[str, Any]


def validates(names: Names, tokens: list[int]) -> None:
    metrics = names["trainer"].callback_metrics
    figures = {"latency_ms", "dense_latency_ms", "speedup", "tokens", "removed"}
    assert {f"pruning/{figure}" for figure in figures} <= metrics.keys()
    assert metrics["pruning/tokens"] == 197 - metrics["pruning/removed"] == tokens[-1]
    decision = names["decision"]
    assert {name: float(metrics[name]) for name in decision.metrics()} == pytest.approx(decision.metrics())
    assert decision.schedule == decision.plan.schedule == lp.Schedule.load("schedule.yaml")
    assert (decision.dense_tokens, decision.tokens) == (197, tokens[-1])
    assert TokenPruning().decision is None
    (described,) = re.findall(r"It has (`schedule`.*?)\. `use", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    assert set(re.findall(r"`(\w+)`", described)) <= {field.name for field in dataclasses.fields(decision)}


def patches(names: Names, tokens: list[int]) -> None:
    assert tokens == [197 - 56]
    assert names["logits"].shape == (1, 1000)
    assert not names["handle"].active
    assert not any(map(is_patched_module, names["model"].modules()))


def keeps_rates(names: Names, tokens: list[int]) -> None:
    assert tokens == [1 + 138, 1 + 140]


def plans(names: Names, tokens: list[int]) -> None:
    plan = names["plan"]
    assert plan.profile is names["profile"]
    assert lp.Schedule.load("schedule.yaml").removed == plan.schedule.removed
    assert plan.schedule.total_removed == plan.total_removed == 197 - plan.tokens
    assert Path("plan.png").read_bytes().startswith(b"\x89PNG")


def compares(names: Names, tokens: list[int]) -> None:
    rows = names["results"].rows
    assert rows[0].variant == "dense"
    assert {row.method for row in rows[1:]} <= {"tome", "random", "resize"}
    assert (Path("results") / "methods" / "report.html").exists()


CHECKS: dict[str, Callable[[Names, list[int]], None]] = {
    "trainer.validate(": validates,
    "handle.remove()": patches,
    "KeepRates": keeps_rates,
    "lp.plan(": plans,
    "lp.compare(": compares,
}


@pytest.fixture
def tokens() -> Iterator[list[int]]:
    """How many left the last of the blocks, in each forward pass."""
    seen: list[int] = []

    def record(module: nn.Module, args: Any, output: Tensor) -> None:
        if isinstance(module, Block):
            seen.append(output.shape[1])

    hook = nn.modules.module.register_module_forward_hook(record)
    yield seen
    hook.remove()


def shorter(function: Callable[..., Any], *args: Any, time_limit: float, **kwargs: Any) -> Any:
    return function(*args, time_limit=time_limit / 5, **kwargs)


_LONG = ("lp.compare(", "trainer.validate(")


@pytest.mark.parametrize("call", [pytest.param(c, marks=pytest.mark.long) if c in _LONG else c for c in CHECKS])
def test_runs(call: str, tokens: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In an empty folder, on a few batches: a reader's own run only takes longer."""
    (block,) = [block for block in BLOCKS if call in block]
    monkeypatch.chdir(tmp_path)
    few = {
        L.Trainer: {"logger": False, "limit_val_batches": 2, "enable_progress_bar": False},
        TokenPruning: {"time_limit": 1, "calibration": 16},
    }
    for kind, defaults in few.items():

        def quick(self: Any, *args: Any, _init: Any = kind.__init__, _defaults: Any = defaults, **kwargs: Any) -> None:
            _init(self, *args, **{**_defaults, **kwargs})

        monkeypatch.setattr(kind, "__init__", quick)
    for name in ("profile_latency", "plan"):
        monkeypatch.setattr(lp, name, partial(shorter, getattr(lp, name)))
    names: Names = {"__name__": "readme"}
    exec(compile(block, str(README), "exec"), names)
    CHECKS[call](names, tokens[11::12])


def test_every_block_has_a_check() -> None:
    assert [sum(call in block for call in CHECKS) for block in BLOCKS] == [1] * len(CHECKS)
