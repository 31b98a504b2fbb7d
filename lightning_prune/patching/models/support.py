"""Finds out which of timm's transformers can be pruned, by building them."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.models.registry import find_vision_transformer
from lightning_prune.patching.models.unsupported import TIMM_MODULES, unsupported_reason

# Modules of timm with transformers of constant resolution. All others are convolutional or hierarchical.
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


# In-place functions that initialise weights. On tensors without data they only take time, half of the total.
_INITIALISERS = frozenset({"uniform_", "normal_", "constant_", "kaiming_uniform_", "kaiming_normal_"})
_INITIALISERS |= {"xavier_uniform_", "trunc_normal_", "zeros_", "ones_", "erfinv_", "mul_", "add_", "clamp_"}
_INITIALISERS |= {"zero_", "fill_"}


class _SkipInitialisation(TorchFunctionMode):
    """Skips the initialisation of weights on the meta device."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get("tensor")  # the name in `torch.nn.init`
        if getattr(func, "__name__", "") in _INITIALISERS and isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return func(*args, **kwargs)


WITH_RESTORE = "with restore"


class SupportStatus(NamedTuple):
    """Whether a model of timm can be pruned.

    Attributes:
        name: timm's name.
        model: Its class.
        reducible: `"yes"`; `"pruning only"` if its attention cannot be weighted by the sizes of merged tokens; `"after
            the block"` if the MLP of a reducing block processes all of its tokens; `"from block 10"`; `"with restore"`
            if removed tokens must be given back (`restore` of `lightning_prune.patch`); or `"no"`.
        reason: Why it cannot be pruned, or not everywhere.
    """

    name: str
    model: str
    reducible: str
    reason: str = ""


def isotropic_names() -> list[str]:
    """Sorted names of timm's transformers with constant resolution."""
    modules = {f"timm.models.{module}" for module in _ISOTROPIC}
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in modules]


def unsupported_names() -> list[str]:
    """Sorted names of timm's other transformers, which cannot be pruned for a known reason."""
    modules = {f"timm.models.{module}" for module in TIMM_MODULES.difference(_ISOTROPIC)}
    return [name for name in timm.list_models() if timm.model_entrypoint(name).__module__ in modules]


def support_of(name: str) -> SupportStatus:
    """Whether a model of timm can be pruned. Builds it with one block and without weights.

    Raises:
        RuntimeError: If timm has no model of that name.
    """
    kind = timm.model_entrypoint(name).__annotations__.get("return")
    reason = unsupported_reason(kind) if isinstance(kind, type) else None
    if isinstance(kind, type) and reason is not None:
        return SupportStatus(name, kind.__name__, "no", reason)
    with torch.device("meta"), _SkipInitialisation():
        try:
            model = timm.create_model(name, pretrained=False, depth=1)
        except (AssertionError, IndexError, TypeError):  # other options depend on the depth
            model = timm.create_model(name, pretrained=False)
    try:
        transformer = find_vision_transformer(model, restore="auto")
    except UnsupportedModelError as error:
        reason = unsupported_reason(type(model)) or str(error)
        return SupportStatus(name, type(model).__name__, "no", reason)
    restore_reason = transformer.adapter.restore_reason(transformer.root)
    if restore_reason is not None:
        reducible, reason = WITH_RESTORE, restore_reason
    elif transformer.first_prunable_block:
        reducible, reason = f"from block {transformer.first_prunable_block}", transformer.first_prunable_reason
    elif transformer.adapter.attn_mlp_split(transformer.blocks[0]) is None:
        block = type(transformer.blocks[0]).__name__
        reducible, reason = "after the block", f"a {block} cannot be split between attention and MLP"
    elif not transformer.adapter.supports_key_bias:
        reducible, reason = "pruning only", "its attention cannot be weighted by the sizes of merged tokens"
    else:
        reducible, reason = "yes", ""
    return SupportStatus(name, type(model).__name__, reducible, reason)


class Group(NamedTuple):
    """Models of one class with the same support."""

    model: str
    reducible: str
    reason: str
    names: int


def grouped(statuses: Iterable[SupportStatus]) -> list[Group]:
    """Groups the models by class and support: first those that can be pruned, and larger groups first."""
    counts: dict[tuple[str, str, str], int] = {}
    for each in statuses:
        key = (each.model, each.reducible, each.reason)
        counts[key] = counts.get(key, 0) + 1
    order = {"yes": 0, "pruning only": 1, "after the block": 2, "no": 4}
    groups = [Group(*key, names) for key, names in counts.items()]
    return sorted(groups, key=lambda g: (order.get(g.reducible, 3), -g.names, g.model))
