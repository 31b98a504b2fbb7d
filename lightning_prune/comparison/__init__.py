"""Dense against pruned: methods, objectives, target speed-ups and given schedules in one comparison."""

from lightning_prune.comparison.api import compare
from lightning_prune.comparison.best_variant import BestVariant
from lightning_prune.comparison.comparison_results import Comparison, read_results

__all__ = ["BestVariant", "Comparison", "compare", "read_results"]
