"""Which of timm's transformers can be pruned, asked of the models themselves."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.models.registry import find_vision_transformer
from lightning_prune.patching.models.unsupported import unsupported_reason

# timm's modules of transformers that keep one resolution throughout. All others are convolutional or hierarchical.
_ISOTROPIC = (
    "beit",
    "cait",
    "convit",
    "deepseek_vit",
    "deit",
    "eva",
    "gemma4_vit",
    "naflexvit",
    "qwen3_vit",
    "tnt",
    "vision_transformer",
    "vision_transformer_hybrid",
    "vision_transformer_relpos",
    "vision_transformer_sam",
    "vitamin",
    "volo",
    "xcit",
)


# What initialises weights in place. Among tensors without data it changes nothing and takes half of the time.
_FILLING = frozenset({"uniform_", "normal_", "constant_", "kaiming_uniform_", "kaiming_normal_", "xavier_uniform_"})
_FILLING |= {"trunc_normal_", "zeros_", "ones_", "erfinv_", "mul_", "add_", "clamp_", "zero_", "fill_"}


class _LeftBlank(TorchFunctionMode):
    """Initialises no weights that have no data."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # as `torch.nn.init` names it
        if getattr(func, "__name__", "") in _FILLING and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


class SupportStatus(NamedTuple):
    """What can be done with a model of timm.

    Attributes:
        name: timm's name.
        model: Its class.
        reducible: `"yes"`; `"pruning only"`, where attention has no place for the sizes of merged tokens; `"after the
            block"`, where the MLP of a reducing block still sees all its tokens; `"from block 10"`; or `"no"`.
        reason: Why not, or not everywhere.
    """

    name: str
    model: str
    reducible: str
    reason: str = ""


def isotropic_names() -> list[str]:
    """The names that timm has of transformers that keep one resolution throughout, sorted."""
    modules = {f"timm.models.{module}" for module in _ISOTROPIC}
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in modules]


def support_of(name: str) -> SupportStatus:
    """Whether the model of that name can be pruned; builds one block of it, without weights.

    Raises:
        RuntimeError: If timm has no such name.
    """
    kind = timm.model_entrypoint(name).__annotations__.get("return")
    reason = unsupported_reason(kind) if isinstance(kind, type) else None
    if isinstance(kind, type) and reason is not None:
        return SupportStatus(name, kind.__name__, "no", reason)
    with torch.device("meta"), _LeftBlank():
        try:
            model = timm.create_model(name, pretrained=False, depth=1)
        except (AssertionError, IndexError, TypeError):  # its options are made for its own depth
            model = timm.create_model(name, pretrained=False)
    try:
        transformer = find_vision_transformer(model)
    except UnsupportedModelError as error:
        return SupportStatus(name, type(model).__name__, "no", str(error))
    if transformer.first_prunable_block:
        reducible, reason = f"from block {transformer.first_prunable_block}", transformer.first_prunable_reason
    elif transformer.adapter.attn_mlp_split(transformer.blocks[0]) is None:
        block = type(transformer.blocks[0]).__name__
        reducible, reason = "after the block", f"attention and MLP of a {block} do not come apart"
    elif not transformer.adapter.supports_key_bias:
        reducible, reason = "pruning only", "its attention cannot be weighed by the sizes of merged tokens"
    else:
        reducible, reason = "yes", ""
    return SupportStatus(name, type(model).__name__, reducible, reason)


class Group(NamedTuple):
    """Models of one class with which the same can be done."""

    model: str
    reducible: str
    reason: str
    names: int


def grouped(statuses: Iterable[SupportStatus]) -> list[Group]:
    """The groups of a survey: what can be pruned first, larger groups first."""
    counts: dict[tuple[str, str, str], int] = {}
    for each in statuses:
        key = (each.model, each.reducible, each.reason)
        counts[key] = counts.get(key, 0) + 1
    order = {"yes": 0, "pruning only": 1, "after the block": 2, "no": 4}
    groups = [Group(*key, names) for key, names in counts.items()]
    return sorted(groups, key=lambda g: (order.get(g.reducible, 3), -g.names, g.model))
