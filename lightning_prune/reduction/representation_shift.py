"""Representation Shift: keeps the patch tokens that a layer changes most (arXiv 2508.00367)."""

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import keep_best


def shift_scores(tokens: Tensor, entering: Tensor, num_prefix_tokens: int) -> Tensor:
    """Distance by which a layer moves each patch token: the Euclidean ||F(x_i) - x_i|| (arXiv 2508.00367, section 3).

    It needs no attention map, so attention stays fused, and it works in models whose attention cannot be read.

    Args:
        tokens: (B, N, C) after the layer, including its residual.
        entering: (B, N, C) the same tokens before it.
        num_prefix_tokens: P, the first tokens, which are not scored.

    Returns:
        (B, N - P), float32 (float64 if the tokens are).

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import shift_scores
        >>> before = torch.zeros(1, 3, 2)
        >>> shift_scores(torch.tensor([[[9.0, 9.0], [3.0, 4.0], [0.0, 1.0]]]), before, num_prefix_tokens=1)
        tensor([[5., 1.]])
    """
    precise = torch.promote_types(tokens.dtype, torch.float32)
    moved = tokens[:, num_prefix_tokens:].to(precise) - entering[:, num_prefix_tokens:].to(precise)
    return torch.linalg.vector_norm(moved, dim=-1)


def shift(tokens: Tensor, entering: Tensor, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the N - P - R patch tokens with the highest `shift_scores`, in their order, and drops the others.

    Args:
        tokens: (B, N, C) after the layer.
        entering: (B, N, C) before it.
        remove: R >= 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.

    Returns:
        N - R tokens.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import shift
        >>> before, after = torch.randn(2, 2, 17, 32).unbind(0)
        >>> shift(after, before, remove=5, num_prefix_tokens=1).tokens.shape
        torch.Size([2, 12, 32])
    """
    return keep_best(tokens, shift_scores(tokens, entering, num_prefix_tokens), remove, num_prefix_tokens)


class RepresentationShift(Reduction):
    """Prunes by Representation Shift; see `shift`.

    The layer is the attention of the block, so that its MLP already runs on fewer tokens. The paper uses the MLP, which
    then processes all tokens. In blocks that cannot be split between attention and MLP, the layer is the whole block.

    Source: arXiv 2508.00367, section 3.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "shift", lp.Schedule.single(depth=12, block=3, remove=56))
    """

    name: str = "shift"
    fused_tokens = 0

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `shift`."""
        assert sequence.entering is not None  # provided to every reduction inside a block
        return shift(sequence.tokens, sequence.entering, remove, sequence.num_prefix_tokens)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)
