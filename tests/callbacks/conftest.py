from typing import Any

import pytest

from helpers.clock import set_latency


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes exactly a millisecond a token, and a pruned variant two thirds of dense; all runs are real."""

    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):
            return alternative / 1e3
        return 0.018 if alternative == "dense" else 0.012

    set_latency(monkeypatch, seconds)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured in the test: one entry for every profile and every timing of a given schedule."""
    from lightning_prune.callbacks import decision

    made: list[str] = []
    for name in ("profiled", "measure_given"):
        real = getattr(decision, name)

        def counted(
            *args: Any, _real: Any = real, _name: str = {"profiled": "plan"}.get(name, name), **kwargs: Any
        ) -> Any:
            made.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(decision, name, counted)
    return made
