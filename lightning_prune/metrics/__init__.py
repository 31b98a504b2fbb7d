"""Latency, throughput and energy of an evaluation, as `torchmetrics.Metric` classes."""

from lightning_prune.metrics.energy import Energy
from lightning_prune.metrics.group_accuracy import GroupAccuracy
from lightning_prune.metrics.latency import Latency, StepTimer, drop_warmup
from lightning_prune.metrics.throughput import Throughput

__all__ = ["Energy", "GroupAccuracy", "Latency", "StepTimer", "Throughput", "drop_warmup"]
