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

    def __init__(self, proportional: bool = True, concatenated: bool = False) -> None:
        self.proportional, self.concatenated = proportional, concatenated
        self.whole = 0  # tokens of block 0
        self.groups: list[int] = []
        self.sizes: list[float] = []

    def __call__(
        self, tokens: Tensor, part: tuple[Tensor, ...], sizes: list[float], remove: int, prefix: int
    ) -> tuple[Tensor, list[int], list[float]]:
        self.whole = self.whole or len(tokens)
        if len(tokens) == self.whole:  # another image
            self.groups, self.sizes = list(range(self.whole)), [1.0] * self.whole
        if self.concatenated:
            rows, kept, self.sizes, sources = published(tokens, part[1], remove, prefix, self.sizes)
        else:
            rows, kept, self.sizes, sources = merged(tokens, matching(part[1], remove, prefix), self.sizes)
        self.groups = [sources[i] for i in self.groups]
        return rows.to(tokens), kept, self.sizes if self.proportional else [1.0] * len(kept)

    def restored(self, tokens: Tensor) -> Tensor:
        """(1, K, C) -> (1, N, C), each where those that it is made of stood; (1, N, C) stays as it is."""
        return tokens if tokens.shape[1] == self.whole else tokens[:, self.groups]


def published(
    tokens: Tensor, key: Tensor, remove: int, prefix: int, sizes: list[float]
) -> tuple[Tensor, list[int], list[float], list[int]]:
    """One merge as the paper's section 3 says it, in its order of tokens; returns what `merged` does.

    1. Tokens at even places are A, those at odd places B. 2. Each of A has an edge to the most similar of B. 3. The
    `remove` most similar edges are kept; prefix tokens take no part. 4. What they connect is merged. 5. A and B are
    concatenated, the prefix tokens first.
    """
    heads, count, channels = key.shape
    k = key.double().tolist()
    mean = [[sum(k[h][i][d] for h in range(heads)) / heads for d in range(channels)] for i in range(count)]
    norms = [math.sqrt(sum(a * a for a in row)) for row in mean]
    a, b = [i for i in range(0, count, 2) if i >= prefix], [i for i in range(1, count, 2) if i >= prefix]
    edges = []
    for i in a:
        similarity = [sum(p * q for p, q in zip(mean[i], mean[j], strict=True)) / norms[i] / norms[j] for j in b]
        edges.append((max(similarity), i, b[similarity.index(max(similarity))]))
    goes = {i: j for _, i, j in sorted(edges, reverse=True)[:remove]}
    places = [*range(prefix), *(i for i in a if i not in goes), *b]
    rows, weights = [], []
    for place in places:
        members = [place, *(i for i in goes if goes[i] == place)]
        weights.append(sum(sizes[i] for i in members))
        rows.append(sum(tokens[i].double() * sizes[i] for i in members) / weights[-1])
    return torch.stack(rows), places, weights, [places.index(goes.get(i, i)) for i in range(count)]
