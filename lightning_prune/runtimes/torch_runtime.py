"""PyTorch itself as a runtime: eagerly, or through `torch.compile`, as a whole or block by block."""

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Literal, get_args
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from lightning_prune._utils.trees import tree_map
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.runtimes.base import Runtime

Mode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs", "blocks"]
"""As `torch.compile` has them; `blocks` compiles each block by itself, which takes a fraction of the time."""

_WITH_CUDA_GRAPHS = ("reduce-overhead", "max-autotune")
# Not an attribute of the module: copies and pickles of a compiled model are not compiled.
_compiled: "WeakKeyDictionary[nn.Module, Runtime]" = WeakKeyDictionary()


def is_compiled(model: nn.Module) -> bool:
    """Whether calling the model runs compiled graphs, of the whole of it or of a part."""
    return any(map(is_compiled_itself, model.modules()))


def is_compiled_itself(module: nn.Module) -> bool:
    """Whether this very module, and not only a part of it, is compiled in place or is the wrapper of a compiled one."""
    return hasattr(module, "_orig_mod") or _compiled_call(module) is not None


def applied_runtime(transformer: VisionTransformer) -> Runtime | None:
    """The runtime that `Runtime.applied` applies to a transformer now.

    None where the model runs as the user made it: eagerly, or compiled by the user (`is_compiled`) in some mode.
    """
    return runtime_of(transformer.compiled_root)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime that `Compiled` or `Runtime.applied` applies to a model now; None as in `applied_runtime`."""
    return _compiled.get(model)


class Compiled:
    """Compiles in place until it is undone: modules, parameters and names stay what they are.

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
        self._modules = (blocks or []) if mode == "blocks" else [root]
        for module in self._modules:
            module.compile(mode=None if mode in ("default", "blocks") else mode, dynamic=False)
        if mode in _WITH_CUDA_GRAPHS:
            vars(root)["_compiled_call_impl"] = _copying_outputs(vars(root)["_compiled_call_impl"])
        self._root, self._runtime = root, TorchCompile(mode)
        self._calls: list[Callable[..., Any]] = []  # of the modules, while the model runs eagerly
        _compiled[root] = self._runtime

    def suspend(self) -> None:
        """Makes the model run eagerly until `resume`."""
        _compiled.pop(self._root, None)
        self._calls = [vars(module).pop("_compiled_call_impl") for module in self._modules]

    def resume(self) -> None:
        """Makes the model run compiled again, by the same graphs."""
        for module, call in zip(self._modules, self._calls, strict=True):
            vars(module)["_compiled_call_impl"] = call
        _compiled[self._root] = self._runtime

    def undo(self) -> None:
        """Makes the model run eagerly again; compiled graphs stay in torch's cache."""
        _compiled.pop(self._root, None)
        for module in self._modules:
            vars(module).pop("_compiled_call_impl", None)


def force_eager() -> AbstractContextManager[Any]:
    """A context in which nothing is compiled and nothing compiled is run: for a batch shape that comes only once."""
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
        return _without_autograd(model)

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return _torch_context(self.name)

    @contextmanager
    def applied(self, transformer: VisionTransformer) -> Iterator[None]:
        """See `Runtime.applied`; there is nothing to do."""
        _check_applied(self, transformer)
        yield


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
        return _without_autograd(shared)

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return _torch_context(self.name)

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        return "the model is compiled already." if is_compiled(model) else None

    def compiled(self, transformer: VisionTransformer) -> Compiled:
        """Compiles a transformer in place, until that is undone.

        Args:
            transformer: It runs eagerly.

        Raises:
            ArgumentError: If the model is compiled already.
        """
        root = transformer.compiled_root
        self._check(root)
        return Compiled(root, self.mode, list(transformer.blocks))

    @contextmanager
    def applied(self, transformer: VisionTransformer) -> Iterator[None]:
        """See `Runtime.applied`; compiles in place and undoes it."""
        _check_applied(self, transformer)
        if applied_runtime(transformer) == self:
            yield
            return
        compiled = self.compiled(transformer)
        try:
            with raised_recompile_limit():
                yield
        finally:
            compiled.undo()


class RuntimeSwitch:
    """Makes a transformer run in one runtime after another, in place; what each has compiled is kept until `off`.

    Args:
        transformer: The Vision Transformer in a user's model.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        self._transformer = transformer
        self._known: dict[Runtime, Compiled] = {}
        self._current: Compiled | None = None
        self._limit = ExitStack()

    def to(self, runtime: Runtime) -> None:
        """Makes the transformer run in a runtime; nothing changes where it is applied already.

        Raises:
            ArgumentError: As `Runtime.applied`.
        """
        if applied_runtime(self._transformer) == runtime:
            return
        if self._current is None:
            _check_applied(runtime, self._transformer)
        if not isinstance(runtime, TorchEager | TorchCompile):
            runtime.applied(self._transformer)  # says why it cannot be
            return
        self._suspend()
        if isinstance(runtime, TorchCompile):
            if runtime in self._known:
                self._known[runtime].resume()
            else:
                if not self._known:
                    self._limit.enter_context(raised_recompile_limit())
                self._known[runtime] = runtime.compiled(self._transformer)
            self._current = self._known[runtime]

    def off(self) -> None:
        """Makes the transformer run as it did at first."""
        self._suspend()
        self._known.clear()
        self._limit.close()

    def _suspend(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.suspend()


def _check_applied(runtime: Runtime, transformer: VisionTransformer) -> None:
    now = applied_runtime(transformer)
    if now is not None and now != runtime:
        raise ArgumentError(f"`runtime` must be {now.name!r}, which is applied to the model, got {runtime.name!r}.")


def _torch_context(name: str) -> dict[str, Any]:
    return {"runtime": name, "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def _without_autograd(model: nn.Module) -> Callable[[Tensor], Any]:
    def run(images: Tensor) -> Any:
        with torch.no_grad():
            return model(images)

    return run


def _compiled_call(module: nn.Module) -> Callable[..., Any] | None:
    call: Callable[..., Any] | None = getattr(module, "_compiled_call_impl", None)
    return call


def _copying_outputs(call: Callable[..., Any]) -> Callable[..., Any]:
    """Copies the outputs: a CUDA graph writes them to the same memory at each run."""

    def run(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return tree_map(lambda each: each.clone() if isinstance(each, Tensor) else each, call(*args, **kwargs))

    return run
