"""How a model is compiled, in words that tell one way from another: latencies are those of one way."""

from collections.abc import Callable
from typing import Any

from torch import nn

UNREADABLE = "unreadable"  # of a condition that cannot be told from others: nothing may be reused under it
_INDUCTOR, _OTHER = "_TorchCompileInductorWrapper", "_TorchCompileWrapper"  # of torch: what a user asked compile for


def compile_mode(model: nn.Module) -> str:
    """How the modules of a model are compiled: the backend, its options, whether shapes are dynamic, and where.

    Args:
        model: The model that is measured.

    Returns:
        Empty where nothing is compiled; `UNREADABLE` where torch, or a backend without a name, does not say.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.compile_mode import compile_mode
        >>> compile_mode(torch.nn.Linear(2, 2)), compile_mode(torch.compile(torch.nn.Linear(2, 2), backend="eager"))
        ('', 'eager')
    """
    places: dict[str, list[str]] = {}
    for name, module in model.named_modules():
        mode = _own_compile_mode(module)
        if mode == UNREADABLE:
            return UNREADABLE
        if mode:
            places.setdefault(mode, []).append(name)
    return "; ".join(mode if names == [""] else f"{mode} in {' '.join(names)}" for mode, names in places.items())


def _own_compile_mode(module: nn.Module) -> str:
    """That of one module, in `torch.compile(module)` and in `module.compile()`."""
    if hasattr(module, "_orig_mod"):
        wrapper = getattr(getattr(module, "dynamo_ctx", None), "callback", None)
    elif (call := getattr(module, "_compiled_call_impl", None)) is not None:
        call = getattr(call, "compiled_call", call)  # as `lightning_prune.compiling` wraps those of CUDA graphs
        cells = dict(zip(call.__code__.co_freevars, call.__closure__ or (), strict=True)) if _closes(call) else {}
        wrapper = cells["callback"].cell_contents if "callback" in cells else None
    else:
        return ""
    while wrapper is not None and type(wrapper).__name__ not in (_INDUCTOR, _OTHER):
        inner = getattr(wrapper, "_torchdynamo_orig_backend", None)  # its name since torch 2.9
        wrapper = getattr(wrapper, "_torchdynamo_orig_callable", None) if inner is None else inner
    if wrapper is None:
        return UNREADABLE
    inductor = type(wrapper).__name__ == _INDUCTOR
    name = "inductor" if inductor else _name_of(wrapper.compiler_fn)
    options = dict(wrapper.config if inductor else wrapper.kwargs) | {"dynamic": wrapper.dynamic}
    told = sorted(f"{key}={value!r}" for key, value in options.items() if value is not None)
    return UNREADABLE if name == UNREADABLE else ", ".join([name, *told])


def _closes(call: object) -> bool:
    return hasattr(call, "__code__") and hasattr(call, "__closure__")


def _name_of(backend: Callable[..., Any]) -> str:
    """Of a backend of torch its own name; of another where it is from, unless that does not tell it from others."""
    kind = backend if hasattr(backend, "__qualname__") else type(backend)
    module, name = str(kind.__module__), str(kind.__qualname__)
    if "<" in name:  # <lambda>, <locals>
        return UNREADABLE
    return name if module.startswith("torch.") else f"{module}.{name}"
