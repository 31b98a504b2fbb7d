"""The base class of runtimes: what executes a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer
from lightning_prune.runtimes.in_place import InPlace, applied_to


class Runtime(ABC):
    """Executes a model, dense or patched. Latencies in different runtimes are never compared or mixed in a profile.

    Runtimes are immutable; two of one name are equal. A package adds one by an entry point of the group
    `lightning_prune.runtimes`, whose name is that of the runtime and whose value is its class.

    Attributes:
        name: The shortest spec from which `parse_runtime` makes it, such as `"torch"` or `"torch.compile:mode=blocks"`.
        compiles: Whether each token count is compiled or converted, which takes seconds, before it runs.
        converts: Whether it runs a converted graph, whose outputs need not be those of PyTorch to the last digit.
    """

    name: str
    compiles: bool = False
    converts: bool = False

    @abstractmethod
    def prepare(self, model: nn.Module, example_inputs: Tensor) -> Callable[[Tensor], Any]:
        """Converts a model for this runtime; the model itself stays as it is.

        Args:
            model: The model, in evaluation mode, dense or patched.
            example_inputs: (B, channels, height, width) images in the size, dtype and on the device that will be used.

        Returns:
            A function of such images; it runs without autograd and returns what the model returns.

        Raises:
            ArgumentError: If the model cannot run here (`unsupported_reason`).
        """

    @abstractmethod
    def context(self) -> dict[str, Any]:
        """What latencies in this runtime depend on besides the model: name, version, threads; plain values."""

    @abstractmethod
    def install(self, transformer: VisionTransformer) -> InPlace | None:
        """Makes the modules that hold the transformer run it in this runtime, in place, until that is undone.

        Args:
            transformer: The Vision Transformer in a user's model; it runs eagerly.

        Returns:
            What undoes it; None if there is nothing to undo, as the model runs eagerly anyway.

        Raises:
            ArgumentError: If the model cannot run here (`unsupported_reason`).
        """

    def limits(self) -> AbstractContextManager[None]:
        """A context in which this runtime runs as many different graphs as profiling needs."""
        return nullcontext()

    def quantized(self) -> "Runtime | None":
        """The same runtime, computing in 8 bits by its own quantizer; None where it has none.

        Raises:
            RuntimeUnavailableError: If the quantizer is not installed; names the extra that installs it.
        """
        return None

    @property
    def unquantized(self) -> "Runtime":
        """The same runtime, computing in floating point."""
        return self

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why a model cannot run in this runtime; None where it can."""
        return None

    @contextmanager
    def applied(self, transformer: VisionTransformer) -> Iterator[None]:
        """A context in which the modules that hold the transformer run it in this runtime, in place.

        It does nothing if this runtime is applied to the transformer already.

        Args:
            transformer: The Vision Transformer in a user's model.

        Raises:
            ArgumentError: As `install`, or if something else is applied to the transformer.
        """
        check_applied(self, transformer)
        installed = None if applied_runtime(transformer) == self else self.install(transformer)
        if installed is None:
            yield
            return
        try:
            with self.limits():
                yield
        finally:
            installed.undo()

    def _check(self, model: nn.Module) -> None:
        reason = self.unsupported_reason(model)
        if reason is not None:
            raise ArgumentError(f"`runtime` must be one that the model can run in, got {self.name!r}: {reason}")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.name!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Runtime) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def runtime_of(model: nn.Module) -> Runtime | None:
    """The runtime that is applied to a model now; None as in `applied_runtime`."""
    return cast(Runtime | None, applied_to(model))


def applied_runtime(transformer: VisionTransformer) -> Runtime | None:
    """The runtime that `Runtime.applied` applies to a transformer now.

    None where the model runs as the user made it: eagerly, or compiled by the user (`is_compiled`) in some mode.
    """
    return runtime_of(transformer.compiled_root)


def check_applied(runtime: Runtime, transformer: VisionTransformer) -> None:
    """Raises ArgumentError if another runtime is applied to a transformer."""
    now = applied_runtime(transformer)
    if now is not None and now != runtime:
        raise ArgumentError(f"`runtime` must be {now.name!r}, which is applied to the model, got {runtime.name!r}.")


def torch_context(name: str) -> dict[str, Any]:
    """What latencies in PyTorch depend on besides the model."""
    return {"runtime": name, "torch": str(torch.__version__), "threads": torch.get_num_threads()}


def without_autograd(model: nn.Module) -> Callable[[Tensor], Any]:
    """A function that runs a model without autograd."""

    def run(images: Tensor) -> Any:
        with torch.no_grad():
            return model(images)

    return run
