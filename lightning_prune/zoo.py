"""The embedded model: a small Vision Transformer, trained on `lightning_prune.digits`, registered with timm.

Importing this module registers it, so that `timm.create_model("vit_digits_patch4_56", pretrained=True)` reads the
weights that lie in this package, through timm's own loading code. How they came about: `examples/train_digits.py`.
"""

from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model

from lightning_prune.canvas import CANVAS
from lightning_prune.digits import CLASSES, MEAN, STD

DIGITS_MODEL = "vit_digits_patch4_56"
DIGITS_WEIGHTS = Path(__file__).parent / "assets" / f"{DIGITS_MODEL}.safetensors"

# timm looks this name up in the module that defines the model.
default_cfgs = generate_default_cfgs(
    {
        f"{DIGITS_MODEL}.digits": {
            "file": str(DIGITS_WEIGHTS),
            "num_classes": CLASSES,
            "input_size": (1, CANVAS, CANVAS),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (MEAN,),
            "std": (STD,),
            "first_conv": "patch_embed.proj",
            "classifier": "head",
            "license": "apache-2.0",
        }
    }
)


@register_model
def vit_digits_patch4_56(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 1 x 56 x 56 digits: patches of 4 (196 tokens and CLS), depth 12, width 96, 3 heads, 10 classes.

    Args:
        pretrained: Whether to load the weights in this package.
        **kwargs: As for any timm Vision Transformer.

    Returns:
        The model, in training mode.

    Example:
        >>> import timm, lightning_prune.zoo
        >>> timm.create_model("vit_digits_patch4_56", pretrained=True).num_classes
        10
    """
    shape = {"img_size": CANVAS, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, DIGITS_MODEL, pretrained, **{**shape, **kwargs})
