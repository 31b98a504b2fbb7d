"""Small models of transformers, and the parts of their blocks."""

from typing import Any, NamedTuple

import pytest
import torch
import transformers
from torch import Tensor, nn

from helpers.models import disturb
from lightning_prune.reduction import Reduction

from .by_hand import Pairs, Parts

WHERE = {"one": [0, 6, 0, 0], "two": [5, 0, 7, 0]}
METHODS: dict[str, str | Reduction] = {"pomt": "pomt", "random": "random", "pairs": Pairs()}
SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": 20,
    "patch_size": 4,
}
TEXT = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "vocab_size": 50}


class Facts(NamedTuple):
    prefix: int
    class_token: bool
    tokens: int | None
    width: int  # of the output
    logits: bool
    has_position_inputs: bool


MODELS = {
    "ViTModel": Facts(1, True, 26, 32, False, True),
    "ViTForImageClassification": Facts(1, True, 26, 7, True, True),
    "DeiTModel": Facts(2, True, 27, 32, False, True),
    "DeiTForImageClassification": Facts(2, True, 27, 7, True, True),
    "DeiTForImageClassificationWithTeacher": Facts(2, True, 27, 7, True, True),
    "Dinov2Model": Facts(1, True, None, 32, False, True),
    "Dinov2ForImageClassification": Facts(1, True, None, 7, True, True),
    "Dinov2WithRegistersModel": Facts(5, True, None, 32, False, True),
    "Dinov2WithRegistersForImageClassification": Facts(5, True, None, 7, True, True),
    "DINOv3ViTModel": Facts(5, True, None, 32, False, True),
    "CLIPVisionModel": Facts(1, True, 26, 32, False, False),
    "CLIPVisionModelWithProjection": Facts(1, True, 26, 16, False, False),
    "CLIPForImageClassification": Facts(1, True, 26, 7, True, False),
    "SiglipVisionModel": Facts(0, False, 25, 32, False, False),
    "SiglipForImageClassification": Facts(0, False, 25, 7, True, False),
}
KINDS = ["ViTModel", "DeiTModel", "Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"]
KINDS += ["CLIPVisionModel", "SiglipVisionModel"]
every_model = pytest.mark.parametrize("name", MODELS)
every_kind = pytest.mark.parametrize("name", KINDS)
every_method = pytest.mark.parametrize("method", METHODS)


def build_hf(name: str, **more: Any) -> Any:
    """Builds a small model by the name of its class; `more` are entries of the vision config."""
    kind = getattr(transformers, name)
    if name.startswith(("CLIP", "Siglip")):
        family = "CLIP" if name.startswith("CLIP") else "Siglip"
        config = getattr(transformers, f"{family}VisionConfig")(**SMALL, **{"projection_dim": 16, **more})
        if not isinstance(config, kind.config_class):
            config = getattr(transformers, f"{family}Config")(
                text_config=TEXT, vision_config={**SMALL, **more}, projection_dim=32, num_labels=7
            )
    else:
        registers = {"num_register_tokens": 4} if "num_register_tokens" in kind.config_class().to_dict() else {}
        scale = {"layerscale_value": 0.5} if "ino" in name.lower() else {}
        config = kind.config_class(**{**SMALL, "num_labels": 7, **registers, **scale, **more})
    torch.manual_seed(0)
    return disturb(kind(config))


def blocks_of(model: Any) -> list[nn.Module]:
    """The only list of four modules."""
    (found,) = (list(m) for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 4)
    return found


NAMES = {  # first norm, attention, its last projection, layer scale, second norm, layer scale
    ("ViTLayer", "DeiTLayer"): ("layernorm_before", "attention", "o_proj", "", "layernorm_after", ""),
    ("Dinov2Layer", "Dinov2WithRegistersLayer", "DINOv3ViTLayer"): (
        "norm1",
        "attention",
        "o_proj",
        "layer_scale1",
        "norm2",
        "layer_scale2",
    ),
    ("CLIPEncoderLayer", "SiglipEncoderLayer"): ("layer_norm1", "self_attn", "out_proj", "", "layer_norm2", ""),
}


def parts_of(block: Any, kwargs: dict[str, Any]) -> Parts:
    norm1, name, out, scale1, norm2, scale2 = next(
        names for kinds, names in NAMES.items() if type(block).__name__ in kinds
    )
    attention = getattr(block, name)

    def project(x: Tensor) -> Any:
        wide = (attention.q_proj(x), attention.k_proj(x), attention.v_proj(x))
        return tuple(torch.stack(each.chunk(4, dim=-1)) for each in wide)

    def scaled(name: str) -> nn.Module:
        found: nn.Module = getattr(block, name) if name else nn.Identity()
        return found

    return Parts(
        getattr(block, norm1),
        project,
        getattr(attention, out),
        scaled(scale1),
        getattr(block, norm2),
        block.mlp,
        scaled(scale2),
        kwargs.get("position_embeddings"),
    )


def outputs_of(result: Any) -> Tensor:
    """The main output of the model, by the names of its fields."""
    for field in ("logits", "image_embeds", "pooler_output"):
        if getattr(result, field, None) is not None:
            found: Tensor = getattr(result, field)
            return found
    raise AssertionError(f"none of the fields: {list(result)}")


@torch.no_grad()
def run(model: Any, images: Tensor) -> Tensor:
    return outputs_of(model(images))


@torch.no_grad()
def last_tokens(model: Any, images: Tensor, **more: Any) -> Tensor:
    """The output of the last block."""
    found: list[Tensor] = []
    hook = blocks_of(model)[-1].register_forward_hook(lambda module, args, x: found.append(x))
    model(images, **more)
    hook.remove()
    return found[0]
