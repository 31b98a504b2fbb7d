"""8-bit weights and activations, for comparison and combination with pruning."""

from lightning_prune.quantization.availability import unsupported_reason
from lightning_prune.quantization.weights import Int8Weights

__all__ = ["Int8Weights", "unsupported_reason"]
