"""Positions of a model that runs on scaled images, where its library only resamples them when weights are loaded."""

import copy
from collections.abc import Callable
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.input_resize import InputResize, ResizedModule
from lightning_prune.reduction.portable import exact_product
from lightning_prune.reduction.resize import Grid


def resample_corners(table: Tensor, num_prefix_tokens: int, old: Grid, new: Grid) -> Tensor:
    """Position embeddings for another grid, bicubic with aligned corners: as torchvision's `interpolate_embeddings`.

    Args:
        table: (1, P + M, C), the P prefix tokens first.
        num_prefix_tokens: P.
        old: Rows and columns of the M patches.
        new: Rows and columns of the other grid.

    Returns:
        (1, P + patches of the other grid, C).
    """
    prefix, patches = table[:, :num_prefix_tokens], table[:, num_prefix_tokens:]
    image = patches.transpose(1, 2).unflatten(2, old)
    moved = F.interpolate(image, new, mode="bicubic", align_corners=True).flatten(2).transpose(1, 2)
    return torch.cat((prefix, moved), dim=1)


@lru_cache(maxsize=32)
def bias_matrices(old: Grid, new: Grid) -> tuple[Tensor, Tensor]:
    """The matrices with which timm resamples a table of relative-position biases, for the rows and for the columns.

    `timm.layers.resize_rel_pos_bias_table` interpolates linearly in one direction after the other. It takes one head
    after the other, on the CPU, which is too slow for a forward pass; here it is applied to tables whose result is a
    column of one of the matrices: a row or column of ones, as the weights of a linear interpolation have the sum 1.

    Args:
        old: Rows and columns of the patches.
        new: Rows and columns of the other grid.

    Returns:
        (2 h - 1, 2 H - 1) and (2 w - 1, 2 W - 1) float32, for H x W and h x w patches.
    """
    from timm.layers import resize_rel_pos_bias_table

    (down, across), (new_down, new_across) = ((2 * rows - 1, 2 * columns - 1) for rows, columns in (old, new))
    rows = torch.eye(down, device="cpu")[:, None].expand(-1, across, -1).reshape(down * across, down)
    columns = torch.eye(across, device="cpu")[None].expand(down, -1, -1).reshape(down * across, across)
    with torch.no_grad():
        both = resize_rel_pos_bias_table(
            torch.cat((rows, columns), dim=1), new, (new_down * new_across, down + across), old_window_size=old
        ).view(new_down, new_across, down + across)
    return both[:, 0, :down].clone(), both[0, :, down:].clone()


class ResizedBias(ResizedModule):
    """Base of the mixins for modules with relative-position biases of timm: they give those of the smaller grid."""

    constants: ClassVar[tuple[str, ...]] = ("relative_position_index",)
    """Buffers that depend on the grid alone."""

    def prepare(self) -> None:
        """See `ResizedModule.prepare`."""
        for name in self.constants:
            self._constant(name)
        if isinstance(getattr(self, "relative_position_bias_table", None), Tensor):
            self._table()

    def _constant(self, name: str) -> Tensor:
        """A buffer as the module has it for the smaller grid."""
        patch, kind = self._prune_patch, original_class(self)
        own: Tensor = getattr(self, name)
        return patch.constant((kind.__qualname__, name, own.dtype), own.device, lambda: _buffers_for(self, patch)[name])

    def _table(self) -> Tensor:
        """(relative distances, H) the table of biases, resampled; entries of prefix tokens stay as they are."""
        module: Any = self
        patch, table = self._prune_patch, module.relative_position_bias_table
        old, new = patch.dense_grid(patch.fixed_size), patch.fixed_grid
        distances = (2 * old[0] - 1) * (2 * old[1] - 1)
        precise = torch.promote_types(table.dtype, torch.float32)
        down, across = (
            patch.constant(("bias", side), table.device, _matrix(old, new, side)).to(precise) for side in (0, 1)
        )
        biases = table[:distances].transpose(0, 1).unflatten(1, (2 * old[0] - 1, 2 * old[1] - 1)).to(precise)
        moved = exact_product(exact_product(down, biases), across.transpose(0, 1)).flatten(1).transpose(0, 1)
        moved = moved.to(table.dtype)
        return torch.cat((moved, table[distances:])) if len(table) > distances else moved

    def _biases(self) -> Tensor:
        """(H, N - R, N - R) the bias of each pair of tokens."""
        index = self._constant("relative_position_index")
        count = self._prune_patch.fixed_grid[0] * self._prune_patch.fixed_grid[1]
        tokens = count if index.numel() == count**2 else count + 1
        return self._table()[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1).contiguous()


def _matrix(old: Grid, new: Grid, side: int) -> Callable[[], Tensor]:
    return lambda: bias_matrices(old, new)[side]


def _buffers_for(module: nn.Module, patch: InputResize) -> dict[str, Tensor]:
    """The buffers that a module of timm has after `set_window_size`; the module itself stays as it is."""
    # On the meta device timm does not resample a table, which takes long.
    weights = {id(each): nn.Parameter(each.detach().to("meta"), each.requires_grad) for each in module.parameters()}
    twin: Any = copy.deepcopy(module, {id(patch): patch, **weights})
    twin.__class__ = original_class(module)
    twin.set_window_size(patch.fixed_grid)
    return dict(twin.named_buffers(recurse=False))


class ResizedBeitAttention(ResizedBias):
    """Biases of the attention of a block of BEiT."""

    def _get_rel_pos_bias(self) -> Tensor:
        return self._biases().unsqueeze(0)


class ResizedBeitBias(ResizedBias):
    """Biases that all blocks of BEiT share."""

    def forward(self) -> Tensor:
        """(H, N - R, N - R) the bias of each pair of tokens."""
        return self._biases()


class ResizedRelPosBias(ResizedBias):
    """Biases of timm's `RelPosBias`."""

    def get_bias(self) -> Tensor:
        """(1, H, N - R, N - R) the bias of each pair of tokens."""
        return self._biases().unsqueeze(0)


class ResizedRelPosMlp(ResizedBias):
    """Biases of timm's `RelPosMlp`, which computes them from the distances of the patches."""

    constants: ClassVar[tuple[str, ...]] = ("relative_position_index", "rel_coords_log")

    def get_bias(self) -> Tensor:
        """(1, H, N - R, N - R) the bias of each pair of tokens."""
        module: Any = self
        count = self._prune_patch.fixed_grid[0] * self._prune_patch.fixed_grid[1]
        computed = module.mlp(self._constant("rel_coords_log")).view(-1, module.num_heads)
        pairs = computed[self._constant("relative_position_index").view(-1)].view(count, count, -1)
        bias: Tensor = module.bias_act(pairs.permute(2, 0, 1))
        if module.bias_gain is not None:
            bias = module.bias_gain * bias
        if module.prefix_tokens:
            bias = F.pad(bias, [module.prefix_tokens, 0, module.prefix_tokens, 0])
        return bias.unsqueeze(0).contiguous()


class ResizedRope(ResizedModule):
    """Mixin for a rotary embedding of timm without weights; computes that of a grid once.

    timm would make the coordinates on the CPU and copy them to the device in every forward pass.
    """

    def prepare(self) -> None:
        """See `ResizedModule.prepare`."""
        if not self.training:
            self.get_embed(self._prune_patch.fixed_grid)

    def get_embed(self, shape: Any = None, dtype: torch.dtype | None = None) -> Tensor:
        """The embedding of a grid; see the module."""
        own: Any = super()
        if shape is None or self.training:  # in training, coordinates may be augmented
            found: Tensor = own.get_embed(shape, dtype)
            return found
        buffer = next(self.buffers(), torch.empty(0))
        name = ("rope", int(shape[0]), int(shape[1]), dtype, buffer.dtype)
        return self._prune_patch.constant(name, buffer.device, lambda: own.get_embed(shape, dtype))
