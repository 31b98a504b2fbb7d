"""What a measured latency depends on: device, software, model structure, compile mode."""

import hashlib
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

import timm
import torch
from torch import Tensor, nn

from lightning_prune import __version__
from lightning_prune._utils.device import device_name
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.class_swap import original_class
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.torch_runtime import is_compiled

UNKNOWN = "unreadable"  # of a condition that cannot be told from others: nothing may be reused under it
_INDUCTOR, _OTHER = "_TorchCompileInductorWrapper", "_TorchCompileWrapper"  # of torch: what a user asked compile for


def compile_mode(model: nn.Module) -> str:
    """How the modules of a model are compiled: the backend, its options, whether shapes are dynamic, and where.

    Args:
        model: The model that is measured.

    Returns:
        Empty where nothing is compiled; `UNKNOWN` where torch, or a backend without a name, does not say.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.environment import compile_mode
        >>> compile_mode(torch.nn.Linear(2, 2)), compile_mode(torch.compile(torch.nn.Linear(2, 2), backend="eager"))
        ('', 'eager')
    """
    places: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        mode = _own_compile_mode(module)
        if mode == UNKNOWN:
            return UNKNOWN
        if mode:
            places.setdefault(mode, []).append(name)
    return "; ".join(mode if names == [""] else f"{mode} in {' '.join(names)}" for mode, names in places.items())


def _own_compile_mode(module: nn.Module) -> str:
    """That of one module, in `torch.compile(module)` and in `module.compile()`."""
    if hasattr(module, "_orig_mod"):
        wrapper = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    elif (call := getattr(module, "_compiled_call_impl", None)) is not None:
        call = getattr(
            call, "compiled_call", call
        )  # as `lightning_prune.runtimes.torch_runtime` wraps those of CUDA graphs
        cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True)) if _closes(call) else {}
        wrapper = cells["callback"].cell_contents if "callback" in cells else None
    else:
        return ""
    while wrapper is not None and type(wrapper).__name__ not in (_INDUCTOR, _OTHER):
        inner = getattr(wrapper, "_torchdynamo_orig_backend", None)  # its name since torch 2.9
        wrapper = getattr(wrapper, "_torchdynamo_orig_callable", None) if inner is None else inner
    if wrapper is None:
        return UNKNOWN
    inductor = type(wrapper).__name__ == _INDUCTOR
    name = "inductor" if inductor else _name_of(wrapper.compiler_fn)
    options = dict(wrapper.config if inductor else wrapper.kwargs) | {"dynamic": wrapper.dynamic}
    told = sorted(f"{key}={value!r}" for key, value in options.items() if value is not None)
    return UNKNOWN if name == UNKNOWN else ", ".join([name, *told])


def _closes(call: object) -> bool:
    return hasattr(call, "__code__") and hasattr(call, "__closure__")


def _name_of(backend: Callable[..., Any]) -> str:
    """Of a backend of torch its own name; of another where it is from, unless that does not tell it from others."""
    kind = backend if hasattr(backend, "__qualname__") else type(backend)
    module, name = str(kind.__module__), str(kind.__qualname__)
    if "<" in name:  # <lambda>, <locals>
        return UNKNOWN
    return name if module.startswith("torch.") else f"{module}.{name}"


def measurement_context(model: nn.Module, batch: Tensor) -> dict[str, Any]:
    """Device, threads, batch, precision, compile mode and versions, as plain values.

    Call it where the model will run: inside the autocast context, with the batch on its device.

    Args:
        model: The model that is measured.
        batch: (B, channels, height, width) images.
    """
    return {
        "device": device_name(batch.device),
        "device_type": batch.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": batch.shape[0],
        "image_shape": list(batch.shape[1:]),
        "precision": precision(model, batch.device),
        "compiled": is_compiled(model),
        "model": original_class(getattr(model, "_orig_mod", model)).__name__,
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": str(torch.__version__),  # a str subclass, which YAML and weights_only loading refuse
        "timm": timm.__version__,
    }


def precision(model: nn.Module, device: torch.device) -> str:
    """`"bf16-mixed"` where autocast is on, else the dtype of the weights, such as `"float32"`."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        return {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype, f"{dtype}-mixed")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return str(weight.dtype if weight is not None else torch.get_default_dtype()).removeprefix("torch.")


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
        `"attention_unsupported_reason"`, and `lightning_prune.profiling.ProfileStore` keeps nothing under it.
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
    return UNKNOWN not in dependencies.values()


def structure(model: nn.Module) -> str:
    """A digest of how a model is built.

    That is the classes and plain settings of its modules (heads, fused attention, ...), Hugging Face's configuration,
    and the shapes, dtypes and layout of its tensors; not the values of these.
    """
    parts = [
        (name, _path(original_class(module)), module.extra_repr(), list(_settings(module)))
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
            return UNKNOWN
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
    for package in sorted({original_class(module).__module__.partition(".")[0] for module in model.modules()}):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # the user's own
            continue
    return found
