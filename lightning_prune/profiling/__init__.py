"""What tokens cost, and what they are worth, on this device: latency profiles and accuracy proxies."""

from lightning_prune._utils.device import between_runs
from lightning_prune.patching.schedule_forms import reducing_block, resolve_block
from lightning_prune.profiling.accuracy_proxy import DENSE_ACCURACY, Estimate, Proxy
from lightning_prune.profiling.energy_counter import Unavailable, find_counter
from lightning_prune.profiling.energy_meter import EnergyReading, measure_energy
from lightning_prune.profiling.environment import measurement_context, profile_dependencies
from lightning_prune.profiling.installation_report import machine_report
from lightning_prune.profiling.interleaved_timer import InterleavedTimer, LatencyStats
from lightning_prune.profiling.latency_profile import CountStep, LatencyProfile
from lightning_prune.profiling.measurement import TOKEN_CURVE, compare_latency, profile_latency
from lightning_prune.profiling.model_variants import DENSE, Variant, VariantSwitch
from lightning_prune.profiling.output_kinds import soft_agreement
from lightning_prune.profiling.profile_store import ProfileStore
from lightning_prune.profiling.simulated_device import SimulatedDevice, Workload
from lightning_prune.profiling.simulation import SimulatedClock, simulate_latency

__all__ = [
    "DENSE",
    "DENSE_ACCURACY",
    "TOKEN_CURVE",
    "CountStep",
    "EnergyReading",
    "Estimate",
    "InterleavedTimer",
    "LatencyProfile",
    "LatencyStats",
    "ProfileStore",
    "Proxy",
    "SimulatedClock",
    "SimulatedDevice",
    "Unavailable",
    "Variant",
    "VariantSwitch",
    "Workload",
    "between_runs",
    "compare_latency",
    "find_counter",
    "machine_report",
    "measure_energy",
    "measurement_context",
    "profile_dependencies",
    "profile_latency",
    "reducing_block",
    "resolve_block",
    "simulate_latency",
    "soft_agreement",
]
