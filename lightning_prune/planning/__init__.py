"""How many tokens to remove, and where: from a profile to a schedule."""

from lightning_prune.planning.objective import AccuracyBudget, Objective, Utility
from lightning_prune.planning.plan import Plan
from lightning_prune.planning.planner import plan
from lightning_prune.planning.proxy_curve import ProxyCurve

__all__ = ["AccuracyBudget", "Objective", "Plan", "ProxyCurve", "Utility", "plan"]
