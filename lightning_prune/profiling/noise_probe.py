"""Noise of the machine: one small Vision Transformer is timed against itself, where every difference is noise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from lightning_prune._utils.device import between_runs, device_name
from lightning_prune._utils.random_state import preserve_random_state
from lightning_prune._utils.readings import NotReadable, attempt
from lightning_prune._utils.system_load import cpu_times
from lightning_prune.profiling.accuracy_proxy import Z95
from lightning_prune.profiling.clocks import clock_name, read_clock
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS, InterleavedTimer, LatencyStats
from lightning_prune.profiling.page_faults import MATTERS, seconds_per_fault

SECONDS = 2.0
"""Of each condition."""
_MOST_ROUNDS = 2000
_MODEL: dict[str, Any] = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 4, "num_heads": 3}
_ABOUT = "a ViT of width 192 and depth 4 with random weights, one image of 224 x 224, float32"


@dataclass(frozen=True)
class NoiseReading:
    """How far two timings of the same model differ.

    Attributes:
        device: Where it ran.
        threads: Of PyTorch; None on an accelerator.
        clock: `"wall"` or `"cpu"`.
        milliseconds: Median of a run.
        run_spread: Half the interquartile range of single runs, over their median.
        drift: Half the interquartile range of the speed of rounds, which comparisons within rounds are free of.
        difference: Of the two medians, as a share: the models are one, so that it should be 0.
        error: Standard error of their ratio.
        rounds: In each of which both ran.
        faults: Median of the page faults of a run; None where they are not counted.
    """

    device: str
    threads: int | None
    clock: str
    milliseconds: float
    run_spread: float
    drift: float
    difference: float
    error: float
    rounds: int
    faults: float | None = None

    @property
    def smallest_gain(self) -> float:
        """The smallest share of latency saved that these rounds tell from noise, at 95% confidence."""
        return max(Z95 * self.error, abs(self.difference))

    @property
    def verdict(self) -> str:
        """What follows for comparisons on this machine, as a sentence."""
        if self.rounds < LEAST_ROUNDS:
            return f"{self.rounds} rounds say nothing of the noise."
        gain = f"{100 * self.smallest_gain:.1f}%"
        spread = f"single runs spread by {100 * self.run_spread:.1f}%"
        if self.smallest_gain <= MATTERS:
            return f"Gains of {gain} and more can be told from noise in {self.rounds} rounds; {spread}."
        return f"Noisy: gains below {gain} cannot be told from noise in {self.rounds} rounds; {spread}."

    def as_dict(self) -> dict[str, Any]:
        """The figures as plain values, in percent where they are shares."""
        return {
            "device": self.device,
            **({} if self.threads is None else {"threads": self.threads}),
            "clock": self.clock,
            "ms": round(self.milliseconds, 3),
            "run_spread_percent": round(100 * self.run_spread, 2),
            "drift_percent": round(100 * self.drift, 2),
            "difference_percent": round(100 * self.difference, 2),
            "smallest_gain_percent": round(100 * self.smallest_gain, 2),
            "rounds": self.rounds,
            "page_faults": self.faults,
            "verdict": self.verdict,
        }


def noise_of_machine(seconds: float = SECONDS) -> dict[str, Any]:
    """Times a small model against itself at one thread, by both clocks, at all threads, and on the accelerator.

    The number of threads and the global random state are put back.

    Args:
        seconds: Of each condition; the first runs are not counted.

    Returns:
        Condition -> the figures of `NoiseReading`, what ran, the microseconds of a page fault, and how busy all cores
        were meanwhile. The reason in place of what fails.
    """
    before = cpu_times()
    cpu, threads = torch.device("cpu"), torch.get_num_threads()
    found: dict[str, Any] = {"model": _ABOUT}
    for count, clock in dict.fromkeys([(1, "wall"), (1, "cpu"), (threads, "wall")]):
        with threads_of(count):
            condition = f"{count} thread{'s' * (count > 1)}, {clock} clock"
            found[condition] = attempt(partial(_figures, cpu, clock, seconds))
    accelerator = attempt(_accelerator)
    if isinstance(accelerator, NotReadable):
        found["accelerator"] = accelerator
    elif accelerator is not None:
        found[f"{accelerator.type}, wall clock"] = attempt(partial(_figures, accelerator, "wall", seconds))
    found["page_fault_us"] = attempt(_page_fault_us)
    after = cpu_times()
    if isinstance(before, NotReadable):
        found["all_cores_meanwhile"] = before
    else:
        found["all_cores_meanwhile"] = after if isinstance(after, NotReadable) else after.since(before)
    return found


def probe(
    device: torch.device,
    clock: str | Callable[[], float] = "wall",
    seconds: float = SECONDS,
    model: nn.Module | None = None,
) -> NoiseReading:
    """Times a model against itself in alternating order.

    Args:
        device: Where it runs.
        clock: `"wall"`, `"cpu"`, or a function that returns seconds.
        seconds: After which no round begins, by the clock of deadlines.
        model: Takes (1, 3, 224, 224) images; a small Vision Transformer if None.

    Example:
        >>> import torch
        >>> from lightning_prune.profiling.noise_probe import probe
        >>> reading = probe(torch.device("cpu"), "cpu", seconds=0.2)
        >>> reading.clock, reading.rounds >= 3
        ('cpu', True)
    """
    timed_by = read_clock(clock, device.type)
    with preserve_random_state(), torch.inference_mode():
        torch.manual_seed(0)
        run = (VisionTransformer(num_classes=10, **_MODEL) if model is None else model).to(device).eval()
        images = torch.rand(1, 3, 224, 224).to(device)
        timer: InterleavedTimer[str] = InterleavedTimer(
            lambda _: None, lambda: run(images), between_runs(device), reference="one", clock=timed_by
        )
        timer.measure(["again"], LEAST_ROUNDS)
        timer.measure(["again"], _MOST_ROUNDS, timed_by() + seconds)
    again, one = timer.result("again"), timer.result("one")
    return NoiseReading(
        device=device_name(device),
        threads=torch.get_num_threads() if device.type == "cpu" else None,
        clock=clock_name(timed_by),
        milliseconds=one.milliseconds,
        run_spread=_share(one),
        drift=timer.drift(),
        difference=again.ratio - 1,
        error=again.ratio_stderr,
        rounds=again.rounds,
        faults=one.faults,
    )


@contextmanager
def threads_of(count: int) -> Iterator[None]:
    """A context in which PyTorch has a number of threads.

    Args:
        count: Of threads.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _figures(device: torch.device, clock: str, seconds: float) -> dict[str, Any]:
    return probe(device, clock, seconds).as_dict()


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None


def _page_fault_us() -> float | NotReadable:
    seconds = seconds_per_fault()
    return NotReadable("none were counted") if seconds is None else round(1e6 * seconds, 3)


def _share(stats: LatencyStats) -> float:
    return stats.spread / stats.milliseconds
