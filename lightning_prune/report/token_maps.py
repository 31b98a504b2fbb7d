"""Token maps: which patches of an image each method keeps, merges and drops."""

from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from textwrap import fill
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Patch
from numpy.typing import NDArray
from torch import Tensor

from lightning_prune.errors import ArgumentError
from lightning_prune.report.styles import save_figure

if TYPE_CHECKING:
    from lightning_prune.patching.token_map import TokenTrace


Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

_INCHES = 1.75  # side of a picture
_ENTRY = 2.8  # width of an entry of the legend in inches
TINTS = ((0.96, 0.55, 0.05), (0.45, 0.25, 0.75), (0.0, 0.55, 0.55))  # of tokens that hold the dropped patches
_BACKGROUND = 0.93  # grey value that dropped patches fade to
_FADED = 0.80
_TINTED = 0.55
_HUE_SHARE = 0.6  # of the added hue in a merged token of a grey picture
_MAX_FUSED = len(TINTS)  # up to this number, shared tokens hold the dropped patches; more of them hold similar ones
_GOLDEN = 0.618034  # steps by this part of the circle of hues keep neighbouring hues apart


def shared(groups: Ints) -> Ints:
    """The tokens that hold two or more patches of this image, largest first.

    Args:
        groups: (patches,) the token that each patch went into, -1 where it was dropped.
    """
    tokens, counts = np.unique(groups[groups >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return tokens[order][counts[order] > 1].astype(np.int64)


def paint(picture: Floats, groups: Ints, grid: tuple[int, int], tinted: bool) -> Floats:
    """Shows in a picture what happened to its patches.

    Dropped patches fade to grey. Patches that share a token get a translucent tint if `tinted`, else the mean colour of
    their pixels, with a hue of its own for each token if the picture is grey. Patches that are kept stay as they are.

    Args:
        picture: `(H, W, 3)` in [0, 1].
        groups: (rows * columns,) the token that each patch went into, -1 where it was dropped.
        grid: Rows and columns of patches.
        tinted: Whether shared tokens hold the dropped patches, whose pixels have little in common.

    Returns:
        `(H, W, 3)` in [0, 1].

    Example:
        >>> picture = np.zeros((2, 4, 3))
        >>> picture[:, 3] = 1
        >>> painted = paint(picture, np.array([-1, 0, 1, 1]), (1, 4), tinted=False)
        >>> painted[0, :, 0].round(2).tolist()  # faded, kept, and two of one token, in one colour
        [0.74, 0.0, 0.45, 0.45]
    """
    where = to_pixels(groups, grid, picture.shape[:2])
    painted = picture.copy()
    luma = picture @ np.array([0.299, 0.587, 0.114])
    dropped = where < 0
    painted[dropped] = (_FADED * _BACKGROUND + (1 - _FADED) * luma[dropped])[:, None]
    grey = bool(np.ptp(picture, axis=2).max() < 0.02)
    for number, token in enumerate(shared(groups).tolist()):
        inside = where == token
        if tinted:
            tint = np.array(TINTS[number % len(TINTS)])
            painted[inside] = _TINTED * tint + (1 - _TINTED) * picture[inside]
            continue
        mean = picture[inside].mean(axis=0)
        painted[inside] = (1 - _HUE_SHARE) * mean + _HUE_SHARE * _hue(number) if grey else mean
    return painted


def to_pixels(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Ints:
    """(height, width): the token of each pixel's patch, for patches that need not divide the picture evenly."""
    rows, columns = (np.arange(pixels) * cells // pixels for pixels, cells in zip(size, grid, strict=True))
    pixels: Ints = groups.reshape(grid)[rows[:, None], columns[None, :]]
    return pixels


def borders(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Floats:
    """The edges of patches where a token of several patches, or what was dropped, ends.

    Args:
        groups: (rows * columns,) the token that each patch went into, -1 where it was dropped.
        grid: Rows and columns of patches.
        size: Height and width of the picture in pixels.

    Returns:
        (edges, 2, 2): both ends of each as x and y, in pixels of an image that is shown with its corner at 0, 0.
    """
    tokens = groups.reshape(grid)
    bounded = np.isin(tokens, shared(groups)) | (tokens < 0)
    down, across = size[0] / grid[0], size[1] / grid[1]
    upright_edges = (tokens[:, 1:] != tokens[:, :-1]) & (bounded[:, 1:] | bounded[:, :-1])
    below = (tokens[1:] != tokens[:-1]) & (bounded[1:] | bounded[:-1])
    row, column = np.nonzero(upright_edges)
    x, y = (column + 1) * across, row * down
    upright = np.stack([np.stack([x, y], -1), np.stack([x, y + down], -1)], 1)
    row, column = np.nonzero(below)
    x, y = column * across, (row + 1) * down
    level = np.stack([np.stack([x, y], -1), np.stack([x + across, y], -1)], 1)
    edges: Floats = np.concatenate([upright, level]).astype(np.float64)
    return edges


def strokes(groups: Ints, grid: tuple[int, int], size: tuple[int, int]) -> Floats:
    """(dropped, 2, 2): a line across each dropped patch, which tells it from a pale one; see `borders`."""
    down, across = size[0] / grid[0], size[1] / grid[1]
    row, column = np.nonzero(groups.reshape(grid) < 0)
    start, end = np.stack([column, row + 1], -1), np.stack([column + 1, row], -1)
    return np.stack([start, end], 1) * np.array([across, down])


def _hue(number: int) -> Floats:
    """A soft colour, far from the previous ones on the circle of hues."""
    turn = 6 * ((0.55 + number * _GOLDEN) % 1.0)
    bright: Floats = np.clip(np.abs((turn + np.array([0.0, 4.0, 2.0])) % 6 - 3) - 1, 0, 1)
    return 0.42 + 0.48 * bright


def plot_tokens(
    images: Tensor,
    traces: "Mapping[str, TokenTrace]",
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Figure:
    r"""Draws a row for each image: the image, and for each method what happened to its patches.

    Dropped patches fade to grey and are crossed out. The token that holds all dropped patches (POMT, EViT) gets a
    translucent tint. Merged patches get the mean colour of their pixels, with a border around each token, and a hue for
    each token if the image is grey. Patches that are kept stay as they are.

    Args:
        images: `(B, 1 or 3, H, W)` as the model receives them; all are drawn, so give a few.
        traces: Title of a column, such as `pomt 1.5x` -> the result of `trace_tokens` for these images.
        mean: Mean by which the images were normalised, a number or one for each channel. None: each image is scaled
            to its own darkest and brightest pixel.
        std: Standard deviation by which they were normalised; given if and only if `mean` is.

    Raises:
        ArgumentError: If `images` has another shape, `mean` and `std` do not fit it, `traces` is empty, or a trace is
            of other images or of patches that form no grid.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> from lightning_prune.patching import trace_tokens
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> images = torch.rand(2, 3, 224, 224)
        >>> trace = trace_tokens(model, images, "pomt", lp.Schedule.single(4, 1, 56))
        >>> figure = plot_tokens(images, {"pomt": trace}, mean=0, std=1)
        >>> [axes.get_title() for axes in figure.axes[:2]]
        ['picture\n196 patches', 'pomt\n141 tokens left']
    """
    pictures = _pictures(images, mean, std)
    if not traces:
        raise ArgumentError("`traces` must hold the trace of one method or more, got none.")
    grids = {name: _grid(name, trace, len(images)) for name, trace in traces.items()}
    columns = 1 + len(traces)
    tall = pictures.shape[1] / pictures.shape[2]
    width = _INCHES * columns
    close = ConstrainedLayoutEngine(w_pad=0.03, h_pad=0.03, wspace=0.0, hspace=0.0)
    figure = Figure(layout=close)
    panels = figure.subplots(len(pictures), columns, squeeze=False)
    rows, across = next(iter(grids.values()))
    panels[0, 0].set_title(f"picture\n{rows * across} patches", fontsize=10)
    for panel, picture in zip(panels[:, 0], pictures, strict=True):
        _show(panel, picture)
    kinds: set[str] = set()
    for column, (name, trace) in enumerate(traces.items(), start=1):
        kinds |= _draw_method(list(panels[:, column]), pictures, name, trace, grids[name])
    legend = _legend(kinds)
    columns = max(1, min(len(legend), int(width / _ENTRY)))
    figure.legend(handles=legend, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    titles = max(panel.get_title().count("\n") + 1 for panel in panels[0])
    labels = len(pictures) * any(panel.get_xlabel() for panel in panels[0])
    lines = titles + labels + ceil(len(legend) / columns)
    figure.set_size_inches(width, _INCHES * tall * len(pictures) + 0.175 * lines + 0.12)
    return figure


def save_tokens(
    images: Tensor,
    traces: "Mapping[str, TokenTrace]",
    path: str | Path,
    mean: float | Sequence[float] | None = None,
    std: float | Sequence[float] | None = None,
) -> Path:
    """Writes `plot_tokens` in the format of the suffix; the file appears whole or not at all.

    Args:
        images: See `plot_tokens`.
        traces: See `plot_tokens`.
        path: Where, such as `tokens.png`.
        mean: See `plot_tokens`.
        std: See `plot_tokens`.

    Returns:
        The path.

    Raises:
        ArgumentError: See `plot_tokens`.
    """
    return save_figure(plot_tokens(images, traces, mean, std), path)


def _draw_method(
    panels: Sequence[Axes], pictures: Floats, name: str, trace: "TokenTrace", grid: tuple[int, int]
) -> set[str]:
    """Draws a column; returns the kinds of patches that occur in it."""
    all_groups: Ints = trace.groups.cpu().numpy()
    left = trace.tokens.cpu().tolist()
    same = len(set(left)) == 1
    counts = f"{left[0]} tokens left" if same else f"{min(left)} to {max(left)} tokens left"
    panels[0].set_title(f"{fill(name, 20)}\n{counts}", fontsize=10)
    tinted = max(len(shared(groups)) for groups in all_groups) <= _MAX_FUSED
    for panel, picture, groups, tokens in zip(panels, pictures, all_groups, left, strict=True):
        _show(panel, paint(picture, groups, grid, tinted))
        crossed = strokes(groups, grid, picture.shape[:2])
        panel.add_collection(LineCollection(list(crossed), colors="#808080", linewidths=0.6, alpha=0.6))
        edges = borders(groups, grid, picture.shape[:2])
        panel.add_collection(LineCollection(list(edges), colors="black", linewidths=1.2, alpha=0.45))
        panel.add_collection(LineCollection(list(edges), colors="white", linewidths=0.55, alpha=0.95))
        if not same:
            panel.set_xlabel(f"{tokens}", fontsize=8, labelpad=2)
    several = any(len(shared(groups)) for groups in all_groups)
    kinds = {"dropped"} if (all_groups < 0).any() else set()
    return kinds | ({"tinted" if tinted else "merged"} if several else set())


def _show(panel: Axes, picture: Floats) -> None:
    height, width = picture.shape[:2]
    panel.imshow(picture, extent=(0, width, height, 0), interpolation="nearest", vmin=0, vmax=1)
    panel.set_xticks([])
    panel.set_yticks([])
    for spine in panel.spines.values():
        spine.set_linewidth(0.5)


def _legend(kinds: set[str]) -> list[Patch]:
    entries = {
        "kept": Patch(facecolor="white", edgecolor="#555555", label="unchanged: kept as it is"),
        "tinted": Patch(facecolor=(*TINTS[0], 0.7), edgecolor="#555555", label="tinted: fused into one token"),
        "merged": Patch(
            facecolor="#9db4c8", edgecolor="#555555", label="one colour in a border: merged into one token"
        ),
        "dropped": Patch(facecolor="#dcdcdc", edgecolor="#555555", hatch="///", label="crossed out: dropped"),
    }
    return [patch for kind, patch in entries.items() if kind == "kept" or kind in kinds]


def _pictures(images: Tensor, mean: float | Sequence[float] | None, std: float | Sequence[float] | None) -> Floats:
    """`(B, H, W, 3)` in [0, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or not len(images):
        raise ArgumentError(f"`images` must be of shape (B, 1 or 3, H, W), got {tuple(images.shape)}.")
    pixels = images.detach().cpu().double()
    if mean is not None and std is not None:
        pixels = pixels * _channels("std", std, pixels) + _channels("mean", mean, pixels)
    elif mean is not None or std is not None:
        raise ArgumentError(f"`mean` and `std` must be given together, got mean={mean!r} and std={std!r}.")
    else:
        low, high = pixels.amin(dim=(1, 2, 3), keepdim=True), pixels.amax(dim=(1, 2, 3), keepdim=True)
        pixels = (pixels - low) / (high - low).clamp(min=1e-12)
    pictures: Floats = pixels.clamp(0, 1).expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    return pictures


def _channels(name: str, values: float | Sequence[float], images: Tensor) -> Tensor:
    numbers = torch.as_tensor(values, dtype=torch.float64).flatten()
    if len(numbers) not in (1, images.shape[1]):
        raise ArgumentError(f"`{name}` must be one number or {images.shape[1]}, one a channel, got {values!r}.")
    return numbers.view(1, -1, 1, 1)


def _grid(name: str, trace: "TokenTrace", images: int) -> tuple[int, int]:
    if len(trace.groups) != images:
        raise ArgumentError(f"`traces` must be of the {images} images, got that of {len(trace.groups)} for {name!r}.")
    if trace.grid is None:
        raise ArgumentError(f"`traces` must be of patches that form a grid, got {name!r}, whose patches do not.")
    return trace.grid
