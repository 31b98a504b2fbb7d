"""Two small Vision Transformers, registered with timm when this module is imported.

`import lightning_prune` imports it, after which `timm.create_model` accepts both names; see the docstring of the root.
`timm.create_model("vit_digits_patch4_56", pretrained=True)` loads the weights in this package, trained by
`examples/train_digits.py`. `vit_cifar_patch4_56` is the model of `configs/cifar10.yaml`; its weights are in
`examples/weights`, trained by `examples/train_cifar10.py`.
"""

from functools import partial
from pathlib import Path
from typing import Any

from timm.models import VisionTransformer, build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from lightning_prune.classification.digits import CANVAS, CLASSES, MEAN, STD

DIGITS_MODEL = "vit_digits_patch4_56"
CIFAR_MODEL = "vit_cifar_patch4_56"
DIGITS_WEIGHTS = Path(__file__).parents[1] / "assets" / f"{DIGITS_MODEL}.safetensors"

# timm reads this name from the module that defines a model.
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
        },
        CIFAR_MODEL: {
            "num_classes": 10,
            "input_size": (3, CANVAS, CANVAS),
            "fixed_input_size": True,
            "pool_size": None,
            "crop_pct": 1.0,
            "interpolation": "bicubic",
            "mean": (0.4914, 0.4822, 0.4465),
            "std": (0.2470, 0.2435, 0.2616),
            "first_conv": "patch_embed.backbone.0.conv",
            "classifier": "head",
            "license": "apache-2.0",
        },
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
        >>> import lightning_prune, timm
        >>> timm.create_model("vit_digits_patch4_56", pretrained=True).num_classes
        10
    """
    shape = {"img_size": CANVAS, "patch_size": 4, "embed_dim": 96, "depth": 12, "num_heads": 3}
    return build_model_with_cfg(VisionTransformer, DIGITS_MODEL, pretrained, **{**shape, **kwargs})


@register_model
def vit_cifar_patch4_56(pretrained: bool = False, **kwargs: Any) -> VisionTransformer:
    """A ViT for 3 x 56 x 56 photographs: patches of 4 (196 tokens and CLS), depth 12, width 128, 4 heads, 10 classes.

    Its blocks are DeiT's. Three small convolutions embed the patches instead of one (arXiv 2106.14881), which trains
    far better on few images. 2.5 million parameters.

    Args:
        pretrained: Must be False, because timm has no weights for this name; use `ImageClassifier(weights=...)`.
        **kwargs: As for any timm Vision Transformer.

    Returns:
        The model, in training mode.

    Example:
        >>> import lightning_prune, timm
        >>> timm.create_model("vit_cifar_patch4_56").patch_embed.num_patches
        196
    """
    from timm.models.vision_transformer_hybrid import ConvStem, HybridEmbed  # only used by this model

    width = kwargs.get("embed_dim", 128)
    stem = ConvStem(
        in_chans=kwargs.get("in_chans", 3),
        channels=(width // 4, width // 2, width),
        kernel_size=(3, 3, 1),
        stride=(2, 2, 1),
        act_layer=nn.GELU,
    )
    embed = partial(HybridEmbed, backbone=stem, proj=False)
    # patch_size counts positions of the stem's output, and each of them is a token.
    shape = {"img_size": CANVAS, "patch_size": 1, "embed_dim": width, "depth": 12, "num_heads": 4}
    return build_model_with_cfg(VisionTransformer, CIFAR_MODEL, pretrained, **{"embed_layer": embed, **shape, **kwargs})
