"""The Visual Word Tokenizer's intra-image method: drops the patches of least pixel variance (arXiv 2411.15397)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import select_best
from lightning_prune.reduction.patchify import cut_like


def patch_variances(pixels: Tensor, patches: int) -> Tensor:
    """The variance of each patch over all of its pixels and channels.

    Args:
        pixels: (B, channels, height, width), normalised images, as they enter the model.
        patches: Number of square patches into which the model divides each image.

    Returns:
        (B, patches), float32 (float64 if the pixels are).

    Raises:
        UnsupportedModelError: If that number of patches does not form a grid of the image.
    """
    precise = torch.promote_types(pixels.dtype, torch.float32)
    return cut_like(pixels, patches).to(precise).var(dim=-1, correction=0)


def vwt_intra(tokens: Tensor, pixels: Tensor, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the N - P - R patch tokens whose pixels have the largest variance, in their order; ties keep the first.

    Args:
        tokens: (B, N, C) before block 0, prefix tokens first, patch tokens row by row.
        pixels: (B, channels, height, width), the normalised images.
        remove: R.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.

    Returns:
        N - R tokens.

    Raises:
        UnsupportedModelError: If the patch tokens do not form a grid of the image.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import vwt_intra
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> images[:, :, 20:, 20:] = torch.randn(3, 12, 12)  # all other patches are uniform
        >>> vwt_intra(torch.randn(1, 5, 8), images, remove=3, num_prefix_tokens=1).positions
        tensor([[0, 4]])
    """
    count = tokens.shape[1]
    keep = count - num_prefix_tokens - remove
    variances = patch_variances(pixels, count - num_prefix_tokens)
    # Ties are common (saturated sky), and `topk` may break them depending on the batch size.
    kept = select_best(variances, keep, num_prefix_tokens, stable=True)
    return ReductionOutput(kept.take(tokens), kept.positions)


class VWTIntra(Reduction):
    """Drops patches of low contrast before block 0: the intra-image method of the Visual Word Tokenizer.

    It needs neither attention nor training, and costs one pass over the pixels. Source: arXiv 2411.15397, which drops a
    fixed share of the patches before the encoder, those with the smallest pixel variance.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "vwt-intra", lp.Schedule.single(depth=12, block=0, remove=56))
    """

    name: str = "vwt-intra"
    fused_tokens = 0
    site: Literal["block", "input"] = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `vwt_intra`."""
        assert sequence.pixels is not None  # provided because of `reads`
        return vwt_intra(sequence.tokens, sequence.pixels, remove, sequence.num_prefix_tokens)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)
