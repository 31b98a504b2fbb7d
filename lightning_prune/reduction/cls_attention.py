"""Top-K and EViT: tokens ranked by the attention of the class token (EViT: arXiv 2202.07800)."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.reduction.base import AttentionInputs, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import (
    attention_probabilities,
    best_in_order,
    keep_best,
    precise_product,
    take_tokens,
    with_prefix,
)


def topk_scores(attention: AttentionInputs, num_prefix_tokens: int, has_class_token: bool) -> Tensor:
    """Attention that every patch token receives from CLS, the score of EViT (arXiv 2202.07800, section 3.2).

    With A[h, j, i] the attention of query j on key i, patch token i scores the mean over heads of A[h, 0, i]; only that
    row is computed. A model without CLS has no such row: there the score is the mean over heads and patch queries j.

    Args:
        attention: Query and key of the block, (B, H, N, D) each.
        num_prefix_tokens: P, the first tokens, which are not scored.
        has_class_token: Whether token 0 is CLS.

    Returns:
        (B, N - P), float32 (float64 where the attention is).

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
    """Keeps the best N - P - R patch tokens by `topk_scores` in their order; the R others are lost.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block that the tokens went through.
        remove: R >= 1.
        num_prefix_tokens: P, kept as they are.
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
    """Pruning by the attention of CLS, without a fused token: see `topk`.

    Source: the token selection of EViT, arXiv 2202.07800, section 3.2.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "topk", lp.Schedule.single(depth=12, block=3, remove=56))
    """

    name: str = "topk"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `topk`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        return topk(sequence.tokens, sequence.attention, remove, sequence.num_prefix_tokens, sequence.has_class_token)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but one may go."""
        return max(tokens - num_prefix_tokens - 1, 0)


def evit(
    tokens: Tensor, attention: AttentionInputs, remove: int, num_prefix_tokens: int, has_class_token: bool
) -> ReductionOutput:
    """Keeps the best N - P - R - 1 patch tokens in their order and appends one that is fused of the R + 1 others.

    With s_i the scores (`topk_scores`), the fused token is sum s_i x_i / sum s_i over the others (arXiv 2202.07800,
    section 3.3). The published code leaves out the division, with which a network that was trained for it can live; one
    that was not would meet a token many times shorter than all others. Scores that are all zero weigh alike.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block that the tokens went through.
        remove: R >= 1.
        num_prefix_tokens: P, kept as they are.
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
    kept = best_in_order(scores, scores.shape[1] - remove - 1)
    index = with_prefix(kept, num_prefix_tokens)
    # The dropped tokens are never gathered: the kept ones take part with weight 0 in one product over all. What is
    # added is lost in any score but zero.
    weights = (scores + torch.finfo(scores.dtype).tiny).scatter(1, kept, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    fused = precise_product(weights.unsqueeze(1), tokens[:, num_prefix_tokens:].to(weights.dtype)).to(tokens.dtype)
    nowhere = index.new_full((index.shape[0], 1), -1)
    return ReductionOutput(torch.cat((take_tokens(tokens, index), fused), dim=1), torch.cat((index, nowhere), dim=1))


class EViT(Reduction):
    """EViT's token reorganisation, without the training that the paper does with it: see `evit`.

    Source: arXiv 2202.07800, section 3. The paper reduces at three blocks (25%, 50% and 75% of the depth).

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "evit", lp.Schedule([0, 0, 0, 40, 0, 0, 30, 0, 0, 20, 0, 0]))
    """

    name: str = "evit"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `evit`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        return evit(sequence.tokens, sequence.attention, remove, sequence.num_prefix_tokens, sequence.has_class_token)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but two may go: one stays as it is, the others become the fused one."""
        return max(tokens - num_prefix_tokens - 2, 0)
