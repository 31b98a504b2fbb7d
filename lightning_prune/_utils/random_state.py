"""The state of random generators: the global ones, and those that an object holds."""

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from itertools import islice
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_MAX_OBJECTS = 10_000  # that are searched for generators
_MAX_ITEMS = 64  # of a container


@contextmanager
def preserve_random_state() -> Iterator[None]:
    """Restores the global random state of torch, NumPy and Python on exit, also after an exception.

    Lightning's `isolate_rng` does not restore it after an exception.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # users use the global generator
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002


@contextmanager
def preserve_generators_of(holder: Any) -> Iterator[None]:
    """Restores the state of the random generators that an object holds: of torch, NumPy and Python.

    Its attributes are searched, and containers and objects in them, as a dataset that holds transforms. Tensors, arrays
    and modules are not searched, nor are slots and closures.

    Args:
        holder: A dataset, for example.
    """
    with ExitStack() as stack:
        for restore in map(_restorer, _generators_of(holder)):
            stack.callback(restore)
        yield


def _restorer(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        state = generator.get_state()
        return lambda: generator.set_state(state)
    if isinstance(generator, random.Random):
        python = generator.getstate()
        return lambda: generator.setstate(python)
    if isinstance(generator, np.random.RandomState):
        legacy = generator.get_state()
        return lambda: generator.set_state(legacy)
    bits = generator.bit_generator.state
    return lambda: setattr(generator.bit_generator, "state", bits)


def _generators_of(holder: Any) -> list[Any]:
    """The generators that are found breadth-first, so that a large container hides none next to it."""
    found, seen, waiting = [], {id(holder)}, deque([holder])
    while waiting and len(seen) < _MAX_OBJECTS:
        value = waiting.popleft()
        if isinstance(value, torch.Generator | random.Random | np.random.Generator | np.random.RandomState):
            found.append(value)
            continue
        for part in _parts(value):
            if id(part) not in seen and not isinstance(part, str | bytes | int | float | bool | None):
                seen.add(id(part))
                waiting.append(part)
    return found


def _parts(value: Any) -> list[Any]:
    if isinstance(value, Tensor | np.ndarray | nn.Module | type | ModuleType):
        return []
    # A list of a million paths or labels holds no generator: what its first items are, the others are.
    if type(value) is dict:  # other mappings, such as open archives, would load what they hold
        return list(islice(value.values(), _MAX_ITEMS))
    if isinstance(value, list | tuple | set | frozenset):
        return list(islice(value, _MAX_ITEMS))
    attributes = getattr(value, "__dict__", None)
    return list(attributes.values()) if isinstance(attributes, dict) else []
