"""How many tokens images are left with by their visual words: the speed of vwt-inter, before any model is run."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_prune.errors import DataError
from lightning_prune.reduction.vwt_inter import group_by_word
from lightning_prune.vocabulary import Vocabulary


class TokensPerImage(NamedTuple):
    """Patch tokens that images are left with; prefix tokens come on top.

    Attributes:
        images: How many images were looked at.
        patches: Patch tokens of the dense model, of the largest image where they differ.
        mean: Over the images.
        low: The 5th percentile.
        high: The 95th percentile.
    """

    images: int
    patches: int
    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.mean:.1f} of {self.patches} patch tokens an image are left (5th percentile {self.low:.0f}, 95th "
            f"{self.high:.0f}; {self.images} images)"
        )


def tokens_per_image(batches: Iterable[Tensor], vocabulary: Vocabulary, threshold: float = 0.1) -> TokensPerImage:
    """Counts the patch tokens that images would be left with by `VWTInter(vocabulary, threshold)`.

    Args:
        batches: Images (B, channels, height, width) as the model sees them; on any device.
        vocabulary: The visual words.
        threshold: Largest cosine distance at which a patch is a word.

    Raises:
        DataError: If there is no image.
        ArgumentError: If the vocabulary is for other channels.

    Example:
        >>> import torch
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import tokens_per_image
        >>> images = torch.rand(4, 3, 1, 1).expand(4, 3, 32, 32)  # one colour each
        >>> words = lp.learn_vocabulary([images], patch_size=8, words=4)
        >>> print(tokens_per_image([images], words))
        1.0 of 16 patch tokens an image are left (5th percentile 1, 95th 1; 4 images)
    """
    counts, most, side = [], 0, vocabulary.patch_size
    for images in batches:
        patches = (images.shape[2] // side) * (images.shape[3] // side)
        counts.append(group_by_word(images, patches, vocabulary, threshold).counts.double().cpu())
        most = max(most, patches)
    if not counts:
        raise DataError("There is no image to count the tokens of.")
    together = torch.cat(counts)
    low, high = together.quantile(torch.tensor([0.05, 0.95], dtype=together.dtype)).tolist()
    return TokensPerImage(len(together), most, together.mean().item(), low, high)
