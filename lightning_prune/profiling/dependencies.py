"""What the latency of a model depends on, as plain values: the key under which its profile is kept."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import __version__
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.overlay import own_class
from lightning_prune.profiling.compile_mode import UNREADABLE, compile_mode
from lightning_prune.profiling.context import measurement_context
from lightning_prune.reduction import Reduction

_PACKAGE = __name__.partition(".")[0]


def profile_dependencies(
    transformer: VisionTransformer,
    images: Tensor,
    reduction: Reduction,
    block: int,
    protocol: str = "deployed",
) -> dict[str, Any]:
    """What the latency of a model depends on, as plain values.

    Args:
        transformer: The Vision Transformer.
        images: (B, channels, height, width) on its device, in the precision that it will run in.
        reduction: The method.
        block: As `lightning_prune.profiling.reducing_block` says it.
        protocol: Of `lightning_prune.profile_latency`.

    Returns:
        One entry a condition. One that cannot be read (a compiler without a name, a method without source) is
        `"unreadable"`, and `lightning_prune.profiling.ProfileStore` keeps nothing under it.
    """
    return {
        **measurement_context(transformer.runner, images),
        "compile_mode": compile_mode(transformer.runner),
        "image_dtype": str(images.dtype).removeprefix("torch."),
        "channels_last": not images.is_contiguous() and images.is_contiguous(memory_format=torch.channels_last),
        "structure": structure(transformer.root),
        "depth": transformer.depth,
        "method": reduction.name,
        "method_class": _identity(type(reduction)),
        "settings": {key: repr(value) for key, value in reduction.settings().items()},
        "block": block,
        "protocol": protocol,
        "kernels": _kernels(),
        "packages": _versions(transformer.root),
        "lightning_prune": __version__,
    }


def readable(dependencies: Mapping[str, Any]) -> bool:
    """Whether all conditions are known, so that a profile can be found under them again."""
    return UNREADABLE not in dependencies.values()


def structure(model: nn.Module) -> str:
    """A digest of how a model is built.

    That is the classes and plain settings of its modules (heads, fused attention, ...), Hugging Face's configuration,
    and the shapes, dtypes and layout of its tensors; not the values of these.
    """
    parts = [
        (name, _path(own_class(module)), module.extra_repr(), list(_settings(module)))
        for name, module in model.named_modules()
    ]
    tensors = [*model.named_parameters(), *model.named_buffers()]
    shapes = [(name, tuple(t.shape), str(t.dtype), t.is_contiguous()) for name, t in tensors]
    return hashlib.sha256(repr((parts, shapes)).encode()).hexdigest()[:24]


def _settings(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds beside tensors and modules, and its `forward` may look at."""
    for name, value in sorted(vars(module).items()):
        if name == "training" or name.startswith("_"):
            continue
        if _is_plain(value):
            yield name, value
        elif inspect.isfunction(value) or inspect.isbuiltin(value):  # an activation
            yield name, _path(value)
        elif hasattr(value, "to_dict") and hasattr(value, "model_type"):  # of Hugging Face; names begin with "_"
            told = {key: entry for key, entry in value.to_dict().items() if not key.startswith("_")}
            yield name, (getattr(value, "_attn_implementation", None), sorted(told.items(), key=str))


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str | torch.dtype)


def _path(thing: Any) -> str:
    return f"{thing.__module__}.{thing.__qualname__}"


def _identity(method: type) -> str:
    """Where a method is from, and a digest of the files of all classes in it that are not this package's.

    Two methods of users may share a name, and one may be edited between two runs.
    """
    texts = []
    for cls in method.__mro__:
        if cls.__module__.partition(".")[0] in (_PACKAGE, "builtins", "abc"):
            continue
        try:
            texts.append(inspect.getsource(sys.modules[cls.__module__]))
        except (OSError, TypeError, KeyError):  # written in a console or a notebook
            return UNREADABLE
    digest = hashlib.sha256("".join(texts).encode()).hexdigest()[:24] if texts else ""
    return f"{_path(method)} {digest}".strip()


def _kernels() -> dict[str, Any]:
    """Switches of torch that choose between kernels of different speed."""
    backends, cuda, cudnn = torch.backends, torch.backends.cuda, torch.backends.cudnn
    switches: dict[str, Callable[[], Any]] = {
        "flash": cuda.flash_sdp_enabled,
        "mem_efficient": cuda.mem_efficient_sdp_enabled,
        "math": cuda.math_sdp_enabled,
        "cudnn_attention": cuda.cudnn_sdp_enabled,
        "mkldnn": lambda: backends.mkldnn.enabled,
        "cudnn": lambda: cudnn.enabled,
        "cudnn_benchmark": lambda: cudnn.benchmark,
        "cudnn_tf32": lambda: cudnn.allow_tf32,
        "matmul_precision": torch.get_float32_matmul_precision,
        "deterministic": torch.are_deterministic_algorithms_enabled,
    }
    found = {name: _told(read) for name, read in switches.items()}
    for name in ("cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv"):
        found[name] = _single_precision(name)
    return found


def _single_precision(name: str) -> str:
    """How a backend of torch computes with 32 bits, where nothing is said as the backend above it does."""
    for place in (name, name.partition(".")[0], ""):
        path = f"{place}.fp32_precision".lstrip(".")
        told = _told(partial(attrgetter(path), torch.backends))
        if told not in (None, "none"):  # there since torch 2.9
            return str(told)
    return "ieee"


def _told(read: Callable[[], Any]) -> Any:
    """What a switch says; nothing of one that this torch does not have, or that its newer form has taken over."""
    try:
        return read()
    except (AttributeError, RuntimeError):
        return None


def _versions(model: nn.Module) -> dict[str, str]:
    """Of the packages that the modules of a model are from, where they have one."""
    found = {}
    for package in sorted({own_class(module).__module__.partition(".")[0] for module in model.modules()}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the user's own
            continue
    return found
