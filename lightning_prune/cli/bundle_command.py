"""The command `bundle`: writes what measures a latency profile on a device without torch."""

from typing import Any

import lightning as L
from rich.console import Console
from torch import Tensor

from lightning_prune._utils.validation import check_int
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.first_batch import FirstBatch, on_first_batch
from lightning_prune.exporting import DeviceBundle, bundle
from lightning_prune.exporting.folder import check_new
from lightning_prune.patching import find_vision_transformer

_RUNTIME = "onnxruntime"


def run_bundle(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    runtime: str | None,
    batch_size: int | None,
    overwrite: bool,
    **data: Any,
) -> DeviceBundle:
    """Writes the bundle of the Vision Transformer, and prints what to do with it.

    Args:
        trainer: Runs one validation batch, so that images are those that the transformer receives.
        model: Contains the Vision Transformer.
        config: Gives the methods, and the runtime if `runtime` is None and it names one.
        output: See `lightning_prune.bundle`.
        runtime: See `lightning_prune.bundle`; ONNX Runtime if neither this nor the config names one.
        batch_size: Number of images in a batch; that of the validation loader if None.
        overwrite: See `lightning_prune.bundle`.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: As `lightning_prune.bundle`.
        DataError: If there is no batch.
        ExportError: As `lightning_prune.bundle`.
        RuntimeUnavailableError: As `lightning_prune.bundle`.
    """
    check_new(output, overwrite)
    if batch_size is not None:
        check_int("batch_size", batch_size, 1, "a number of images")
    named = config.runtime if config.runtime != "torch" else None

    def take(first: FirstBatch) -> Tensor:
        return first.images.detach().cpu()

    # The loop has ended when the graphs are exported: its precision would be a part of them.
    images = on_first_batch(trainer, model, config, take, **data)
    count = len(images) if batch_size is None else batch_size
    example = images[:count] if count <= len(images) else images[:1].expand(count, -1, -1, -1).contiguous()
    transformer = find_vision_transformer(model, config.module_path, config.restore)
    whole, path = transformer.outer, None
    if config.module_path is not None:
        path = next(name for name, each in whole.named_modules() if each is transformer.root) or None
    made = bundle(
        whole,
        output,
        example,
        runtime=runtime or named or _RUNTIME,
        methods=config.methods,
        module_path=path,
        restore=config.restore,
        overwrite=overwrite,
        verbose=config.verbose,
    )
    if trainer.is_global_zero:
        console = Console(markup=False)
        lines = [
            f"{made.folder}: {made.tokens} tokens, {len(example)} images, overheads of {', '.join(made.methods)}, for "
            f"{made.runtime}; {made.megabytes:.1f} MB.",
            f"Copy it to the device and run there: python profile.py. The next steps are in "
            f"{made.folder / 'README.md'}.",
        ]
        for line in lines:
            console.print(line, soft_wrap=True, highlight=False)
    return made
