"""Selects the int8 kernels: torch's own on CPUs, torchao's elsewhere.

The files with the kernels are only imported when int8 is used, because importing them registers a custom operator and a
tensor class with torch, and torchao takes long to import and logs many messages.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError

# Messages of torchao 0.18 during its import, by logger. None is relevant to int8 matrix products, which are torch's.
_KNOWN = {
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "torchao": "Skipping import of cpp extensions",
    "torchao.kernel.intmm": "Detected no triton",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Suppresses the known, irrelevant messages of torchao's import."""

    def is_unknown(record: logging.LogRecord) -> bool:
        return _KNOWN[record.name] not in record.getMessage()

    for name in _KNOWN:
        logging.getLogger(name).addFilter(is_unknown)
    try:
        yield
    finally:
        for name in _KNOWN:
            logging.getLogger(name).removeFilter(is_unknown)


def int8_backend(device: torch.device | str) -> str:
    """The library that provides the int8 kernels for a device.

    Args:
        device: Where the model runs.

    Returns:
        `oneDNN` (part of torch) on a CPU if this build of torch has it, else `torchao`, whether installed or not.

    Example:
        >>> from lightning_prune.quantization import int8_backend
        >>> int8_backend("cuda")
        'torchao'
    """
    return "torchao" if _limit(torch.device(device)) is None else "oneDNN"


def quantizer(device: torch.device) -> Callable[[Tensor], nn.Parameter]:
    """The function that quantizes a weight for a device. Imports torchao if it is needed.

    Raises:
        ArgumentError: If torchao is needed but cannot be imported; names the extra.
    """
    limit = _limit(device)
    if limit is not None:
        return partial(_load("cpu_tensor").quantize, limit=limit)
    try:
        with quiet():
            module = _load("int8_tensor")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        reason = "torchao is not installed" if missing else f"torchao cannot be used ({error})"
        raise ArgumentError(f"int8: {reason}; pip install 'lightning-prune[int8]'") from error
    quantize: Callable[[Tensor], nn.Parameter] = module.quantize
    return quantize


def _limit(device: torch.device) -> int | None:
    limit: int | None = _load("onednn").weight_limit() if device.type == "cpu" else None
    return limit


def _load(name: str) -> Any:
    return import_module(f"lightning_prune.quantization.{name}")


def allow_checkpoints() -> None:
    """Allows `torch.load(..., weights_only=True)` to read weights that `Int8Weights` quantized on a CPU.

    This is not needed in a process that has used `Int8Weights` on a CPU.

    Example:
        >>> import io
        >>> import torch
        >>> from lightning_prune.quantization import Int8Weights, allow_checkpoints
        >>> model, file = torch.nn.Linear(16, 16), io.BytesIO()
        >>> with Int8Weights(model):
        ...     torch.save(model.state_dict(), file)
        >>> allow_checkpoints()
        >>> sorted(torch.load(io.BytesIO(file.getvalue()), weights_only=True))
        ['bias', 'weight']
    """
    _load("cpu_tensor")
