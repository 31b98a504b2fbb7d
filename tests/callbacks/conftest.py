from typing import Any

import pytest

from lightning_prune.profiling.timing import Interleaved


@pytest.fixture
def clockwork(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every run takes exactly a millisecond a token, and a pruned variant two thirds of dense; all runs are real."""

    def once(self: Interleaved[Any], alternative: Any) -> float:
        self.prepare(alternative)
        self.run()
        if isinstance(alternative, int):
            return alternative / 1e3
        return 0.018 if alternative == "dense" else 0.012

    monkeypatch.setattr(Interleaved, "once", once)


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was measured in the test: one entry for every profile and every timing of a given schedule."""
    from lightning_prune.callbacks import planned, token_pruning

    made: list[str] = []
    for module, name in ((planned, "profiled"), (token_pruning, "measure_given")):
        real = getattr(module, name)

        def counted(
            *args: Any, _real: Any = real, _name: str = {"profiled": "plan"}.get(name, name), **kwargs: Any
        ) -> Any:
            made.append(_name)
            return _real(*args, **kwargs)

        monkeypatch.setattr(module, name, counted)
    return made
