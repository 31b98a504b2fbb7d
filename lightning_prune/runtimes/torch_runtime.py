"""PyTorch itself as a runtime: eagerly, or through `torch.compile`, as a whole or block by block."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune._utils.trees import tree_map
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.runtimes.base import Runtime, torch_context, without_autograd
from lightning_prune.runtimes.in_place import InPlace, is_compiled

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "blocks"]
"""As `torch.compile` has them; `blocks` compiles each block by itself, which takes a fraction of the time."""

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class Compiled(InPlace):
    """Compiles in place until it is undone; compiled graphs stay in torch's cache.

    Compiles with `dynamic=False`: one graph for each shape, as in deployment; graphs for symbolic shapes are slower.

    Args:
        root: The model.
        mode: How.
        blocks: Its blocks, for `"blocks"`.

    Raises:
        ArgumentError: If the model is compiled already.
    """

    def __init__(self, root: nn.Module, mode: Mode, blocks: list[nn.Module] | None = None) -> None:
        if is_compiled(root):
            raise ArgumentError(f"`mode` must be left out for a model that is compiled already, got {mode!r}.")
        modules = (blocks or []) if mode == "blocks" else [root]
        for module in modules:
            module.compile(mode=None if mode in ("default", "blocks") else mode, dynamic=False)
        if mode in _WITH_CUDA_GRAPHS:
            vars(root)["_compiled_call_impl"] = _copying_outputs(vars(root)["_compiled_call_impl"])
        super().__init__(root, modules, TorchCompile(mode))


@contextmanager
def raised_recompile_limit() -> Iterator[None]:
    """A context in which torch compiles as many graphs as profiling needs; beyond its limit it runs eagerly."""
    from torch._dynamo import config  # the only use of it: torch has no public way to raise the limits for a while

    with config.patch(recompile_limit=256, accumulated_recompile_limit=1024):
        yield


class TorchEager(Runtime):
    """PyTorch, running the model as it is; a module that the user compiled runs compiled.

    Example:
        >>> import torch
        >>> from lightning_prune.runtimes import parse_runtime
        >>> run = parse_runtime("torch").prepare(torch.nn.Identity(), torch.zeros(1, 3, 8, 8))
        >>> run(torch.ones(1, 3, 8, 8)).sum()
        tensor(192.)
    """

    name = "torch"

    def prepare(self, model: nn.Module, example_inputs: Tensor) -> Callable[[Tensor], Any]:
        """See `Runtime.prepare`."""
        self._check(model)
        return without_autograd(model)

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return torch_context(self.name)

    def install(self, transformer: VisionTransformer) -> None:
        """See `Runtime.install`; there is nothing to install."""


class TorchCompile(Runtime):
    """PyTorch through `torch.compile`, with one graph for each shape.

    Args:
        mode: As of `torch.compile`, or `"blocks"`: each block by itself, which takes a fraction of the time.

    Raises:
        ArgumentError: If there is no such mode.

    Example:
        >>> from lightning_prune.runtimes import TorchCompile
        >>> TorchCompile(), TorchCompile("blocks")
        (TorchCompile('torch.compile'), TorchCompile('torch.compile:mode=blocks'))
    """

    compiles = True

    def __init__(self, mode: Mode = "default") -> None:
        if mode not in get_args(Mode):
            raise ArgumentError(f"`mode` must be one of {', '.join(get_args(Mode))}, got {mode!r}.")
        self.mode = mode
        self.name = "torch.compile" if mode == "default" else f"torch.compile:mode={mode}"

    def prepare(self, model: nn.Module, example_inputs: Tensor) -> Callable[[Tensor], Any]:
        """See `Runtime.prepare`. The compiled model is a copy that shares parameters and buffers."""
        self._check(model)
        tensors = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
        shared = copy.deepcopy(model, tensors)
        blocks = list(find_vision_transformer(shared).blocks) if self.mode == "blocks" else None
        Compiled(shared, self.mode, blocks)
        return without_autograd(shared)

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return torch_context(self.name)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        return "the model is compiled already." if is_compiled(model) else None

    def install(self, transformer: VisionTransformer) -> Compiled:
        """See `Runtime.install`; compiles in place."""
        root = transformer.compiled_root
        self._check(root)
        return Compiled(root, self.mode, list(transformer.blocks))

    def limits(self) -> AbstractContextManager[None]:
        """See `Runtime.limits`."""
        return raised_recompile_limit()


def _copying_outputs(call: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the outputs: a CUDA graph writes them to the same memory at each run."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, call(*args, **kwargs))

    return run
