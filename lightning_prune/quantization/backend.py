"""Loading torchao, which is slow and says more than a user can use."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

from torch import Tensor, nn

from lightning_prune.errors import ArgumentError

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


def quantizer() -> Callable[[Tensor], nn.Parameter]:
    """Loads torchao and returns what quantizes a weight.

    Raises:
        ArgumentError: torchao is not installed, or is one that this cannot use; names the extra.
    """
    try:
        with quiet():
            module = import_module("lightning_prune.quantization.int8_tensor")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "torchao"
        why = "torchao is not installed" if missing else f"torchao cannot be used ({error})"
        raise ArgumentError(f"int8: {why}; pip install 'lightning-prune[int8]'") from error
    quantize: Callable[[Tensor], nn.Parameter] = module.quantize
    return quantize
