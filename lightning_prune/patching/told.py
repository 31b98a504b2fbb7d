"""Reads the query, key and value of attention modules that make no fused call of their own."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.overlay import Overlay
from lightning_prune.reduction.base import Attention


@dataclass(eq=False)
class Ear:
    """What an attention module that makes no fused call is asked to tell while its block runs.

    Attributes:
        calls: Where to record; None while nobody listens.
        log_sizes: (B, N) to be added to the logits of every key, or None.
    """

    calls: list[Attention] | None = None
    log_sizes: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves tensors out of copies and pickles."""
        return {"calls": None, "log_sizes": None}


class Listening:
    """Makes an ear listen while one block runs: what `AttentionTap` is for modules without a fused call."""

    def __init__(self, ear: Ear, calls: list[Attention], log_sizes: Tensor | None) -> None:
        self._ear, self._calls, self._log_sizes = ear, calls, log_sizes

    def __enter__(self) -> None:
        self._ear.calls, self._ear.log_sizes = self._calls, self._log_sizes

    def __exit__(self, *_: object) -> None:
        self._ear.calls, self._ear.log_sizes = None, None


class ToldAttention(Overlay):
    """Mixin over the class of an attention module without a fused call: says what it computes from.

    A subclass for each kind says how to read query, key and value from what goes into it.
    """

    _prune_site: Ear

    def read(self, x: Tensor) -> Attention:
        """Query, key and value for the tokens (B, N, C) that go into the attention."""
        raise TypeError(f"{type(self).__name__} does not say how its attention is read.")

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own computation."""
        ear = self._prune_site
        if ear.calls is not None:
            ear.calls.append(self.read(x))
        if ear.log_sizes is not None:
            kwargs = self.weighed(kwargs, ear.log_sizes)
        return super().forward(x, *args, **kwargs)

    def weighed(self, kwargs: dict[str, Any], log_sizes: Tensor) -> dict[str, Any]:
        """The call with log-sizes added to the logits, where the module has an argument for that."""
        raise UnsupportedModelError("This attention cannot weigh its keys by their sizes.")
