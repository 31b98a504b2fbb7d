"""8-bit weights and activations, for comparison and combination with pruning."""

from lightning_prune.quantization.availability import unsupported_reason
from lightning_prune.quantization.backend import allow_checkpoints, int8_backend
from lightning_prune.quantization.weights import Int8Weights

__all__ = ["Int8Weights", "allow_checkpoints", "int8_backend", "unsupported_reason"]
