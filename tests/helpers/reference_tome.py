"""ToMe in plain loops, one image at a time, written from the paper without the package."""

import math

import torch
from torch import Tensor


def matching(key: Tensor, remove: int, prefix: int) -> list[tuple[int, int]]:
    """(source, destination) of the merges in one image, most alike first; `key` is (H, N, D)."""
    heads, tokens, channels = key.shape
    k = key.double().tolist()
    mean = [[sum(k[h][i][d] for h in range(heads)) / heads for d in range(channels)] for i in range(tokens)]

    def cosine(i: int, j: int) -> float:
        dot = sum(a * b for a, b in zip(mean[i], mean[j], strict=True))
        return dot / math.sqrt(sum(a * a for a in mean[i])) / math.sqrt(sum(b * b for b in mean[j]))

    edges = []
    for i in range(prefix + 1, tokens, 2):
        best = max(range(prefix, tokens, 2), key=lambda j: cosine(i, j))
        edges.append((cosine(i, best), i, best))
    edges.sort(reverse=True)
    return [(i, j) for _, i, j in edges[:remove]]


def merged(
    tokens: Tensor, pairs: list[tuple[int, int]], sizes: list[float]
) -> tuple[Tensor, list[int], list[float], list[int]]:
    """Tokens (N - R, C) of one image in float64, where each stood, patches in each, and where each of the N went."""
    goes = dict(pairs)
    kept = [i for i in range(len(tokens)) if i not in goes]
    rows, weights = [], []
    for i in kept:
        members = [i, *(j for j, into in pairs if into == i)]
        weights.append(sum(sizes[j] for j in members))
        rows.append(sum(tokens[j].double() * sizes[j] for j in members) / weights[-1])
    sources = [kept.index(goes.get(i, i)) for i in range(len(tokens))]
    return torch.stack(rows), kept, weights, sources


class Naive:
    """The method as `by_hand.pruned_by_hand` wants it; remembers where each token of block 0 of the image went.

    Where attention is not proportional it tells no sizes, but merges by them all the same.
    """

    def __init__(self, proportional: bool = True) -> None:
        self.proportional = proportional
        self.whole = 0  # tokens of block 0
        self.groups: list[int] = []
        self.sizes: list[float] = []

    def __call__(
        self, tokens: Tensor, part: tuple[Tensor, ...], sizes: list[float], remove: int, prefix: int
    ) -> tuple[Tensor, list[int], list[float]]:
        self.whole = self.whole or len(tokens)
        if len(tokens) == self.whole:  # another image
            self.groups, self.sizes = list(range(self.whole)), [1.0] * self.whole
        rows, kept, self.sizes, sources = merged(tokens, matching(part[1], remove, prefix), self.sizes)
        self.groups = [sources[i] for i in self.groups]
        return rows.to(tokens), kept, self.sizes if self.proportional else [1.0] * len(kept)

    def restored(self, tokens: Tensor) -> Tensor:
        """(1, K, C) -> (1, N, C), each where those that it is made of stood; (1, N, C) stays as it is."""
        return tokens if tokens.shape[1] == self.whole else tokens[:, self.groups]
