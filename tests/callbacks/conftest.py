from typing import Any

import pytest

from helpers.clock import set_few_rounds, set_latency


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes exactly a millisecond a token, and any pruned variant twelve of them; all runs are real."""

    def seconds(alternative: Any) -> float:
        if isinstance(alternative, int):
            return alternative / 1e3
        return 0.017 if alternative == "dense" else 0.012

    set_latency(monkeypatch, seconds)
    set_few_rounds(monkeypatch)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured in the test: one entry for every profile and every timing of a given schedule."""
    from lightning_prune.callbacks import decider, planned_schedule

    made: list[str] = []
    for module, name, entry in ((planned_schedule, "profiled", "plan"), (decider, "time_given", "given")):
        real = getattr(module, name)

        def counted(*args: Any, _real: Any = real, _entry: str = entry, **kwargs: Any) -> Any:
            made.append(_entry)
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return made
