"""Which kernels compute in 8 bits: torch's own on CPUs; elsewhere torchao, slow to load and full of messages."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.quantization import cpu_tensor, onednn

# What torchao 0.18 says while it is imported, by logger. None of it bears on int8 matrix products, which are torch's.
_KNOWN = {
    "torch.utils._pytree": "register_constant() on Enum subclasses is deprecated",
    "torchao": "Skipping import of cpp extensions",
    "torchao.kernel.intmm": "Detected no triton",
}


@contextmanager
def quiet() -> Iterator[None]:
    """Drops the messages of torchao's import that are known to mean nothing, and no others."""

    def is_news(record: logging.LogRecord) -> bool:
        return _KNOWN[record.name] not in record.getMessage()

    for name in _KNOWN:
        logging.getLogger(name).addFilter(is_news)
    try:
        yield
    finally:
        for name in _KNOWN:
            logging.getLogger(name).removeFilter(is_news)


def int8_backend(device: torch.device | str) -> str:
    """Whose kernels compute in 8 bits on a device.

    Args:
        device: Where the model runs.

    Returns:
        `oneDNN`, which is torch's own, on a CPU where torch has it; otherwise `torchao`, be it installed or not.

    Example:
        >>> from lightning_prune.quantization import int8_backend
        >>> int8_backend("cuda")
        'torchao'
    """
    return "torchao" if _limit(torch.device(device)) is None else "oneDNN"


def quantizer(device: torch.device) -> Callable[[Tensor], nn.Parameter]:
    """What quantizes a weight for a device; loads torchao where it takes that.

    Raises:
        ArgumentError: It takes torchao, which is not installed, or is one that this cannot use; names the extra.
    """
    limit = _limit(device)
    if limit is not None:
        return partial(cpu_tensor.quantize, limit=limit)
    try:
        with quiet():
            module = import_module("lightning_prune.quantization.int8_tensor")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        why = "torchao is not installed" if missing else f"torchao cannot be used ({error})"
        raise ArgumentError(f"int8: {why}; pip install 'lightning-prune[int8]'") from error
    quantize: Callable[[Tensor], nn.Parameter] = module.quantize
    return quantize


def _limit(device: torch.device) -> int | None:
    return onednn.weight_limit() if device.type == "cpu" else None
