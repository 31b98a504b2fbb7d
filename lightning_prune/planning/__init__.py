"""How many tokens to remove, and where: from a profile to a schedule."""

from lightning_prune.planning.blocks_plan import BlocksPlan, FrontEntry
from lightning_prune.planning.objective import AccuracyBudget, LatencyBudget, Objective, Utility
from lightning_prune.planning.plan import Plan
from lightning_prune.planning.planner import plan
from lightning_prune.planning.proxy_curve import ProxyCurve
from lightning_prune.planning.several import plan_blocks

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
