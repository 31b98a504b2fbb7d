"""What the Vision Transformer receives in the first step of a run, as opposed to the images of the batch."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_prune.callbacks.batches import Calibration
from lightning_prune.patching import VisionTransformer
from lightning_prune.profiling.environment import precision

# Arguments that choose what is returned or add a loss: they do not change what the blocks compute.
_OUTPUT_ARGUMENTS = ("labels", "return_dict", "output_attentions", "output_hidden_states")


@dataclass(frozen=True)
class FirstCall:
    """The inputs of a call of the transformer, and the precision that is in force.

    Attributes:
        images: (B, C, H, W), a copy.
        keywords: Further arguments whose values are not the defaults.
        precision: As `lightning_prune.profiling.environment.precision` returns it.
        loaded: (B, C, H, W) images of the batch before the step; None if there are none.
    """

    images: Tensor
    keywords: Mapping[str, Any]
    precision: str
    loaded: Tensor | None = None

    @property
    def is_repeatable(self) -> bool:
        """Whether other images can be passed in the same way; not where a tensor of this batch goes with them."""
        return not any(isinstance(value, Tensor) for value in self.keywords.values())

    def _changes(self, images: Tensor) -> bool:
        loaded = images.to(self.images.device).float()
        return not torch.allclose(self.images.float(), loaded, rtol=0.02, atol=0.02, equal_nan=True)

    def differences(self, context: Mapping[str, Any], images: Tensor | None) -> list[str]:
        """How the call differs from what was measured, as "A instead of B"; empty if it does not.

        Args:
            context: Of the measurement; see `lightning_prune.profiling.measurement_context`.
            images: (B, C, H, W) that were measured; None if only their shape is known.
        """
        found = []
        shape = (context.get("batch_size"), *context.get("image_shape", ()))
        if len(shape) == 4 and tuple(self.images.shape) != shape:
            found.append(f"images {tuple(self.images.shape)} instead of {shape}")
        if images is not None and self.images.dtype != images.dtype:
            found.append(f"{self.images.dtype} images instead of {images.dtype}")
        if self.precision != context.get("precision", self.precision):
            found.append(f"precision {self.precision} instead of {context['precision']}")
        if not found and images is not None and self._changes(images):
            found.append("images that the step changed, by a normalisation for example")
        if self.keywords:
            found.append(f"the arguments {', '.join(self.keywords)} in addition to the images")
        return found


def read_call(root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> FirstCall | None:
    """The inputs of a call of a module; None if there are no images among them.

    Args:
        root: The transformer.
        args: Its positional arguments.
        kwargs: Its keyword arguments.
    """
    names = list(inspect.signature(root.forward).parameters.values())
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
    copy = by_name[images].detach().clone()
    return FirstCall(copy, keywords, precision(root, copy.device))


def watch_first_call(transformer: VisionTransformer, receive: Callable[[FirstCall], None]) -> Callable[[], None]:
    """Calls a function with the inputs of the next call of a transformer, before that call runs.

    No hook does this: `receive` may patch the transformer, but by the time that hooks are called torch has looked up
    which `forward` to run, and in a compiled model they are a part of the graph. Nothing is received if only methods of
    the module are called, such as `forward_features`.

    Args:
        transformer: The Vision Transformer.
        receive: Called once, in the context of the call.

    Returns:
        A function that ends watching; it does nothing after the first call.
    """
    called = transformer.compiled_root
    attributes = vars(called)
    own = attributes.get("_compiled_call_impl")

    def end() -> None:
        if attributes.get("_compiled_call_impl") is watched:
            attributes.pop("_compiled_call_impl")
            if own is not None:
                attributes["_compiled_call_impl"] = own

    def watched(*args: Any, **kwargs: Any) -> Any:
        end()
        call = read_call(transformer.root, args, kwargs)
        if call is not None:
            receive(call)
        return called(*args, **kwargs)

    attributes["_compiled_call_impl"] = watched
    return end


def as_passed(sampled: Calibration, loaded: Tensor, passed: Tensor) -> Calibration:
    """Calibration images as the step passes images to the transformer; those of the first batch if that is not known.

    Args:
        sampled: Images as the loader yields them.
        loaded: (B, C, H, W) images of the first batch.
        passed: The same images as the step passed them.
    """
    if sampled.images.shape[1:] == passed.shape[1:] and loaded.shape == passed.shape:
        found = channelwise_affine(loaded.to(passed.device), passed)
        if found is not None:
            scale, shift = found
            return sampled._replace(images=sampled.images * scale.cpu() + shift.cpu())
    source = "the first batch as the step passed it, since the step changes the images"
    return Calibration(passed.cpu(), None, source, sampled.targets)


def channelwise_affine(loaded: Tensor, passed: Tensor) -> tuple[Tensor, Tensor] | None:
    """Scale and shift (1, C, 1, 1) of each channel that turn images into others, as a normalisation does.

    Args:
        loaded: (B, C, H, W) images.
        passed: (B, C, H, W) images.

    Returns:
        The least-squares solution; None if it does not reproduce `passed` to within 2% of its spread.
    """
    x, y = loaded.float(), passed.float()
    over = (0, 2, 3)
    x_mean, y_mean = x.mean(over, keepdim=True), y.mean(over, keepdim=True)
    covariance = ((x - x_mean) * (y - y_mean)).mean(over, keepdim=True)
    scale = covariance / (x - x_mean).square().mean(over, keepdim=True).clamp_min(1e-12)
    shift = y_mean - scale * x_mean
    error = (scale * x + shift - y).abs().amax()
    return (scale, shift) if error <= 0.02 * y.std() else None


def _is_default(value: Any, default: Any) -> bool:
    """Whether an argument is left at its default; None and False are the same where that is one of them."""
    return value is default or value is None or (value is False and default is None)


def _is_images(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 4 and value.is_floating_point()
