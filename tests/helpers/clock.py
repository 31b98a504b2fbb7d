"""Latencies that are known: a clock that a forward pass drives, and runs that take what a test says."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from torch import Tensor, nn

from lightning_prune.profiling import InterleavedTimer


class TokenClock:
    """A clock for the `clock` argument: every block that runs takes a fixed time for each token that leaves it.

    The time passes in the MLP, which runs on these tokens; a hook would not be called while a model is measured.

    Args:
        blocks: Of the model that is timed.
        seconds: For each token.
    """

    def __init__(self, blocks: nn.ModuleList, seconds: float = 1e-3) -> None:
        self.now = 0.0
        self.seconds = seconds
        for block in blocks:
            vars(block.mlp)["clock"] = self
            block.mlp.__class__ = _timed(type(block.mlp))

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@cache
def _timed(kind: type[Any]) -> type[Any]:
    """A class, and not a method of the module: a module with methods of its own is never taken for another's equal."""

    def forward(self: Any, tokens: Tensor) -> Tensor:
        self.clock.now += self.clock.seconds * tokens.shape[1]
        result: Tensor = kind.forward(self, tokens)
        return result

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__})


class TickingClock:
    """A clock for the `clock` argument that goes on by a little at each look: loops end, and nothing takes long.

    Args:
        seconds: For each look.
    """

    def __init__(self, seconds: float = 1e-3) -> None:
        self.now, self.seconds = 0.0, seconds

    def __call__(self) -> float:
        """Seconds."""
        self.now += self.seconds
        return self.now


def set_latency(monkeypatch: pytest.MonkeyPatch, seconds: Callable[[Any], float], runs: bool = True) -> None:
    """Makes every timed run take what `seconds` says of its alternative, where no `clock` can be handed in.

    That is behind a whole run of the callback, or a command. An alternative is what the timer switches to: a number of
    tokens in a profile, a name or a `Variant` in a comparison.

    Args:
        monkeypatch: Of the test.
        seconds: Of one run of an alternative.
        runs: Whether the model is switched and run all the same; otherwise a run is free.
    """

    def once(self: InterleavedTimer[Any], alternative: Any) -> float:
        if runs:
            self.prepare(alternative)
            self.run()
        return seconds(alternative)

    monkeypatch.setattr(InterleavedTimer, "once", once)


def set_few_rounds(monkeypatch: pytest.MonkeyPatch, most: int = 3) -> None:
    """Ends every measurement after three rounds, where a clock says the same in each.

    Args:
        monkeypatch: Of the test.
        most: Rounds.
    """
    measure = InterleavedTimer.measure

    def measured(self: InterleavedTimer[Any], alternatives: Any, rounds: int, *more: Any, **options: Any) -> int:
        return measure(self, alternatives, min(rounds, most), *more, **options)

    monkeypatch.setattr(InterleavedTimer, "measure", measured)
