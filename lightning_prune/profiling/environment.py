"""The environment of a measurement: device, versions, settings and model structure, as plain values."""

import time
from collections.abc import Callable, Mapping
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune import __version__
from lightning_prune._utils.device import device_name
from lightning_prune._utils.digests import tensor_digest, weights_digest
from lightning_prune._utils.isolation import user_hooks
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.models.call_arguments import call_keywords
from lightning_prune.profiling.clocks import clock_name
from lightning_prune.profiling.model_identity import (
    UNKNOWN,
    class_identity,
    code_identity,
    model_name,
    plain_arguments,
    replaced_methods,
    structure,
)
from lightning_prune.reduction import Reduction
from lightning_prune.runtimes.base import runtime_of
from lightning_prune.runtimes.in_place import is_compiled

_MODEL_LIBRARIES = ("timm", "torchvision", "transformers")


def measurement_context(
    model: nn.Module, example_inputs: Tensor, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Device, threads, batch, precision, runtime and versions, as plain values.

    Call it where the model will run: inside the autocast context, with the batch on its device.

    Args:
        model: The model that is measured.
        example_inputs: (B, C, H, W) images.
        clock: What runs are timed by; CPU time is a condition of its own.

    Returns:
        One entry per condition, and those of the runtime that is applied (version, provider, threads). Of the libraries
        of models (timm, torchvision, transformers) those that the modules of `model` are from are named, with their
        version.
    """
    runtime, inner = runtime_of(model), getattr(model, "_orig_mod", model)
    return {
        "device": device_name(example_inputs.device),
        "device_type": example_inputs.device.type,
        "threads": torch.get_num_threads(),
        "batch_size": example_inputs.shape[0],
        "image_shape": list(example_inputs.shape[1:]),
        "precision": precision(model, example_inputs.device),
        "runtime": runtime_name(model),
        "compiled": is_compiled(model) and not (runtime is not None and runtime.converts),
        "model": original_class(inner).__name__,
        **({} if (name := model_name(inner)) is None else {"model_name": name}),
        "parameters": sum(p.numel() for p in model.parameters()),
        "torch": str(torch.__version__),  # a str subclass, which YAML and weights_only loading refuse
        **{name: number for name, number in package_versions(model).items() if name in _MODEL_LIBRARIES},
        **({} if runtime is None else runtime.context()),
        **({"clock": "cpu"} if clock_name(clock) == "cpu" else {}),
    }


def precision(model: nn.Module, device: torch.device) -> str:
    """`"bf16-mixed"` where autocast is on, else the dtype of the weights, such as `"float32"`."""
    if torch.is_autocast_enabled(device.type):
        dtype = torch.get_autocast_dtype(device.type)
        return {torch.bfloat16: "bf16-mixed", torch.float16: "16-mixed"}.get(dtype, f"{dtype}-mixed")
    weight = next((p for p in model.parameters() if p.is_floating_point()), None)
    return str(weight.dtype if weight is not None else torch.get_default_dtype()).removeprefix("torch.")


def runtime_name(model: nn.Module) -> str:
    """The specification of the runtime that runs a model.

    Args:
        model: The model that is measured.

    Returns:
        `"torch"` where nothing is compiled, `"torch.compile..."` where this package compiled the model, and `UNKNOWN`
        where the user compiled it or a part of it, as torch does not tell how.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.environment import runtime_name
        >>> runtime_name(torch.nn.Linear(2, 2)), runtime_name(torch.compile(torch.nn.Linear(2, 2)))
        ('torch', 'unknown')
    """
    if not is_compiled(model):
        return "torch"
    runtime = runtime_of(model)
    return UNKNOWN if runtime is None else runtime.name


def profile_dependencies(
    transformer: VisionTransformer,
    example_inputs: Tensor,
    reduction: Reduction,
    block: int,
    protocol: str = "deployed",
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Any]:
    """Everything that the latency of a model depends on, as plain values: the key of a kept profile.

    Args:
        transformer: The Vision Transformer.
        example_inputs: (B, C, H, W) images on its device, in the precision that it will run in.
        reduction: The method.
        block: The reducing block, as `lightning_prune.profiling.reducing_block` returns it.
        protocol: As in `lightning_prune.profile_latency`.
        clock: What runs are timed by.

    Returns:
        One entry per condition. A condition that cannot be compared (a model that the user compiled, or whose methods
        the user replaced, a reduction without source) is `"unknown"`, and `lightning_prune.profiling.ProfileStore`
        keeps nothing under it.
    """
    return {
        **model_conditions(transformer, example_inputs, clock),
        "method": reduction.name,
        "method_class": class_identity(type(reduction)),
        "settings": {key: repr(value) for key, value in reduction.settings().items()},
        "block": block,
        "protocol": protocol,
    }


def model_conditions(
    transformer: VisionTransformer, example_inputs: Tensor, clock: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """Everything that the latency of the dense model depends on, as plain values.

    Args:
        transformer: The Vision Transformer.
        example_inputs: (B, C, H, W) images on its device, in the precision that it will run in.
        clock: What runs are timed by.

    Returns:
        One entry per condition, as `profile_dependencies` returns them.
    """
    context = measurement_context(transformer.compiled_root, example_inputs, clock)
    return {
        **{key: value for key, value in context.items() if key != "model_name"},  # no latency depends on a name
        "hooks": UNKNOWN if user_hooks(transformer.outer) else "",
        "replaced_methods": UNKNOWN if replaced_methods(transformer.outer) else "",
        "image_dtype": str(example_inputs.dtype).removeprefix("torch."),
        "channels_last": not example_inputs.is_contiguous()
        and example_inputs.is_contiguous(memory_format=torch.channels_last),
        "structure": structure(transformer.outer),
        **({} if transformer.reader is None else {"reader": code_identity(transformer.outer)}),
        "depth": transformer.depth,
        "arguments": plain_arguments(call_keywords(transformer.root)),
        "kernels": _kernel_switches(),
        "packages": package_versions(transformer.outer),
        "lightning_prune": __version__,
        **({} if transformer.restore is None else {"restore": transformer.restore}),
    }


def accuracy_dependencies(
    transformer: VisionTransformer, example_inputs: Tensor, images: Tensor, proxy: str
) -> dict[str, Any]:
    """Everything that estimates of accuracy depend on besides method and schedule: the key of those that are kept.

    They are made without compilation, so that the runtime is no condition, nor is the batch that latency is measured
    on.

    Args:
        transformer: The Vision Transformer, dense.
        example_inputs: (B, C, H, W) images on its device, in the precision that it will run in.
        images: (images, C, H, W) calibration images, in the order in which they are used.
        proxy: What is estimated.

    Returns:
        One entry per condition. `"unknown"` are hooks and compilation of the user, and methods that replace those of
        the class in one object.
    """
    conditions = model_conditions(transformer, example_inputs)
    for name in ("runtime", "compiled", "batch_size", "image_dtype", "channels_last"):
        if conditions[name] != UNKNOWN:
            del conditions[name]
    return {
        **conditions,
        "weights": weights_digest(transformer.outer),
        "images": tensor_digest(images),
        "proxy": proxy,
    }


def unknown_conditions(dependencies: Mapping[str, Any]) -> list[str]:
    """Names of the conditions that are unknown; a profile can be found again only if there are none."""
    return [name for name, value in dependencies.items() if value == UNKNOWN]


def _kernel_switches() -> dict[str, Any]:
    """Settings of torch that choose between kernels of different speed."""
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
    values = {name: _read(switch) for name, switch in switches.items()}
    for name in ("cuda.matmul", "cudnn.conv", "mkldnn.matmul", "mkldnn.conv"):
        values[name] = _fp32_precision(name)
    return values


def _fp32_precision(name: str) -> str:
    """How a backend of torch computes in float32; where it has no setting of its own, that of its parent."""
    for place in (name, name.partition(".")[0], ""):
        path = f"{place}.fp32_precision".lstrip(".")
        value = _read(partial(attrgetter(path), torch.backends))
        if value not in (None, "none"):  # there since torch 2.9
            return str(value)
    return "ieee"


def _read(switch: Callable[[], Any]) -> Any:
    """The value of a switch; None where this torch has none, or a newer form of it was used."""
    try:
        return switch()
    except (AttributeError, RuntimeError):
        return None


def package_versions(model: nn.Module) -> dict[str, str]:
    """Versions of the installed packages that the modules of a model are from."""
    packages = {kind.__module__.partition(".")[0] for kind in set(map(original_class, model.modules()))}
    versions = {package: _installed_version(package) for package in sorted(packages)}
    return {package: number for package, number in versions.items() if number is not None}


@cache  # metadata is read from a file each time, and a planning asks often
def _installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:  # the user's own
        return None
