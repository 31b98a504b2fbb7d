"""Running a model by something else than its `forward`, in place, until that is undone.

A module calls `_compiled_call_impl` instead of `forward` where it has one, as `nn.Module.compile` sets it. Modules,
parameters, names and hooks stay what they are.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

# Not an attribute of the module: copies and pickles of a compiled model are not compiled.
_applied: "WeakKeyDictionary[nn.Module, object]" = WeakKeyDictionary()
_eager = ContextVar("eager", default=False)


class InPlace:
    """What runs a model in the place of its `forward`; can be suspended, resumed and undone.

    Args:
        root: The model.
        modules: The modules whose calls were replaced: the model itself, or parts of it.
        runtime: What runs it, as `applied_to` will return it.
    """

    def __init__(self, root: nn.Module, modules: Sequence[nn.Module], runtime: object) -> None:
        self._root, self._modules, self._runtime = root, list(modules), runtime
        self._calls: list[Callable[..., Any]] = []  # of the modules, while they are suspended
        _applied[root] = runtime

    def suspend(self) -> None:
        """Makes the model run eagerly until `resume`."""
        _applied.pop(self._root, None)
        self._calls = [vars(module).pop("_compiled_call_impl") for module in self._modules]

    def resume(self) -> None:
        """Makes the model run as before `suspend`."""
        for module, call in zip(self._modules, self._calls, strict=True):
            vars(module)["_compiled_call_impl"] = call
        _applied[self._root] = self._runtime

    def undo(self) -> None:
        """Makes the model run eagerly again, for good."""
        _applied.pop(self._root, None)
        for module in self._modules:
            vars(module).pop("_compiled_call_impl", None)


def applied_to(model: nn.Module) -> object | None:
    """What an `InPlace` runs a model by now; None where the model runs as the user made it."""
    return _applied.get(model)


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs something else than its `forward`, of the whole of it or of a part."""
    return any(map(is_compiled_itself, model.modules()))


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether this very module, and not only a part of it, is compiled in place or is the wrapper of a compiled one."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """A context in which a model that was compiled in place is as it was before."""
    modules = list(model.modules())
    compiled = [(module, vars(module).pop("_compiled_call_impl", None)) for module in modules]
    applied = [(module, _applied.pop(module, None)) for module in modules]
    try:
        yield
    finally:
        for module, call in compiled:
            if call is not None:
                vars(module)["_compiled_call_impl"] = call
        for module, runtime in applied:
            if runtime is not None:
                _applied[module] = runtime


@contextmanager
def force_eager() -> Iterator[None]:
    """A context in which PyTorch runs models eagerly: for a batch shape that comes only once, or for outputs alone.

    Nothing is compiled or converted, and nothing compiled or converted is run.
    """
    token = _eager.set(True)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        _eager.reset(token)


def is_forced_eager() -> bool:
    """Whether `force_eager` is in force."""
    return _eager.get()
