"""Vision Transformers that are small enough for a test: 17 tokens and four blocks unless a test asks for others."""

from typing import Any

import timm
import torch
import torchvision
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_prune import ImageClassifier

SHAPE: dict[str, Any] = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}
DEPTH, TOKENS, CLASSES = 4, 17, 5  # of a model of this shape; the class token is one of the tokens
DIGITS_MODEL = "vit_digits_patch4_56"
DIGITS_SHAPE: dict[str, Any] = {"depth": 4, "embed_dim": 32, "num_heads": 2}


def tiny_vit(
    kind: type[nn.Module] | str = VisionTransformer,
    *,
    seed: int | None = 0,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float32,
    **options: Any,
) -> Any:
    """A Vision Transformer of timm in evaluation mode, with the same random weights each time.

    Args:
        kind: The class, or the name under which timm has it.
        seed: Of the global generator, which stays where the weights leave it; None leaves it where it is.
        noise: Standard deviation of what is added to every parameter: fresh weights are so small that pruning them
            changes almost nothing.
        dtype: Of the parameters.
        options: Of the model, over those of `SHAPE`.
    """
    if seed is not None:
        torch.manual_seed(seed)
    options = {**SHAPE, **options}
    model = timm.create_model(kind, **options) if isinstance(kind, str) else kind(**options)
    model = model.to(dtype).eval()
    if noise:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
    return model


def tiny_torchvision_vit(depth: int = 4, width: int = 32, mlp: int = 64, num_classes: int = 5) -> nn.Module:
    """A Vision Transformer of torchvision of the same image and patch size, by the global generator."""
    return torchvision.models.VisionTransformer(32, 8, depth, 2, width, mlp, num_classes=num_classes).eval()


def tiny_hugging_face_vit(kind: str = "ViTModel", **options: Any) -> Any:
    """A ViT of transformers of the same image and patch size, by the global generator."""
    import transformers

    shape = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 64}
    config = transformers.ViTConfig(**{**shape, "image_size": 32, "patch_size": 8, **options})
    return getattr(transformers, kind)(config).eval()


def digits_module(
    kind: type[ImageClassifier] = ImageClassifier, *, seed: int = 0, shape: dict[str, Any] | None = None, **options: Any
) -> Any:
    """A classifier of the embedded digits: 197 tokens, four narrow blocks unless `shape` is another, random weights."""
    torch.manual_seed(seed)
    return kind(DIGITS_MODEL, pretrained=False, model_kwargs={**DIGITS_SHAPE, **(shape or {})}, **options)


def disturb(model: nn.Module, seed: int = 0) -> Any:
    """Weights with which attention is far from uniform, and biases and scales are not those of a fresh model."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim == 2 and "embed" not in name and "token" not in name:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            elif parameter.ndim == 1 and ("weight" in name or "lambda" in name):
                parameter.copy_(1 + 0.3 * noise)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()
