"""Lightning callbacks: `TokenPruning` and its settings."""

from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.token_pruning import TokenPruning, config_of

__all__ = ["PruningConfig", "TokenPruning", "config_of"]
