"""How many tokens to remove, and where: from a profile to a schedule."""

from lightning_prune.planning.api import plan, plan_blocks
from lightning_prune.planning.objectives import AccuracyBudget, LatencyBudget, Objective, Utility
from lightning_prune.planning.results import BlocksPlan, FrontEntry, Plan
from lightning_prune.profiling.accuracy_proxy import ProxyCurve

__all__ = [
    "AccuracyBudget",
    "BlocksPlan",
    "FrontEntry",
    "LatencyBudget",
    "Objective",
    "Plan",
    "ProxyCurve",
    "Utility",
    "plan",
    "plan_blocks",
]
