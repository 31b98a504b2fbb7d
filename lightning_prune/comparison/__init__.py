"""Dense against pruned: methods, objectives, target speed-ups and given schedules in one comparison."""

from lightning_prune.comparison.api import compare
from lightning_prune.comparison.comparison_results import BestVariant, Comparison, read_results

__all__ = ["BestVariant", "Comparison", "compare", "read_results"]
