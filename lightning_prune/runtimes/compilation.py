"""Running a Vision Transformer through `torch.compile`, as a whole or block by block, where that pays."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from lightning_prune.errors import ArgumentError

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "blocks"]
"""As `torch.compile` has them; `blocks` compiles each block by itself, which takes a fraction of the time."""

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


def parse_compile_mode(value: object) -> Mode | None:
    """The mode that a user means: True is `"default"`, False is none.

    Raises:
        ArgumentError: If it is neither of the two nor the name of a mode.

    Example:
        >>> from lightning_prune.runtimes.compilation import parse_compile_mode
        >>> parse_compile_mode(True), parse_compile_mode(False), parse_compile_mode("blocks")
        ('default', None, 'blocks')
    """
    if isinstance(value, bool) or value is None:
        return "default" if value else None
    for mode in get_args(Mode):
        if value == mode:
            return mode
    raise ArgumentError(f"`compile` must be True, False or one of {', '.join(get_args(Mode))}; got {value!r}.")


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs compiled graphs, of the whole of it or of a part."""
    return any(hasattr(m, "_orig_mod") or _compiled_call(m) is not None for m in model.modules())


class Compiled:
    """Compiles in place until it is undone: modules, parameters and names stay what they are.

    Every shape gets a graph of its own, as what is deployed would have; graphs that symbols stand in for shapes in are
    slower.

    Args:
        root: The model.
        mode: How.
        blocks: Its blocks, for `"blocks"`.

    Raises:
        ArgumentError: If the model is compiled already.
    """

    def __init__(self, root: nn.Module, mode: Mode, blocks: list[nn.Module] | None = None) -> None:
        if is_compiled(root):
            raise ArgumentError(f"The model is compiled already; leave out `compile`, got {mode!r}.")
        self._modules = (blocks or []) if mode == "blocks" else [root]
        for module in self._modules:
            module.compile(mode=None if mode in ("default", "blocks") else mode, dynamic=False)
        if mode in _WITH_CUDA_GRAPHS:
            vars(root)["_compiled_call_impl"] = _outliving(vars(root)["_compiled_call_impl"])

    def undo(self) -> None:
        """Makes the model run eagerly again; compiled graphs stay in torch's cache."""
        for module in self._modules:
            vars(module).pop("_compiled_call_impl", None)


def force_eager() -> AbstractContextManager[Any]:
    """A context in which nothing is compiled and nothing compiled is run: for a batch that comes once."""
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """A context in which a model that was compiled in place is as it was before."""
    compiled = [(module, vars(module).pop("_compiled_call_impl", None)) for module in model.modules()]
    try:
        yield
    finally:
        for module, call in compiled:
            if call is not None:
                vars(module)["_compiled_call_impl"] = call


@contextmanager
def raised_recompile_limit() -> Iterator[None]:
    """A context in which as many graphs may be compiled as profiling needs; beyond its limit torch falls to eager."""
    from torch._dynamo import config

    with config.patch(cache_size_limit=256, accumulated_cache_size_limit=1024):  # their names since torch 2.1
        yield


def _compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    found: Callable[..., Any] | None = getattr(module, "_compiled_call_impl", None)
    return found


def _outliving(call: Callable[..., Any]) -> Callable[..., Any]:
    """With outputs that outlive the next run: a CUDA graph writes them to the same memory each time."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, call(*args, **kwargs))

    vars(run)["compiled_call"] = call  # of which the mode can be read
    return run
