"""Top-K and EViT: patch tokens are ranked by the attention of the CLS token (arXiv 2202.07800)."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.reduction.base import AttentionInputs, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import (
    attention_probabilities,
    keep_best,
    precise_product,
    select_best,
)


def topk_scores(attention: AttentionInputs, num_prefix_tokens: int, has_class_token: bool) -> Tensor:
    """Attention from CLS to every patch token, the score of EViT (arXiv 2202.07800, section 3.2).

    With A[h, j, i] the attention of query j to key i, the score of patch token i is the mean over heads of A[h, 0, i];
    only that row is computed. In models without CLS it is the mean over heads and patch queries j.

    Args:
        attention: Query and key of the block, (B, H, N, D) each.
        num_prefix_tokens: P, the first tokens, which are not scored.
        has_class_token: Whether token 0 is CLS.

    Returns:
        (B, N - P), float32 (float64 if the attention is).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import AttentionInputs, topk_scores
        >>> q, k, v = torch.zeros(3, 1, 2, 5, 8).unbind(0)
        >>> topk_scores(AttentionInputs(q, k, v), num_prefix_tokens=1, has_class_token=True)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    precise = torch.promote_types(attention.query.dtype, torch.float32)
    queries = slice(0, 1) if has_class_token else slice(num_prefix_tokens, None)
    received = attention_probabilities(attention, queries)[..., num_prefix_tokens:]
    return received.mean(dim=(1, 2), dtype=precise)


def topk(
    tokens: Tensor, attention: AttentionInputs, remove: int, num_prefix_tokens: int, has_class_token: bool
) -> ReductionOutput:
    """Keeps the N - P - R patch tokens with the highest `topk_scores`, in their order, and drops the others.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block.
        remove: R >= 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        has_class_token: Whether token 0 is CLS.

    Returns:
        N - R tokens.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import AttentionInputs, topk
        >>> q, k, v = torch.randn(3, 2, 4, 17, 8).unbind(0)
        >>> attention = AttentionInputs(q, k, v)
        >>> topk(torch.randn(2, 17, 32), attention, 5, num_prefix_tokens=1, has_class_token=True).tokens.shape
        torch.Size([2, 12, 32])
    """
    return keep_best(tokens, topk_scores(attention, num_prefix_tokens, has_class_token), remove, num_prefix_tokens)


class TopK(Reduction):
    """Prunes by the attention of CLS, without a fused token; see `topk`.

    Source: the token selection of EViT, arXiv 2202.07800, section 3.2.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "topk", lp.Schedule.single(depth=12, block=3, remove=56))
    """

    name: str = "topk"
    fused_tokens = 0
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `topk`."""
        assert sequence.attention is not None  # provided because of `reads`
        return topk(sequence.tokens, sequence.attention, remove, sequence.num_prefix_tokens, sequence.has_class_token)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)


def evit(
    tokens: Tensor, attention: AttentionInputs, remove: int, num_prefix_tokens: int, has_class_token: bool
) -> ReductionOutput:
    """Keeps the N - P - R - 1 patch tokens with the highest scores, in their order, and fuses the others.

    With s_i the scores (`topk_scores`), the fused token is sum s_i x_i / sum s_i over the R + 1 other tokens (arXiv
    2202.07800, section 3.3). The published code omits the division, which is harmless for a network trained that way.
    For other networks the fused token would have a much smaller norm than all others. If all scores are zero, the
    weights are equal.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block.
        remove: R >= 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.
        has_class_token: Whether token 0 is CLS.

    Returns:
        N - R tokens, the fused one last.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import AttentionInputs, evit
        >>> q, k, v = torch.randn(3, 2, 4, 17, 8).unbind(0)
        >>> attention = AttentionInputs(q, k, v)
        >>> evit(torch.randn(2, 17, 32), attention, 5, num_prefix_tokens=1, has_class_token=True).positions[0, -1]
        tensor(-1)
    """
    scores = topk_scores(attention, num_prefix_tokens, has_class_token)
    kept = select_best(scores, scores.shape[1] - remove - 1, num_prefix_tokens)
    # One product over all tokens, in which the kept ones have weight 0, is faster than gathering the others. Adding
    # `tiny` only changes scores that are zero.
    weights = kept.clear(scores + torch.finfo(scores.dtype).tiny)
    weights = weights / weights.sum(dim=1, keepdim=True)
    fused = precise_product(weights.unsqueeze(1), tokens[:, num_prefix_tokens:].to(weights.dtype)).to(tokens.dtype)
    nowhere = kept.positions.new_full((tokens.shape[0], 1), -1)
    return ReductionOutput(torch.cat((kept.take(tokens), fused), dim=1), torch.cat((kept.positions, nowhere), dim=1))


class EViT(Reduction):
    """EViT's token reorganisation, without the training of the paper; see `evit`.

    Source: arXiv 2202.07800, section 3. The paper reduces at three blocks (25%, 50% and 75% of the depth).

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "evit", lp.Schedule([0, 0, 0, 40, 0, 0, 30, 0, 0, 20, 0, 0]))
    """

    name: str = "evit"
    fused_tokens = 1
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `evit`."""
        assert sequence.attention is not None  # provided because of `reads`
        return evit(sequence.tokens, sequence.attention, remove, sequence.num_prefix_tokens, sequence.has_class_token)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except two: one is kept, and the others become the fused one."""
        return max(tokens - num_prefix_tokens - 2, 0)
