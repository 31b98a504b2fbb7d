"""Measurements of `ImageClassifier` in validation and test: accuracy, latency, throughput and energy."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune._utils.sampler_shares import SamplerShare, shares_of
from lightning_prune.errors import DataError
from lightning_prune.metrics import Energy, Latency, StepTimer, Throughput, drop_warmup
from lightning_prune.metrics.energy import QUANTITIES
from lightning_prune.profiling.energy_counter import EnergyCounter, Unavailable, device_counter
from lightning_prune.profiling.energy_meter import SHORTEST_WINDOW

_WINDOW = "evaluation"  # name of the counter's window


class Metered(NamedTuple):
    """Energy, images and seconds of a window, as `lightning_prune.metrics.Energy` takes them."""

    joules: float
    images: int
    seconds: float


class EnergyMeter:
    """Measures energy from the first batch after warm-up to the end of the run, loading included.

    A run of less than a second after warm-up has no result, because counters are updated every 0.1 s.

    Args:
        counter: Measures the energy; None if another process measures with the same counter.
        warmup: Number of batches at the start that are left out.
        agree: Reduces a condition over all processes of the run, which must log the same metrics.
        clock: Returns seconds.
    """

    def __init__(
        self,
        counter: EnergyCounter | None,
        warmup: int,
        agree: Callable[[bool], bool] = bool,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._counter = counter
        self._warmup = warmup
        self._agree = agree
        self._clock = clock
        self._batches = self._images = 0
        self._start = 0.0

    def begin(self, images: int) -> None:
        """Must be called before each batch, on an idle device."""
        if self._batches == self._warmup:
            self._start = self._clock()
            if self._counter is not None:
                self._counter.begin(_WINDOW)
        self._images += images if self._batches >= self._warmup else 0
        self._batches += 1

    def finish(self) -> Metered | None:
        """Ends the run. Returns None if any process has no result."""
        started = self._batches > self._warmup
        joules = self._counter.end(_WINDOW) if started and self._counter is not None else 0.0
        seconds = self._clock() - self._start if self._images else 0.0
        counted = self._counter is None or joules > 0
        return Metered(joules, self._images, seconds) if self._agree(seconds >= SHORTEST_WINDOW and counted) else None


def meter_of(trainer: L.Trainer, warmup: int) -> EnergyMeter | None:
    """The meter for a run of `trainer`; None if the device of any process has no energy counter."""
    device = trainer.strategy.root_device
    found = device_counter(device)
    counter = None if isinstance(found, Unavailable) else found
    if not trainer.strategy.reduce_boolean_decision(counter is not None, all=True):
        return None
    # The processes of a machine share its processor, whose energy is measured by the first.
    shares = device.type == "cpu" and trainer.local_rank > 0
    return EnergyMeter(None if shares else counter, warmup, trainer.strategy.reduce_boolean_decision)


class Evaluation(nn.Module):
    """Accuracy, loss, throughput, latency and energy of one run over the data, reduced over all processes.

    Args:
        num_classes: Size of the head; None if there is no head, so that there is no accuracy either.
        warmup: Number of batches at the start that are left out of the times; at least one is always counted.

    Attributes:
        refuses_broken: Whether logits that are not finite end the run; see `counting_broken`.

    Example:
        >>> import torch
        >>> from lightning_prune.classification.evaluation import Evaluation
        >>> evaluation = Evaluation(num_classes=3, warmup=0)
        >>> with evaluation.timing(torch.zeros(2, 1, 8, 8)):
        ...     logits = torch.eye(3)[:2]
        >>> evaluation.update(logits, torch.tensor([0, 2]))
        >>> evaluation.finish()["top1"].compute()
        tensor(0.5000)
    """

    def __init__(self, num_classes: int | None, warmup: int) -> None:
        super().__init__()
        self.warmup = warmup
        metrics: dict[str, Metric] = {}
        if num_classes is not None:
            metrics |= {"loss": MeanMetric(), "top1": _accuracy(num_classes, 1)}
        if num_classes is not None and num_classes > 5:
            metrics["top5"] = _accuracy(num_classes, 5)
        metrics |= {"throughput": Throughput(), "throughput_end_to_end": Throughput()}
        metrics |= {"latency_p50": Latency(0.5), "latency_p90": Latency(0.9)}
        metrics |= {quantity: Energy(quantity) for quantity in QUANTITIES}
        self.metrics = nn.ModuleDict(metrics)
        self.timer = StepTimer()
        self.meter: EnergyMeter | None = None
        self.shares: list[SamplerShare | None] = []
        self.refuses_broken = True

    @contextmanager
    def counting_broken(self) -> Iterator[None]:
        """A context in which logits that are not finite end no run: whoever enters it counts them, and says so."""
        before, self.refuses_broken = self.refuses_broken, False
        try:
            yield
        finally:
            self.refuses_broken = before

    def reset(self, trainer: L.Trainer | None = None) -> None:
        """Resets all metrics.

        Args:
            trainer: The trainer of the next run; images repeated by its distributed samplers are left out.
        """
        self.shares = shares_of(trainer) if trainer is not None else []
        self.timer = StepTimer()
        self.meter = meter_of(trainer, self.warmup) if trainer is not None else None
        for metric in self._by_name().values():
            metric.reset()

    @contextmanager
    def timing(self, images: Tensor) -> Iterator[None]:
        """Times the block, which runs a batch of images; the device is synchronised before and after it."""
        if self.meter is not None:
            self.meter.begin(len(images))
        with self.timer.timing(len(images), images.device):
            yield

    def update(self, logits: Tensor, labels: Tensor, batch_idx: int = 0, dataloader_idx: int = 0) -> None:
        """Adds one batch, which must have passed `check_batch`, without its repeated images.

        Args:
            logits: `(B, num_classes)`.
            labels: `(B,)`.
            batch_idx: Index of the batch in its loader.
            dataloader_idx: Index of the loader.
        """
        count = self.counted(len(labels), batch_idx, dataloader_idx)
        if not count:
            return
        logits, labels = logits[:count], labels[:count]
        metrics = self._by_name()
        logits = logits.float()
        metrics["loss"].update(nn.functional.cross_entropy(logits, labels), len(labels))
        for name in ("top1", "top5"):
            if name in metrics:
                metrics[name].update(logits, labels)

    def counted(self, images: int, batch_idx: int, dataloader_idx: int = 0) -> int:
        """How many images of a batch count, from the first; the others repeat images of another process.

        Args:
            images: Images in the batch.
            batch_idx: Index of the batch in its loader.
            dataloader_idx: Index of the loader.
        """
        share = self.shares[dataloader_idx] if dataloader_idx < len(self.shares) else None
        return images if share is None else share.counted(batch_idx, images)

    def finish(self) -> dict[str, Metric]:
        """Updates the metrics of time and energy, once, and returns all metrics by name.

        Energy is left out if the device has no counter or the run was shorter than a second.
        """
        metrics = self._by_name()
        metered = self.meter.finish() if self.meter is not None else None
        self.meter = None
        for quantity in QUANTITIES:
            if metered is None:
                del metrics[quantity]
            else:
                metrics[quantity].update(*metered)
        for step in drop_warmup(self.timer.forward, self.warmup):
            metrics["throughput"].update(step.images, step.seconds)
            metrics["latency_p50"].update(step.seconds)
            metrics["latency_p90"].update(step.seconds)
        for step in drop_warmup(self.timer.end_to_end, self.warmup):
            metrics["throughput_end_to_end"].update(step.images, step.seconds)
        self.timer = StepTimer()
        return metrics

    def __getstate__(self) -> dict[str, Any]:
        # A copy of the module is not part of the run, and handles of counters cannot be copied.
        return {**self.__dict__, "meter": None}

    def _by_name(self) -> dict[str, Metric]:
        return {name: metric for name, metric in self.metrics.items() if isinstance(metric, Metric)}


def _accuracy(num_classes: int, top_k: int) -> Metric:
    # check_batch has validated the arguments; validating them again would synchronise the device.
    return MulticlassAccuracy(num_classes=num_classes, top_k=top_k, average="micro", validate_args=False)


def split_batch(batch: Any, where: str) -> tuple[Tensor, Tensor]:
    """Splits a batch into images and labels.

    Args:
        batch: A batch of the dataloader.
        where: Name of the batch in error messages.

    Returns:
        Images `(B, C, H, W)` and labels `(B,)`.

    Raises:
        DataError: If the batch is not a pair of tensors.
    """
    if isinstance(batch, list | tuple) and len(batch) == 2 and all(isinstance(part, Tensor) for part in batch):
        return batch[0], batch[1]
    if isinstance(batch, Mapping):
        keys = ", ".join(map(repr, list(batch)[:8]))
        raise DataError(f"{where.capitalize()} must be a pair of images and labels, got a dict with the keys {keys}.")
    types = [type(part).__name__ for part in batch] if isinstance(batch, list | tuple) else type(batch).__name__
    raise DataError(f"{where.capitalize()} must be a pair of tensors (images, labels), got {types}.")


def check_batch(logits: Any, labels: Tensor, num_classes: int, where: str, finite: bool = True) -> None:
    """Checks logits and labels, which could otherwise lead to wrong results or to crashes on a GPU.

    This synchronises the device once, so it must not be called in timed code.

    Args:
        logits: Output of the model; must be `(B, num_classes)`.
        labels: `(B,)`.
        num_classes: Size of the head.
        where: Name of the batch in error messages.
        finite: Whether the logits must be finite.

    Raises:
        DataError: If the logits have another type or shape or are not finite, or a label is not a class of the head.
    """
    if not isinstance(logits, Tensor) or logits.shape != (len(labels), num_classes):
        got = f"shape {tuple(logits.shape)}" if isinstance(logits, Tensor) else type(logits).__name__
        raise DataError(f"Logits of {where} must have shape {(len(labels), num_classes)}, got {got}.")
    if labels.ndim != 1 or labels.is_floating_point() or labels.is_complex():
        raise DataError(
            f"Labels of {where} must be integers of shape (B,), got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    outside = (labels < 0) | (labels >= num_classes)
    broken = ~torch.isfinite(logits).all(dim=1)
    wrong_labels, broken_images = torch.stack([outside.sum(), broken.sum()]).tolist()  # the one synchronisation
    if wrong_labels:
        raise DataError(
            f"Labels of {where} must be in 0 to {num_classes - 1}, the classes of the model's head, "
            f"got {int(labels[outside][0])}."
        )
    if finite and broken_images:
        raise DataError(
            f"Logits of {where} must be finite, got NaN or infinity for {broken_images} of {len(labels)} images."
        )
