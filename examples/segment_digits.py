"""A dense head on the embedded digits: segments the digit on its canvas, and compares it dense with pruned.

    python examples/segment_digits.py --output results/segment_digits

A head of two layers on four taps of the embedded Vision Transformer, which stays as it is, is trained for two minutes
on two cores: for each pixel whether it belongs to the digit, and not to the fragments of other digits around it. Then
`compare` plans each method for 1.25x and 1.5x, with `restore="auto"`, and gives the mean IoU of the held-out images
with an interval, paired by image.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_prune as lp
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.digits import ClutteredDigits, EpochSampler

TAPS = (2, 5, 8, 11)
PATCH = 4  # pixels
THRESHOLD = 0.3  # of the strokes, from which a pixel belongs to the digit
EPOCHS, BATCH, RATE = 12, 32, 3e-3


class SegmentedDigits(Dataset[tuple[Tensor, Tensor]]):
    """Canvases with the mask of their digit, (1, 56, 56) each, the mask of zeros and ones."""

    def __init__(self, split: Literal["train", "held_out"], placements: int = 1) -> None:
        self.digits = ClutteredDigits(split, placements)

    def __len__(self) -> int:
        return len(self.digits)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        strokes = torch.from_numpy(self.digits.render(index).strokes)
        return self.digits[index][0], (strokes > THRESHOLD).float().unsqueeze(0)


class SegmentationNet(nn.Module):
    """A Vision Transformer with a head that reads the grids of four blocks.

    Args:
        backbone: The transformer, of timm.
    """

    def __init__(self, backbone: Any) -> None:
        super().__init__()
        self.backbone = backbone.requires_grad_(False)
        self.norm = nn.BatchNorm2d(len(TAPS) * backbone.embed_dim)
        self.head = nn.Sequential(
            nn.Conv2d(len(TAPS) * backbone.embed_dim, 64, 1), nn.GELU(), nn.Conv2d(64, PATCH * PATCH, 1)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Logits (B, 1, height, width) of images (B, 1, height, width)."""
        taps = self.backbone.forward_intermediates(images, indices=list(TAPS), norm=True, intermediates_only=True)
        return nn.functional.pixel_shuffle(self.head(self.norm(torch.cat(taps, dim=1))), PATCH)


class DigitSegmentation(L.LightningModule):
    """Trains the head; its validation step returns the IoU of each image."""

    def __init__(self) -> None:
        super().__init__()
        self.net = SegmentationNet(timm.create_model("vit_digits_patch4_56", pretrained=True))

    def forward(self, images: Tensor) -> Tensor:
        found: Tensor = self.net(images)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, masks = batch
        self.net.backbone.eval()
        logits = self(images)
        return (
            nn.functional.binary_cross_entropy_with_logits(logits, masks) + 1 - soft_iou(logits.sigmoid(), masks).mean()
        )

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        images, masks = batch
        iou = soft_iou((self(images) > 0).float(), masks)
        self.log("val/iou", iou.mean(), batch_size=len(images))
        return {"iou": iou}

    def configure_optimizers(self) -> Any:
        weights = [weight for weight in self.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=RATE, weight_decay=0.01)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def soft_iou(one: Tensor, other: Tensor) -> Tensor:
    """Intersection over union (B,) of masks (B, 1, height, width) with values in [0, 1]."""
    both = (one * other).sum(dim=(1, 2, 3))
    return (both + 1e-6) / (one.sum(dim=(1, 2, 3)) + other.sum(dim=(1, 2, 3)) - both + 1e-6)


def trained(weights: Path, epochs: int, images: int | None = None) -> DigitSegmentation:
    """A module with a trained head: that of the file, else trained now and written there."""
    L.seed_everything(0)
    module = DigitSegmentation()
    head = nn.ModuleDict({"norm": module.net.norm, "head": module.net.head})
    if weights.exists():
        head.load_state_dict(load_file(weights))
        return module
    data = SegmentedDigits("train")
    sampler = EpochSampler(len(data) if images is None else images)
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=epochs, logger=False, enable_checkpointing=False, enable_model_summary=False
    )
    trainer.fit(module, DataLoader(data, BATCH, sampler=sampler, drop_last=True))
    weights.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in head.state_dict().items()}, weights)
    return module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/segment_digits"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--placements", type=int, default=2, help="held-out images: 500 times this number")
    parser.add_argument("--images", type=int, help="training images; all by default")
    parser.add_argument("--methods", nargs="+", default=["auto", "pomt", "pomt-nearest", "tome", "topk"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5])
    parser.add_argument("--time-limit", type=float, default=240, help="seconds for planning and timing")
    parser.add_argument("--restore", choices=["auto", "copy", "delta"], default="auto")
    args = parser.parse_args()
    start = time.monotonic()
    module = trained(args.output / "head.safetensors", args.epochs, args.images)
    print(f"Trained in {time.monotonic() - start:.0f} s")
    data = DataLoader(SegmentedDigits("held_out", args.placements), args.batch_size)
    pruner = TokenPruning(restore=args.restore, time_limit=args.time_limit, calibration=256)
    trainer = L.Trainer(accelerator="cpu", callbacks=[pruner], logger=False, enable_progress_bar=False)
    results = lp.compare(
        trainer,
        module,
        data,
        methods=args.methods,
        speedups=args.speedups,
        output=args.output,
        metric_from_step="iou",
        command="python examples/segment_digits.py",
    )
    for row in results.rows:
        print(f"{row.variant:20} IoU {row.metric or 0:.3f}  {row.speedup or 0:.2f}x  {row.tokens} tokens  {row.note}")


if __name__ == "__main__":
    main()
