"""What a step from one token count to another costs at a block, from what the block minds when it alone reduces."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Table = NDArray[np.float64]

_STEEPEST = 2.0  # power of the removed tokens by which the divergence may go on beyond the measured counts
_NOTHING = 1e-9  # nats: less is taken for this, since logarithms are interpolated


def step_costs(counts: Sequence[int], divergence: Table, levels: Sequence[int]) -> Table:
    """(levels, levels) nats that a block loses by going from one count (rows) to another (columns); 0 where none goes.

    Only steps from N were measured. From fewer tokens there are two estimates: a step costs what its two counts differ
    by when they are reached from N, or what the same share of N costs, and more the fewer tokens stand for the image.
    The first is too high for methods whose reach is a share (ToMe at its capacity merges tokens that are not alike,
    whatever their number), the second too low for those that drop ever better tokens. Their geometric mean orders
    random schedules best of what was tried.

    Args:
        counts: Measured, ascending, N last.
        divergence: (counts,) of each from N; 0 at N.
        levels: Token counts, ascending, N last.

    Example:
        >>> import numpy as np
        >>> from lightning_prune.planning.step_costs import step_costs
        >>> step_costs([50, 100], np.array([0.4, 0.0]), [25, 50, 100])[2].round(2).tolist()
        [0.6, 0.4, 0.0]
    """
    places = np.array(levels, dtype=float)
    n = places[-1]
    alone = divergence_at(counts, divergence, places)
    difference = np.maximum(alone[None, :] - alone[:, None], 0.0)
    entering, leaving = places[:, None], np.minimum(places[None, :], places[:, None])
    share = divergence_at(counts, divergence, n * leaving / entering) * n / entering
    return np.sqrt(difference * share)


def divergence_at(counts: Sequence[int], divergence: Table, wanted: Table) -> Table:
    """The divergence at other counts than the measured ones; it never falls when more tokens go.

    Between measured counts its logarithm is straight. Of fewer tokens than were ever removed it is proportional to
    their number; of more it follows the power of that number that the last two counts do, at most the square.

    Args:
        counts: Measured, ascending, N last; at least one besides N.
        divergence: (counts,) of each; 0 at N.
        wanted: Any shape, counts up to N.
    """
    removed = counts[-1] - np.array(counts[:-1], dtype=float)[::-1]  # ascending, without dense
    logs = np.log(np.maximum(np.maximum.accumulate(divergence[:-1][::-1]), _NOTHING))
    gone = np.maximum(counts[-1] - wanted, 0.0)
    small = np.exp(logs[0]) * gone / removed[0]
    power = (logs[-1] - logs[-2]) / np.log(removed[-1] / removed[-2]) if len(logs) > 1 else 1.0
    large = np.exp(logs[-1]) * (np.maximum(gone, removed[-1]) / removed[-1]) ** min(power, _STEEPEST)
    inside = np.exp(np.interp(gone, removed, logs))
    return np.where(gone < removed[0], small, np.where(gone > removed[-1], large, inside))
