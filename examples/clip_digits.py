"""Trains a small CLIP on the embedded digits, and compares zero-shot classification dense with pruned.

    python examples/clip_digits.py --output results/clip_digits

The model is a `CLIPModel` of Hugging Face with its own tokenizer, trained in two minutes on two cores to match each
scan with a text, such as "a photo of the digit three". It is saved as a folder, and `ZeroShotClassifier` loads that
folder as it loads `hf:openai/clip-vit-base-patch16`. Groups are scans with thin and with thick strokes.
"""

import argparse
import time
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_prune as lp
from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.digits import load_scans

NAMES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TEMPLATES = ["a photo of the digit {}", "the digit {}"]
GROUPS = ["thin", "thick"]
MEAN, STD = 0.3, 0.33
WORDS = ["[PAD]", "[BOS]", "[EOS]", "[UNK]", "a", "photo", "of", "the", "digit", *NAMES]
EPOCHS, BATCH, RATE = 24, 64, 1e-3


class Scans(Dataset[dict[str, Any]]):
    """Scans enlarged to three equal channels, with their label and the group of their strokes.

    Args:
        split: "train" or "held_out".
        size: Side in pixels.
        shift: Largest random shift in the training, in pixels.
    """

    def __init__(self, split: Literal["train", "held_out"], size: int, shift: int = 0) -> None:
        scans, labels = load_scans(split)
        self.labels, self.shift = torch.from_numpy(labels), shift
        images = torch.from_numpy(scans)[:, None]
        self.groups = (images.mean(dim=(1, 2, 3)) > images.mean()).long()
        self.images = nn.functional.interpolate(images, size, mode="bilinear", align_corners=False)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image = self.images[index]
        if self.shift:
            down, right = (int(torch.randint(-self.shift, self.shift + 1, ())) for _ in range(2))
            image = image.roll((down, right), (1, 2))
        image = ((image - MEAN) / STD).expand(3, -1, -1)
        return {"image": image, "label": int(self.labels[index]), "group": int(self.groups[index])}


def make_tokenizer() -> Any:
    """A tokenizer of the few words, as `AutoTokenizer` loads it again."""
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    inner.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 1), ("[EOS]", 2)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )


def make_clip(size: int, patch: int, width: int = 64, depth: int = 6) -> Any:
    """A small CLIP with random weights."""
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = transformers.CLIPConfig(
        text_config={
            **shape, **special, "num_hidden_layers": 2, "vocab_size": len(WORDS), "max_position_embeddings": 12
        },
        vision_config={**shape, "num_hidden_layers": depth, "image_size": size, "patch_size": patch},
        projection_dim=width,
    )  # fmt: skip
    return transformers.CLIPModel(config)


class Training(L.LightningModule):
    """Matches images with the texts of all classes; each batch draws a template."""

    def __init__(self, clip: Any, tokenizer: Any, epochs: int) -> None:
        super().__init__()
        self.clip, self.tokenizer, self.epochs = clip, tokenizer, epochs

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        template = TEMPLATES[int(torch.randint(len(TEMPLATES), ()))]
        texts = self.tokenizer([template.format(name) for name in NAMES], padding=True, return_tensors="pt")
        found = self.clip(
            pixel_values=batch["image"], input_ids=texts["input_ids"], attention_mask=texts["attention_mask"]
        )
        return nn.functional.cross_entropy(found.logits_per_image, batch["label"])

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=RATE, weight_decay=0.05)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(folder: Path, size: int = 56, patch: int = 4, epochs: int = EPOCHS, **shape: int) -> Path:
    """Trains a model, and writes it with its tokenizer and image processor as `save_pretrained` does."""
    L.seed_everything(0)
    clip, tokenizer = make_clip(size, patch, **shape), make_tokenizer()
    data = DataLoader(Scans("train", size, shift=size // 14), BATCH, shuffle=True, drop_last=True)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=epochs, gradient_clip_val=1.0, enable_progress_bar=False, **quiet)
    trainer.fit(Training(clip, tokenizer, epochs), data)
    clip.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    square = {"height": size, "width": size}
    processor = transformers.CLIPImageProcessor(
        size=square, crop_size=square, do_center_crop=False, image_mean=[MEAN] * 3, image_std=[STD] * 3
    )
    processor.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("results/clip_digits"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--methods", nargs="+", default=["auto", "tome", "topk", "pomt", "int8"])
    parser.add_argument("--speedups", type=float, nargs="+", default=[1.25, 1.5])
    parser.add_argument("--time-limit", type=float, default=180, help="seconds for planning and timing")
    args = parser.parse_args()
    folder, start = args.output / "model", time.monotonic()
    if not (folder / "config.json").exists():
        train(folder, epochs=args.epochs)
        print(f"Trained in {time.monotonic() - start:.0f} s")
    module = lp.ZeroShotClassifier(f"hf:{folder}", NAMES, TEMPLATES, group_names=GROUPS)
    data = DataLoader(Scans("held_out", 56), args.batch_size)
    pruner = TokenPruning(time_limit=args.time_limit)
    trainer = L.Trainer(accelerator="cpu", callbacks=[pruner], logger=False, enable_progress_bar=False)
    options: dict[str, Any] = {"methods": args.methods, "speedups": args.speedups, "output": args.output}
    results = lp.compare(trainer, module, data, **options, command="python examples/clip_digits.py")
    for row in results.rows:
        change = "" if row.top1_change is None else f"{100 * row.top1_change:+.1f}"
        print(f"{row.variant:20} top-1 {100 * (row.top1 or 0):.1f}% {change:5} {row.speedup or 0:.2f}x  {row.note}")


if __name__ == "__main__":
    main()
