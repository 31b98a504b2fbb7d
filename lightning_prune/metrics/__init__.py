"""What a validation measures besides accuracy, as `torchmetrics.Metric` classes."""

from lightning_prune.metrics.energy import Energy
from lightning_prune.metrics.latency import Latency
from lightning_prune.metrics.throughput import Throughput
from lightning_prune.metrics.timing import StepTimer, steady

__all__ = ["Energy", "Latency", "StepTimer", "Throughput", "steady"]
