"""8-bit weights and activations, to be compared with pruning and combined with it."""

from lightning_prune.quantization.availability import unsupported_reason
from lightning_prune.quantization.backend import allow_checkpoints, int8_backend
from lightning_prune.quantization.weights import Int8Weights

__all__ = ["Int8Weights", "allow_checkpoints", "int8_backend", "unsupported_reason"]
