"""Reads the query, key and value of attention modules that make no fused call of their own."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.overlay import Overlay
from lightning_prune.patching.per_thread import PerThread
from lightning_prune.reduction.base import Attention


class Question(NamedTuple):
    """What an attention module is asked to tell while its block runs.

    Attributes:
        calls: Where to record.
        log_sizes: (B, 1, 1, N) to be added to the logits of every key, or None.
    """

    calls: list[Attention]
    log_sizes: Tensor | None


@dataclass(eq=False)
class Ear:
    """Where an attention module that makes no fused call finds what it is asked; nothing while nobody listens."""

    question: PerThread[Question] = field(default_factory=PerThread)


class Listening:
    """Makes an ear listen while one block runs: what `AttentionTap` is for modules without a fused call."""

    def __init__(self, ear: Ear, calls: list[Attention], log_sizes: Tensor | None) -> None:
        self._ear, self._question = ear, Question(calls, log_sizes)

    def __enter__(self) -> None:
        self._ear.question.set(self._question)

    def __exit__(self, *_: object) -> None:
        self._ear.question.set(None)


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
        question = self._prune_site.question.get()
        if question is not None:
            question.calls.append(self.read(x))
            if question.log_sizes is not None:
                kwargs = self.weighed(kwargs, question.log_sizes)
        return super().forward(x, *args, **kwargs)

    def weighed(self, kwargs: dict[str, Any], log_sizes: Tensor) -> dict[str, Any]:
        """The call with log-sizes added to the logits, where the module has an argument for that."""
        raise UnsupportedModelError("This attention cannot weigh its keys by their sizes.")
