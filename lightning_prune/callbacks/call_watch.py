"""Watching what reaches the Vision Transformer: in a step, and in the `forward` of the module around it."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.isolation import isolated
from lightning_prune.callbacks.first_call import FirstCall, read_call
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling.environment import precision


class BlockInput(NamedTuple):
    """What enters the first block that can reduce.

    Attributes:
        images: B.
        tokens: N, prefix included.
        precision: As `lightning_prune.profiling.environment.precision` returns it.
    """

    images: int
    tokens: int
    precision: str


class CallWatch:
    """Has functions called with the inputs of a transformer, before it runs on them, until `end`.

    Watched are calls of the transformer itself, and otherwise what its parts receive: methods such as
    `forward_features` call the module that embeds the images, and a step may call the blocks by themselves.

    No hook does this: a function may patch the transformer, but by the time that hooks are called torch has looked up
    which `forward` to run, and in a compiled model they are a part of the graph. Nothing is watched while a call runs.

    Args:
        transformer: The Vision Transformer.
        on_call: Called with the images and further arguments of each call.
        on_block: Called with what enters the first block that can reduce, outside a call of the transformer itself.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        on_call: Callable[[FirstCall], None],
        on_block: Callable[[BlockInput], None],
    ) -> None:
        self._transformer, self._on_call, self._on_block = transformer, on_call, on_block
        block = transformer.blocks[transformer.first_prunable_block]
        self._watched: dict[nn.Module, Callable[..., Any]] = {}
        for module, read in (
            (block, self._read_block),
            (transformer.patch_embed, self._read_call),
            (transformer.compiled_root, self._read_call),
        ):
            self._watched[module] = self._watching(module, read)
        self._own: dict[nn.Module, Callable[..., Any] | None] = {}  # of the modules while they are watched
        self._ended = False
        self._begin()

    def end(self) -> None:
        """Ends watching; does nothing the second time."""
        self._ended = True
        self._pause()

    def _begin(self) -> None:
        if self._ended:
            return
        for module, watched in self._watched.items():
            self._own[module] = vars(module).get("_compiled_call_impl")
            vars(module)["_compiled_call_impl"] = watched

    def _pause(self) -> None:
        own, self._own = self._own, {}
        for module, call in own.items():
            if vars(module).get("_compiled_call_impl") is self._watched[module]:
                del vars(module)["_compiled_call_impl"]
                if call is not None:
                    vars(module)["_compiled_call_impl"] = call

    def _watching(
        self, module: nn.Module, read: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None]
    ) -> Callable[..., Any]:
        def watched(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                return (self._own.get(module) or module._call_impl)(*args, **kwargs)
            self._pause()
            try:
                read(module, args, kwargs)
                return module(*args, **kwargs)
            finally:
                self._begin()

        return watched

    def _read_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        outer = self._transformer.outer
        called = outer if module is self._transformer.compiled_root else module
        call = read_call(outer, args, kwargs, called)
        if call is not None:
            self._on_call(call)

    def _read_block(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        tokens = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        if tokens is not None and tokens.ndim == 3:
            found = precision(self._transformer.root, tokens.device)
            self._on_block(BlockInput(tokens.shape[0], tokens.shape[1], found))


class _Reached(BaseException):
    """Ends a `forward` whose inputs of the transformer are known; no `Exception`, which a module may handle."""


def call_in_forward(module: nn.Module, transformer: VisionTransformer, images: Tensor) -> FirstCall | None:
    """What `forward` of a module passes to the transformer in it.

    It runs up to there and no further, without the user's hooks and in evaluation mode.

    Args:
        module: Contains the transformer.
        transformer: The Vision Transformer.
        images: (B, C, H, W) of the batch.

    Returns:
        The call; None where `forward` cannot be called with images alone, or does not call the transformer with images.
    """
    if transformer.outer is module:
        return FirstCall.of(transformer.root, images)
    found: list[FirstCall] = []

    def stop(call: FirstCall) -> None:
        found.append(call)
        raise _Reached

    watch = CallWatch(transformer, stop, lambda _: None)
    try:
        with torch.no_grad(), isolated(module):
            module.forward(images.clone())
    except _Reached:
        pass
    except Exception:  # of the user's code, which its own step may never call like this
        return None
    finally:
        watch.end()
    return found[0] if found else None
