"""The Vision Transformer of a run, compiled from its first batch to its end."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import lightning as L

from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.patching import find_vision_transformer
from lightning_prune.runtimes.compilation import Compiled, Mode, force_eager, raised_recompile_limit

if TYPE_CHECKING:
    from lightning_prune.callbacks.token_pruning import TokenPruning


class Compilation:
    """Compiles the transformer while a run lasts; batches smaller than its first run eagerly.

    A last batch that is short would be compiled for seconds to be run once.

    Args:
        mode: How, or None to leave the transformer as it is.
    """

    def __init__(self, mode: Mode | None) -> None:
        self.mode = mode
        self._run: ExitStack | None = None
        self._batch = ExitStack()
        self._size = 0

    def __getstate__(self) -> dict[str, object]:
        """Without the run under way."""
        return {**vars(self), "_run": None, "_batch": ExitStack()}

    def begin(self, pruner: "TokenPruning", pl_module: L.LightningModule) -> None:
        """Compiles, unless that is done or not wanted.

        Args:
            pruner: Says which transformer.
            pl_module: Contains it.

        Raises:
            ArgumentError: If it is compiled already.
        """
        if self.mode is None or self._run is not None:
            return
        transformer = find_vision_transformer(pl_module, pruner.target)
        with ExitStack() as stack:
            stack.callback(Compiled(transformer.runner, self.mode, list(transformer.blocks)).undo)
            stack.enter_context(raised_recompile_limit())
            self._run = stack.pop_all()

    def before_batch(self, pruner: "TokenPruning", pl_module: L.LightningModule, batch: Any, first: bool) -> None:
        """Begins, if need be; lets a batch that is smaller than the first of its loader run eagerly.

        Args:
            pruner: Says where images are.
            pl_module: Contains the transformer.
            batch: As the step will receive it.
            first: Whether it is the first.
        """
        self.after_batch()
        self.begin(pruner, pl_module)
        if self._run is None:
            return
        size = len(images_from_batch(batch, pruner.images_from_batch))
        self._size = size if first else self._size
        if size < self._size:
            self._batch.enter_context(force_eager())

    def after_batch(self) -> None:
        """Ends what `before_batch` began."""
        self._batch.close()

    def end(self) -> None:
        """Makes the transformer what it was."""
        self._batch.close()
        if self._run is not None:
            self._run.close()
            self._run = None
