"""Blocks that reduce: a subclass put over a block's own class while the patch lasts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.keep_rates import Rate
from lightning_prune.patching.blocks import Halves
from lightning_prune.patching.families.base import Family, Setting
from lightning_prune.patching.origin import Origin
from lightning_prune.patching.overlay import Overlay
from lightning_prune.patching.per_thread import PerThread
from lightning_prune.patching.survivors import Survivors, survivors_of
from lightning_prune.patching.tap import AskingMask, can_ask, recorded_attention
from lightning_prune.patching.told import Ear
from lightning_prune.patching.travelling import found, leave
from lightning_prune.reduction.base import Attention, Reduction, Sequence
from lightning_prune.reduction.functional import take_tokens


@dataclass(eq=False)
class PixelSite:
    """Hands the images of the forward pass that is under way to a reduction that reads them."""

    pixels: PerThread[Tensor] = field(default_factory=PerThread)

    def take(self, tokens: Tensor) -> Tensor:
        """The images that these tokens (B, N, C) were made of.

        From now on they travel with the tokens, so that no batch outlives its forward pass and the backward after it,
        in which a checkpointed block asks for them again.

        Raises:
            UnsupportedModelError: If they were not seen.
        """
        pixels = found(tokens)
        if pixels is None:  # not a block that backward runs again
            pixels = self.pixels.get()
            self.pixels.set(None)
        if not isinstance(pixels, Tensor):
            raise UnsupportedModelError(
                "The images that these tokens were made of were not seen. Run the whole model, and compile it as a "
                "whole or not at all."
            )
        leave(tokens, pixels)
        return pixels


@dataclass(eq=False)
class BlockSite:
    """What one patched block does. It keeps nothing of a forward pass: that travels with the tokens."""

    index: int
    reduction: Reduction
    remove: int | Rate
    prefix_tokens: int
    has_class_token: bool
    family: Family
    halves: Halves | None = None
    follows: bool = False  # whether a patched block comes before this one
    pixels: PixelSite | None = None
    keeps_account: bool = False  # whether later blocks must know who is left
    keeps_places: bool = True  # and where each of them stood
    adapts: bool = False  # whether the images decide here how many tokens go
    traces: bool = False  # whether it must be known which token each of block 0 went into
    restores: bool = False  # whether each token stands again, after this block, where those it is made of stood
    fused: list[Setting] = field(default_factory=list)  # what was changed to have fused attention in the block
    hands_on: Callable[..., Any] | None = None  # the attention's forward, if an `attn_mask` reaches its fused call
    ear: Ear | None = None  # of attention modules that make no fused call
    expects: int | None = None  # tokens that the schedule was made to meet here, where it says so
    origin: Origin | None = None  # where the schedule was made; asked at the first batch

    def removes(self, tokens: int) -> int:
        """How many tokens go, of `tokens` that enter the block."""
        if isinstance(self.remove, int):
            return self.remove
        return self.remove.removes(tokens, self.prefix_tokens)

    def check(self, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what a reducing block cannot honour; warns where the schedule was made elsewhere.

        Raises:
            ScheduleError: If the schedule was made for another number of tokens.
            ArgumentError: If an attention mask for all tokens came.
            UnsupportedModelError: If attention is to be causal.
        """
        self.family.check_call(args, kwargs)
        if self.expects is not None and self.expects != x.shape[1]:
            raise ScheduleError(
                f"The schedule was made for {self.expects} tokens entering block {self.index}; {x.shape[1]} enter it. "
                "Give keep rates (KeepRates) where images come in several sizes."
            )
        if self.origin is not None and not torch.compiler.is_compiling():
            origin, self.origin = self.origin, None
            origin.warn(x)

    def takes_mask(self, block: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a mask can be handed to the block's attention: it runs what is known, and no mask came."""
        if self.hands_on is None or args or kwargs.get("attn_mask") is not None:
            return False
        return type(block.attn).forward is self.hands_on and "forward" not in block.attn.__dict__

    def arrived(self, x: Tensor) -> Survivors | None:
        """Who is left after the blocks before this one; None where all are, or nobody needs to know.

        Raises:
            UnsupportedModelError: If that cannot be said of the tokens that arrive.
        """
        if not (self.follows and self.keeps_account):
            return None
        left = found(x)
        if not isinstance(left, Left) or (left.survivors and left.survivors.left != x.shape[1]):
            raise UnsupportedModelError(
                f"The tokens that enter block {self.index} are not those that left the block before: something between "
                "them, such as a hook that returns other tokens, lost what belongs to them (where each stood)."
            )
        return left.survivors


class Left(NamedTuple):
    """What a block that keeps account leaves with its tokens."""

    survivors: Survivors | None


class ReducedBlock(Overlay):
    """Mixin over a block's class. Its `forward` reduces; everything else is the block's own."""

    _prune_site: BlockSite

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The block's own computation with the reduction at its place."""
        site = self._prune_site
        reduction, family, prefix = site.reduction, site.family, site.prefix_tokens
        arrived = site.arrived(x)
        remove = site.removes(x.shape[1])
        reduces = remove > 0 or site.adapts
        if reduces:
            site.check(x, args, kwargs)
        if reduces and reduction.site == "input":
            pixels = site.pixels.take(x) if site.pixels is not None else None
            x, arrived = _reduce(site, Sequence(x, prefix, site.has_class_token, pixels=pixels), remove, arrived)
            reduces = False
        if arrived is not None:
            args, kwargs = family.carry(args, kwargs, arrived, prefix)
        log_sizes = arrived.log_sizes if arrived is not None else None
        reads = reduces and "attention" in reduction.reads
        halves = site.halves if reduces else None
        calls: list[Attention] = []
        tap: AbstractContextManager[Any] = nullcontext()
        if not reads and log_sizes is not None and site.takes_mask(self, args, kwargs):
            kwargs, log_sizes = {**kwargs, "attn_mask": log_sizes}, None  # weighed by attention itself: no need to look
        elif reads and site.takes_mask(self, args, kwargs) and can_ask(x):
            kwargs = {**kwargs, "attn_mask": AskingMask(calls, log_sizes)}
        elif reads or log_sizes is not None or (arrived is not None and family.always_taps):
            tap = family.tap(calls, log_sizes, arrived, prefix, site.ear)
        with tap:
            if halves is None:
                after = super().forward(x, *args, **kwargs)
            else:
                after = halves.attention(self, x, *args, **kwargs)
        if log_sizes is not None and not calls:
            recorded_attention(calls)  # raises: nothing was weighed
        if reduces:
            known = arrived.sizes if arrived is not None else None
            attention = recorded_attention(calls) if reads else None
            sequence = Sequence(after, prefix, site.has_class_token, attention, known, x)
            after, arrived = _reduce(site, sequence, remove, arrived)
            del attention, sequence
            calls.clear()  # query, key and value of all tokens need not outlive the reduction
            if halves is not None:
                after = halves.mlp(self, after)
        if site.restores and arrived is not None and arrived.sources is not None:
            return take_tokens(after, arrived.sources)
        if site.keeps_account:
            leave(after, Left(arrived))
        return after


class RecordingEntry(Overlay):
    """Mixin over the class of the module that receives the images: remembers them for this forward pass."""

    _prune_site: PixelSite

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """The module's own computation."""
        self._prune_site.pixels.set(x)
        return super().forward(x, *args, **kwargs)


def _reduce(
    site: BlockSite, sequence: Sequence, remove: int, arrived: Survivors | None
) -> tuple[Tensor, Survivors | None]:
    count = sequence.tokens.shape[1]
    capacity = site.reduction.capacity(count, site.prefix_tokens)
    if remove > capacity:
        raise ScheduleError(too_many(site.index, count, remove, capacity, site.reduction.name))
    reduced = site.reduction.reduce(sequence._replace(trace=True) if site.traces else sequence, remove)
    if site.traces and reduced.sources is None:
        # Positions tell of one fused token at most; where others went cannot be guessed, nor checked without a sync.
        raise ArgumentError(
            f"{site.reduction.name} says that it `merges`, and this model pools over its patch tokens, so it must say "
            "where each token went: return `Reduced.sources` where `Sequence.trace` asks for them."
        )
    if not site.keeps_account:
        return reduced.tokens, None
    return reduced.tokens, survivors_of(arrived, reduced, site.keeps_places, site.reduction.proportional_attention)


def too_many(block: int, tokens: int, remove: int, capacity: int, method: str) -> str:
    """The message of a `ScheduleError`, at patch time or, where the token count depends on the image, in forward."""
    return (
        f"Block {block} is asked to remove {remove} tokens, but of the {tokens} that enter it {method} can remove at "
        f"most {capacity}."
    )
