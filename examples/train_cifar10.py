"""Trains `vit_cifar_patch4_56` on CIFAR-10 from scratch, on two CPU cores in about two hours.

    python examples/train_cifar10.py --data DIR

`DIR` holds the image folders `train/<class>/*` and `val/<class>/*`; if it does not, torchvision downloads CIFAR-10
into it. The script writes the weights, and a JSON file with the figures and the settings. With `--checkpoints FOLDER`
an interrupted run continues from the last checkpoint. With `--weights` given weights are trained further on the labels
alone. The second sitting, on images of full size, was

    python examples/train_cifar10.py --data DIR --weights examples/weights/vit_cifar_patch4_56.safetensors \
        --stages 56:1.75 --rate 5e-4 --steady 0.3 --precision bf16-mixed

Three things make this affordable. A small convolutional network is trained first and teaches the ViT: its class
probabilities are soft targets, as in DeiT (arXiv 2012.12877), and its feature maps are targets for the tokens of two
blocks (locality guidance, arXiv 2207.10026). The attention weights are initialised as in arXiv 2305.09828. Most images
are scaled down to 25 or 49 tokens, with position embeddings resampled from those of all 196. No token is ever dropped
or merged.
"""

import argparse
import math
import platform
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import timm
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import ModelCheckpoint
from safetensors.torch import save_file
from timm.layers import build_sincos2d_pos_embed
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.datasets import CIFAR10, ImageFolder
from torchvision.transforms.functional import pil_to_tensor

from lightning_prune import ImageClassifier
from lightning_prune._utils.documents import write_document
from lightning_prune._utils.files import atomic_write
from lightning_prune.classification.demo_models import CIFAR_MODEL

WEIGHTS = Path(__file__).parent / "weights" / f"{CIFAR_MODEL}.safetensors"
BATCH, PAD, CLASSES = 64, 4, 10
CHANNELS, GUIDED = (128, 256), (4, 8)  # of the teacher's last two stages; the blocks whose tokens learn to predict them


class Stage(NamedTuple):
    """Part of the training: `epochs` epochs on images of `side` pixels."""

    side: int
    epochs: float


STAGES = (Stage(20, 5), Stage(28, 6), Stage(56, 0.6))
TEACHER_EPOCHS = 6
STEADY = 0.6  # until then a run can be made longer


def images_of(root: Path, part: str) -> TensorDataset:
    """All images of a part, (n, 3, 32, 32) bytes, with their labels."""
    if (root / part).is_dir():
        samples = ImageFolder(root / part)
    else:
        samples = CIFAR10(root, train=part == "train", download=True)
    images, labels = zip(*((pil_to_tensor(image), label) for image, label in samples), strict=True)
    return TensorDataset(torch.stack(images), torch.tensor(labels))


def augmented(images: Tensor) -> Tensor:
    """Every image of a batch mirrored or not, and shifted by up to 4 pixels in each direction."""
    count, _, height, width = images.shape
    padded = F.pad(images, [PAD] * 4, mode="reflect")
    images = torch.where(torch.rand(count, 1, 1, 1, device=images.device) < 0.5, padded.flip(3), padded)
    top, left = torch.randint(0, 2 * PAD + 1, (2, count, 1, 1), device=images.device)
    rows = top + torch.arange(height, device=images.device)[:, None]
    columns = left + torch.arange(width, device=images.device)
    each = torch.arange(count, device=images.device)[:, None, None]
    return images[each, :, rows, columns].permute(0, 3, 1, 2)


class Normalise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        config = timm.get_pretrained_cfg(CIFAR_MODEL)
        self.register_buffer("mean", torch.tensor(config.mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return (images.float() / 255 - self.mean) / self.std


class Residual(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x)


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU(inplace=True)
    )


class Teacher(L.LightningModule):
    """A small residual network, which trains in minutes where a ViT takes hours."""

    def __init__(self, epochs: int) -> None:
        super().__init__()
        self.epochs, self.normalise = epochs, Normalise()
        self.body = nn.ModuleList([
            nn.Sequential(convolution(3, 32), convolution(32, 64, 2), Residual(convolution(64, 64))),
            nn.Sequential(convolution(64, CHANNELS[0], 2), Residual(convolution(CHANNELS[0], CHANNELS[0]))),
            nn.Sequential(convolution(CHANNELS[0], CHANNELS[1], 2), Residual(convolution(CHANNELS[1], CHANNELS[1]))),
        ]).to(memory_format=torch.channels_last)  # fmt: skip
        self.head = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(CHANNELS[1], CLASSES))
        self.correct: list[Tensor] = []

    def feature_maps(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """The maps of the last two stages, (B, C, rows, columns) each."""
        middle = self.body[1](self.body[0](self.normalise(images)))
        return middle, self.body[2](middle)

    def classify(self, last: Tensor) -> Tensor:
        return 0.25 * self.head(last)

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.feature_maps(images)[1])

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self(augmented(images)), labels, label_smoothing=0.1)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.correct.append((self(batch[0]).argmax(1) == batch[1]).float())

    def on_validation_epoch_end(self) -> None:
        print(f"{time.strftime('%H:%M:%S')}  teacher  val/top1 {torch.cat(self.correct).mean():.4f}", flush=True)
        self.correct.clear()

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = int(self.trainer.estimated_stepping_batches)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.2, steps, pct_start=0.25, cycle_momentum=False)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def initialise_attention(attention: Any) -> None:
    """Makes each token attend to itself and to similar ones at first (arXiv 2305.09828, section 4)."""
    heads, size = attention.num_heads, attention.head_dim
    width = heads * size
    query, key, value = attention.qkv.weight.view(3, width, width)
    noise = torch.randn(heads, width, width) / math.sqrt(width)
    left, weight, right = torch.linalg.svd(0.7 * noise + 0.7 * torch.eye(width))
    weight = weight[:, :size].sqrt().unsqueeze(2)
    query.copy_((left.transpose(1, 2)[:, :size] * weight).reshape(width, width))
    key.copy_((right[:, :size] * weight).reshape(width, width))
    left, weight, right = torch.linalg.svd(0.4 * noise[0] - 0.4 * torch.eye(width))
    attention.proj.weight.copy_(left * weight.sqrt())
    value.copy_(right * weight.sqrt().unsqueeze(1))


class Cifar10Training(ImageClassifier):
    """`ImageClassifier` with an optimiser, a teacher, and images that grow from stage to stage."""

    def __init__(
        self,
        teacher: Teacher | None,
        stages: tuple[Stage, ...],
        batches: int,
        rate: float,
        steady: float,
        weights: Path | None,
    ) -> None:
        super().__init__(CIFAR_MODEL, pretrained=False, weights=weights, model_kwargs={"dynamic_img_size": True})
        self.hparams.clear()  # the teacher is a module, which a checkpoint that is read without pickle cannot hold
        self.normalise, self.rate, self.steady = Normalise(), rate, steady
        self.ends = [round(batches * sum(stage.epochs for stage in stages[: i + 1])) for i in range(len(stages))]
        self.sides = [stage.side for stage in stages]
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.guides, self.tokens = nn.ModuleList(), dict[int, Tensor]()
        if weights is None:
            self.initialise()
        self.correct: list[Tensor] = []

    def initialise(self) -> None:
        """Gives the ViT the values it starts from, and the layers that guide two of its blocks."""
        self.model.init_weights("jax")  # timm's default suits widths of 768; at 128 the branches start near zero
        with torch.no_grad():
            self.model.pos_embed[:, 1:] = 0.5 * build_sincos2d_pos_embed([14, 14], self.model.embed_dim)
            for block in self.model.blocks:
                initialise_attention(block.attn)
        width = self.model.embed_dim
        self.guides.extend(nn.Sequential(nn.LayerNorm(width), nn.Linear(width, size)) for size in CHANNELS)
        for index in GUIDED:
            self.model.blocks[index].register_forward_hook(lambda _, __, x, index=index: self.tokens.update({index: x}))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        if self.teacher is not None:
            self.teacher.eval()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = augmented(batch[0]), batch[1]
        side = next(side for side, end in zip(self.sides, self.ends, strict=True) if self.global_step < end)
        logits = self(resized(self.normalise(images), side))
        self.correct.append((logits.detach().argmax(1) == labels).float().mean())
        if self.teacher is None:
            return F.cross_entropy(logits, labels, label_smoothing=0.1)
        with torch.no_grad():
            maps = self.teacher.feature_maps(images)
            target = (4 * self.teacher.classify(maps[1])).softmax(1)
        guidance = sum(self.guidance_loss(*each) for each in zip(GUIDED, self.guides, maps, strict=True))
        return 0.5 * F.cross_entropy(logits, target) + 0.5 * F.cross_entropy(logits, labels) + guidance

    def guidance_loss(self, block: int, guide: nn.Module, target: Tensor) -> Tensor:
        """Squared error of the teacher's feature map as it is predicted from the tokens of a block."""
        tokens = guide(self.tokens.pop(block)[:, self.model.num_prefix_tokens :])
        side = math.isqrt(tokens.shape[1])
        target = F.interpolate(target, size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        target = F.batch_norm(target, None, None, training=True)  # gives every channel the same weight
        return F.mse_loss(tokens, target.flatten(2).transpose(1, 2))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.global_step % 100 == 0:
            top1 = torch.stack(self.correct).mean()
            self.correct.clear()
            print(f"{time.strftime('%H:%M:%S')}  step {self.global_step}  train/top1 {top1:.4f}", flush=True)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        side = next((s for s, end in zip(self.sides, self.ends, strict=True) if self.global_step <= end), 56)
        super().validation_step([resized(self.normalise(batch[0]), side), batch[1]], batch_idx)

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        top1 = self.trainer.callback_metrics["val/top1"]
        print(f"{time.strftime('%H:%M:%S')}  step {self.global_step}  val/top1 {top1:.4f}", flush=True)

    def configure_optimizers(self) -> Any:
        learning = [p for p in self.parameters() if p.requires_grad]
        matrices = [p for p in learning if p.ndim > 1 and p.shape[0] > 1]
        others = [p for p in learning if not (p.ndim > 1 and p.shape[0] > 1)]
        groups = [{"params": matrices, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
        optimizer = torch.optim.AdamW(groups, lr=self.rate)
        warm, drop_warmup, total = 200, round(self.steady * self.ends[-1]), self.ends[-1]
        rates = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: min((step + 1) / warm, 1.0, max(0.005, (total - step) / (total - drop_warmup)))
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def resized(images: Tensor, side: int) -> Tensor:
    return F.interpolate(images, size=(side, side), mode="bicubic", antialias=True, align_corners=False)


def trainer(checkpoints: Path | None, precision: Any, **kwargs: Any) -> L.Trainer:
    callbacks = [ModelCheckpoint(checkpoints, save_last=True, every_n_train_steps=200)] if checkpoints else []
    return L.Trainer(
        max_epochs=-1, precision=precision, gradient_clip_val=1.0, callbacks=callbacks, logger=False,
        enable_checkpointing=bool(callbacks), enable_progress_bar=False, enable_model_summary=False,
        num_sanity_val_steps=0, **kwargs,
    )  # fmt: skip


def trained_teacher(args: argparse.Namespace, loader: Any, validation: Any) -> Teacher:
    """The teacher of an earlier run with the same checkpoints, or else a new one."""
    teacher, saved = Teacher(args.teacher_epochs), args.checkpoints and args.checkpoints / "teacher.pt"
    if saved and saved.exists():
        teacher.load_state_dict(torch.load(saved, weights_only=True))
        return teacher
    trainer(None, args.precision, max_steps=args.teacher_epochs * len(loader)).fit(teacher, loader, validation)
    if saved:
        saved.parent.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), saved)
    return teacher


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder of CIFAR-10")
    parser.add_argument(
        "--output", type=Path, default=WEIGHTS, help="the .safetensors; the .json is in the same folder"
    )
    parser.add_argument("--checkpoints", type=Path, help="folder; a run continues from the last checkpoint in it")
    parser.add_argument("--stages", nargs="+", default=[f"{s.side}:{s.epochs}" for s in STAGES], help="SIDE:EPOCHS")
    parser.add_argument("--teacher-epochs", type=int, default=TEACHER_EPOCHS)
    parser.add_argument("--rate", type=float, default=1e-3, help="the highest learning rate")
    parser.add_argument("--steady", type=float, default=STEADY, help="share of the steps before it falls")
    parser.add_argument("--weights", type=Path, help="train these weights further, without a teacher")
    parser.add_argument("--precision", default="32-true", help="of Lightning's Trainer, as bf16-mixed")
    args = parser.parse_args()
    stages = tuple(Stage(int(s), float(e)) for s, e in (each.split(":") for each in args.stages))

    L.seed_everything(0)
    started = time.monotonic()
    train, held_out = images_of(args.data, "train"), images_of(args.data, "val")
    loader = DataLoader(train, batch_size=BATCH, shuffle=True, drop_last=True)
    validation = DataLoader(held_out, batch_size=250)
    folder = args.checkpoints

    teacher = None if args.weights else trained_teacher(args, loader, validation)
    module = Cifar10Training(teacher, stages, len(loader), args.rate, args.steady, args.weights)
    last = folder / "last.ckpt" if folder else None
    run = trainer(folder, args.precision, max_steps=module.ends[-1])
    run.fit(module, loader, validation, ckpt_path=last if last and last.exists() else None)
    (found,) = run.validate(module, validation, verbose=False)

    args.output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(args.output) as temporary:
        save_file({key: value.contiguous() for key, value in module.model.state_dict().items()}, temporary)
    about = {
        "model": CIFAR_MODEL, "held_out_top1": round(100 * found["val/top1"], 2),
        "held_out_loss": round(found["val/loss"], 4), "held_out_images": len(held_out), "train_images": len(train),
        "stages": [stage._asdict() for stage in stages], "rate": args.rate, "steady": args.steady,
        "teacher_epochs": 0 if args.weights else args.teacher_epochs,
        "precision": args.precision, "continued_from": args.weights and args.weights.name,
        "minutes": round((time.monotonic() - started) / 60, 1), "device": str(run.strategy.root_device),
        "cores": torch.get_num_threads(), "torch": torch.__version__, "lightning": L.__version__,
        "timm": timm.__version__, "python": platform.python_version(),
    }  # fmt: skip
    write_document(args.output.with_suffix(".json"), about)
    print(about)


if __name__ == "__main__":
    main()
