"""Blocks that reduce: a subclass put over a block's own class while the patch lasts."""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, ScheduleError
from lightning_prune.patching.blocks import Halves
from lightning_prune.patching.families.base import Family
from lightning_prune.patching.overlay import Overlay
from lightning_prune.patching.tap import recorded_attention
from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence


class Survivors(NamedTuple):
    """What later blocks must know of the tokens that are left."""

    positions: Tensor  # (B, K) where each stood in block 0, -1 for a token made of several
    sizes: Tensor | None  # (B, K) patches that each stands for


@dataclass(eq=False)
class PixelSite:
    """Keeps the images of the forward pass that is under way for a reduction that reads them."""

    pixels: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the images out of copies and pickles."""
        return {"pixels": None}

    def take(self) -> Tensor | None:
        """The images; forgotten once taken, so that no batch outlives its forward pass.

        With gradients they stay until the next pass: a checkpointed block asks for them again during backward.
        """
        pixels = self.pixels
        if not torch.is_grad_enabled():
            self.pixels = None
        return pixels


@dataclass(eq=False)
class BlockSite:
    """What one patched block does, and what it last left for the blocks after it.

    State is kept by block, not by model: gradient checkpointing runs a block a second time during backward, when a
    shared state would already be that of the last block.
    """

    index: int
    reduction: Reduction
    remove: int
    prefix_tokens: int
    has_class_token: bool
    family: Family
    halves: Halves | None = None
    previous: "BlockSite | None" = None
    pixels: PixelSite | None = None
    keeps_account: bool = False  # whether later blocks read `survivors`
    survivors: Survivors | None = None
    fused: list[nn.Module] = field(default_factory=list)  # attention modules that were switched to fused

    def __getstate__(self) -> dict[str, Any]:
        """Leaves the tensors of the last forward pass out of copies and pickles."""
        return {**self.__dict__, "survivors": None}

    def arrived(self) -> Survivors | None:
        """What the reductions before this block left; None where nothing needs to be known of it."""
        return self.previous.survivors if self.previous is not None else None


class ReducedBlock(Overlay):
    """Mixin over a block's class. Its `forward` reduces; everything else is the block's own."""

    _prune_site: BlockSite

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's own computation with the reduction at its place."""
        site = self._prune_site
        if site.remove and kwargs.get("attn_mask") is not None:
            raise ArgumentError("`attn_mask` is made for all tokens; a model whose blocks remove tokens cannot use it.")
        arrived = site.arrived()
        if site.remove and site.reduction.site == "input":
            pixels = site.pixels.take() if site.pixels is not None else None
            x, arrived = _reduce(site, Sequence(x, site.prefix_tokens, site.has_class_token, pixels=pixels), arrived)
        if arrived is not None:
            args, kwargs = site.family.carry(args, kwargs, arrived.positions)
        sizes = arrived.sizes if arrived is not None and site.reduction.proportional_attention else None
        reduces_here = site.remove > 0 and site.reduction.site == "block"
        if not reduces_here and sizes is None:
            x = super().forward(x, *args, **kwargs)
            site.survivors = arrived
            return x
        calls: list[Attention] = []
        with site.family.tap(calls, sizes.log() if sizes is not None else None):
            if site.halves is None or not reduces_here:
                after = super().forward(x, *args, **kwargs)
            else:
                after = site.halves.attention(self, x, *args, **kwargs)
        if reduces_here:
            attention = recorded_attention(calls) if "attention" in site.reduction.reads else None
            known = arrived.sizes if arrived is not None else None
            sequence = Sequence(after, site.prefix_tokens, site.has_class_token, attention, known, x)
            after, arrived = _reduce(site, sequence, arrived)
            if site.halves is not None:
                after = site.halves.mlp(self, after)
        site.survivors = arrived
        return after


class RecordingEntry(Overlay):
    """Mixin over the class of the module that receives the images: remembers them for this forward pass."""

    _prune_site: PixelSite

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own computation."""
        self._prune_site.pixels = x
        return super().forward(x, *args, **kwargs)


def _reduce(site: BlockSite, sequence: Sequence, arrived: Survivors | None) -> tuple[Tensor, Survivors | None]:
    count = sequence.tokens.shape[1]
    capacity = site.reduction.capacity(count, site.prefix_tokens)
    if site.remove > capacity:
        raise ScheduleError(too_many(site.index, count, site.remove, capacity, site.reduction.name))
    reduced = site.reduction.reduce(sequence, site.remove)
    if not site.keeps_account and reduced.sizes is None:  # sizes are for the next reduction, whatever attention does
        return reduced.tokens, None
    return reduced.tokens, Survivors(_compose(arrived, reduced), reduced.sizes)


def _compose(arrived: Survivors | None, reduced: Reduced) -> Tensor:
    """Positions in block 0 of tokens whose positions in this block are known."""
    if arrived is None:
        return reduced.positions
    original = arrived.positions.gather(1, reduced.positions.clamp(min=0))
    return torch.where(reduced.positions < 0, -1, original)


def too_many(block: int, tokens: int, remove: int, capacity: int, method: str) -> str:
    """The message of a `ScheduleError`, at patch time or, where the token count depends on the image, in forward."""
    return (
        f"Block {block} is asked to remove {remove} tokens, but of the {tokens} that enter it {method} can remove at "
        f"most {capacity}."
    )
