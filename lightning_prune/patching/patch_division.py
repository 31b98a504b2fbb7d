"""How a model divides images into patches."""

from typing import NamedTuple

from lightning_prune.reduction.resize import (
    Grid,
)


class PatchDivision(NamedTuple):
    """How a model divides its images into patches.

    Attributes:
        patch_size: Height and width of a patch, in pixels: the stride of the patch embedding.
        image_size: Height and width of the images; None if the model takes images of any size.
        pads: Whether images are padded to whole patches; else a border narrower than a patch is ignored.
    """

    patch_size: tuple[int, int]
    image_size: tuple[int, int] | None = None
    pads: bool = False

    def grid(self, height: int, width: int) -> Grid:
        """Rows and columns of patches of images of this size."""
        rows, columns = (
            -(-pixels // side) if self.pads else pixels // side
            for pixels, side in zip((height, width), self.patch_size, strict=True)
        )
        return rows, columns
