"""Reference forward passes of pruned models with pre-norm blocks."""

import copy
import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from helpers import reference as naive
from lightning_prune.reduction import Reduction, ReductionOutput, TokenSequence

Part = tuple[Tensor, Tensor, Tensor]  # query, key, value (heads, N, D) of one image
CarriedState = tuple[Tensor, list[int], list[float]]  # tokens (N, C), where each stood (-1: several), patches in each
Method = Callable[
    [Tensor, Part, list[float], int, int], CarriedState
]  # of tokens, attention, sizes, how many go, prefix


class Pairs(Reduction):
    """Merges the first `remove` pairs of neighbouring patch tokens, weighted by their sizes, as ToMe does."""

    name: ClassVar[str] = "pairs"
    tracks_sizes = True

    def __init__(self, proportional_attention: bool = True) -> None:
        self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        x, start = sequence.tokens, sequence.num_prefix_tokens
        end = start + 2 * remove
        sizes = x.new_ones(x.shape[:2]) if sequence.sizes is None else sequence.sizes
        weights = sizes[:, start:end].reshape(len(x), remove, 2)
        pairs = x[:, start:end].reshape(len(x), remove, 2, -1)
        merged = (pairs * weights[..., None]).sum(2) / weights.sum(2)[..., None]
        positions = torch.arange(x.shape[1], device=x.device).expand(len(x), -1)
        return ReductionOutput(
            torch.cat((x[:, :start], merged, x[:, end:]), 1),
            torch.cat((positions[:, :start], positions.new_full((len(x), remove), -1), positions[:, end:]), 1),
            torch.cat((sizes[:, :start], weights.sum(2), sizes[:, end:]), 1),
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        return (tokens - num_prefix_tokens) // 2


def pairs(tokens: Tensor, part: Part, sizes: list[float], remove: int, prefix: int) -> CarriedState:
    """The reference by a loop."""
    rows, places, weights = list(tokens[:prefix]), list(range(prefix)), sizes[:prefix]
    for i in range(prefix, prefix + 2 * remove, 2):
        weights.append(sizes[i] + sizes[i + 1])
        rows.append((tokens[i] * sizes[i] + tokens[i + 1] * sizes[i + 1]) / weights[-1])
        places.append(-1)
    end = prefix + 2 * remove
    return (
        torch.stack([*rows, *tokens[end:]]),
        [*places, *range(end, len(tokens))],
        weights + sizes[end:],
    )


def looped(name: str) -> Method:
    """The reference of a method by loops."""

    def pomt(tokens: Tensor, part: Part, sizes: list[float], remove: int, prefix: int) -> CarriedState:
        left, places = naive.pomt(tokens, *part, remove, prefix)
        return left, places, [1.0] * len(places)

    def random(tokens: Tensor, part: Part, sizes: list[float], remove: int, prefix: int) -> CarriedState:
        left, places = naive.random(tokens, remove, prefix, 0)
        return left, places, [1.0] * len(places)

    return {"pomt": pomt, "random": random, "pairs": pairs}[name]


class Parts(NamedTuple):
    """The parts of a block; `rotation` is (cosine, sine) of the patch tokens of block 0."""

    norm1: nn.Module
    project: Callable[[Tensor], Part]  # of (N, C) tokens
    out: nn.Module
    scale1: nn.Module
    norm2: nn.Module
    mlp: nn.Module
    scale2: nn.Module
    rotation: Part | None = None


def rotated(x: Tensor, rotation: Any, places: list[int], prefix: int) -> Tensor:
    """(heads, N, D) with the two halves of the channels of every patch token turned by the angles of its place."""
    cosine, sine = rotation
    turned, half = x.clone(), x.shape[-1] // 2
    for i, place in enumerate(places):
        if place >= prefix:
            c, s = cosine[place - prefix].to(x), sine[place - prefix].to(x)
            across = torch.cat((-x[:, i, half:], x[:, i, :half]), -1)
            turned[:, i] = x[:, i] * c + across * s
    return turned


@torch.no_grad()
def pruned_by_hand(
    model: nn.Module,
    images: Tensor,
    removed: list[int],
    method: Method,
    prefix: int,
    blocks: Callable[[Any], list[nn.Module]],
    parts: Callable[[nn.Module, dict[str, Any]], Parts],
    output: Callable[[Any], Tensor],
) -> Tensor:
    """The output in float64, one image at a time, attention as a plain softmax.

    What comes before the blocks and after them is the model's own: the last block is made to return other tokens.
    """
    model = copy.deepcopy(model).double()
    layers, outputs = blocks(model), []
    entering: dict[str, Any] = {}
    layers[0].register_forward_pre_hook(lambda m, a, k: entering.update(x=a[0], kwargs=k), with_kwargs=True)
    handle = None
    for image in images.double():
        if handle is not None:
            handle.remove()
        model(image[None])
        x, places = entering["x"][0], list(range(entering["x"].shape[1]))
        sizes = [1.0] * len(places)
        for layer, remove in zip(layers, removed, strict=True):
            p = parts(layer, entering["kwargs"])
            query, key, value = p.project(p.norm1(x))
            if p.rotation is not None:
                query, key = (rotated(each, p.rotation, places, prefix) for each in (query, key))
            logits = query @ key.transpose(-2, -1) / math.sqrt(query.shape[-1])
            logits = logits + torch.tensor([math.log(size) for size in sizes], dtype=x.dtype)
            mixed = (logits.softmax(-1) @ value).transpose(0, 1).flatten(1)
            x = x + p.scale1(p.out(mixed))
            if remove:
                x, stood, sizes = method(x, (query, key, value), sizes, remove, prefix)
                places = [-1 if i < 0 else places[i] for i in stood]
            x = x + p.scale2(p.mlp(p.norm2(x)))
        handle = layers[-1].register_forward_hook(lambda *_, x=x: x[None])
        outputs.append(output(model(image[None])))
    return torch.cat(outputs)
