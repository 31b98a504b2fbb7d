"""Soft merging: each token that is not kept is shared among the kept ones, by a product with a matrix."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune._utils.validation import check_bool, check_positive
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.cls_attention import topk_scores
from lightning_prune.reduction.functional import precise_product, select_best, with_prefix
from lightning_prune.reduction.merging import mean_keys
from lightning_prune.reduction.portable import joined, one_hot


def soft_merge(
    tokens: Tensor,
    key: Tensor,
    scores: Tensor,
    remove: int,
    num_prefix_tokens: int,
    temperature: float,
    sizes: Tensor | None = None,
    trace: bool = False,
) -> ReductionOutput:
    """Keeps the N - P - R patch tokens with the highest scores; shares the others among them: y = W x.

    With S_ij the cosine of the keys of patch tokens i and j, averaged over heads, m_i the size of a token and K the
    kept tokens, a token i that is not kept gives the kept token j the share a_ij = exp(S_ij / tau) / sum over k in K of
    exp(S_ik / tau). A kept token keeps itself: a_jj = 1. What j holds is m'_j = sum over all i of a_ij m_i, and
    y_j = sum over all i of (a_ij m_i / m'_j) x_i: the rows of W sum to 1, and the sizes to the number of patches.
    As tau goes to 0 this becomes `merge_into_nearest`.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D), keys of the block.
        scores: (B, N - P).
        remove: R, from 1 to N - P - 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        temperature: tau > 0.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`, the kept token with the largest share of each.

    Returns:
        N - R tokens in their order, and their sizes, which are no whole numbers (float32; float64 if the tokens are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import soft_merge
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]]).view(1, 1, 3, 2)
        >>> tokens, scores = torch.tensor([[[3.0], [9.0], [6.0]]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> merged = soft_merge(tokens, key, scores, remove=1, num_prefix_tokens=0, temperature=0.1)
        >>> merged.tokens.flatten().tolist(), merged.sizes.tolist()
        ([4.0, 8.0], [[1.5, 1.5]])
    """
    prefix, patches = num_prefix_tokens, scores.shape[1]
    precise = torch.promote_types(tokens.dtype, torch.float32)
    kept = select_best(scores, patches - remove, prefix)
    matrix = one_hot(kept.patch_indices, patches) if kept.matrix is None else kept.matrix
    metric = F.normalize(mean_keys(key)[:, prefix:], dim=-1)
    matrix = matrix.to(metric.dtype)
    similarity = precise_product(precise_product(matrix, metric), metric.transpose(1, 2))  # (B, kept, all)
    is_kept = matrix.sum(dim=1, keepdim=True) > 0
    shares = torch.where(is_kept, matrix, (similarity / temperature).softmax(dim=1)).to(precise)
    held = shares if sizes is None else shares * sizes[:, prefix:].to(precise).unsqueeze(1)
    left_sizes = held.sum(dim=2)
    # Weights are normalised before the product, so that a token that receives nothing has weight 1 exactly.
    merged = precise_product(held / left_sizes.unsqueeze(2), tokens[:, prefix:].to(precise)).to(tokens.dtype)
    ones = torch.ones(tokens.shape[0], prefix, dtype=precise, device=tokens.device)
    return ReductionOutput(
        joined(tokens[:, :prefix], merged),
        kept.positions,
        joined(ones if sizes is None else sizes[:, :prefix].to(precise), left_sizes),
        with_prefix(shares.argmax(dim=1), prefix) if trace else None,
    )


class SoftMerge(Reduction):
    """Merges each token that is not kept into several kept ones, by a product with a matrix; see `soft_merge`.

    Tokens are kept by the attention of CLS, or without CLS by the mean attention that they receive (`topk_scores`).
    There is no index of a destination: no gather by it, no scatter, in any form.

    Ours, in the spirit of Token Transforming (arXiv 2506.05709), which also describes reduction as a product with a
    matrix from many tokens to many. Its formulas could not be verified, so they are not claimed to be these. Formula
    and temperature were chosen by the outputs of a small ViT for CIFAR-10 (`docs/benchmarks.md`), where no temperature
    lost less than merging into the nearest token alone: what speaks for it are its operators.

    Args:
        temperature: tau > 0: the smaller, the fewer tokens a token is shared among.
        proportional_attention: Whether later blocks weight tokens by size: log(size) is added to the logits of each
            key. Blocks before the first merge are not affected.

    Raises:
        ArgumentError: If an argument has another value.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "soft-merge", lp.Schedule.single(depth=12, block=3, remove=56))
    """

    name = "soft-merge"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    tracks_sizes = True
    is_lossless = True
    fused_tokens = 0

    def __init__(self, temperature: float = 0.01, proportional_attention: bool = True) -> None:
        check_positive("temperature", temperature)
        check_bool("proportional_attention", proportional_attention)
        self.temperature = temperature
        self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `soft_merge`."""
        attention, prefix = sequence.attention, sequence.num_prefix_tokens
        assert attention is not None  # provided because of `reads`
        scores = topk_scores(attention, prefix, sequence.has_class_token)
        return soft_merge(
            sequence.tokens, attention.key, scores, remove, prefix, self.temperature, sequence.sizes, sequence.trace
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def settings(self) -> dict[str, Any]:
        """`temperature` and `proportional_attention`."""
        return {"temperature": self.temperature, "proportional_attention": self.proportional_attention}
