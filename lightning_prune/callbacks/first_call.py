"""What the Vision Transformer receives in the first step of a run, as opposed to the images of the batch."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from lightning_prune.patching.models.call_arguments import calling_with
from lightning_prune.profiling.environment import precision

# Arguments that choose what is returned or add a loss: they do not change what the blocks compute.
_OUTPUT_ARGUMENTS = ("labels", "return_dict", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class FirstCall:
    """The inputs of a call of the transformer, or of the module in it that receives the images.

    Attributes:
        images: (B, C, H, W).
        keywords: Further arguments whose values are not the defaults.
        precision: As `lightning_prune.profiling.environment.precision` returns it.
        autocast: The dtype of the autocast that is in force; None without.
        is_repeatable: Whether other images can be passed in the same way: not where a tensor of this batch goes with
            them, or an argument that `forward` of the transformer does not have.
        loaded: (B, C, H, W) images of the batch before the step; None if there are none.
    """

    images: Tensor
    keywords: Mapping[str, Any]
    precision: str
    autocast: torch.dtype | None
    is_repeatable: bool = True
    loaded: Tensor | None = None

    @classmethod
    def of(cls, root: nn.Module, images: Tensor) -> Self:
        """A call with images alone, in the present precision.

        Args:
            root: The transformer.
            images: (B, C, H, W).
        """
        return cls(images, {}, precision(root, images.device), _autocast(images.device.type))

    @property
    def form(self) -> str:
        """Shape, dtype and precision, on which the latency depends, in words."""
        dtype = str(self.images.dtype).removeprefix("torch.")
        return f"images {tuple(self.images.shape)} of {dtype} in {self.precision}"

    @contextmanager
    def in_force(self, root: nn.Module) -> Iterator[None]:
        """A context with the autocast of the call, in which the transformer is given its further arguments.

        Args:
            root: The transformer.
        """
        kind = self.images.device.type
        with ExitStack() as stack:
            stack.enter_context(calling_with(root, self.keywords))
            if _autocast(kind) != self.autocast:
                stack.enter_context(torch.autocast(kind, self.autocast, enabled=self.autocast is not None))
            yield

    def differences(
        self, context: Mapping[str, Any], images: Tensor | None, keywords: Mapping[str, Any] | None = None
    ) -> list[str]:
        """How the call differs from what was measured, as "A instead of B"; empty if it does not.

        Args:
            context: Of the measurement; see `lightning_prune.profiling.measurement_context`.
            images: (B, C, H, W) that were measured; None if only their shape is known.
            keywords: Further arguments of the measurement.
        """
        found = []
        shape = (context.get("batch_size"), *context.get("image_shape", ()))
        if len(shape) == 4 and tuple(self.images.shape) != shape:
            found.append(f"images {tuple(self.images.shape)} instead of {shape}")
        if images is not None and self.images.dtype != images.dtype:
            found.append(f"{self.images.dtype} images instead of {images.dtype}")
        if self.precision != context.get("precision", self.precision):
            found.append(f"precision {self.precision} instead of {context['precision']}")
        if not found and images is not None and self.changes(images):
            found.append("images that the step changed, by a normalisation for example")
        if not _same(self.keywords, keywords or {}):
            named = [f"the arguments {', '.join(each)}" if each else "none" for each in (self.keywords, keywords or {})]
            found.append(f"{named[0]} in addition to the images, instead of {named[1]}")
        return found

    def changes(self, images: Tensor) -> bool:
        """Whether the images are more than rounding away from others of the same shape."""
        loaded = images.to(self.images.device).float()
        return not torch.allclose(self.images.float(), loaded, rtol=0.02, atol=0.02, equal_nan=True)


def read_call(
    root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], called: Any = None
) -> FirstCall | None:
    """The inputs of a call of a module; None if there are no images among them.

    Args:
        root: The transformer.
        args: Positional arguments.
        kwargs: Keyword arguments.
        called: The module that is called; the transformer if None.
    """
    accepted = inspect.signature(root.forward).parameters
    names = list(inspect.signature((called or root).forward).parameters.values())
    by_name = {**{parameter.name: value for parameter, value in zip(names, args, strict=False)}, **kwargs}
    defaults = {parameter.name: parameter.default for parameter in names}
    images = next((name for name, value in by_name.items() if _is_images(value)), None)
    if images is None:
        return None
    keywords = {
        name: value
        for name, value in by_name.items()
        if name not in (images, *_OUTPUT_ARGUMENTS) and not _is_default(value, defaults.get(name))
    }
    passed = by_name[images].detach()
    return FirstCall(
        images=passed,
        keywords=keywords,
        precision=precision(root, passed.device),
        autocast=_autocast(passed.device.type),
        is_repeatable=not any(isinstance(value, Tensor) or name not in accepted for name, value in keywords.items()),
    )


def _autocast(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast that is in force; None without."""
    return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether arguments are the same; tensors never are, since each batch has its own."""
    if one.keys() != other.keys() or any(isinstance(value, Tensor) for value in one.values()):
        return not one and not other
    return all(value is other[name] or bool(value == other[name]) for name, value in one.items())


def _is_default(value: Any, default: Any) -> bool:
    """Whether an argument is left at its default; None and False are the same where that is one of them."""
    return value is default or value is None or (value is False and default is None)


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
