"""How many tokens to remove, in which blocks, and by which method: from measurements to a schedule."""

from lightning_prune.planning.api import plan, plan_many
from lightning_prune.planning.candidates import Candidate
from lightning_prune.planning.method_selection import AUTO_METHODS
from lightning_prune.planning.objectives import AccuracyBudget, LatencyBudget, Objective, Utility
from lightning_prune.planning.results import Plan

__all__ = [
    "AUTO_METHODS",
    "AccuracyBudget",
    "Candidate",
    "LatencyBudget",
    "Objective",
    "Plan",
    "Utility",
    "plan",
    "plan_many",
]
