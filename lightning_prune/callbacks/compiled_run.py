"""The Vision Transformer of a run, compiled from its first batch to its end."""

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.runtimes import parse_runtime
from lightning_prune.runtimes.calibration import calibrating_if_none
from lightning_prune.runtimes.in_place import force_eager, is_compiled_itself


class CompiledRun:
    """Compiles the transformer while a run lasts; batches smaller than the first one run eagerly.

    A short last batch would take seconds to compile and would run once. A runtime that converts the model runs it all
    the same, since the figures are to be those of what will be deployed.
    """

    def __init__(self) -> None:
        self._run: ExitStack | None = None  # undoes the compilation; None between runs
        self._batch = ExitStack()  # ends the eager execution of a short batch
        self._compiles = False  # in a runtime whose outputs are those of PyTorch, so that a batch may run eagerly
        self._size = 0

    def __getstate__(self) -> dict[str, object]:
        """Without the current run."""
        return {**vars(self), "_run": None, "_batch": ExitStack(), "_compiles": False}

    def before_batch(
        self,
        config: PruningConfig,
        pl_module: L.LightningModule,
        batch: Any,
        first: bool,
        calibration: Callable[[], Tensor],
    ) -> None:
        """Compiles at the first batch of a run; a batch that is smaller than the first of its loader runs eagerly.

        What it begins for a batch lasts until the next one, or until `end`.

        Args:
            config: Its `runtime`, `module_path` and `images_from_batch` are used.
            pl_module: Contains the transformer.
            batch: As the step receives it.
            first: Whether it is the first batch of its loader.
            calibration: Returns the images on which a quantized runtime finds the ranges of activations, (N, C, H, W);
                called for such a one only.

        Raises:
            ArgumentError: If the transformer is compiled already.
        """
        if self._run is None:
            self._begin(config, pl_module, calibration)
        if not self._compiles:
            return
        self._batch.close()
        size = len(images_from_batch(batch, config.images_from_batch))
        self._size = size if first else self._size
        if size < self._size:
            self._batch.enter_context(force_eager())

    def end(self) -> None:
        """Restores the transformer."""
        self._batch.close()
        if self._run is not None:
            self._run.close()
        self._run, self._compiles = None, False

    def _begin(self, config: PruningConfig, pl_module: L.LightningModule, calibration: Callable[[], Tensor]) -> None:
        runtime = parse_runtime(config.runtime)
        with ExitStack() as stack:
            if runtime.compiles:
                transformer = find_vision_transformer(pl_module, config.module_path, config.restore)
                if runtime != runtime.unquantized:
                    stack.enter_context(calibrating_if_none(calibration()))
                stack.enter_context(runtime.applied(transformer))
            self._run, self._compiles = stack.pop_all(), runtime.compiles and not runtime.converts


def is_wrapped_by_compile(pl_module: L.LightningModule, transformer: VisionTransformer) -> bool:
    """Whether the LightningModule, or a module in it that contains the transformer, is compiled."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        return True
    own = (transformer.root, transformer.compiled_root)
    around = (m for m in pl_module.modules() if not any(m is each for each in own) and transformer.root in m.modules())
    return any(map(is_compiled_itself, around))


def warn_if_wrapped_by_compile(pl_module: L.LightningModule, transformer: VisionTransformer) -> None:
    """Warns where a module around the transformer is compiled: what is measured is not what will run."""
    if is_wrapped_by_compile(pl_module, transformer):
        rank_zero_warn(
            "The LightningModule, or a module in it around the Vision Transformer, is compiled, but latency is "
            "measured on the transformer alone. Compile the transformer instead, as in `module.vit.compile()`."
        )
