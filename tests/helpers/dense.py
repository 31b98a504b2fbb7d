"""Dense models: a Vision Transformer with a head that reads two grids of patches."""

from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from helpers.models import tiny_vit


class DenseNet(nn.Module):
    """One number for each patch, from two taps; the images may be of any size that the transformer takes."""

    def __init__(self, transformer: Any, taps: tuple[int, int] = (1, 3), channels: int = 1) -> None:
        super().__init__()
        self.backbone, self.taps = transformer, list(taps)
        self.head = nn.Conv2d(2 * transformer.embed_dim, channels, 1)

    def forward(self, images: Tensor) -> Tensor:
        grids = self.backbone.forward_intermediates(images, indices=self.taps, intermediates_only=True)
        return self.head(torch.cat(grids, dim=1))


class FeatureNet(nn.Module):
    """The two grids themselves, by name."""

    def __init__(self, transformer: Any, taps: tuple[int, int] = (1, 3)) -> None:
        super().__init__()
        self.backbone, self.taps = transformer, list(taps)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        grids = self.backbone.forward_intermediates(images, indices=self.taps, intermediates_only=True)
        return {f"tap{index}": grid for index, grid in zip(self.taps, grids, strict=True)}


class HeadOnHook(nn.Module):
    """A head on the tokens that a hook collects."""

    def __init__(self) -> None:
        super().__init__()
        self.vit = tiny_vit(noise=0.1)
        self.head = nn.Linear(self.vit.embed_dim, 3)
        self.seen: list[Tensor] = []
        self.vit.blocks[1].register_forward_hook(self.collect)

    def collect(self, block: nn.Module, args: Any, output: Tensor) -> None:
        self.seen.append(output)

    def forward(self, images: Tensor) -> Tensor:
        self.seen.clear()
        self.vit(images)
        return self.head(self.seen[0][:, 1:]).transpose(1, 2)


class DenseModule(L.LightningModule):
    """Logs the mean squared error of a dense model.

    Args:
        net: The model.
        has_forward: Whether the module itself is called with images, or its step calls the model.
    """

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch
        self.log("val/mse", (self.net(images) - targets).square().mean())


class CalledDenseModule(DenseModule):
    """The same, by its own `forward`, which also normalises the images."""

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images - 0.5)
        return found

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, targets = batch
        self.log("val/mse", (self(images) - targets).square().mean())


def dense_net(**options: Any) -> DenseNet:
    """A small one with random weights, in evaluation mode."""
    return DenseNet(tiny_vit(noise=0.1, **options)).eval()
