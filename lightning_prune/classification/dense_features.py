"""The grids of a Vision Transformer at several blocks, as dense heads read them."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from lightning_prune._utils.validation import check, is_int
from lightning_prune.classification.named_models import create_model
from lightning_prune.errors import UnsupportedModelError


class DenseFeatures(nn.Module):
    """A timm model that returns the grids of patch tokens of several blocks, as a DPT head reads them.

    With it a schedule can be planned where only the encoder is at hand, and the head is somebody else's: `plan(...,
    restore="auto")`, `compare` and `TokenPruning(restore="auto")` compare its grids with those of the dense model.

    Args:
        model: Name of a timm model, or a module with `forward_intermediates`.
        taps: Indices of blocks, from 0; negative ones count from the last. Evenly spaced quarters of the depth if None.
        norm: Whether the norm after the blocks is applied to each grid.
        pretrained: Whether the weights for that name are loaded.
        model_kwargs: Further arguments of the model, such as `img_size`.

    Raises:
        ArgumentError: If an argument is unusable.
        UnsupportedModelError: If the model has no `forward_intermediates`, or no blocks.

    Example:
        >>> import torch
        >>> from lightning_prune.classification import DenseFeatures
        >>> features = DenseFeatures("vit_digits_patch4_56", taps=[5, 11])
        >>> [tuple(grid.shape) for grid in features(torch.zeros(2, 1, 56, 56))]
        [(2, 96, 14, 14), (2, 96, 14, 14)]
    """

    def __init__(
        self,
        model: str | nn.Module = "vit_small_patch14_dinov2",
        taps: Sequence[int] | None = None,
        norm: bool = True,
        pretrained: bool = True,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        backbone: Any = model
        if isinstance(model, str):
            backbone = create_model(model, pretrained, None, model_kwargs or {}, None)
        depth = len(getattr(backbone, "blocks", ()))
        if not depth or not hasattr(backbone, "forward_intermediates"):
            raise UnsupportedModelError(
                f"`model` must be a timm model with blocks and `forward_intermediates`, got {type(backbone).__name__}."
            )
        if taps is None:
            taps = [max(0, round(depth * quarter / 4) - 1) for quarter in (1, 2, 3, 4)]
        valid = isinstance(taps, Sequence) and len(taps) > 0 and all(is_int(i, -depth) and i < depth for i in taps)
        check("taps", taps, f"indices of the {depth} blocks", valid)
        self.backbone, self.taps, self.norm = backbone, [int(index) % depth for index in taps], norm
        self.num_classes = 0  # as timm says of a model that returns features

    def forward(self, images: Tensor) -> list[Tensor]:
        """The grids (B, C, height, width) of images (B, channels, height, width)."""
        found: list[Tensor] = self.backbone.forward_intermediates(
            images, indices=self.taps, norm=self.norm, intermediates_only=True
        )
        return found

    @property
    def pretrained_cfg(self) -> Any:
        """The data config of timm, of the model."""
        return self.backbone.pretrained_cfg
