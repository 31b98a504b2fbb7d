"""Outputs of dense models as one vector per image, whose products are mean cosine similarities."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_prune.errors import UnsupportedModelError

_MOST_VALUES = 2**15  # of an image, which bounds what is kept of the dense model's: 512 images take 128 MiB in float64


def unit_features(result: Any, channels: int | None = None, channels_last: bool = False) -> Tensor:
    """The outputs of a dense model, of all taps and positions, as one vector of length 1 for each image.

    The product of the vectors of two models is the mean over taps of the mean over positions of the cosine similarity
    of their features: a position of a grid (B, C, H, W), a token of (B, N, C), a vector (B, C). A map with a single
    channel has no direction at a position: of it, the correlation over all positions is taken; and so of (B, H, W). If
    there are more than 32768 values, evenly spaced positions stand for all.

    Args:
        result: A tensor, or tensors in a tuple, list or mapping, as those of Hugging Face; `predicted_depth` is a map.
        channels: C of tokens (B, N, C), which distinguishes them from maps (B, H, W); None if there are no maps.
        channels_last: Whether grids are (B, H, W, C), as timm says by `output_fmt`.

    Returns:
        (B, D) float32.

    Raises:
        UnsupportedModelError: If it holds no features of images.

    Example:
        >>> import torch
        >>> from lightning_prune.patching.models.dense_outputs import unit_features
        >>> one, other = torch.randn(2, 8, 4, 4), torch.randn(2, 8, 4, 4)
        >>> products = (unit_features(one) * unit_features(other)).sum(dim=1)
        >>> torch.allclose(products, torch.cosine_similarity(one, other, dim=1).mean(dim=(1, 2)), atol=1e-6)
        True
    """
    taps = [_positions(name, each, channels, channels_last) for name, each in _tensors("", result)]
    if not taps:
        raise UnsupportedModelError(
            "The model must return features of images: a tensor (B, C, H, W), (B, N, C) or (B, C) of floating-point "
            f"numbers, or several of them, got {type(result).__name__}."
        )
    parts = []
    for tap in taps:
        most = _MOST_VALUES // len(taps)
        tap = _thinned(tap, max(1, most // tap.shape[2]), 1)
        if tap.shape[1] == 1:  # a map, whose values are of as many positions
            tap = _thinned(tap, most, 2)
        count = tap.shape[1]
        parts.append((torch.nn.functional.normalize(tap.float(), dim=2) / (count * len(taps)) ** 0.5).flatten(1))
    return torch.cat(parts, dim=1)


def _thinned(values: Tensor, count: int, dim: int) -> Tensor:
    """At most `count` of the values along a dimension, evenly spaced."""
    if values.shape[dim] <= count:
        return values
    places = torch.linspace(0, values.shape[dim] - 1, count, device=values.device).round().long()
    return values.index_select(dim, places)


def _tensors(name: str, result: Any) -> Iterator[tuple[str, Tensor]]:
    """The tensors of images in a result, with the names that they have there."""
    if isinstance(result, Tensor):
        if result.is_floating_point() and 2 <= result.ndim <= 4:
            yield name, result
    elif isinstance(result, Mapping):
        for key, each in result.items():
            yield from _tensors(str(key), each)
    elif isinstance(result, tuple | list):
        for each in result:
            yield from _tensors(name, each)


def _positions(name: str, tap: Tensor, channels: int | None, channels_last: bool) -> Tensor:
    """(B, positions, C) of a tensor; a map is one position, without its mean."""
    if tap.ndim == 2:
        return tap.unsqueeze(1)
    is_map = name == "predicted_depth" or (tap.ndim == 3 and channels is not None and tap.shape[2] != channels)
    if is_map or (tap.ndim == 4 and tap.shape[3 if channels_last else 1] == 1):
        flat = tap.flatten(1).float()
        return (flat - flat.mean(dim=1, keepdim=True)).unsqueeze(1)
    if tap.ndim == 3:
        return tap
    return tap.flatten(1, 2) if channels_last else tap.flatten(2).transpose(1, 2)
