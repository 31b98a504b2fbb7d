"""Lightning callbacks: what users touch first."""

from lightning_prune.callbacks.token_pruning import TokenPruning

__all__ = ["TokenPruning"]
