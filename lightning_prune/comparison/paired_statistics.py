"""How certain a difference in accuracy is: two variants judged by the same images."""

from collections.abc import Callable, Sequence
from math import sqrt
from statistics import NormalDist, fmean, stdev
from typing import NamedTuple

from lightning_prune.errors import ArgumentError


class Difference(NamedTuple):
    """A difference between two shares, or two means, of the same images, with its confidence interval.

    Attributes:
        change: Second minus first; of shares in [-1, 1].
        low: Lower end of the interval.
        high: Upper end.
    """

    change: float
    low: float
    high: float


def paired_difference(first: Sequence[bool], second: Sequence[bool], confidence: float = 0.95) -> Difference:
    """The change in accuracy from one variant to another, judged by the same images in the same order.

    Args:
        first: For each image whether the first variant (dense) is right.
        second: For each image whether the second is right.
        confidence: Of the interval.

    Returns:
        The change with its interval; see `paired_interval`.

    Raises:
        ArgumentError: If there are no images, or not as many of both.

    Example:
        >>> from lightning_prune.comparison.paired_statistics import paired_difference
        >>> paired_difference([True, True, False, True], [True, False, False, True]).change
        -0.25
    """
    if not len(first) or len(first) != len(second):
        raise ArgumentError(f"`first` and `second` must be of the same images, got {len(first)} and {len(second)}.")
    pairs = list(zip(map(bool, first), map(bool, second), strict=True))
    return paired_interval(pairs.count((False, True)), pairs.count((True, False)), len(pairs), confidence)


def paired_mean_difference(first: Sequence[float], second: Sequence[float], confidence: float = 0.95) -> Difference:
    """The change of the mean of a metric from one variant to another, by the same images in the same order.

    Args:
        first: The metric of each image by the first variant (dense).
        second: That by the second.
        confidence: Of the interval, in (0, 1).

    Returns:
        The mean of the differences, and the ends of its interval by the normal distribution; of a single image they are
        the difference itself.

    Raises:
        ArgumentError: If there are no images, or not as many of both, or `confidence` is not in (0, 1).

    Example:
        >>> from lightning_prune.comparison.paired_statistics import paired_mean_difference
        >>> [round(value, 3) for value in paired_mean_difference([0.5, 0.7, 0.9], [0.4, 0.7, 0.7])]
        [-0.1, -0.213, 0.013]
    """
    if not len(first) or len(first) != len(second):
        raise ArgumentError(f"`first` and `second` must be of the same images, got {len(first)} and {len(second)}.")
    if not 0 < confidence < 1:
        raise ArgumentError(f"`confidence` must be in (0, 1), got {confidence!r}.")
    differences = [b - a for a, b in zip(first, second, strict=True)]
    change, count = fmean(differences), len(differences)
    error = stdev(differences) / sqrt(count) if count > 1 else 0.0
    half = NormalDist().inv_cdf((1 + confidence) / 2) * error
    return Difference(change, change - half, change + half)


def paired_interval(gained: int, lost: int, images: int, confidence: float = 0.95) -> Difference:
    """Tango's score interval for the difference of two paired proportions.

    It holds the differences that a score test, with the nuisance parameter at its likeliest value under each, does not
    refute. Unlike the interval by the normal distribution it keeps its coverage at small counts: where no image is
    judged differently it has still a width, about z^2 / n to either side. (T. Tango, Equivalence test and confidence
    interval for the difference in proportions for the paired-sample design, Statistics in Medicine 17, 1998.)

    Args:
        gained: Images that only the second variant is right about.
        lost: Images that only the first is right about.
        images: All images.
        confidence: Of the interval, in (0, 1).

    Returns:
        (gained - lost) / images and the ends of its interval.

    Raises:
        ArgumentError: If the counts are negative or more than there are images, or `confidence` is not in (0, 1).

    Example:
        >>> from lightning_prune.comparison.paired_statistics import paired_interval
        >>> [round(value, 4) for value in paired_interval(gained=4, lost=12, images=1000)]
        [-0.008, -0.0173, -0.0002]
    """
    if min(gained, lost) < 0 or images < 1 or gained + lost > images:
        raise ArgumentError(
            f"`gained` and `lost` must be counts of `images` >= 1, got {gained} and {lost} of {images} images."
        )
    if not 0 < confidence < 1:
        raise ArgumentError(f"`confidence` must be in (0, 1), got {confidence!r}.")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    change = (gained - lost) / images

    def refuted(delta: float) -> bool:
        return abs(_score(gained, lost, images, delta)) > z

    return Difference(change, _edge(refuted, change, -1.0), _edge(refuted, change, 1.0))


def agreement(first: Sequence[int], second: Sequence[int]) -> float:
    """Share of images with the same predicted class.

    Args:
        first: Class of each image by the first variant.
        second: Class of each image by the second.

    Raises:
        ArgumentError: If there are no images, or not as many of both.

    Example:
        >>> from lightning_prune.comparison.paired_statistics import agreement
        >>> agreement([3, 1, 4, 1], [3, 1, 4, 5])
        0.75
    """
    if not len(first) or len(first) != len(second):
        raise ArgumentError(f"`first` and `second` must be of the same images, got {len(first)} and {len(second)}.")
    return sum(int(a) == int(b) for a, b in zip(first, second, strict=True)) / len(first)


def _score(gained: int, lost: int, n: int, delta: float) -> float:
    """The score statistic of the hypothesis that the true difference is `delta`; standard normal if it is.

    With p the probability of a lost image and p + delta that of a gained one, the likeliest p under the hypothesis is
    the larger root of 2n p^2 - (gained + lost - (2n - gained + lost) delta) p - lost delta (1 - delta).
    """
    half = (gained + lost - (2 * n - gained + lost) * delta) / 2
    root = sqrt(max(half * half + 2 * n * lost * delta * (1 - delta), 0.0))
    p = (half + root) / (2 * n)
    variance = n * (2 * p + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance > 0:
        return distance / sqrt(variance)
    return 0.0 if abs(distance) < 1e-9 else float("inf")


def _edge(refuted: Callable[[float], bool], inside: float, outside: float) -> float:
    """Where `refuted` begins on the way from `inside`, by halving; `outside` where it does not."""
    if not refuted(outside):
        return outside
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (inside, middle) if refuted(middle) else (middle, outside)
    return inside
