"""Runtimes that run a converted graph of a model instead of the model itself."""

import inspect
import warnings
from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lightning_prune._utils.isolation import hooks_read, isolated, user_hooks
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.patching import VisionTransformer
from lightning_prune.patching.class_swap import patch_generation
from lightning_prune.patching.patched_block import patch_key
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.calibration import calibration_key
from lightning_prune.runtimes.graph_export import ExportedGraph, export_graph
from lightning_prune.runtimes.graph_store import Converted, RunGraph, store_of, version_of
from lightning_prune.runtimes.in_place import InPlace, force_eager, is_compiled, is_forced_eager

LOW_PRECISION_TOLERANCE = 0.1
"""The tolerance of a runtime that may compute in 16 bits."""


class ConvertedRuntime(Runtime):
    """Base class of runtimes that export a model and run the graph, one for each shape and schedule.

    Applied in place, the model is exported at the first call after each change of its patch, of its weights or of the
    shape of the images, which takes seconds, and later calls run what was exported.
    """

    compiles = True
    converts = True
    tolerance: float | None = 0.01
    """Relative error of an image from which on the first graph counts as wrong; None in 8 bits, where none can tell."""

    weight_dtypes: tuple[torch.dtype, ...] = ()
    """The floating-point types of weights that it takes; empty for all."""

    @abstractmethod
    def load(self, graph: ExportedGraph) -> RunGraph:
        """Converts a graph with static shapes, and loads it.

        Args:
            graph: Of a model.

        Returns:
            A function of the inputs of the graph; it returns the tensors that the graph returns.

        Raises:
            ExportError: If the graph cannot be converted; names the operator where that is known.
        """

    def load_counts(self, graph: ExportedGraph) -> Callable[[int], RunGraph]:
        """Converts a graph with one dynamic dimension, `graph_sessions.TOKENS`, once for all its sizes.

        Runtimes whose graph for one size is another than that for all sizes leave it as it is here, so that each count
        is converted by itself.

        Args:
            graph: As `lightning_prune.runtimes.token_curve.export_token_curve` makes it.

        Returns:
            A function of the size of that dimension, which loads the graph with this size as a static one.

        Raises:
            ExportError: As `load`, or if the runtime converts each count by itself.
        """
        raise ExportError(f"{self.name} converts each token count by itself.")

    def prepare(self, model: nn.Module, example_inputs: Tensor) -> Callable[[Tensor], Any]:
        """See `Runtime.prepare`. The weights are copied."""
        self._check(model)
        graph = export_graph(model, (example_inputs,))
        run = self.load(graph)
        return lambda images: graph.unflatten(run(images))

    def install(self, transformer: VisionTransformer) -> InPlace:
        """See `Runtime.install`."""
        root = transformer.compiled_root
        self._check(root)
        hooks = user_hooks(root)
        if hooks:
            names = ", ".join(sorted({getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks}))
            said = "they are no part of a converted graph."
            if transformer.restore is not None:  # then they are, for the model's own forward
                said = "what they read while it is converted is for its own forward, not for code after it."
            warnings.warn(
                f"The {len(hooks)} forward hooks on the Vision Transformer ({names}) are not called while "
                f"{self.name!r} runs it: {said}",
                stacklevel=2,
            )
        return _ConvertedCalls(self, root, transformer.restore is not None)

    def save(self, graph: ExportedGraph, folder: Path, name: str, counts: bool = False) -> list[str]:
        """Writes a graph as this runtime runs it, for a device without PyTorch.

        Args:
            graph: With static shapes, or as `load_counts` takes it.
            folder: Where to write.
            name: Of the files, without suffix.
            counts: Whether it has the dynamic dimension of `load_counts`.

        Returns:
            The names of the files; the first is the one that is loaded.

        Raises:
            ArgumentError: If this runtime has no files for that.
            ExportError: As `load`.
            FileWriteError: If a file cannot be written.
        """
        raise ArgumentError(f"`runtime` must be one whose graphs can be written to files, got {self.name!r}.")

    def device_settings(self) -> dict[str, Any]:
        """How to run the files of `save`, for `lightning_prune.exporting.bundle_profile`; plain values."""
        raise ArgumentError(f"`runtime` must be one whose graphs can be written to files, got {self.name!r}.")

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        wrong = {weight.dtype for weight in model.parameters() if weight.is_floating_point()} - {*self.weight_dtypes}
        if self.weight_dtypes and wrong:
            taken = " or ".join(str(each).removeprefix("torch.") for each in self.weight_dtypes)
            return f"the weights are {min(map(str, wrong))}; it takes models in {taken}."
        if is_compiled(model):
            return "the model is compiled already."
        if not all(map(is_plain, model.parameters())):
            return "its weights are quantized, or otherwise no plain tensors."
        return None

    @staticmethod
    def _spec(name: str, **settings: tuple[object, object]) -> str:
        """The shortest spec, from setting -> (value, default)."""
        differing = [f"{key}={value}" for key, (value, default) in settings.items() if value != default]
        return f"{name}:{','.join(differing)}" if differing else name


class _ConvertedCalls(InPlace):
    """Calls of a model that run converted graphs of it.

    Args:
        runtime: Converts and runs.
        root: The model.
        has_readers: Whether tokens are given back to those who read them, as hooks may.
    """

    def __init__(self, runtime: ConvertedRuntime, root: nn.Module, has_readers: bool) -> None:
        self._has_readers = has_readers
        self._converter, self._graphs = runtime, store_of(root, runtime.name)
        self._last: tuple[Hashable, Converted] | None = None
        self._names = list(inspect.signature(root.forward).parameters)
        self._tensors: list[Tensor] = []
        self._hooks: list[Callable[..., Any]] = []  # kept, so that no other gets the id of one
        self._is_checked = False
        vars(root)["_compiled_call_impl"] = self._call
        super().__init__(root, [root], runtime)

    def resume(self) -> None:
        """See `InPlace.resume`; the weights may have changed meanwhile."""
        self._last = None
        super().resume()

    def undo(self) -> None:
        """See `InPlace.undo`; frees the graphs, except in `keeping_graphs`."""
        super().undo()
        self._graphs = store_of(self._root, self._converter.name)
        self._last = None

    def _call(self, *args: Any, **keywords: Any) -> Any:
        if is_forced_eager():
            call: Callable[..., Any] = self._root._call_impl
            return call(*args, **keywords)
        keywords = {**dict(zip(self._names, args, strict=False)), **keywords}
        images = keywords.pop(self._names[0], None)
        if not isinstance(images, Tensor):
            name = f"`{self._names[0]}` must be the images with the runtime {self._converter.name!r}"
            raise ArgumentError(f"{name}, got {type(images).__name__}.")
        # What is compared at every call takes microseconds; a parameter that was replaced, and not changed in place,
        # is seen when something else differs.
        state = self._root.training, torch.is_autocast_enabled(images.device.type), *map(version_of, self._tensors)
        hooks = RemovableHandle.next_id if self._has_readers else 0  # which changes where any is registered
        key = patch_generation(), hooks, images.shape, images.dtype, images.device, tuple(keywords.items()), state
        if self._last is None or self._last[0] != key:
            found = self._graph(images, keywords)
            state = *state[:2], *map(version_of, self._tensors)
            self._last = (*key[:-1], state), found
        graph, run = self._last[1]
        return graph.unflatten(run(images.detach()))

    def _graph(self, images: Tensor, keywords: Mapping[str, Any]) -> Converted:
        """The graph of the model as it is now, converted where that has not been done."""
        self._check_call(images, keywords)
        self._tensors = [*self._root.parameters(), *self._root.buffers()]
        self._graphs.take_weights(self._tensors)

        def convert() -> Converted:
            with hooks_read(self._has_readers):
                graph = export_graph(self._root, (images.detach(),), keywords)
                run = self._converter.load(graph)
                is_exact = self._converter.tolerance is not None and images.dtype == torch.float32
                if is_exact and not self._is_checked:
                    self._check_outputs(graph, run, images.detach(), keywords)
            return graph, run

        shape = images.shape, images.dtype, images.device
        self._hooks = user_hooks(self._root) if self._has_readers else []
        key = (
            patch_key(self._root),
            tuple(map(id, self._hooks)),
            shape,
            repr(sorted(keywords.items())),
            calibration_key(),
        )
        return self._graphs.get(key, convert)

    def _check_outputs(self, graph: ExportedGraph, run: RunGraph, images: Tensor, keywords: Mapping[str, Any]) -> None:
        """Compares the first graph with PyTorch: what is fast and wrong must not be planned with, or validated.

        A patched model may decide between tokens of equal score in another way, so there it is a warning.
        """
        limit = self._converter.tolerance
        assert limit is not None
        with torch.no_grad(), isolated(self._root), force_eager():
            expected = tree_leaves(self._root(images, **keywords))
        pairs = zip(expected, tree_leaves(graph.unflatten(run(images))), strict=True)
        errors = [relative_errors(one, other) for one, other in pairs if isinstance(one, Tensor) and one.ndim > 1]
        wrong = next((each for each in errors if bool((each > limit).all())), None)
        if wrong is not None:
            text = (
                f"{self._converter.name!r} computes something else than PyTorch for all of the {len(images)} images: "
                f"the relative error is at least {float(wrong.min()):.2g}."
            )
            if not patch_key(self._root):
                raise ExportError(f"{text} Use another runtime for this model.")
            warnings.warn(text, stacklevel=2)
        self._is_checked = True

    def _check_call(self, images: Tensor, keywords: Mapping[str, Any]) -> None:
        name = self._converter.name
        if not all(map(is_plain, self._root.parameters())):
            raise ArgumentError(f"The weights must be plain tensors with the runtime {name!r}, got quantized ones.")
        if torch.is_autocast_enabled(images.device.type):
            raise ArgumentError(f"`precision` must be '32-true' with the runtime {name!r}, got autocast.")
        if self._root.training:
            raise ArgumentError(f"The model must be in evaluation mode with the runtime {name!r}, got training mode.")
        tensors = [key for key, value in keywords.items() if isinstance(value, Tensor)]
        if tensors:
            raise ArgumentError(
                f"The model must be called with images alone with the runtime {name!r}, got the tensor `{tensors[0]}`."
            )


def relative_errors(expected: Tensor, found: Tensor) -> Tensor:
    """The relative error of each image, max |found - expected| / max |expected|, (B,), of outputs (B, ...)."""
    expected, found = expected.double().flatten(1), found.double().flatten(1)
    return (found - expected).abs().amax(1) / expected.abs().amax(1).clamp_min(1e-6)


def not_float32(model: nn.Module) -> str | None:
    """Why a quantizer does not take the weights of a model; None where it does."""
    wrong = {str(t.dtype) for t in model.parameters() if t.is_floating_point() and t.dtype != torch.float32}
    return f"the weights are {min(wrong)}; its quantizer takes models in float32." if wrong else None


def is_plain(parameter: Tensor) -> bool:
    """Whether it is a tensor of numbers, and no subclass such as a quantized one."""
    return type(parameter) in (Tensor, nn.Parameter)
