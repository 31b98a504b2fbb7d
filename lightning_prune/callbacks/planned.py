"""Planning as a `TokenPruning` is set: on the profile that is kept, or on a new one."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.images import Calibration, calibration_images
from lightning_prune.errors import ArgumentError
from lightning_prune.planning import Objective, Plan, plan
from lightning_prune.planning.planner import PAPER_IMAGES
from lightning_prune.planning.several import plan_blocks_for
from lightning_prune.profiling import ProfileStore
from lightning_prune.profiling.reuse import Found, measured_or_stored
from lightning_prune.reduction import Random

if TYPE_CHECKING:
    from lightning_prune.callbacks.token_pruning import TokenPruning


def profiled(
    pruner: "TokenPruning", pl_module: L.LightningModule, images: Tensor, over_blocks: bool | None = None
) -> Found:
    """The latency profile that a pruner plans on; to be called under the trainer's precision.

    Args:
        pruner: Its settings count.
        pl_module: The module, dense.
        images: (B, channels, height, width) as the transformer receives them.
        over_blocks: Whether it is to plan over blocks; as the pruner does if None.
    """
    store = None
    if pruner.cache_dir is not None:
        store = ProfileStore(None if pruner.cache_dir == "auto" else pruner.cache_dir)
    # Over blocks, a curve serves all methods on which all tokens go before block 0.
    searching = pruner.searches if over_blocks is None else over_blocks
    return measured_or_stored(
        pl_module,
        images,
        store,
        method=Random(site="input") if searching else pruner.reduction,
        block=0 if searching else pruner.place,
        protocol=pruner.protocol,
        max_seconds=None if pruner.protocol == "paper" else pruner.max_seconds,
        refresh=pruner.refresh,
        target=pruner.target,
        progress=pruner.verbose,
    )


def sample(pruner: "TokenPruning", trainer: L.Trainer, pl_module: L.LightningModule, batch: Any) -> Calibration:
    """The calibration images that a pruner would use in the running loop.

    Args:
        pruner: Its settings count.
        trainer: Whose loop it is.
        pl_module: The module.
        batch: The first of the loop.
    """
    loaders = trainer.val_dataloaders if trainer.validating else None
    if loaders is None:
        loaders = trainer.test_dataloaders if trainer.testing else trainer.predict_dataloaders
    least = PAPER_IMAGES if pruner.protocol == "paper" else 0
    extract = pruner.images_from_batch
    return calibration_images(trainer, pl_module, loaders, pruner.calibration, batch, extract, pruner.seed, least)


def warn_if_wrapped_by_compile(pl_module: L.LightningModule) -> None:
    """Says that what is measured is not what will run, where the LightningModule itself is compiled."""
    if getattr(pl_module, "_compiler_ctx", None) is not None:
        rank_zero_warn(
            "The whole LightningModule is compiled, but latency is measured on its Vision Transformer alone, which is "
            "not. Compile the transformer instead, as in `module.vit.compile()` or `ImageClassifier(compile=True)`."
        )


def check_labels(pruner: "TokenPruning", calibration: Calibration) -> None:
    """Raises ArgumentError where the paper's protocol has no labels; said before hours of profiling."""
    if pruner.protocol == "paper" and calibration.labels is None:
        raise ArgumentError("protocol='paper' needs labels, and the calibration batches hold none.")


def planned(
    pruner: "TokenPruning",
    pl_module: L.LightningModule,
    images: Tensor,
    calibration: Calibration,
    found: Found | None = None,
) -> Decision:
    """What a pruner decides on these images, judged by those of the calibration; see `planned_for`."""
    (decision,) = planned_for(pruner, pl_module, images, calibration, [pruner.objective], found)
    return decision


def planned_for(
    pruner: "TokenPruning",
    pl_module: L.LightningModule,
    images: Tensor,
    calibration: Calibration,
    objectives: Sequence[Objective],
    found: Found | None = None,
    **more: Any,
) -> list[Decision]:
    """What a pruner would decide by each of several objectives, measured once for all of them where that can be.

    Args:
        pruner: Its settings count.
        pl_module: The module, dense.
        images: (B, channels, height, width) as the transformer receives them.
        calibration: Images, and labels where the protocol needs them.
        objectives: In any order.
        found: The latency profile; as `profiled` finds it if None.
        **more: For `lightning_prune.plan`, where one block reduces.

    Raises:
        ArgumentError: As `check_labels`, and as `lightning_prune.plan`.
    """
    check_labels(pruner, calibration)
    found = profiled(pruner, pl_module, images) if found is None else found
    shared: dict[str, Any] = {
        "profile": found.profile,
        "example_batch": images,
        "max_seconds": pruner.max_seconds,
        "target": pruner.target,
        "progress": pruner.verbose,
    }
    plans: Sequence[Plan]
    if pruner.searches:
        plans = plan_blocks_for(pl_module, calibration.images, objectives, methods=pruner.methods, **shared)
    else:
        shared |= {"method": pruner.reduction, "block": pruner.place, "protocol": pruner.protocol}
        shared["labels"] = calibration.labels if pruner.protocol == "paper" else None
        plans = [plan(pl_module, calibration.images, objective=each, **shared, **more) for each in objectives]
    return [Decision.from_plan(made, calibration.source, found.reused) for made in plans]
