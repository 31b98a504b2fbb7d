"""Visual Word Tokenizer, intra-image: the patches with the largest pixel variance stay (arXiv 2411.15397)."""

from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.patches import cut_like
from lightning_prune.reduction.base import Reduced, Reduction, Sequence
from lightning_prune.reduction.functional import take_tokens, with_prefix


def patch_variances(pixels: Tensor, patches: int) -> Tensor:
    """The variance of each patch over all its pixels and channels.

    Args:
        pixels: (B, channels, height, width), the images as the model sees them: normalised.
        patches: How many square patches the model cuts each into.

    Returns:
        (B, patches), float32 (float64 where the pixels are).

    Raises:
        UnsupportedModelError: If so many patches are no grid of the image.
    """
    precise = torch.promote_types(pixels.dtype, torch.float32)
    return cut_like(pixels, patches).to(precise).var(dim=-1, correction=0)


def vwt_intra(tokens: Tensor, pixels: Tensor, remove: int, prefix_tokens: int) -> Reduced:
    """Keeps the N - P - R patch tokens whose patches vary most, in their order; of equals the first.

    Args:
        tokens: (B, N, C) before block 0, prefix tokens first, patch tokens row by row.
        pixels: (B, channels, height, width), the images that they were made of.
        remove: R.
        prefix_tokens: P, kept as they are.

    Returns:
        N - R tokens.

    Raises:
        UnsupportedModelError: If the patch tokens are no grid of the image.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import vwt_intra
        >>> images = torch.zeros(1, 3, 32, 32)
        >>> images[:, :, 20:, 20:] = torch.randn(3, 12, 12)  # only the last patch has anything to see
        >>> vwt_intra(torch.randn(1, 5, 8), images, remove=3, prefix_tokens=1).positions
        tensor([[0, 4]])
    """
    count = tokens.shape[1]
    keep = count - prefix_tokens - remove
    variances = patch_variances(pixels, count - prefix_tokens)
    # Stable, since equals are common here (saturated sky) and `topk` may choose among them by the shape of the batch.
    ranked = variances.sort(dim=-1, descending=True, stable=True).indices
    index = with_prefix(ranked[:, :keep].sort(dim=-1).values, prefix_tokens)
    return Reduced(take_tokens(tokens, index), index)


class VWTIntra(Reduction):
    """Visual Word Tokenizer's intra-image reduction: before block 0, patches of little contrast go.

    It needs neither attention nor training, and costs a pass over the pixels. Source: arXiv 2411.15397, where a fixed
    share of the patches, those of the smallest pixel variance, is dropped before the encoder.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, "vwt-intra", lp.Schedule.single(depth=12, block=0, remove=56))
    """

    name: str = "vwt-intra"
    site: Literal["block", "input"] = "input"
    reads: ClassVar[frozenset[str]] = frozenset({"pixels"})

    def reduce(self, sequence: Sequence, remove: int) -> Reduced:
        """See `vwt_intra`."""
        assert sequence.pixels is not None  # the patch provides what `reads` asks for
        return vwt_intra(sequence.tokens, sequence.pixels, remove, sequence.prefix_tokens)

    def capacity(self, tokens: int, prefix_tokens: int) -> int:
        """All patch tokens but one."""
        return max(tokens - prefix_tokens - 1, 0)
