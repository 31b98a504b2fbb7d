"""How long the tasks of a comparison take at least, from two passes of the dense model in each runtime."""

from collections.abc import Callable

from torch import Tensor

from lightning_prune._utils.device import synchronize
from lightning_prune.comparison.target_search import TUNING
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning import measurement_tuning
from lightning_prune.planning.overhead_probes import graphs_to_probe
from lightning_prune.planning.probed_schedules import PROBES
from lightning_prune.profiling.interleaved_timer import timed_seconds
from lightning_prune.profiling.model_variants import settle_seconds
from lightning_prune.runtimes import Runtime

_PASSES_OF_COSTS = 3.0  # that two passes take as long as in which every operation is followed


class LeastTimes:
    """The seconds that tasks take at least, so that none begins for which there is no time.

    Args:
        transformer: The Vision Transformer, dense.
        images: (B, C, H, W) on its device.
        clock: Seconds.
    """

    def __init__(self, transformer: VisionTransformer, images: Tensor, clock: Callable[[], float]) -> None:
        self._transformer, self._images, self._clock = transformer, images, clock
        self._seconds_per_pass = 0.0  # of the dense model, in the slowest runtime
        self._seconds_per_graph: dict[Runtime, float] = {}

    def time_passes(self, runtime: Runtime) -> None:
        """Times two passes of the dense model in a runtime that is applied to it.

        What the first one takes longer is what each variant takes to be compiled or converted.

        Args:
            runtime: The runtime.
        """
        seconds = []
        for _ in range(2):
            start = self._clock()
            self._transformer.compiled_root(self._images)
            synchronize(self._images.device)
            seconds.append(self._clock() - start)
        first, later = seconds
        self._seconds_per_pass = max(self._seconds_per_pass, later)
        self._seconds_per_graph[runtime] = max(first - later, 0.0) if runtime.compiles else 0.0

    def of_final_run(self, variants: int) -> float:
        """Seconds of the run of all variants.

        Args:
            variants: Their number, dense included.
        """
        # PyTorch in float32 is part of the rounds.
        timed = timed_seconds(self._seconds_per_pass, settle_seconds([*self._seconds_per_graph, None]))
        return variants * (self._seconds_per_pass + TUNING.min_final_rounds * timed)

    def of_costs(self, variants: int) -> float:
        """Seconds of counting the operations and the memory of all variants: two passes that are followed by Python.

        Args:
            variants: Their number, dense included.
        """
        return _PASSES_OF_COSTS * variants * self._seconds_per_pass

    def of_search(self, runtime: Runtime, targets: int) -> float:
        """Seconds of the search for target speed-ups: each amount is run twice, and dense with it.

        Args:
            runtime: The runtime.
            targets: Their number.
        """
        passes = 2 + 2 * TUNING.grid_points[0] + 1 + 2 * targets + 1
        graphs = TUNING.grid_points[0] + targets
        timed = timed_seconds(self._seconds_per_pass, settle_seconds([runtime]))
        return passes * timed + graphs * self._seconds_per_graph[runtime]

    def of_front(self, runtime: Runtime) -> float:
        """Seconds of the front of one method: overhead, sensitivity, proxies, and a timing run.

        Args:
            runtime: The runtime.
        """
        tuning, depth = measurement_tuning.TUNING, self._transformer.depth
        images = 1 + len(tuning.sensitivity_shares) * depth / 2 + tuning.min_proxies * tuning.min_images
        passes = PROBES * tuning.min_runs_per_probe + images / len(self._images) + 4
        graphs = 1 + graphs_to_probe(self._transformer, runtime)
        timed = timed_seconds(self._seconds_per_pass, settle_seconds([runtime]))
        return passes * timed + graphs * self._seconds_per_graph[runtime]
