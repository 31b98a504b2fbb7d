"""Top-K: the patch tokens that the class token attends to most stay, the others are dropped."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.functional import attention_probabilities, keep_best


def topk_scores(attention: Attention, prefix_tokens: int, has_class_token: bool) -> Tensor:
    """Attention that every patch token receives from CLS, the score of EViT (arXiv 2202.07800, section 3.2).

    With A[h, j, i] the attention of query j on key i, patch token i scores the mean over heads of A[h, 0, i]; only that
    row is computed. A model without CLS has no such row: there the score is the mean over heads and patch queries j.

    Args:
        attention: Query and key of the block, (B, H, N, D) each.
        prefix_tokens: P, the first tokens, which are not scored.
        has_class_token: Whether token 0 is CLS.

    Returns:
        (B, N - P), float32 (float64 where the attention is).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import Attention, topk_scores
        >>> q, k, v = torch.zeros(3, 1, 2, 5, 8).unbind(0)
        >>> topk_scores(Attention(q, k, v), prefix_tokens=1, has_class_token=True)
        tensor([[0.2000, 0.2000, 0.2000, 0.2000]])
    """
    precise = torch.promote_types(attention.query.dtype, torch.float32)
    queries = slice(0, 1) if has_class_token else slice(prefix_tokens, None)
    received = attention_probabilities(attention, queries)[..., prefix_tokens:]
    return received.mean(dim=(1, 2), dtype=precise)


def topk(tokens: Tensor, attention: Attention, remove: int, prefix_tokens: int, has_class_token: bool) -> Reduced:
    """Keeps the best N - P - R patch tokens by `topk_scores` in their order; the R others are lost.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block that the tokens went through.
        remove: R >= 1.
        prefix_tokens: P, kept as they are.
        has_class_token: Whether token 0 is CLS.

    Returns:
        N - R tokens.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import Attention, topk
        >>> q, k, v = torch.randn(3, 2, 4, 17, 8).unbind(0)
        >>> topk(torch.randn(2, 17, 32), Attention(q, k, v), 5, prefix_tokens=1, has_class_token=True).tokens.shape
        torch.Size([2, 12, 32])
    """
    return keep_best(tokens, topk_scores(attention, prefix_tokens, has_class_token), remove, prefix_tokens)


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

    def reduce(self, sequence: Sequence, remove: int) -> Reduced:
        """See `topk`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        return topk(sequence.tokens, sequence.attention, remove, sequence.prefix_tokens, sequence.has_class_token)

    def capacity(self, tokens: int, prefix_tokens: int) -> int:
        """All patch tokens but one may go."""
        return max(tokens - prefix_tokens - 1, 0)
