"""What tells one model or method from another by its structure and code, as plain values."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune._utils.digests import tensor_digest
from lightning_prune.patching.class_swap import original_class
from lightning_prune.reduction import Reduction

UNKNOWN = "unknown"
"""Value of a condition that cannot be compared with others; nothing is reused under it."""

_PACKAGE = __name__.partition(".")[0]
_LIBRARIES = (
    "torch",
    "timm",
    "torchvision",
    "transformers",
    "lightning",
    "pytorch_lightning",
    "torchmetrics",
    _PACKAGE,
)
_OF_LIGHTNING = frozenset({"_current_fx_name"})  # which hook of a LightningModule runs
_OF_LOOPS = frozenset(
    {f"{stage}_{what}" for stage in ("training", "validation", "test", "predict") for what in ("step", "dataloader")}
    | {"train_dataloader", "val_dataloader"}
)
_OF_TORCH = frozenset(vars(nn.Module())) | {"_is_hf_initialized"}  # no settings, though some are private and plain


def method_identity(reduction: Reduction) -> dict[str, Any]:
    """What tells the outputs of one method from those of another: its class, and all that it holds.

    Args:
        reduction: The method.

    Returns:
        Plain values; `"unknown"` where the class has no source, or a setting is neither plain nor a tensor.
    """
    held = dict(sorted(vars(reduction).items()))
    known = all(_is_plain(value) or isinstance(value, Tensor) for value in held.values())
    state = {name: tensor_digest(v) if isinstance(v, Tensor) else repr(v) for name, v in held.items()}
    return {
        "method": reduction.name,
        "method_class": class_identity(type(reduction)),
        "state": state if known else UNKNOWN,
    }


def replaced_methods(model: nn.Module) -> list[Callable[..., Any]]:
    """The methods that single modules have in place of those of their class, as a wrapper sets them.

    Those of a LightningModule that only a loop calls do not count: a forward pass runs none of them.

    Args:
        model: The model, dense.
    """
    return [
        value
        for module in model.modules()
        for name, value in vars(module).items()
        if callable(value)
        and inspect.isfunction(getattr(type(module), name, None))
        and not (name in _OF_LOOPS and hasattr(module, "validation_step"))
    ]


def code_identity(model: nn.Module) -> str:
    """A digest of the source files of the user's classes among the modules; `"unknown"` where one has no file.

    What a dense head computes is code that no class name and no setting tells of.

    Args:
        model: The model, patched or dense.
    """
    kinds = {original_class(module) for module in model.modules()}
    own = sorted((k for k in kinds if k.__module__.partition(".")[0] not in _LIBRARIES), key=_qualified_name)
    found = [class_identity(kind) for kind in own]
    return UNKNOWN if UNKNOWN in found else hashlib.sha256(repr(found).encode()).hexdigest()[:24]


def structure(model: nn.Module) -> str:
    """A digest of how a model is built.

    It covers the classes and plain settings of its modules (heads, fused attention, ...), their private switches (of
    adapters, for example), Hugging Face's configuration, and the shapes, dtypes and layout of its tensors, but not
    their values.
    """
    parts = [
        (name, _qualified_name(original_class(module)), module.extra_repr(), list(_plain_settings(module)))
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(t.shape), str(t.dtype), str(t.layout), _is_contiguous(t)) for name, t in tensors]
    return hashlib.sha256(repr((parts, shapes)).encode()).hexdigest()[:24]


def _is_contiguous(tensor: Tensor) -> bool:
    return tensor.layout is torch.strided and tensor.is_contiguous()  # sparse layouts have no strides


def plain_arguments(arguments: Mapping[str, Any]) -> Any:
    """The arguments as text; `UNKNOWN` if one is no plain value."""
    plain = all(map(_is_plain, arguments.values()))
    return {name: repr(value) for name, value in arguments.items()} if plain else UNKNOWN


def _plain_settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """Attributes of a module besides tensors and modules, at which its `forward` may look."""
    for name, value in sorted(vars(module).items()):
        if name == "training" or name in _OF_TORCH or name in _OF_LIGHTNING:
            continue
        if name.startswith("_"):
            if _is_switch(value):
                yield name, value
        elif _is_plain(value):
            yield name, value
        elif inspect.isfunction(value) or inspect.isbuiltin(value):  # an activation
            yield name, _qualified_name(value)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):  # Hugging Face; private names begin with "_"
            entries = {key: entry for key, entry in value.to_dict().items() if not key.startswith("_")}
            yield name, (getattr(value, "_attn_implementation", None), sorted(entries.items(), key=str))


def _is_switch(value: Any) -> bool:
    """Whether a private attribute chooses what runs, as adapters that are on or off do; numbers may be counters."""
    return isinstance(value, bool | str) or (isinstance(value, list | tuple) and all(map(_is_switch, value)))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _qualified_name(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def class_identity(method: type) -> str:
    """The name of a class, and a digest of the source files of its bases outside this package.

    Two methods of users may share a name, and one may be edited between two runs.
    """
    texts = []
    for cls in method.__mro__:
        if cls.__module__.partition(".")[0] in (_PACKAGE, "builtins", "abc", *_LIBRARIES):
            continue
        try:
            texts.append(inspect.getsource(sys.modules[cls.__module__]))
        except (OSError, TypeError, KeyError):  # written in a console or a notebook
            return UNKNOWN
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:24] if texts else ""
    return f"{_qualified_name(method)} {digest}".strip()


def model_name(model: nn.Module) -> str | None:
    """The name under which a library knows a model; None where it has none.

    Args:
        model: The model, without a wrapper of `torch.compile`.

    Returns:
        timm's name of the architecture, or the last part of the name or folder that Hugging Face loaded it from.

    Example:
        >>> import timm
        >>> from lightning_prune.profiling.model_identity import model_name
        >>> model_name(timm.create_model("vit_tiny_patch16_224", depth=1))
        'vit_tiny_patch16_224'
    """
    of_timm = getattr(model, "pretrained_cfg", None)
    found = of_timm.get("architecture") if isinstance(of_timm, Mapping) else getattr(of_timm, "architecture", None)
    found = found or getattr(getattr(model, "config", None), "name_or_path", None)
    return PurePath(found).name or None if isinstance(found, str) else None
