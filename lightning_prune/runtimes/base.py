"""The base class of runtimes: what executes a model."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer


class Runtime(ABC):
    """Executes a model, dense or patched. Latencies in different runtimes are never compared or mixed in a profile.

    Runtimes are immutable; two of one name are equal.

    Attributes:
        name: The shortest spec from which `parse_runtime` makes it, such as `"torch"` or `"torch.compile:mode=blocks"`.
        compiles: Whether each token count is compiled, which takes seconds, before it runs.
    """

    name: str
    compiles: bool = False

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

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """Why a model cannot run in this runtime; None where it can."""
        return None

    def applied(self, transformer: VisionTransformer) -> AbstractContextManager[None]:
        """A context in which the modules that hold the transformer run it in this runtime, in place.

        It does nothing if this runtime is applied to the transformer already.

        Args:
            transformer: The Vision Transformer in a user's model.

        Raises:
            ArgumentError: If the runtime runs converted models only, or something else is applied to the transformer.
        """
        raise ArgumentError(f"`runtime` must be one that runs a torch module in place, got {self.name!r}.")

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
