"""Merging every token that a score picks out into the kept token that is most like it."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_prune.reduction.base import Reduced
from lightning_prune.reduction.functional import precise_product, take_tokens
from lightning_prune.reduction.merging import merge


def merge_into_nearest(
    tokens: Tensor,
    key: Tensor,
    scores: Tensor,
    remove: int,
    prefix_tokens: int,
    sizes: Tensor | None = None,
    trace: bool = False,
) -> Reduced:
    """Keeps the best N - P - R patch tokens and merges each other one into the kept one whose key is most like its own.

    Likeness is the cosine of the block's keys averaged over heads, as in ToMe (arXiv 2210.09461, section 3), asked of
    dropped against kept tokens only; merging is that of `merging.merge`, each token as many as it stands for.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D) of the block that the tokens went through.
        scores: (B, N - P), the higher the better.
        remove: R, from 1 to N - P - 1.
        prefix_tokens: P, which stay and receive nothing.
        sizes: (B, N) how many patches each token stands for; None where each is one.
        trace: Whether `Reduced.sources` is wanted.

    Returns:
        N - R tokens in their order, and their sizes (float32; float64 where the tokens are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import merge_into_nearest
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1]]).view(1, 1, 3, 2)
        >>> tokens, scores = torch.tensor([[[4.0], [9.0], [6.0]]]), torch.tensor([[3.0, 2.0, 1.0]])
        >>> merged = merge_into_nearest(tokens, key, scores, remove=1, prefix_tokens=0)
        >>> merged.tokens.flatten().tolist(), merged.sizes.tolist()
        ([5.0, 9.0], [[2.0, 1.0]])
    """
    order = scores.argsort(dim=-1, descending=True) + prefix_tokens
    kept, dropped = order[:, : scores.shape[1] - remove], order[:, scores.shape[1] - remove :]
    # One mean with a dtype is one pass over the keys, and half precision would tie many similarities. The length of a
    # dropped token's own key scales its whole row of likenesses, so it has no say in which is the largest.
    metric = key.mean(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    candidates = F.normalize(take_tokens(metric, kept), dim=-1)
    likeness = precise_product(take_tokens(metric, dropped), candidates.transpose(1, 2))
    return merge(tokens, dropped, kept.gather(1, likeness.argmax(dim=-1)), sizes, trace)
