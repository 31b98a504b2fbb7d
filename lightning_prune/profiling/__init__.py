"""What tokens cost, and what they are worth, on this device: latency profiles and accuracy proxies."""

from lightning_prune.profiling.accuracy import Proxy, soft_agreement
from lightning_prune.profiling.context import measurement_context
from lightning_prune.profiling.curve import LatencyProfile, Span
from lightning_prune.profiling.dependencies import profile_dependencies
from lightning_prune.profiling.energy import EnergyReading, Unavailable, find_counter, measure_energy
from lightning_prune.profiling.latency import compare_latency, profile_latency
from lightning_prune.profiling.simulated import SimulatedClock, SimulatedDevice, Workload
from lightning_prune.profiling.simulating import simulate_latency
from lightning_prune.profiling.spreading import reducing_block, resolve_block, spread_schedule
from lightning_prune.profiling.store import ProfileStore
from lightning_prune.profiling.timing import Interleaved, Timing
from lightning_prune.profiling.variant import DENSE, Variant, VariantSwitch

__all__ = [
    "DENSE",
    "EnergyReading",
    "Interleaved",
    "LatencyProfile",
    "ProfileStore",
    "Proxy",
    "SimulatedClock",
    "SimulatedDevice",
    "Span",
    "Timing",
    "Unavailable",
    "Variant",
    "VariantSwitch",
    "Workload",
    "compare_latency",
    "find_counter",
    "measure_energy",
    "measurement_context",
    "profile_dependencies",
    "profile_latency",
    "reducing_block",
    "resolve_block",
    "simulate_latency",
    "soft_agreement",
    "spread_schedule",
]
