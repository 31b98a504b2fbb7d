"""What later blocks must know of the tokens that are left."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduced


class Survivors(NamedTuple):
    """The tokens that are left, seen from block 0.

    Attributes:
        positions: (B, K) where each stood in block 0, -1 for a token that has no place.
        sizes: (B, K) patches that each stands for, where the method keeps account of it.
        carried: What was gathered for these tokens before, with what it was gathered from.
        sources: (B, N) which of the K each token of block 0 went into, where the model's pooling must know.
    """

    positions: Tensor
    sizes: Tensor | None
    carried: list[tuple[Tensor, Tensor]]
    sources: Tensor | None = None

    def carry(self, source: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """`gather(source)`, once for all blocks that receive the same tensor: most models share one among them."""
        for known, gathered in self.carried:
            if known is source:
                return gathered
        gathered = gather(source)
        del self.carried[:-1]  # sines and cosines may come as two; a bias of each block's own is not asked for again
        self.carried.append((source, gathered))
        return gathered


def survivors_of(arrived: Survivors | None, reduced: Reduced) -> Survivors:
    """Who is left once a reduction has worked on those that `arrived` (None: all tokens of block 0)."""
    positions, sources = reduced.positions, reduced.sources
    if arrived is not None:
        original = arrived.positions.gather(1, positions.clamp(min=0))
        positions = torch.where(positions < 0, -1, original)
        if sources is not None and arrived.sources is not None:
            sources = sources.gather(1, arrived.sources)
    return Survivors(positions, reduced.sizes, [], sources)
