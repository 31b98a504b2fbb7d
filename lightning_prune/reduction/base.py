"""The interface between reduction methods (which tokens are removed) and patching (where in the model)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor, nn


class AttentionInputs(NamedTuple):
    """The inputs of the attention of one block.

    H heads, D channels per head. `query` and `key` are the operands of the dot product, after q/k-norm and rotary
    embedding.

    Attributes:
        query: (B, H, N, D).
        key: (B, H, N, D).
        value: (B, H, N, Dv).
        mask: Broadcastable to (B, H, N, N): bool (True is attended to) or added to the logits.
        scale: Of the logits; None means D ** -0.5.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None = None
    scale: float | None = None


class TokenSequence(NamedTuple):
    """The input of a reduction.

    Attributes:
        tokens: (B, N, C), prefix tokens first.
        num_prefix_tokens: P, the number of prefix tokens, which are never removed.
        has_class_token: Whether token 0 is a CLS token.
        attention: If the reduction reads "attention".
        sizes: (B, N) number of patches merged into each token, if an earlier block merged tokens.
        entering: (B, N, C) the tokens that entered the block.
        pixels: (B, channels, height, width) the images, if the reduction reads "pixels".
        trace: Whether to return `ReductionOutput.sources`, which takes time.
        block: Index of the block.
        depth: Number of blocks of the model.
    """

    tokens: Tensor
    num_prefix_tokens: int
    has_class_token: bool
    attention: AttentionInputs | None = None
    sizes: Tensor | None = None
    entering: Tensor | None = None
    pixels: Tensor | None = None
    trace: bool = False
    block: int = 0
    depth: int = 1


class ReductionOutput(NamedTuple):
    """The tokens that are left.

    Attributes:
        tokens: (B, N - R, C), prefix tokens first, kept tokens in their order.
        positions: (B, N - R) index of each token among the N (of the destination, if merged); -1 if fused.
        sizes: (B, N - R) number of patches in each token, if the method tracks sizes; 0 for padding.
        sources: (B, N) index among the N - R of the token that each became part of; -1 if dropped.
    """

    tokens: Tensor
    positions: Tensor
    sizes: Tensor | None = None
    sources: Tensor | None = None


class Reduction(ABC):
    """A method that shortens the token sequence. Subclass it to add one.

    A reduction is immutable and has only plain Python values as attributes. It must process each image independently of
    the others in the batch, must not synchronise with the host, and must not make shapes depend on data.

    Attributes:
        name: The name by which `lightning_prune.patch` selects it. An instance may override the name of its class if
            its settings define another method, as `POMT(dropped="nearest")` does.
        site: `"block"` if it acts between the attention and the MLP of a block, `"input"` if it acts before block 0.
        reads: The inputs that it reads in addition to the tokens: `"attention"`, `"pixels"`.
        tracks_sizes: Whether it returns sizes, and uses those of earlier blocks.
        proportional_attention: Whether the sizes that it returns weight the attention of later blocks: log(size) is
            added to the logits of each key.
        is_lossless: Whether every removed token is merged into a kept one. Models that pool over their patch tokens
            then need `ReductionOutput.sources`, so it must be returned if `TokenSequence.trace` is set.
        fused_tokens: How many tokens without a position (-1), made of several, it returns for an image at most; None if
            that is not known. Giving removed tokens back (`lightning_prune.patch`, `restore`) is faster where it is.
        adaptive: Whether the number of removed tokens depends on the image. Then there is no schedule and `remove` is
            0. Shorter images of a batch are padded with tokens of size 0, which proportional attention masks.
        multi_block: Whether it is used in many blocks, as ToMe is, with the tokens distributed by `allocate`. Other
            methods reduce in one block.
        scales_images: Whether it scales the images down before the model, instead of removing tokens of a sequence, as
            `Resize` does. Its site is `"input"`, and `reduce` is never called.
    """

    name: str
    site: Literal["block", "input"] = "block"
    reads: ClassVar[frozenset[str]] = frozenset()
    tracks_sizes: bool = False
    proportional_attention: bool = False
    is_lossless: bool = False
    fused_tokens: int | None = None
    adaptive: bool = False
    multi_block: bool = False
    scales_images: bool = False

    @abstractmethod
    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Removes exactly `remove` >= 1 tokens of each image.

        Args:
            sequence: The tokens, and the inputs that this reduction reads.
            remove: R; at most `max_removed`.

        Returns:
            The N - R tokens that are left.
        """

    @abstractmethod
    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """The largest number of tokens that can be removed.

        Args:
            tokens: N, prefix tokens included.
            num_prefix_tokens: P.
        """

    def possible_counts(
        self, tokens: int, num_prefix_tokens: int, grid: tuple[int, int] | None = None
    ) -> Sequence[int] | None:
        """The numbers of tokens that can be left of N, for methods that cannot leave every number.

        Args:
            tokens: N, prefix tokens included.
            num_prefix_tokens: P.
            grid: Rows and columns of the N - P patches; None if it is not known.

        Returns:
            The numbers below N, prefix tokens included, ascending; None if every one from N - `max_removed` on can be.
        """
        return None

    def nearest_removed(
        self, wanted: int, tokens: int, num_prefix_tokens: int, grid: tuple[int, int] | None = None
    ) -> int:
        """The number of tokens nearest to `wanted` that can be removed, at least 1 if any can; see `possible_counts`.

        Args:
            wanted: Number of tokens to remove.
            tokens: N, prefix tokens included.
            num_prefix_tokens: P.
            grid: Rows and columns of the N - P patches; None if it is not known.
        """
        possible = self.possible_counts(tokens, num_prefix_tokens, grid)
        if possible is None:
            return min(max(wanted, 1), self.max_removed(tokens, num_prefix_tokens))
        return min((tokens - count for count in possible), key=lambda removed: abs(removed - wanted), default=0)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why this instance cannot be used with a model, for example because its vocabulary is for another one.

        Called when a model is patched. None if it can be used, as most methods can.
        """
        return None

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """Distributes a total number of tokens over the blocks, as the method is usually used.

        By default all tokens are removed in one block: in `block`, or in block 0 if the method acts before it.

        Args:
            remove: Total number of tokens to remove; at most `max_total_removed`.
            tokens: N, tokens that enter the first block.
            num_prefix_tokens: P.
            depth: Number of blocks.
            block: The reducing block of methods that reduce once; for others the first block that may reduce.

        Returns:
            The number for each block, with the sum `remove`.
        """
        reducing = 0 if self.site == "input" else block
        return [remove if index == reducing else 0 for index in range(depth)]

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """The largest total that `allocate` can distribute; see there for the arguments."""
        return self.max_removed(tokens, num_prefix_tokens)

    def settings(self) -> dict[str, Any]:
        """The settings that distinguish this instance from others of its class, as plain values."""
        return dict(vars(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{k}={v!r}' for k, v in self.settings().items())})"

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and vars(self) == vars(other)

    def __hash__(self) -> int:
        return hash((type(self), tuple(sorted(vars(self).items()))))
