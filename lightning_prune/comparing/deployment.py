"""Running a validation as one variant of a comparison."""

from typing import Any

import lightning as L

from lightning_prune.callbacks.stages import EvaluationCallback
from lightning_prune.callbacks.together import refuse_sharded
from lightning_prune.keep_rates import KeepRates
from lightning_prune.patching import find_vision_transformer
from lightning_prune.profiling import Variant, VariantSwitch
from lightning_prune.schedule import Schedule


class Deployment(EvaluationCallback):
    """Makes the Vision Transformer of a LightningModule run as a variant from the first batch to the end of a run.

    Args:
        variant: What to run as.
        dense_tokens: N, of the images that the variant was planned for.
        target: Dotted path of the transformer, where there are several.
    """

    def __init__(self, variant: Variant, dense_tokens: int, target: str | None) -> None:
        self.variant, self.dense_tokens, self.target = variant, dense_tokens, target
        self._switch: VariantSwitch | None = None

    def _before_batch(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int
    ) -> None:
        if self._switch is not None:
            return
        refuse_sharded(trainer)
        transformer = find_vision_transformer(pl_module, self.target)
        variant = self.variant
        if isinstance(variant.schedule, Schedule) and transformer.tokens is None:  # images of other sizes may come
            rates = KeepRates.of(Schedule(variant.schedule.removed), self.dense_tokens, transformer.prefix_tokens)
            variant = variant._replace(schedule=rates)
        self._switch = VariantSwitch(transformer)  # before anything can fail: `_close` takes off what is on
        self._switch.to(variant)

    def _figures(self) -> dict[str, float]:
        return {}

    def _close(self, trainer: L.Trainer) -> None:
        switch, self._switch = self._switch, None
        if switch is not None:
            switch.off()
