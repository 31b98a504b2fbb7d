"""What a reduction is: the contract between the methods (which tokens go) and the patching (where they go)."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn


class AttentionInputs(NamedTuple):
    """What one block's attention was computed from.

    H heads, D channels a head. `query` and `key` are those that met in the dot product: after q/k-norm and rotation.
    """

    query: Tensor  # (B, H, N, D)
    key: Tensor  # (B, H, N, D)
    value: Tensor  # (B, H, N, Dv)
    mask: Tensor | None = None  # broadcastable to (B, H, N, N): bool (True takes part) or added to the logits
    scale: float | None = None  # of the logits; None is D ** -0.5


class TokenSequence(NamedTuple):
    """The tokens that a reduction chooses from, and what it may look at to choose."""

    tokens: Tensor  # (B, N, C), prefix tokens first
    num_prefix_tokens: int  # the first P of them, never removed
    has_class_token: bool  # whether token 0 is a CLS token
    attention: AttentionInputs | None = None  # where the reduction reads "attention"
    sizes: Tensor | None = None  # (B, N) how many patches each token stands for, where an earlier block merged some
    entering: Tensor | None = None  # (B, N, C) the tokens as they entered the block
    pixels: Tensor | None = None  # (B, channels, height, width) the images, where the reduction reads "pixels"
    trace: bool = False  # whether `ReductionOutput.sources` is wanted, which costs time


class ReductionOutput(NamedTuple):
    """The tokens that are left."""

    tokens: Tensor  # (B, N - R, C), prefix tokens first, kept tokens in their order
    positions: Tensor  # (B, N - R) index among the N of each, or of the one it was merged into; -1: has no place
    sizes: Tensor | None = None  # (B, N - R) how many patches each stands for, where the method keeps sizes; 0: padding
    sources: Tensor | None = None  # (B, N) index among the N - R that each went into, -1 if dropped; where traced


class Reduction(ABC):
    """A method that shortens the token sequence. Subclass it to add one.

    A reduction is immutable, holds plain Python values only and treats every image alone: it must never let one
    image's outcome depend on another of the batch, synchronise with the host, or make shapes depend on data.

    Attributes:
        name: The name that `lightning_prune.patch` knows it by. Of the class; an instance may have one of its own where
            its settings make it a method of its own, as `POMT(dropped="nearest")` does.
        site: `"block"`: acts between a block's attention and its MLP. `"input"`: acts before block 0.
        reads: What it looks at besides the tokens: `"attention"`, `"pixels"`.
        tracks_sizes: Whether it returns sizes, and its later reductions of the same images want to be given them.
        proportional_attention: Whether the sizes that it returns weigh the attention of later blocks: log(size) is
            added to the logits of each key.
        is_lossless: Whether every removed token is merged into one that stays. Models that pool over their patch tokens
            then need to know where each token went, so `ReductionOutput.sources` must be set if it is traced.
        adaptive: Whether the image decides how many tokens go. There is no schedule then and `remove` is 0; shorter
            images of a batch are padded with tokens of size 0, which proportional attention masks.
        multi_block: Whether it is used in many blocks, as ToMe is, and `allocate` gives each a share; other methods
            reduce in one block.
    """

    name: str
    site: Literal["block", "input"] = "block"
    reads: ClassVar[frozenset[str]] = frozenset()
    tracks_sizes: bool = False
    proportional_attention: bool = False
    is_lossless: bool = False
    adaptive: bool = False
    multi_block: bool = False

    @abstractmethod
    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Removes exactly `remove` >= 1 tokens of every image.

        Args:
            sequence: The tokens and what this reduction reads.
            remove: R; at most `max_removed`.

        Returns:
            The N - R tokens that are left.
        """

    @abstractmethod
    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """The most tokens that can be removed when `tokens`, `num_prefix_tokens` of them prefix, are there."""

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why this instance cannot be used with a transformer: what it was made with (a vocabulary) is for another.

        Asked when a model is patched; None where nothing speaks against it, as with most methods.
        """
        return None

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """What each block removes if `remove` tokens are to go in all, in the form that the method is used in.

        Args:
            remove: Tokens that go in all; at most `max_total_removed`.
            tokens: N, entering the first block.
            num_prefix_tokens: P.
            depth: Number of blocks.
            block: The reducing block of methods that reduce once, as this does unless a method says otherwise; the
                first block that may reduce for all others. Before block 0 is where methods of that site act.

        Returns:
            One number a block, `remove` in all.
        """
        at = 0 if self.site == "input" else block
        return [remove if index == at else 0 for index in range(depth)]

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """The most tokens that `allocate` can make go."""
        return self.max_removed(tokens, num_prefix_tokens)

    def settings(self) -> dict[str, Any]:
        """What distinguishes this instance from a default one, as plain values."""
        return dict(vars(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(vars(self).items()))))
