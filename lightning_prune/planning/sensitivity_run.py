"""One run that measures the sensitivities to several methods on the same images, within a time limit."""

from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.errors import DataError
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.halving import next_look
from lightning_prune.planning.measurement_tuning import TUNING
from lightning_prune.planning.sensitivity import Sensitivity, dense_pass
from lightning_prune.profiling.accuracy_store import AccuracyStore, KeptSensitivity
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import Reduction

Worse = Callable[[Mapping[str, Sensitivity]], dict[str, tuple[str, ...]]]


class SensitivityRun:
    """The sensitivities to several methods, on as many images as the time allows.

    Those that are kept of an earlier run with about as much time are not measured again. Of the others all get a batch
    before any gets the next, and its size follows from the time of the last one. The first method is measured whatever
    time it takes; others are left out if there is no time for their first batch, and as soon as they are surely worse
    than others, which get the time that they would have taken.

    Args:
        transformer: The Vision Transformer, dense.
        methods: Label -> the method, and its table, which is filled.
        images: (images, C, H, W) calibration images.
        device: Where they are run.
        limit: The time limit of planning; a share of it is used.
        store: Where sensitivities are kept; None where they are not.
        seconds_per_image: Of a dense pass.

    Attributes:
        tables: Label -> its table; of what was left out there is none.
        missing: Those of them that are not known before `measure`.
        dominated: Label of a method that is surely worse than others -> those, and the number of images.
        not_finite: Name of a method whose outputs are NaN or infinite -> the message of the error.
        num_images: Number of images that all tables are of, at least.
        seconds: What the measurement took.
    """

    def __init__(
        self,
        transformer: VisionTransformer,
        methods: Mapping[str, tuple[Reduction, Sensitivity]],
        images: Tensor,
        device: torch.device,
        limit: TimeLimit,
        store: AccuracyStore | None = None,
        seconds_per_image: float = 0.0,
    ) -> None:
        self._transformer, self._images, self._device, self._limit = transformer, images, device, limit
        self._store, self._seconds_per_image = store, seconds_per_image
        self._methods = {label: reduction for label, (reduction, _) in methods.items()}
        self._own_seconds = (limit.deadline(TUNING.sensitivity_share) - limit.clock()) / len(methods)
        self.tables = {label: table for label, (_, table) in methods.items()}
        self.missing = {label: table for label, table in self.tables.items() if not self._recall(label, table)}
        self.dominated: dict[str, tuple[tuple[str, ...], int]] = {}
        self.not_finite: dict[str, str] = {}
        self.seconds = 0.0

    @property
    def num_images(self) -> int:
        """Number of images that all tables are of, at least."""
        return min(table.images for table in self.tables.values())

    def measure(self, worse: Worse, order: Tensor, sizes: Tensor | None, verbose: bool = False) -> None:
        """Measures what is missing.

        Args:
            worse: Of measured methods those that are surely worse than others -> which.
            order: (images,) indices of the images, in the order in which they are taken.
            sizes: (images,) what each counts for; see `Sensitivity.add`.
            verbose: Shows a progress bar on a terminal.
        """
        transformer, clock = self._transformer, self._limit.clock
        began, deadline = clock(), self._limit.deadline(TUNING.sensitivity_share)
        weight = next((p for p in transformer.root.parameters() if p.is_floating_point()), self._images)
        dtype = self._images.dtype if torch.is_autocast_enabled(self._device.type) else weight.dtype
        seen, size = 0, self._first_images(deadline - began)
        look = next_look(seen)
        seconds = self._limit.share(TUNING.sensitivity_share)
        with ready_to_run(transformer), progress_bar("Sensitivity of the blocks", seconds, verbose) as on_step:
            while self.missing and size and seen < len(self._images):
                started = clock()
                chosen = order[seen : seen + size]
                images = self._images[chosen].to(self._device, dtype)
                self._add(images, None if sizes is None else sizes[chosen], on_step, not seen, deadline)
                seen += len(images)
                took = max(clock() - started, 1e-9)
                if len(self.missing) > 1 and look <= seen < len(self._images) and clock() < deadline:
                    look = next_look(seen)
                    before = len(self.missing)
                    self._drop(worse(self.missing), seen)
                    took *= len(self.missing) / before
                affordable = len(images) * max(deadline - clock(), 0.0) / took
                most = min(affordable, look - seen if len(self.missing) > 1 and look > seen else TUNING.batch_images)
                size = int(min(most, TUNING.batch_images)) // TUNING.first_images * TUNING.first_images
        for label, table in self.missing.items():
            self._keep(label, table)
        self.seconds = clock() - began

    def _add(
        self, images: Tensor, sizes: Tensor | None, on_step: Callable[[], None], is_first: bool, deadline: float
    ) -> None:
        """Adds a batch to all tables that are missing."""
        dense = dense_pass(self._transformer, images)
        on_step()
        for label, table in list(self.missing.items()):
            if is_first and label != next(iter(self.tables)) and self._limit.clock() >= deadline:
                del self.missing[label], self.tables[label]
                continue
            try:
                table.add(images, on_step, dense, sizes)
            except DataError as error:
                if len(self.tables) == 1:
                    raise
                self.not_finite[self._methods[label].name] = str(error)
                del self.missing[label], self.tables[label]

    def _drop(self, dominated: Mapping[str, tuple[str, ...]], seen: int) -> None:
        """Measures methods no further that are surely worse than others; what is known of them is kept."""
        for label, better in dominated.items():
            self.dominated[label] = better, seen
            self._keep(label, self.missing[label])
            del self.missing[label], self.tables[label]

    def _first_images(self, seconds: float) -> int:
        """Images in the first batch: fewer than usual if even that would take too long."""
        depth, counts = self._transformer.depth, len(TUNING.sensitivity_shares)
        passes = 1 + sum(counts * (1 - block / depth) for table in self.missing.values() for block in table.blocks)
        affordable = seconds / max(passes * self._seconds_per_image, 1e-9)
        return int(min(max(affordable, 1), TUNING.first_images))

    def _recall(self, label: str, table: Sensitivity) -> bool:
        """Fills a table with what is kept, unless there is time for much better figures now; whether it did."""
        if self._store is None:
            return False
        kept = self._store.sensitivity(self._methods[label], table.blocks, table.counts)
        enough = TUNING.kept_ratio * self._own_seconds
        if kept is None or (kept.images < len(self._images) and kept.seconds < enough):
            return False
        table.take(np.array(kept.table), kept.images)
        return True

    def _keep(self, label: str, table: Sensitivity) -> None:
        if self._store is not None:
            kept = KeptSensitivity(table.table.tolist(), table.images, self._own_seconds)
            self._store.keep_sensitivity(self._methods[label], table.blocks, table.counts, kept)
