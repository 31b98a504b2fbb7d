"""The Vision Transformer of a run, compiled from its first batch to its end."""

from contextlib import ExitStack
from typing import Any

import lightning as L

from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.torch_runtime import force_eager


class CompiledRun:
    """Compiles the transformer while a run lasts; batches smaller than the first one run eagerly.

    A short last batch would take seconds to compile and would run once.
    """

    def __init__(self) -> None:
        self._run: ExitStack | None = None
        self._batch = ExitStack()
        self._size = 0

    def __getstate__(self) -> dict[str, object]:
        """Without the current run."""
        return {**vars(self), "_run": None, "_batch": ExitStack()}

    def before_batch(self, config: PruningConfig, pl_module: L.LightningModule, batch: Any, first: bool) -> None:
        """Compiles at the first batch of a run; a batch that is smaller than the first of its loader runs eagerly.

        Args:
            config: Says how to compile, which transformer, and where images are.
            pl_module: Contains the transformer.
            batch: As the step will receive it.
            first: Whether it is the first batch of its loader.

        Raises:
            ArgumentError: If the transformer is compiled already.
        """
        self.after_batch()
        runtime = parse_runtime(config.runtime)
        if not runtime.compiles:
            return
        if self._run is None:
            transformer = find_vision_transformer(pl_module, config.module_path)
            with ExitStack() as stack:
                stack.enter_context(runtime.applied(transformer))
                self._run = stack.pop_all()
        size = len(images_from_batch(batch, config.images_from_batch))
        self._size = size if first else self._size
        if size < self._size:
            self._batch.enter_context(force_eager())

    def after_batch(self) -> None:
        """Ends what `before_batch` began for one batch."""
        self._batch.close()

    def end(self) -> None:
        """Restores the transformer."""
        self._batch.close()
        if self._run is not None:
            self._run.close()
            self._run = None
