"""The patched root: the Vision Transformer itself, whose calls decide which tokens are read."""

import inspect
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, Protocol

from torch import nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.class_swap import PatchedModule
from lightning_prune.patching.exact_tail import ExactTail
from lightning_prune.patching.token_readers import RestoreMode, TokenReaders


class RootPatch:
    """Data of a patched root.

    Args:
        root: The Vision Transformer.
        tail: The exact tail of the model, if it has one.
        readers: What is read of the model, if removed tokens are given back.

    Attributes:
        tail: The exact tail.
        readers: What is read.
    """

    def __init__(self, root: nn.Module, tail: ExactTail | None = None, readers: TokenReaders | None = None) -> None:
        function = getattr(root, "forward_intermediates", None)
        self._arguments = list(inspect.signature(function).parameters) if function is not None else []
        self.tail = tail
        self.readers = readers

    def argument(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """An argument of a call of `forward_intermediates`; None if it was not passed."""
        position = self._arguments.index(name) if name in self._arguments else len(args)
        return kwargs.get(name, args[position] if position < len(args) else None)


class OfRoot(Protocol):
    """What the patch of a root says."""

    tail: ExactTail | None
    readers: TokenReaders | None


class PatchedRoot(PatchedModule):
    """Mixin for the root of a patched model. Its `forward` is the model's own.

    While it runs, the exact tail is in force, and removed tokens are given back where it reads them.
    """

    _prune_patch: OfRoot
    keeps_name = True  # transformers looks up by the name of the class what it records, and writes it into configs

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_prune_classes" in cls.__dict__:
            # With the signature of the model's own, which exporters and trainers look at. A type checker allows no
            # assignment to a method; each patched class has one of its own.
            cls.forward = _with_signature(cls.forward, cls.__dict__["_prune_classes"][0].forward)  # type: ignore[method-assign]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model."""
        tail = self._prune_patch.tail
        return self._run(*args, **kwargs) if tail is None else tail.call(self, self._run, args, kwargs)

    def _run(self, *args: Any, **kwargs: Any) -> Any:
        readers = self._prune_patch.readers
        if readers is None:
            return super().forward(*args, **kwargs)
        return readers.call_forward(self, super().forward, args, kwargs)


class IntermediatesGuard(PatchedRoot):
    """Rejects the layout of a grid where removed tokens are not given back: fewer tokens may fit it by chance."""

    _prune_patch: RootPatch

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own method."""
        own: Any = super()  # the patched class, unknown to type checkers
        patch = self._prune_patch
        if patch.readers is None and patch.argument("output_fmt", args, kwargs) in ("NCHW", None):
            raise UnsupportedModelError(
                "`output_fmt` must be 'NLC' in a model whose blocks remove tokens, got 'NCHW'; or patch it with "
                "restore='auto', or remove the patch."
            )
        return own.forward_intermediates(*args, **kwargs)


def tail_of(root: nn.Module) -> ExactTail | None:
    """The exact tail of a patched transformer; None if it has none."""
    return root._prune_patch.tail if isinstance(root, PatchedRoot) else None


def restore_mode(model: nn.Module) -> RestoreMode | None:
    """How a patched model gives removed tokens back; None if it does not.

    Args:
        model: Contains one Vision Transformer; anything else does not.
    """
    modules = model.modules() if isinstance(model, nn.Module) else ()
    roots = (each for each in modules if isinstance(each, PatchedRoot))
    readers = next((each._prune_patch.readers for each in roots), None)
    return None if readers is None else readers.mode


def _with_signature(forward: Callable[..., Any], own: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(own)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return call
