"""Trains the embedded model, `vit_digits_patch4_56`, from scratch on a CPU.

    python examples/train_digits.py

The script writes the weights, and a JSON file with the figures and the settings. It takes about an hour on two cores.
With `--checkpoints DIR` an interrupted run continues from the last checkpoint.

Attention over all 196 patches is slow on a CPU. Most epochs therefore train on windows of 8 x 8 patches around the
digit, cut from the same canvases, with the position embeddings of the patches that they were cut from; the last epochs
train on whole canvases. No token is ever dropped at random. The contrast of the clutter rises over the first epochs to
that of the digits, and returns to that of the held-out part for the last epochs.
"""

import argparse
import math
import platform
import time
from pathlib import Path
from typing import Any

import lightning as L
import timm
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, Dataset

from lightning_prune import DigitsData, ImageClassifier
from lightning_prune._utils.documents import write_document
from lightning_prune._utils.files import atomic_write
from lightning_prune.classification.demo_models import DIGITS_MODEL, DIGITS_WEIGHTS
from lightning_prune.classification.digits import ClutteredDigits, EpochSampler

PATCH, GRID, WINDOW = 4, 14, 8  # pixels per patch; patches per side of a canvas, and of a window
EPOCHS, WINDOW_EPOCHS, STEADY_EPOCHS = 108, 80, 40
FADE_EPOCHS, CLUTTERED_EPOCHS = 4, 85  # per quarter of the clutter's contrast; until the contrast is the usual again
BATCH, RATE, WARMUP, DECAY, SMOOTHING = 32, 1e-3, 100, 0.05, 0.05
VALIDATE_EVERY = 4
AVERAGING = 0.995  # the weights that are kept are a running average over about 200 steps, five epochs

Sample = tuple[Tensor, int, int, int]


class LocatedDigits(Dataset[Sample]):
    """Training images, each with the patch row and column of a random window around its digit."""

    def __init__(self) -> None:
        self.usual = ClutteredDigits("train")
        self.levels = [ClutteredDigits("train", clutter=quarter / 4) for quarter in range(5)]

    def __len__(self) -> int:
        return len(self.usual)

    def __getitem__(self, index: int) -> Sample:
        epoch = index // len(self)  # EpochSampler continues to count through the epochs
        digits = self.levels[min(4, epoch // FADE_EPOCHS)] if epoch < CLUTTERED_EPOCHS else self.usual
        image, label = digits[index]
        top, left, side = digits.render(index).box
        pick = torch.Generator().manual_seed(index)
        return image, label, self._corner(top, side, pick), self._corner(left, side, pick)

    @staticmethod
    def _corner(edge: float, side: float, pick: torch.Generator) -> int:
        last = min(GRID - WINDOW, math.floor(edge / PATCH))
        # A digit that straddles one patch more than the window has loses its faint lower or right edge.
        first = min(last, max(0, math.ceil((edge + side) / PATCH) - WINDOW))
        return int(torch.randint(first, last + 1, (), generator=pick))


class DigitsTraining(ImageClassifier):
    """`ImageClassifier` with an optimiser, windows, and the running average of the weights, which is validated."""

    def __init__(self, epochs: int, window_epochs: int, output: str) -> None:
        super().__init__(DIGITS_MODEL, pretrained=False)
        self.epochs, self.window_epochs, self.output = epochs, window_epochs, output
        # timm's default initialisation suits widths of 768; at 96 every branch stays near zero for long.
        self.model.init_weights("jax")
        with torch.no_grad():
            self.model.pos_embed[:, 1:] = 0.5 * build_sincos2d_pos_embed([GRID, GRID], self.model.embed_dim)
        self.averaged = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING), use_buffers=True)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images) if self.training else self.averaged(images)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels, rows, columns = batch
        windows = self.current_epoch < self.window_epochs
        logits = self.on_windows(images, rows.tolist(), columns.tolist()) if windows else self(images)
        loss = nn.functional.cross_entropy(logits, labels, label_smoothing=SMOOTHING)
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        self.log("train/top1", (logits.argmax(1) == labels).float().mean(), on_step=False, on_epoch=True)
        return loss

    def on_windows(self, images: Tensor, rows: list[int], columns: list[int]) -> Tensor:
        vit = self.model
        places = list(zip(images, rows, columns, strict=True))
        side = WINDOW * PATCH
        windows = torch.stack([image[:, PATCH * r :, PATCH * c :][:, :side, :side] for image, r, c in places])
        grid = vit.pos_embed[0, 1:].unflatten(0, (GRID, GRID))
        positions = torch.stack([grid[r : r + WINDOW, c : c + WINDOW].flatten(0, 1) for _, r, c in places])
        patches = vit.patch_embed.proj(windows).flatten(2).transpose(1, 2) + positions
        cls = (vit.cls_token + vit.pos_embed[:, :1]).expand(len(images), -1, -1)
        return vit.forward_head(vit.norm(vit.blocks(vit.norm_pre(torch.cat([cls, patches], dim=1)))))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.averaged.update_parameters(self.model)

    def on_train_epoch_end(self) -> None:
        names = ("train/loss", "train/top1", "val/top1")
        seen = {name: self.trainer.callback_metrics.get(name) for name in names}
        shown = "  ".join(f"{name} {value:.4f}" for name, value in seen.items() if value is not None)
        print(f"{time.strftime('%H:%M:%S')}  epoch {self.current_epoch}  {shown}", flush=True)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        # Always the newest: choosing the best epoch by the held-out part would make its figure too high.
        with atomic_write(self.output) as temporary:
            save_file({key: value.contiguous() for key, value in self.averaged.module.state_dict().items()}, temporary)

    def configure_optimizers(self) -> Any:
        matrices = [p for p in self.model.parameters() if p.ndim > 1 and p.shape[0] > 1]
        others = [p for p in self.model.parameters() if not (p.ndim > 1 and p.shape[0] > 1)]
        groups = [{"params": matrices, "weight_decay": DECAY}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=RATE, fused=True)
        per_epoch = int(self.trainer.estimated_stepping_batches) // self.epochs
        drop_warmup, total = per_epoch * min(STEADY_EPOCHS, self.epochs), per_epoch * self.epochs

        def rate(step: int) -> float:
            if step < WARMUP:
                return (step + 1) / WARMUP
            done = min(1.0, max(0, step - drop_warmup) / max(1, total - drop_warmup))
            return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))

        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def figures(weights: Path) -> dict[str, Any]:
    """Validates the written weights as a user would."""
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    data = DigitsData(batch_size=50)
    (found,) = trainer.validate(ImageClassifier(DIGITS_MODEL, weights=str(weights)), data, verbose=False)
    return {
        "held_out_top1": round(100 * found["val/top1"], 2),
        "held_out_loss": round(found["val/loss"], 4),
        "held_out_images": len(data.dataset),
        "held_out_scans": len(data.dataset.scans),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument(
        "--window-epochs", type=int, default=WINDOW_EPOCHS, help="number of epochs that train on windows only"
    )
    parser.add_argument(
        "--output", type=Path, default=DIGITS_WEIGHTS, help="the .safetensors; the .json is in the same folder"
    )
    parser.add_argument(
        "--checkpoints", type=Path, help="folder for checkpoints; a run continues from the last one in it"
    )
    args = parser.parse_args()

    L.seed_everything(0)
    started = time.monotonic()
    digits = LocatedDigits()
    train = DataLoader(digits, batch_size=BATCH, sampler=EpochSampler(len(digits)), drop_last=True)
    validation = DataLoader(ClutteredDigits("held_out"), batch_size=100)
    callbacks = [ModelCheckpoint(args.checkpoints, save_last=True)] if args.checkpoints else []
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(
        accelerator="cpu", max_epochs=args.epochs, gradient_clip_val=1.0, check_val_every_n_epoch=VALIDATE_EVERY,
        callbacks=callbacks, enable_checkpointing=bool(callbacks), **quiet,
    )  # fmt: skip
    last = args.checkpoints / "last.ckpt" if args.checkpoints else None
    module = DigitsTraining(args.epochs, args.window_epochs, str(args.output))
    trainer.fit(module, train, validation, ckpt_path=last if last and last.exists() else None)
    if args.epochs % VALIDATE_EVERY:
        trainer.validate(module, validation, verbose=False)  # writes the weights of the last epoch
    about = {
        "model": DIGITS_MODEL, **figures(args.output), "epochs": args.epochs, "window_epochs": args.window_epochs,
        "minutes": round((time.monotonic() - started) / 60, 1), "command": "python examples/train_digits.py",
        "cores": torch.get_num_threads(), "torch": torch.__version__, "lightning": L.__version__,
        "timm": timm.__version__, "python": platform.python_version(),
    }  # fmt: skip
    write_document(args.output.with_suffix(".json"), about)
    print(about)


if __name__ == "__main__":
    main()
