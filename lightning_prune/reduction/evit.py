"""EViT: the patch tokens that the class token attends to most stay, the others are fused (arXiv 2202.07800)."""

from typing import ClassVar

import torch
from torch import Tensor

from lightning_prune.reduction.base import Attention, Reduced, Reduction, Sequence
from lightning_prune.reduction.functional import best_in_order, precise_product, take_tokens, with_prefix
from lightning_prune.reduction.topk import topk_scores


def evit(tokens: Tensor, attention: Attention, remove: int, prefix_tokens: int, has_class_token: bool) -> Reduced:
    """Keeps the best N - P - R - 1 patch tokens in their order and appends one that is fused of the R + 1 others.

    With s_i the scores (`topk_scores`), the fused token is sum s_i x_i / sum s_i over the others (arXiv 2202.07800,
    section 3.3). The published code leaves out the division, with which a network that was trained for it can live; one
    that was not would meet a token many times shorter than all others. Scores that are all zero weigh alike.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query and key of the block that the tokens went through.
        remove: R >= 1.
        prefix_tokens: P, kept as they are.
        has_class_token: Whether token 0 is CLS.

    Returns:
        N - R tokens, the fused one last.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import Attention, evit
        >>> q, k, v = torch.randn(3, 2, 4, 17, 8).unbind(0)
        >>> evit(torch.randn(2, 17, 32), Attention(q, k, v), 5, prefix_tokens=1, has_class_token=True).positions[0, -1]
        tensor(-1)
    """
    scores = topk_scores(attention, prefix_tokens, has_class_token)
    kept = best_in_order(scores, scores.shape[1] - remove - 1)
    index = with_prefix(kept, prefix_tokens)
    # The dropped tokens are never gathered: the kept ones take part with weight 0 in one product over all. What is
    # added is lost in any score but zero.
    weights = (scores + torch.finfo(scores.dtype).tiny).scatter(1, kept, 0.0)
    weights = weights / weights.sum(dim=1, keepdim=True)
    fused = precise_product(weights.unsqueeze(1), tokens[:, prefix_tokens:].to(weights.dtype)).to(tokens.dtype)
    nowhere = index.new_full((index.shape[0], 1), -1)
    return Reduced(torch.cat((take_tokens(tokens, index), fused), dim=1), torch.cat((index, nowhere), dim=1))


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

    def reduce(self, sequence: Sequence, remove: int) -> Reduced:
        """See `evit`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        return evit(sequence.tokens, sequence.attention, remove, sequence.prefix_tokens, sequence.has_class_token)

    def capacity(self, tokens: int, prefix_tokens: int) -> int:
        """All patch tokens but two may go: one stays as it is, the others become the fused one."""
        return max(tokens - prefix_tokens - 2, 0)
