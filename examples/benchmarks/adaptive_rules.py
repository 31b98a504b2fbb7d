"""Rules that choose a graph for each image by a score, the static mix that they have to beat, and how sure that is.

A rule sorts images into buckets by thresholds of one score; each bucket has a graph. The static mix takes one of two
plans (a graph, or two graphs whose outputs are averaged) at random, whatever the image is: it attains every mean
latency between those of the plans.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, Any]
Costs = Callable[[tuple[int, ...]], Sequence[float]]
"""Graphs of the buckets -> mean latency of an image in each bucket, with the score."""


class Rule(NamedTuple):
    """Which graph runs an image.

    Attributes:
        graphs: Of the buckets.
        thresholds: Between them, ascending; an image at a threshold is in the bucket above.
        costs: Latency of an image in each bucket.
    """

    graphs: tuple[int, ...]
    thresholds: tuple[float, ...]
    costs: tuple[float, ...]

    def buckets(self, score: Array) -> Array:
        """(images,) -> (images,): the bucket of each."""
        return np.searchsorted(np.array(self.thresholds), score, side="right")

    def applied(self, score: Array, values: Array) -> tuple[Array, Array]:
        """The value and the latency of each image; `values` are (images, graphs)."""
        bucket = self.buckets(score)
        return values[np.arange(len(score)), np.array(self.graphs)[bucket]], np.array(self.costs)[bucket]


class Ranked:
    """Images sorted by a score, cut into parts of one size.

    Args:
        score: (images,).
        values: (images, graphs), such as whether a graph is right.
        parts: Number of parts; thresholds lie between two of them.
    """

    def __init__(self, score: Array, values: Array, parts: int) -> None:
        order = np.argsort(score, kind="stable")
        self.ends = np.unique(np.linspace(0, len(score), parts + 1).round().astype(int))
        self.score, self.images = score[order], len(score)
        total = np.concatenate([np.zeros((1, values.shape[1])), np.cumsum(values[order], axis=0)])
        self.sums = total[self.ends] / self.images  # (parts + 1, graphs)
        self.shares = self.ends / self.images

    def threshold(self, cut: int) -> float:
        """Halfway between the images to the two sides of a cut."""
        end = self.ends[cut]
        return float((self.score[end - 1] + self.score[end]) / 2)


def best_rules(
    ranked: Ranked,
    latency: Sequence[float],
    costs: Costs,
    buckets: int,
    targets: Sequence[float],
    first: int | None = None,
) -> list[tuple[Rule, float] | None]:
    """For each mean latency the rule of the highest mean value, by trying all; with that value.

    Graphs get slower from bucket to bucket, so an image of a higher score never gets a faster one. With `first`, that
    graph runs the lowest bucket.
    """
    by_latency = [int(graph) for graph in np.argsort(latency, kind="stable")]
    cuts = np.array(list(combinations(range(1, len(ranked.ends) - 1), buckets - 1))).reshape(-1, buckets - 1)
    edges = np.hstack([np.zeros((len(cuts), 1), int), cuts, np.full((len(cuts), 1), len(ranked.ends) - 1)])
    shares = np.diff(ranked.shares[edges], axis=1)
    found: list[tuple[Rule, float] | None] = [None] * len(targets)
    for graphs in combinations(by_latency, buckets):
        if first not in (None, graphs[0]):
            continue
        price = np.array(costs(graphs))
        value = sum(ranked.sums[edges[:, k + 1], g] - ranked.sums[edges[:, k], g] for k, g in enumerate(graphs))
        mean = shares @ price
        for place, target in enumerate(targets):
            allowed = np.where(mean <= target + 1e-12, value, -np.inf)
            best = int(allowed.argmax())
            now = found[place]
            if allowed[best] > (-np.inf if now is None else now[1] + 1e-12):
                thresholds = tuple(ranked.threshold(cut) for cut in cuts[best])
                found[place] = Rule(graphs, thresholds, tuple(price.tolist())), float(allowed[best])
    return found


def static_front(means: Array, latency: Sequence[float]) -> list[int]:
    """The plans that mixes consist of, fastest first: the corners of the upper concave front, up to the best value."""
    front: list[int] = []
    for graph in sorted(range(len(latency)), key=lambda graph: (latency[graph], -means[graph])):
        if front and means[graph] <= means[front[-1]]:
            continue
        while len(front) > 1 and _slope(means, latency, front[-1], graph) >= _slope(means, latency, *front[-2:]):
            front.pop()
        front.append(graph)
    return front


def _slope(means: Array, latency: Sequence[float], first: int, second: int) -> float:
    return float((means[second] - means[first]) / (latency[second] - latency[first]))


def static_mix(front: Sequence[int], latency: Sequence[float], means: Array, targets: Array) -> Array:
    """The mean value of the best mix at each mean latency; of the ends of the front outside of it.

    `means` are (targets, graphs): the value of each graph alone.
    """
    rows, corners = np.arange(len(targets)), np.array(front)
    at = np.array([latency[graph] for graph in front])
    if len(front) == 1:
        return means[:, corners[0]]
    target = targets.clip(at[0], at[-1])
    left = (np.searchsorted(at, target) - 1).clip(0)
    slow = (target - at[left]) / (at[left + 1] - at[left])
    return (1 - slow) * means[rows, corners[left]] + slow * means[rows, corners[left + 1]]


class Judged(NamedTuple):
    """A rule on images that it was not chosen on, and the static mix of the same mean latency.

    Attributes:
        adaptive: Mean value of the rule.
        static: Mean value of the mix.
        latency: Mean latency of both.
        resampled: (resamples,), the difference on images drawn again.
        images: Number of images.
    """

    adaptive: float
    static: float
    latency: float
    resampled: Array
    images: int

    @property
    def difference(self) -> float:
        return self.adaptive - self.static


class Static:
    """The static plans on the images on which rules are judged, once for all rules.

    Args:
        values: (images, plans).
        front: Plans that mixes consist of; see `static_front`.
        latency: Of each plan.
        draws: (resamples, images): how often each resample has each image; see `resamples`.
    """

    def __init__(self, values: Array, front: Sequence[int], latency: Sequence[float], draws: Array) -> None:
        self.front, self.latency, self.draws = front, latency, draws
        self.means = values.mean(axis=0, keepdims=True)
        self.resampled = self.draws @ values / values.shape[0]

    def judge(self, rule: Rule, score: Array, values: Array) -> Judged:
        """Compares a rule with the best mix of the rule's own mean latency on these images, in each resample.

        `score` are (images,), `values` (images, graphs): what a rule by that score gets of each graph.
        """
        right, took = rule.applied(score, values)
        means = self.draws @ np.column_stack([right, took]) / len(score)
        mixed = static_mix(self.front, self.latency, self.resampled, means[:, 1])
        static = static_mix(self.front, self.latency, self.means, took.mean(keepdims=True))
        return Judged(float(right.mean()), float(static[0]), float(took.mean()), means[:, 0] - mixed, len(score))


def resamples(images: int, count: int, seed: int) -> Array:
    """(count, images): how often each image is in a sample of as many images, drawn with replacement."""
    return np.random.default_rng(seed).multinomial(images, np.full(images, 1 / images), size=count).astype(float)


def pooled(parts: Sequence[Judged]) -> tuple[float, float, float]:
    """Difference with its 95% interval over parts of the images, each judged by rules chosen on others."""
    weights = np.array([part.images for part in parts]) / sum(part.images for part in parts)
    low, high = np.quantile(weights @ np.stack([part.resampled for part in parts]), [0.025, 0.975])
    return float(weights @ [part.difference for part in parts]), float(low), float(high)


def halves(images: int, seed: int) -> Iterator[tuple[Array, Array]]:
    """Images to choose rules on, and the others to judge them on; then the other way round."""
    order = np.random.default_rng(seed).permutation(images)
    first, second = np.sort(order[: images // 2]), np.sort(order[images // 2 :])
    yield first, second
    yield second, first
