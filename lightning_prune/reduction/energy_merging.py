"""PiToMe: merges tokens that have many similar ones, and leaves the others as they are (arXiv 2405.16148)."""

from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor

from lightning_prune._utils.validation import check_bool
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import precise_product
from lightning_prune.reduction.merge_schedule import allocate_by_rate, max_allocatable
from lightning_prune.reduction.merging import (
    mean_keys,
    merge,
    merge_into_targets,
    most_similar,
    most_similar_targets,
)
from lightning_prune.reduction.portable import descending_ranks, is_portable


def pitome_margin(block: int, depth: int) -> float:
    """The margin t = 0.9 (1 - l / L) of block l of L: similarities above it count in full.

    Example:
        >>> from lightning_prune.reduction import pitome_margin
        >>> pitome_margin(block=3, depth=12)
        0.675
    """
    return 0.9 * (1 - block / depth)


def pitome_energy(key: Tensor, num_prefix_tokens: int, margin: float) -> Tensor:
    """The energy of every patch token: high where many others are similar to it (arXiv 2405.16148, section 3).

    With S_ij the cosine of the keys of patch tokens i and j, averaged over heads, and t the margin, E_i is the mean
    over j of f(S_ij - t), with f(u) = u for u >= 0 and exp(u) - 1 for u < 0: the ELU of the published code for images.
    j = i is included, which adds the same to all tokens.

    Args:
        key: (B, H, N, D) keys of the block.
        num_prefix_tokens: P, the first tokens, which have no energy and add none.
        margin: t; see `pitome_margin`.

    Returns:
        (B, N - P), float32 (float64 if the keys are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import pitome_energy
        >>> key = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).view(1, 1, 3, 2)
        >>> pitome_energy(key, num_prefix_tokens=0, margin=0.0)
        tensor([[0.6667, 0.6667, 0.3333]])
    """
    metric = F.normalize(mean_keys(key)[:, num_prefix_tokens:], dim=-1)
    return F.elu(precise_product(metric, metric.transpose(1, 2)) - margin).mean(dim=-1)


def pitome(
    tokens: Tensor,
    key: Tensor,
    remove: int,
    num_prefix_tokens: int,
    margin: float,
    sizes: Tensor | None = None,
    trace: bool = False,
) -> ReductionOutput:
    """Merges R of the 2R patch tokens with the highest energy into the R others of them (arXiv 2405.16148, section 3).

    In the order of their energy, the first, third, ... of the 2R are merged, each into the most similar of the second,
    fourth, ...; all other tokens are left as they are. See `merge` for the merging.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D), keys of the block.
        remove: R, from 1 to (N - P) // 2.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        margin: t; see `pitome_margin`.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`.

    Returns:
        N - R tokens in their order, and their sizes (float32; float64 if the tokens are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import pitome
        >>> key = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]).view(1, 1, 3, 2)
        >>> merged = pitome(torch.tensor([[[4.0], [6.0], [9.0]]]), key, remove=1, num_prefix_tokens=0, margin=0.9)
        >>> merged.tokens.flatten().tolist(), merged.sizes.tolist()
        ([5.0, 9.0], [[2.0, 1.0]])
    """
    metric, energy = mean_keys(key), pitome_energy(key, num_prefix_tokens, margin)
    if is_portable():
        rank = descending_ranks(energy)
        second = (rank * 0.5).floor() < rank * 0.5  # of each pair of ranks
        candidates, protected = second & (rank < 2 * remove), rank > 2 * remove - 1
        target = most_similar_targets(metric, rank, candidates | protected, candidates, num_prefix_tokens)
        return merge_into_targets(tokens, target, tokens.shape[1] - remove, sizes, trace)
    order = energy.topk(2 * remove, dim=-1).indices + num_prefix_tokens
    source, candidates = order[:, ::2], order[:, 1::2]
    return merge(tokens, source, most_similar(metric, source, candidates), sizes, trace)


class PiToMe(Reduction):
    """PiToMe, as a method for `lightning_prune.patch`; see `pitome`.

    Source: arXiv 2405.16148, section 3. Differences from the published code: tokens that are left keep their order, and
    a merged token keeps the position of its destination, so that models with rotary embeddings or position biases can
    be used; and a schedule removes exactly the requested total.

    Args:
        proportional_attention: Whether later blocks weight tokens by size: log(size) is added to the logits of each
            key. Blocks before the first merge are not affected.

    Raises:
        ArgumentError: If the argument has another value.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, "pitome", 100) as handle:
        ...     handle.schedule.removed
        (11, 11, 10, 10, 9, 8, 8, 7, 7, 7, 6, 6)
    """

    name = "pitome"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    tracks_sizes = True
    is_lossless = True
    fused_tokens = 0
    multi_block = True

    def __init__(self, proportional_attention: bool = True) -> None:
        check_bool("proportional_attention", proportional_attention)
        self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `pitome`; the margin is that of the sequence's block."""
        assert sequence.attention is not None  # provided because of `reads`
        margin = pitome_margin(sequence.block, sequence.depth)
        key, prefix = sequence.attention.key, sequence.num_prefix_tokens
        return pitome(sequence.tokens, key, remove, prefix, margin, sequence.sizes, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """Half of the patch tokens."""
        return max(tokens - num_prefix_tokens, 0) // 2

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """Each block from `block` on keeps the same share of its patch tokens; see `allocate_by_rate`."""
        return allocate_by_rate(remove, tokens, num_prefix_tokens, depth, block)

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """The total if each block from `block` on merges half of its patch tokens."""
        return max_allocatable(tokens, num_prefix_tokens, depth, block)

    def settings(self) -> dict[str, Any]:
        """`proportional_attention`."""
        return {"proportional_attention": self.proportional_attention}
