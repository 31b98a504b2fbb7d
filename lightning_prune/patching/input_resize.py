"""Scales the images down where they enter a patched model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.device import device_name
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.class_swap import PatchedModule, Setting
from lightning_prune.patching.exact_tail import ExactTail
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.patched_root import PatchedRoot
from lightning_prune.patching.restored_tokens import GridCut
from lightning_prune.patching.token_readers import TokenReaders
from lightning_prune.patching.token_state import PerThread, has_storage
from lightning_prune.reduction.base import Reduction
from lightning_prune.reduction.functional import is_exported
from lightning_prune.reduction.resize import (
    Grid,
    cell_of_patches,
    grid_of_count,
    largest_grid,
    resampling_matrix,
    scale_images,
)
from lightning_prune.schedule import Rate


class ScalingSites(NamedTuple):
    """What has to change in a model so that it runs on smaller images.

    Attributes:
        mixins: Module -> the mixin of its class. One of them scales the images, others resample positions.
        settings: Module, name and new value of plain attributes, such as a check of the image size.
        guard: Mixin for the root, in place of the adapter's `guard`; None for that one.
    """

    mixins: Mapping[nn.Module, type["ResizedModule"]]
    settings: tuple[tuple[nn.Module, str, Any], ...] = ()
    guard: type[PatchedRoot] | None = None


@dataclass(eq=False)
class InputResize:
    """What is scaled in a patched model, shared by all modules that take part in it.

    Attributes:
        reduction: The method.
        remove: Number of tokens to remove, or the share of the patch tokens to keep.
        num_prefix_tokens: P.
        division: How the model divides its images into patches.
        made_on: What the schedule was made on; compared with the first batch.
        settings: Settings that were changed so that the model takes smaller images.
        constants: Tensors that follow from the grids alone, on the device on which they were used last.
        grids: Height and width of images -> the grid that is left of them.
        resampled: Name -> weights, and what was resampled from them.
        is_adaptive: Whether the images decide how many tokens are left: never.
        tail: The exact tail of the model, where the root itself takes part in the scaling.
        readers: What is read of the model, likewise.
        seen: Height and width of the images that were scaled last.
        traced: Likewise, in a graph.
    """

    reduction: Reduction
    remove: int | Rate
    num_prefix_tokens: int
    division: PatchDivision
    made_on: MeasurementSource | None = None
    settings: list[Setting] = field(default_factory=list)
    constants: dict[tuple[Any, ...], Tensor] = field(default_factory=dict)
    grids: dict[tuple[int, int], Grid] = field(default_factory=dict)
    resampled: dict[tuple[Any, ...], tuple[Tensor, Tensor]] = field(default_factory=dict)
    is_adaptive: bool = False
    tail: ExactTail | None = None
    readers: TokenReaders | None = None
    seen: PerThread[tuple[int, int]] = field(default_factory=PerThread)
    traced: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        """Computes for images of a fixed size what does not depend on the images, so that graphs hold it."""
        if self.division.image_size is not None:
            self.matrices(self.division.image_size, torch.device("cpu"))
            self.cut(torch.device("cpu"))

    def key(self) -> tuple[Any, ...]:
        """What distinguishes it from another one of the same model, apart from its method."""
        return "resize", self.remove, self.division

    @property
    def fixed_size(self) -> tuple[int, int]:
        """Height and width of the images of a model that takes one size."""
        assert self.division.image_size is not None
        return self.division.image_size

    @property
    def fixed_grid(self) -> Grid:
        """Rows and columns that are left of images of that size."""
        return self.grid(self.fixed_size)

    def dense_grid(self, image_size: tuple[int, int]) -> Grid:
        """Rows and columns of patches of images of this height and width, without scaling."""
        return self.division.grid(*image_size)

    def grid(self, image_size: tuple[int, int]) -> Grid:
        """Rows and columns of patches that are left of images of this height and width.

        Raises:
            ScheduleError: If the number of tokens to remove leaves no grid of such images.
        """
        found = self.grids.get(image_size)
        if found is not None:
            return found
        rows, columns = self.dense_grid(image_size)
        patches = rows * columns
        if isinstance(self.remove, int):
            found = grid_of_count(rows, columns, patches - self.remove)
        else:
            removed = self.remove.removes(patches + self.num_prefix_tokens, self.num_prefix_tokens)
            found = largest_grid(rows, columns, patches - removed)
        self.grids[image_size] = found
        return found

    def new_size(self, image_size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the scaled images, in pixels."""
        (h, w), (down, across) = self.grid(image_size), self.division.patch_size
        return h * down, w * across

    def removes_of(self, image_size: tuple[int, int]) -> int:
        """R, the number of tokens that images of this height and width have less."""
        (rows, columns), (h, w) = self.dense_grid(image_size), self.grid(image_size)
        return rows * columns - h * w

    def sources(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Where the tokens of the dense model went: to the one whose cell covers the middle of their patch.

        Args:
            images: (B, channels, height, width).

        Returns:
            (B, N) int64, the index of the token that each became part of; and (B, N - R) int64, the number of tokens
            in each.
        """
        size, prefix = image_size_of(images), self.num_prefix_tokens
        cells = cell_of_patches(self.dense_grid(size), self.grid(size))
        sources = torch.tensor([*range(prefix), *(prefix + cell for cell in cells)], device=images.device)
        return sources.expand(len(images), -1), sources.bincount().expand(len(images), -1)

    def cut(self, device: torch.device) -> GridCut:
        """What gives the grid of all patches back to the tokens of the images that were scaled last in this thread.

        Raises:
            UnsupportedModelError: If it is not known which images these are.
        """
        size = (self.traced if torch.compiler.is_compiling() else self.seen.get()) or self.division.image_size
        if size is None:
            raise UnsupportedModelError(
                "The size of these images is not known. Run the whole model, and compile all of it or none."
            )
        matrices = (
            self.constant(("matrix", *sides), device, partial(resampling_matrix, *sides))
            for sides in zip(self.grid(size), self.dense_grid(size), strict=True)
        )
        rows, columns = matrices
        return GridCut(rows, columns, self.num_prefix_tokens)

    def constant(self, name: tuple[Any, ...], device: torch.device, compute: Callable[[], Tensor]) -> Tensor:
        """A tensor that depends neither on the images nor on the weights, on a device.

        Args:
            name: Of the tensor, unique.
            device: Where it is needed.
            compute: Makes it, if it does not exist yet.
        """
        known = self.constants.get(name)
        if known is not None and known.device == device:
            return known
        if torch.compiler.is_compiling():  # a graph must not leave its tensors here
            return (compute() if known is None else known).to(device)
        with torch.inference_mode(False), torch.no_grad():  # the tensor may be needed for a backward pass later on
            self.constants[name] = made = (compute() if known is None else known).to(device)
        return made

    def keeps(self, weights: Tensor) -> bool:
        """Whether what is resampled from these weights may be kept for the next forward pass.

        It is compared with the weights in each of them, which takes a twentieth of the time on a CPU, and would wait
        for the device elsewhere. Neither graphs nor gradients may use what is kept.
        """
        if torch.compiler.is_compiling() or weights.device.type != "cpu" or type(weights) not in (Tensor, nn.Parameter):
            return False
        needs_grad = torch.is_grad_enabled() and weights.requires_grad
        return not needs_grad and has_storage(weights)

    def resample(self, name: tuple[Any, ...], weights: Tensor, compute: Callable[[], Tensor]) -> Tensor:
        """What is resampled from weights that it `keeps`; computed where the weights have changed.

        Args:
            name: Of the result, unique for these weights.
            weights: The weights.
            compute: Resamples them.
        """
        source, found = self.resampled.get(name, (None, None))
        if source is not None and found is not None and source.dtype == weights.dtype and torch.equal(source, weights):
            return found
        with torch.inference_mode(False), torch.no_grad():
            source, found = weights.detach().clone(), compute()
        self.resampled[name] = source, found
        return found

    def matrices(self, image_size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """The matrices of `scale_images` for the height and for the width of images."""
        down, across = (
            self.constant(("matrix", *sizes), device, partial(resampling_matrix, *sizes))
            for sizes in zip(image_size, self.new_size(image_size), strict=True)
        )
        return down, across

    def scale(self, images: Tensor, any_size: bool = False) -> Tensor:
        """Scales the images (B, channels, height, width) to the size of the grid that is left.

        Args:
            images: As they enter the model.
            any_size: Whether images of any size may enter, whatever the model says.

        Raises:
            ArgumentError: If the images have another size than those of the model.
            ScheduleError: As `grid`.
            UnsupportedModelError: If they are no images.
        """
        if images.ndim != 4:
            raise UnsupportedModelError(
                f"The model input must be images (B, channels, height, width) with {self.reduction.name}, got a tensor "
                f"of shape {tuple(images.shape)}."
            )
        size, expected = image_size_of(images), self.division.image_size
        if torch.compiler.is_compiling():  # dynamo allows no change of a dict in a graph that looks up classes
            self.traced = size
        else:
            self.seen.set(size)
        if expected is not None and size != expected and not any_size:
            raise ArgumentError(f"`images` must have the size {expected} of the model, got {size}.")
        if self.made_on is not None and not torch.compiler.is_compiling():
            made_on, self.made_on = self.made_on, None
            rows, columns = self.dense_grid(size)
            tokens = self.num_prefix_tokens + rows * columns
            made_on.warn_elsewhere(device=device_name(images.device), batch_size=images.shape[0], dense_tokens=tokens)
        matrices = self.matrices(size, images.device) if is_exported() else None
        return scale_images(images, self.new_size(size), matrices)


def image_size_of(images: Tensor) -> tuple[int, int]:
    """Height and width of images (B, channels, height, width); graphs are specialised to them."""
    return int(images.shape[-2]), int(images.shape[-1])


def active_resize(module: nn.Module) -> InputResize | None:
    """The scaling that a module takes part in; None if it takes part in none."""
    state = vars(module).get("_prune_patch")
    return state if isinstance(state, InputResize) else None


def resize_of(root: nn.Module) -> InputResize | None:
    """The scaling of the images of a patched transformer; None if they are not scaled."""
    return next((state for module in root.modules() if (state := active_resize(module)) is not None), None)


def own_setting(module: nn.Module, name: str, site: nn.Module) -> Any:
    """The value of a plain attribute as it is without a patch that scales images.

    Args:
        module: Has the attribute.
        name: Of the attribute.
        site: A module that takes part in the scaling, if there is one.
    """
    resize = active_resize(site)
    changed = [] if resize is None else [each for each in resize.settings if each.module is module]
    return next((each.value for each in changed if each.name == name), getattr(module, name, None))


class ResizedModule(PatchedModule):
    """Base of the mixins for modules that take part in the scaling."""

    _prune_patch: InputResize

    def prepare(self) -> None:
        """Computes what does not depend on the images, when the model is patched: compiled graphs then hold it."""


class ResizedInput(ResizedModule):
    """Mixin for the class of the module that receives the images; scales them down."""

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the module on the scaled images."""
        return super().forward(self._prune_patch.scale(images), *args, **kwargs)
