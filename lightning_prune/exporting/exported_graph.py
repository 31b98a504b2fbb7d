"""What is exported: a copy of a model, dense or patched, that takes float32 images and returns one tensor."""

import copy
from contextlib import nullcontext
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.isolation import isolated, user_hooks
from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.exporting.export_report import GraphForm
from lightning_prune.exporting.formats import BATCH
from lightning_prune.exporting.image_input import ImageInput
from lightning_prune.exporting.precision import dtype_of
from lightning_prune.patching import VisionTransformer, find_vision_transformer, unpatch
from lightning_prune.patching.api import make_handle
from lightning_prune.patching.compatibility import check_depth
from lightning_prune.patching.input_resize import InputResize, image_size_of, resize_of
from lightning_prune.patching.patched_block import BlockPatch, reducing_patches
from lightning_prune.patching.patched_root import restore_mode, tail_of
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.reduction.portable import portable_graph
from lightning_prune.reduction.registry import spec_of
from lightning_prune.runtimes.base import applied_runtime
from lightning_prune.runtimes.converted import is_plain
from lightning_prune.runtimes.graph_export import ExportedGraph, export_graph
from lightning_prune.schedule import MethodSpec, Schedule, ScheduleLike, read_schedule

BatchSize = Literal["static", "dynamic"]


class AppliedPatch(NamedTuple):
    """How a model is patched.

    Attributes:
        method: Name of the method, with settings; `"mixed"` for several; None for a dense model.
        schedule: In tokens; None for a dense model, and where the images decide.
        tokens: Tokens that leave each block; None as for `schedule`.
        tail: Whether it runs with the exact tail.
    """

    method: str | None = None
    schedule: Schedule | None = None
    tokens: tuple[int, ...] | None = None
    tail: bool = False

    @property
    def is_dense(self) -> bool:
        """Whether the model runs as it does without a patch."""
        return self.method is None and not self.tail


class ExportedCopy(nn.Module):
    """A copy of a model that takes images and returns its logits or features in float32.

    Args:
        model: Contains one Vision Transformer; in evaluation mode, on the CPU.
        module_path: Dotted path of the transformer in it.
        dtype: What it computes in.
        normalise: What makes normalised float32 images of those that it takes; None where it takes these.
    """

    def __init__(
        self,
        model: nn.Module,
        module_path: str | None,
        dtype: torch.dtype = torch.float32,
        normalise: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.model, self.module_path, self.dtype, self.normalise = model, module_path, dtype, normalise
        self.eval()

    @property
    def transformer(self) -> VisionTransformer:
        """The Vision Transformer in it."""
        return find_vision_transformer(self.model, self.module_path, restore_mode(self.model))

    def forward(self, images: Tensor) -> Tensor:
        """Runs the model on (B, C, H, W) images; returns (B, ...)."""
        images = images if self.normalise is None else self.normalise(images)
        output = self.model(images.to(self.dtype))
        if not isinstance(output, Tensor):
            transformer = self.transformer
            if transformer.root is not self.model or transformer.reader is not None:
                raise ArgumentError(
                    f"`model` must return a tensor to be exported, got {type(output).__name__}. Export the Vision "
                    "Transformer in it, or a module around it that returns the tensor."
                )
            output = transformer.adapter.output(output)
        return output.float()

    def converted(self, precision: str, images: ImageInput) -> "ExportedCopy":
        """The same with the weights of a precision, for the images that the exported model takes."""
        dtype = dtype_of(precision)
        model = self.model if dtype == self.dtype else _copy(self.model, dtype)
        return ExportedCopy(model, self.module_path, dtype, images.module())

    def patch(self, images: Tensor) -> AppliedPatch:
        """How it is patched, for (B, C, H, W) images."""
        transformer = self.transformer
        patches, tail = reducing_patches(transformer), self._runs_tail(transformer, images)
        for patch in patches.values():
            if patch.is_adaptive and patch.reduction is not None:
                return AppliedPatch(str(spec_of(patch.reduction)), tail=tail)
        count = transformer.count_tokens(images)
        resize = resize_of(transformer.root)
        scaled = 0 if resize is None else resize.removes_of(image_size_of(images))  # before the tokens were counted
        entering = count + scaled
        removed: list[int] = []
        methods: list[MethodSpec | None] = []
        for index in range(transformer.depth):
            found = patches.get(index)
            removed.append(found.removes(count) if isinstance(found, BlockPatch) else 0 if found is None else scaled)
            reduction = None if found is None else found.reduction
            methods.append(spec_of(reduction) if reduction is not None and removed[-1] else None)
            count -= 0 if isinstance(found, InputResize) else removed[-1]
        if not any(removed):
            return AppliedPatch(tail=tail)
        schedule = Schedule(removed, methods)
        method = str(schedule.method) if isinstance(schedule.method, MethodSpec) else "mixed"
        return AppliedPatch(method, schedule, schedule.tokens(entering), tail)

    def _runs_tail(self, transformer: VisionTransformer, images: Tensor) -> bool:
        """Whether the exact tail is in force; the model in which the transformer is may ask it for all tokens."""
        tail = tail_of(transformer.root)
        if tail is None:
            return False
        tail.ran = None
        with torch.no_grad(), isolated(self):
            self(images)
        return bool(tail.ran)


def exported_copy(
    model: nn.Module, plan: ScheduleLike | None, module_path: str | None, restore: RestoreMode | None = None
) -> ExportedCopy:
    """A copy of a model in float32, patched as the model is or by a plan; it shares the weights that it can.

    Args:
        model: As of `lightning_prune.export`.
        plan: As of `lightning_prune.export`.
        module_path: As of `lightning_prune.export`.
        restore: As of `lightning_prune.export`.

    Raises:
        ArgumentError: If the model is patched and a plan or `restore` is given, the plan names no method, or the model
            is quantized.
        FileFormatError: If the plan is a file that cannot be read.
        ScheduleError, UnsupportedModelError: As `lightning_prune.patch`.
    """
    transformer = find_vision_transformer(model, module_path, restore or restore_mode(model))
    _refuse_quantized(model, transformer)
    if transformer.restore is not None:
        _refuse_foreign_hooks(model)
    if reducing_patches(transformer):
        for name, value in (("plan", plan), ("restore", restore)):
            if value is not None:
                way = "left out for a patched model, which is exported as it is patched"
                raise ArgumentError(f"`{name}` must be {way}.")
    schedule = None if plan is None else read_schedule(plan, "plan")
    copied = ExportedCopy(_copy(model, torch.float32), module_path)
    if schedule is not None:
        if isinstance(schedule, int | float) or (schedule.method is None and schedule.reducing):
            raise ArgumentError(f"`plan` must be a Plan, or a schedule that names its method, or None, got {plan!r}.")
        check_depth(copied.transformer, schedule)
        if schedule.reducing:
            make_handle(find_vision_transformer(copied.model, module_path, restore), schedule)
    return copied


def graph_of(
    model: nn.Module, images: Tensor, batch: BatchSize = "static", form: GraphForm = "native"
) -> ExportedGraph:
    """The graph of a model for images of one size.

    Args:
        model: Takes images alone.
        images: (B, C, H, W), as the model takes them.
        batch: Whether the graph is for B images or for any number of them.
        form: How tokens are selected and merged, see `lightning_prune.reduction.portable_graph`.

    Raises:
        ExportError: If the model cannot be exported, or not for any number of images.
    """
    context = portable_graph() if form == "portable" else nullcontext()
    if batch == "static":
        with context:
            return export_graph(model, (images,))
    several = images if len(images) > 1 else torch.cat([images, images])  # a size of 1 would become a constant
    try:
        with context:
            return export_graph(model, (several,), dynamic_shapes=({0: torch.export.Dim(BATCH, min=1)},))
    except ExportError as error:
        raise ExportError(f"`batch` must be 'static' for this model, got 'dynamic': {error}") from error


def dense_graph(model: ExportedCopy, images: Tensor) -> ExportedGraph:
    """The graph of a model without its patch, for B images as it takes them."""
    dense = ExportedCopy(_shared(model.model), model.module_path, model.dtype, model.normalise)
    unpatch(dense)
    return graph_of(dense, images)


def _refuse_quantized(model: nn.Module, transformer: VisionTransformer) -> None:
    """Raises ArgumentError for a model that computes in 8 bits: its copy in floating point would be another model."""
    way = "export the model in floating point with precision='int8', which quantizes it for the runtime of the format."
    runtime = applied_runtime(transformer)
    if runtime is not None and runtime != runtime.unquantized:
        raise ArgumentError(f"`model` must not be run in a quantized runtime, got one in {runtime.name!r}: {way}")
    wrong = next((name for name, each in model.named_parameters() if not is_plain(each)), None)
    if wrong is not None:
        raise ArgumentError(f"`model` must have plain weights, got a quantized or wrapped one, {wrong}: {way}")


def _refuse_foreign_hooks(model: nn.Module) -> None:
    """Raises ArgumentError for hooks that would belong to the model, and not to its copy."""
    modules = list(model.modules())
    for hook in user_hooks(model):
        if not any(getattr(hook, "__self__", None) is each for each in modules):
            name = getattr(hook, "__qualname__", type(hook).__qualname__)
            raise ArgumentError(
                f"`model` must read tokens by hooks that are methods of its modules, as a copy of it is exported, got "
                f"the hook {name}. Remove it if it is no part of the model."
            )


def _copy(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy on the CPU in another precision; it shares the weights if none of them has to change."""
    tensors = [*model.parameters(), *model.buffers()]
    if all(each.device.type == "cpu" and (each.dtype == dtype or not each.is_floating_point()) for each in tensors):
        return _shared(model)
    return copy.deepcopy(model).to("cpu", dtype)


def _shared(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
