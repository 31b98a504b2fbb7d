"""Small models of every family, a batch of images, and what is reduced where.

Weights and images are computed from names and shapes, so they depend on no random number generator of torch and on no
initialisation of a library. Of lightning_prune only the public names are used.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import numpy as np
import torch
import transformers
from timm.models import beit, cait, convit, eva, naflexvit
from timm.models import vision_transformer as vit
from timm.models import vision_transformer_relpos as relpos
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn
from torchvision.models.vision_transformer import VisionTransformer as TorchvisionVisionTransformer

import lightning_prune as lp

CLASSES, DEPTH, GRID, PATCH = 8, 4, 5, 4
SIZE = GRID * PATCH

TIMM = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": 32, "depth": DEPTH, "num_heads": 4, "num_classes": CLASSES}
TORCHVISION = {"image_size": SIZE, "patch_size": PATCH, "num_layers": DEPTH, "num_heads": 4, "num_classes": CLASSES}
HUGGING_FACE = {
    "hidden_size": 32,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "image_size": SIZE,
    "patch_size": PATCH,
}


def plain(**more: Any) -> Callable[[], nn.Module]:
    return lambda: vit.VisionTransformer(**{**TIMM, **more})


def timm(kind: Callable[..., nn.Module], **more: Any) -> Callable[[], nn.Module]:
    return lambda: kind(**{**TIMM, **more})


def naflex(**more: Any) -> Callable[[], nn.Module]:
    shape = {"patch_size": PATCH, "embed_dim": 32, "depth": DEPTH, "num_heads": 4, "pos_embed_grid_size": (GRID, GRID)}
    return lambda: naflexvit.NaFlexVit(naflexvit.NaFlexVitCfg(**{**shape, **more}), 3, CLASSES)


def hugging_face(kind: Any, **more: Any) -> Callable[[], nn.Module]:
    return lambda: kind(kind.config_class(**{**HUGGING_FACE, "num_labels": CLASSES, **more}))


def hugging_face_tower(kind: Any) -> Callable[[], nn.Module]:
    text = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    text |= {"vocab_size": 50, "bos_token_id": 0, "eos_token_id": 1}
    return lambda: kind(kind.config_class(text_config=text, vision_config=HUGGING_FACE, num_labels=CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm-vit": plain(),
    "timm-deit3": plain(no_embed_class=True, init_values=0.5),
    "timm-deit-distilled": timm(VisionTransformerDistilled),
    "timm-dinov2-registers": plain(init_values=0.5, reg_tokens=4, no_embed_class=True),
    "timm-registers-without-class": plain(class_token=False, reg_tokens=4, global_pool="avg"),
    "timm-clip": plain(pre_norm=True, act_layer="quick_gelu"),
    "timm-siglip": plain(class_token=False, global_pool="map"),
    "timm-average-pool": plain(global_pool="avg"),
    "timm-qk-norm": plain(qk_norm=True),
    "timm-res-post": plain(block_fn=vit.ResPostBlock, init_values=0.5),
    "timm-parallel-things": plain(block_fn=vit.ParallelThingsBlock, init_values=0.5),
    "timm-parallel-scaling": plain(block_fn=vit.ParallelScalingBlock, init_values=0.5),
    "timm-diff-attention": plain(attn_layer="diff"),
    "timm-eva": timm(eva.Eva, init_values=0.5),
    "timm-eva02": timm(eva.Eva, qkv_fused=False, swiglu_mlp=True, scale_mlp=True, use_rot_pos_emb=True),
    "timm-eva-post-norm": timm(eva.Eva, use_post_norm=True),
    "timm-dinov3": timm(
        eva.Eva, use_abs_pos_emb=False, use_rot_pos_emb=True, rope_type="dinov3", num_reg_tokens=4, init_values=0.5
    ),
    "timm-rope-mixed": timm(eva.Eva, use_rot_pos_emb=True, rope_type="mixed"),
    "timm-naflex": naflex(),
    "timm-naflex-rope": naflex(rope_type="axial", attn_type="rope"),
    "timm-beit": timm(beit.Beit, use_rel_pos_bias=True, init_values=0.5),
    "timm-beit-shared": timm(beit.Beit, use_shared_rel_pos_bias=True),
    "timm-relpos": timm(relpos.VisionTransformerRelPos),
    "timm-relpos-class": timm(relpos.VisionTransformerRelPos, rel_pos_type="bias", class_token=True),
    "timm-cait": timm(cait.Cait),
    "timm-convit": timm(convit.ConVit, local_up_to_layer=1),
    "torchvision-vit": lambda: TorchvisionVisionTransformer(**TORCHVISION, hidden_dim=32, mlp_dim=64),
    "hf-vit": hugging_face(transformers.ViTForImageClassification),
    "hf-deit": hugging_face(transformers.DeiTForImageClassification),
    "hf-deit-distilled": hugging_face(transformers.DeiTForImageClassificationWithTeacher),
    "hf-dinov2": hugging_face(transformers.Dinov2ForImageClassification),
    "hf-dinov2-registers": hugging_face(transformers.Dinov2WithRegistersForImageClassification, num_register_tokens=4),
    "hf-dinov3": hugging_face(transformers.DINOv3ViTModel, num_register_tokens=4),
    "hf-clip": hugging_face_tower(transformers.CLIPForImageClassification),
    "hf-siglip": hugging_face_tower(transformers.SiglipForImageClassification),
}
UNWEIGHED = ("timm-cait", "timm-convit")  # their attention takes no sizes of tokens

METHODS = ("pomt", "pomt-nearest", "tome", "topk", "evit", "shift", "random")  # inside a block
LATER_METHODS = ("pitome", "diffrate-merge", "soft-merge")  # inside a block as well; with fewer cases each
WEIGHING = ("pomt-nearest", "tome", *LATER_METHODS)
FIXED_SIZE = ("timm-beit", "timm-beit-shared", "timm-cait", "timm-convit")  # whose images cannot be scaled down

SCHEDULES: dict[str, Callable[[], Any]] = {
    "one": lambda: lp.Schedule.single(DEPTH, 1, 8),
    "two": lambda: lp.Schedule([0, 5, 6, 0]),
    "every": lambda: [3, 3, 3, 3],
    "rate": lambda: lp.KeepRates.single(DEPTH, 2, 0.6),
    "rates": lambda: lp.KeepRates([1, 0.9, 0.6, 1]),
    "input": lambda: lp.Schedule.single(DEPTH, 0, 9),
    "input-rate": lambda: lp.KeepRates.single(DEPTH, 0, 0.6),
    "none": lambda: None,
}


class Case(NamedTuple):
    model: str
    method: str  # "dense" for the model as it is
    schedule: str

    def __str__(self) -> str:
        return f"{self.model} {self.method} {self.schedule}"


def _cases() -> list[Case]:
    cases = [Case(model, "dense", "none") for model in MODELS]
    cases += [
        Case("timm-vit", method, schedule)
        for method in METHODS
        for schedule in ("one", "two", "every", "rate", "rates")
    ]
    cases += [Case("timm-vit", method, schedule) for method in LATER_METHODS for schedule in ("one", "two", "every")]
    cases += [Case("timm-vit", "tome-concatenated", schedule) for schedule in ("two", "every")]
    cases += [Case("timm-vit", "vwt-intra", schedule) for schedule in ("input", "input-rate")]
    cases.append(Case("timm-vit", "resize", "input"))
    cases.append(Case("timm-vit", "vwt-inter", "none"))
    cases += [
        Case("timm-vit", method, "two") for method in ("pomt-nearest-unweighed", "tome-unweighed", "random-seed-3")
    ]
    cases.append(Case("timm-vit", "random-input", "input"))
    for model in MODELS:
        if model == "timm-vit":
            continue
        methods = (*METHODS, *LATER_METHODS)
        names = [f"{name}-unweighed" if name in WEIGHING and model in UNWEIGHED else name for name in methods]
        cases += [Case(model, name, "two") for name in names]
        cases.append(Case(model, "pomt", "rates"))
        if model != "timm-convit":  # its first block cannot reduce
            cases.append(Case(model, "vwt-intra", "input"))
        if model not in UNWEIGHED:
            cases.append(Case(model, "vwt-inter", "none"))
        if model not in FIXED_SIZE:
            cases.append(Case(model, "resize", "input"))
    return cases


CASES = _cases()


def draw(name: str, shape: tuple[int, ...]) -> Tensor:
    """Normally distributed numbers by a name; NumPy promises never to change what a RandomState gives."""
    drawn = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(drawn)).float()


@lru_cache(maxsize=2)
def build(name: str) -> nn.Module:
    """A model whose attention is far from uniform; tables that are computed and not saved (rotary) stay as they are."""
    model = MODELS[name]().eval()
    for key, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        noise = draw(f"{name} {key}", tuple(value.shape))
        if value.ndim > 1 and "token" not in key and "embed" not in key:
            noise *= 1.5 / value[0].numel() ** 0.5
        elif value.ndim == 1 and key.endswith("weight"):
            noise = 1 + 0.3 * noise
        else:
            noise *= 0.3
        value.copy_(noise)  # which shares its memory with the model
    return model


def _tiles() -> Tensor:
    """(6, 3, PATCH, PATCH): what several patches of the images show."""
    return draw("tiles", (6, 3, PATCH, PATCH))


@lru_cache
def images() -> Tensor:
    """Two images; half of their patches show one of six tiles, nearly, and all have a contrast of their own."""
    shape, places = (GRID * GRID, 3, PATCH, PATCH), torch.arange(GRID * GRID)
    is_tile = (places % 2 == 0).view(-1, 1, 1, 1)
    both = []
    for image in range(2):
        tile = (places * (image + 2) + places // GRID) % 6
        shown = _tiles()[tile] + 0.1 * draw(f"grain {image}", shape)
        patches = torch.where(is_tile, shown, draw(f"patches {image}", shape))
        patches = patches / patches.flatten(1).std(dim=1, correction=0).view(-1, 1, 1, 1)
        contrast = 0.5 + ((places * 7 + image) % len(places)) / len(places)  # each another
        patches = patches * contrast.view(-1, 1, 1, 1)
        both.append(patches.view(GRID, GRID, 3, PATCH, PATCH).permute(2, 0, 3, 1, 4).reshape(3, SIZE, SIZE))
    return torch.stack(both)


def method_of(name: str) -> Any:
    """What `lp.patch` takes as the method."""
    settings: dict[str, Callable[[], Any]] = {
        "pomt-nearest-unweighed": lambda: lp.reduction.POMT("nearest", False),
        "tome-unweighed": lambda: lp.reduction.ToMe(False),
        "tome-concatenated": lambda: lp.reduction.ToMe(order="concatenated"),
        "pitome-unweighed": lambda: lp.reduction.PiToMe(False),
        "diffrate-merge-unweighed": lambda: lp.reduction.DiffRateMerge(False),
        "soft-merge-unweighed": lambda: lp.reduction.SoftMerge(proportional_attention=False),
        "random-seed-3": lambda: lp.reduction.RandomDrop(3),
        "random-input": lambda: lp.reduction.RandomDrop(0, "input"),
        "vwt-inter": lambda: lp.reduction.VWTInter(lp.Vocabulary(_tiles().flatten(1), PATCH), 0.1),
    }
    return settings[name]() if name in settings else name


@torch.no_grad()
def run(case: Case, model: nn.Module, batch: Tensor) -> Tensor:
    """The logits (2, CLASSES) of a case; features (2, C) of a model without a head."""
    if case.method == "dense":
        output = model(batch)
    else:
        with lp.patch(model, method_of(case.method), SCHEDULES[case.schedule]()):
            output = model(batch)
    if isinstance(output, Tensor):
        return output
    found = output.logits if hasattr(output, "logits") else output.pooler_output
    assert isinstance(found, Tensor)
    return found
