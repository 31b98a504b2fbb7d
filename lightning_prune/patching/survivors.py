"""What later blocks must know of the tokens that are left."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduced


class Survivors(NamedTuple):
    """The tokens that are left, seen from block 0.

    What no block can ask for is not kept: at batch 1 the few operations that it takes are felt.

    Attributes:
        left: K, how many are left.
        carried: What was gathered for these tokens before, with what it was gathered from.
        places: (B, K) where each stood in block 0, -1 for a token that has no place; None where blocks receive
            nothing beside the tokens (`VisionTransformer.carries`).
        sizes: (B, K) patches that each stands for, where the method keeps account of it.
        log_sizes: (B, 1, 1, K) their logarithms, where they weigh the attention of later blocks: added to its logits.
        sources: (B, N) which of the K each token of block 0 went into, where the model's pooling must know.
    """

    left: int
    carried: list[tuple[Tensor, Tensor]]
    places: Tensor | None = None
    sizes: Tensor | None = None
    log_sizes: Tensor | None = None
    sources: Tensor | None = None

    @property
    def positions(self) -> Tensor:
        """`places`, for families that said that their blocks ask for them (`VisionTransformer.carries`)."""
        assert self.places is not None
        return self.places

    def carry(self, source: Tensor, gather: Callable[[Tensor], Tensor]) -> Tensor:
        """`gather(source)`, once for all blocks that receive the same tensor: most models share one among them."""
        for known, gathered in self.carried:
            if known is source:
                return gathered
        gathered = gather(source)
        del self.carried[:-1]  # sines and cosines may come as two; a bias of each block's own is not asked for again
        self.carried.append((source, gathered))
        return gathered


def survivors_of(arrived: Survivors | None, reduced: Reduced, places: bool, weighs: bool) -> Survivors:
    """Who is left once a reduction has worked on those that `arrived`.

    Args:
        arrived: Who was left before; None for all tokens of block 0.
        reduced: What the reduction made of them.
        places: Whether it will be asked where they stood.
        weighs: Whether their sizes weigh the attention of later blocks.
    """
    positions, sources, sizes = reduced.positions, reduced.sources, reduced.sizes
    if arrived is not None:
        if places:
            original = arrived.positions.gather(1, positions.clamp(min=0))
            positions = torch.where(positions < 0, -1, original)
        if sources is not None and arrived.sources is not None:
            sources = sources.gather(1, arrived.sources)
    log_sizes = sizes.log()[:, None, None].to(reduced.tokens.dtype) if weighs and sizes is not None else None
    return Survivors(positions.shape[1], [], positions if places else None, sizes, log_sizes, sources)
