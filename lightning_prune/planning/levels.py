"""Which token counts of a latency curve a search over blocks goes through."""

import numpy as np

from lightning_prune.profiling import LatencyProfile

_MOST = 40  # the time of the search grows with the square


def search_levels(curve: LatencyProfile) -> list[int]:
    """The counts of a curve, ascending, N last; of more than forty the lower edges of cliffs and a spread of others.

    Where the device gains nothing, N alone.

    Args:
        curve: All tokens go before block 0.
    """
    if not any(curve.saves(count) for count in curve.tokens):
        return [curve.dense_tokens]
    if len(curve.tokens) <= _MOST:
        return list(curve.tokens)
    cliffs = sorted(curve.cliffs(), key=curve.excess, reverse=True)[: _MOST // 2]
    edges = {curve.tokens[0], curve.dense_tokens, *(cliff.below for cliff in cliffs)}
    others = [count for count in curve.tokens if count not in edges]
    places = np.linspace(0, len(others) - 1, min(_MOST - len(edges), len(others))).round().astype(int)
    return sorted(edges | {others[place] for place in places})
