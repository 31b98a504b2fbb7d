"""The published formulas in float64 and plain loops, one image at a time, written without the package."""

import math

import torch
from torch import Tensor

from helpers.reference_tome import merged


def probabilities(
    query: Tensor, key: Tensor, scale: float | None = None, mask: Tensor | None = None
) -> list[list[list[float]]]:
    """A[h][j][i] of one image, (H, N, D) each; the mask is (H, N, N), bool or additive."""
    q, k = query.double().tolist(), key.double().tolist()
    heads, tokens, channels = query.shape
    scale = channels**-0.5 if scale is None else scale
    rows = []
    for h in range(heads):
        rows.append([])
        for j in range(tokens):
            logits = []
            for i in range(tokens):
                logit = sum(a * b for a, b in zip(q[h][j], k[h][i], strict=True)) * scale
                if mask is not None and mask.dtype == torch.bool:
                    logit = logit if mask[h, j, i] else -math.inf
                elif mask is not None:
                    logit += float(mask[h, j, i])
                logits.append(logit)
            top = max(logits)
            weights = [math.exp(logit - top) for logit in logits]
            rows[h].append([weight / sum(weights) for weight in weights])
    return rows


def pomt_scores(
    query: Tensor, key: Tensor, value: Tensor, prefix: int, attention: list[list[list[float]]] | None = None
) -> list[float]:
    """a_i + s_i of every patch token of one image; `attention` is A[h][j][i] where it is more than q and k say."""
    attention = probabilities(query, key) if attention is None else attention
    v = value.double().tolist()
    heads, tokens, channels = value.shape
    received = []
    for i in range(prefix, tokens):
        received.append(sum(max(attention[h][j][i] for h in range(heads)) for j in range(prefix, tokens)))
    magnitude = []
    for i in range(tokens):
        magnitude.append(sum(max(v[h][i][d] for h in range(heads)) for d in range(channels)))
    top = max(magnitude)
    total = sum(math.exp(m - top) for m in magnitude)
    return [a / max(received) + math.exp(m - top) / total for a, m in zip(received, magnitude[prefix:], strict=True)]


def pomt(
    tokens: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    remove: int,
    prefix: int,
    attention: list[list[list[float]]] | None = None,
) -> tuple[Tensor, list[int]]:
    """Tokens (N - R, C) in float64 that are left of one image, and where each stood; -1 for the mean."""
    scores = pomt_scores(query, key, value, prefix, attention)
    patches = len(scores)
    by_score = sorted(range(patches), key=lambda i: scores[i], reverse=True)
    kept = sorted(by_score[: patches - remove - 1])
    rows = tokens.double()
    mean = sum(rows[prefix + i] for i in range(patches) if i not in kept) / (remove + 1)
    left = [rows[p] for p in range(prefix)] + [rows[prefix + i] for i in kept] + [mean]
    return torch.stack(left), [*range(prefix), *(prefix + i for i in kept), -1]


def random(tokens: Tensor, remove: int, prefix: int, seed: int) -> tuple[Tensor, list[int]]:
    """The same for random pruning: MurmurHash3's finaliser on Python's own whole numbers."""
    word = 2**32

    def draw(position: int) -> int:
        h = ((position + 1) * 0x9E3779B1 + seed * 0x9E3779B9 + 0x85EBCA6B) % word
        h = ((h ^ (h >> 16)) * 0x85EBCA6B) % word
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) % word
        return h ^ (h >> 16)

    patches = tokens.shape[0] - prefix
    kept = sorted(sorted(range(patches), key=draw, reverse=True)[: patches - remove])
    positions = [*range(prefix), *(prefix + i for i in kept)]
    return tokens.double()[positions], positions


def topk_scores(query: Tensor, key: Tensor, prefix: int, has_class_token: bool) -> list[float]:
    """Mean attention that every patch token of one image receives: from CLS, or else from the patch tokens."""
    attention = probabilities(query, key)
    heads, tokens, _ = query.shape
    queries = [0] if has_class_token else range(prefix, tokens)
    return [
        sum(attention[h][j][i] for h in range(heads) for j in queries) / (heads * len(queries))
        for i in range(prefix, tokens)
    ]


def shift_scores(tokens: Tensor, entering: Tensor, prefix: int) -> list[float]:
    """Euclidean distance of every patch token of one image from what it was."""
    after, before = tokens.double().tolist(), entering.double().tolist()
    return [math.dist(a, b) for a, b in zip(after[prefix:], before[prefix:], strict=True)]


def best(scores: list[float], keep: int) -> list[int]:
    """Where the highest scores stand, in ascending order."""
    return sorted(sorted(range(len(scores)), key=lambda i: scores[i], reverse=True)[:keep])


def keep_best(tokens: Tensor, scores: list[float], remove: int, prefix: int) -> tuple[Tensor, list[int]]:
    """The tokens of one image that are left in float64, and where each stood."""
    positions = [*range(prefix), *(prefix + i for i in best(scores, len(scores) - remove))]
    return tokens.double()[positions], positions


def evit(tokens: Tensor, scores: list[float], remove: int, prefix: int) -> tuple[Tensor, list[int]]:
    """The same, with one token less and the mean of the others, weighted by their scores, behind them; it has -1."""
    left, positions = keep_best(tokens, scores, remove + 1, prefix)
    others = [i for i in range(len(tokens)) if i not in positions]
    weights = [scores[i - prefix] for i in others]
    if sum(weights) == 0:
        weights = [1.0] * len(others)
    fused = sum(w / sum(weights) * tokens[i].double() for w, i in zip(weights, others, strict=True))
    return torch.cat((left, fused[None])), [*positions, -1]


def nearest(
    tokens: Tensor, key: Tensor, scores: list[float], remove: int, prefix: int, sizes: list[float] | None = None
) -> tuple[Tensor, list[int], list[float], list[int]]:
    """Tokens that are left of one image, where each stood, how many each stands for, and where each token went."""
    sizes = [1.0] * len(tokens) if sizes is None else sizes
    _, positions = keep_best(tokens, scores, remove, prefix)
    heads = key.shape[0]
    keys = key.double().tolist()
    mean = [[sum(k[i][d] for k in keys) / heads for d in range(key.shape[2])] for i in range(len(tokens))]
    sources = []
    for i in range(len(tokens)):
        likeness = [
            sum(a * b for a, b in zip(mean[i], mean[j], strict=True)) / math.hypot(*mean[i]) / math.hypot(*mean[j])
            for j in positions[prefix:]
        ]
        sources.append(positions.index(i) if i in positions else prefix + likeness.index(max(likeness)))
    rows, weights = [], []
    for k in range(len(positions)):
        group = [i for i, source in enumerate(sources) if source == k]
        weights.append(sum(sizes[i] for i in group))
        rows.append(sum(sizes[i] * tokens[i].double() for i in group) / weights[-1])
    return torch.stack(rows), positions, weights, sources


def mean_key_cosines(key: Tensor) -> list[list[float]]:
    """The cosine of the keys of each two tokens of one image, averaged over heads; `key` is (H, N, D)."""
    heads, tokens, channels = key.shape
    keys = key.double().tolist()
    mean = [[sum(k[i][d] for k in keys) / heads for d in range(channels)] for i in range(tokens)]
    norms = [math.hypot(*row) for row in mean]
    return [
        [sum(a * b for a, b in zip(mean[i], mean[j], strict=True)) / norms[i] / norms[j] for j in range(tokens)]
        for i in range(tokens)
    ]


def pitome_energy(key: Tensor, prefix: int, margin: float) -> list[float]:
    """Mean over the patch tokens j of f(cos(k_i, k_j) - margin), of every patch token i of one image."""
    cosines = [row[prefix:] for row in mean_key_cosines(key)[prefix:]]
    return [
        sum(u if u >= 0 else math.exp(u) - 1 for u in (cosine - margin for cosine in row)) / len(row) for row in cosines
    ]


def pitome(
    tokens: Tensor, key: Tensor, remove: int, prefix: int, margin: float, sizes: list[float] | None = None
) -> tuple[Tensor, list[int], list[float], list[int]]:
    """The 2R tokens with the highest energy in pairs: the first of a pair goes into the most similar of the seconds."""
    energy, cosines = pitome_energy(key, prefix, margin), mean_key_cosines(key)
    order = sorted(range(len(energy)), key=lambda i: energy[i], reverse=True)[: 2 * remove]
    seconds = [prefix + i for i in order[1::2]]
    goes = {prefix + i: max(seconds, key=lambda j, i=i: cosines[prefix + i][j]) for i in order[::2]}
    return merged(tokens, list(goes.items()), [1.0] * len(tokens) if sizes is None else sizes)


def soft_merge(
    tokens: Tensor,
    key: Tensor,
    scores: list[float],
    remove: int,
    prefix: int,
    temperature: float,
    sizes: list[float] | None = None,
) -> tuple[Tensor, list[int], list[float], list[int]]:
    """Each token that is not kept is shared among the kept ones; the source is that with the largest share."""
    sizes = [1.0] * len(tokens) if sizes is None else sizes
    _, positions = keep_best(tokens, scores, remove, prefix)
    kept, cosines = positions[prefix:], mean_key_cosines(key)
    shares = []
    for i in range(len(tokens)):
        weights = [math.exp(cosines[i][j] / temperature) for j in kept]
        own = [float(i == j) for j in kept]
        shares.append(own if i < prefix or i in kept else [weight / sum(weights) for weight in weights])
    rows, held = list(tokens.double()[:prefix]), list(sizes[:prefix])
    for k in range(len(kept)):
        given = [shares[i][k] * sizes[i] for i in range(len(tokens))]
        held.append(sum(given))
        rows.append(sum(weight / held[-1] * row for weight, row in zip(given, tokens.double(), strict=True)))
    sources = [i if i < prefix else prefix + shares[i].index(max(shares[i])) for i in range(len(tokens))]
    return torch.stack(rows), positions, held, sources
