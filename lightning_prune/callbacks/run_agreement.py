"""What the ranks of a pruned run agree on: twice, before the step of its first batch and after it."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning as L

from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.rank_agreement import join_decision


class Agreed(NamedTuple):
    """What rank 0 tells the others.

    Attributes:
        decision: The decision; None where none can be made, or has to wait.
        keywords: Further arguments of the transformer for which it was made.
        waits: Whether it is made when the step calls the transformer; only in a single process.
        is_new: Whether it replaces an earlier one of this run.
    """

    decision: Decision | None = None
    keywords: Mapping[str, Any] = {}
    waits: bool = False
    is_new: bool = True


def join_agreements(trainer: L.Trainer) -> Agreed | None:
    """Takes part in both agreements of the other ranks, on a rank without a batch.

    Args:
        trainer: Of this rank.

    Returns:
        The last decision; None if no rank has a batch, or there is one process.

    Raises:
        PruneError: As `lightning_prune.callbacks.rank_agreement.join_decision`.
    """
    before: Agreed | None = join_decision(trainer)
    if before is None:
        return None
    after: Agreed = join_decision(trainer)
    return after if after.is_new else before
