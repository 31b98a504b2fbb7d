"""Planning the schedule of a run: the latency profile, and the plans of one or several objectives."""

from collections.abc import Sequence

import lightning as L
from torch import Tensor

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks.batches import Calibration
from lightning_prune.callbacks.config import PruningConfig
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.first_batch import FirstBatch
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.patching.models import restoring
from lightning_prune.planning import Objective, plan_many
from lightning_prune.planning.api import PROFILE_SHARE
from lightning_prune.profiling import TOKEN_CURVE
from lightning_prune.profiling.clocks import CLOCKS
from lightning_prune.profiling.output_kinds import choose_proxy
from lightning_prune.profiling.profile_reuse import CachedProfile, get_or_profile
from lightning_prune.runtimes.calibration import calibrating_if_none


def profiled(
    config: PruningConfig,
    pl_module: L.LightningModule,
    images: Tensor,
    of_method: bool = False,
    limit: TimeLimit | None = None,
) -> CachedProfile:
    """The latency profile to plan on, measured or read from the cache; call it inside `open_first_batch`.

    Args:
        config: Method, block, time limit, and where profiles are kept.
        pl_module: The module, dense.
        images: (B, C, H, W) as the transformer receives them.
        of_method: Measures the latency of the method at its block instead, if one is given, and uses the whole time
            limit instead of the share that planning leaves for it.
        limit: A time limit that may have begun before; only what is left of it is used. None for none.
    """
    # One curve is used for all methods and blocks, except in the paper's protocol, whose lowest count depends on both.
    general = config.uses_token_curve or not (of_method or config.protocol == "paper")
    method, block = (TOKEN_CURVE, 0) if general else (config.reduction, config.reducing_block)
    seconds = config.time_limit if of_method else PROFILE_SHARE * config.time_limit
    if limit is not None:
        seconds = min(seconds, limit.share(1.0) or seconds)
    with restoring(config.restore):
        return get_or_profile(
            pl_module,
            images,
            config.store(),
            method=method,
            block=block,
            protocol=config.protocol,
            time_limit=None if config.protocol == "paper" else seconds,
            module_path=config.module_path,
            verbose=config.verbose,
            clock=limit.clock if limit is not None else config.clock,
        )


def check_labels(config: PruningConfig, calibration: Calibration) -> None:
    """Raises ArgumentError where the paper's protocol has no labels, before hours of profiling."""
    if config.protocol == "paper" and calibration.labels is None:
        raise ArgumentError("`calibration` must have labels with protocol='paper', got batches without.")


def proxy_for(
    config: PruningConfig, pl_module: L.LightningModule, transformer: VisionTransformer, calibration: Calibration
) -> str:
    """The proxy of the config, else the one that fits the outputs, by the module and the targets of the loop."""
    return choose_proxy(pl_module, transformer, config.proxy, calibration.targets)


def _blocks(config: PruningConfig, depth: int) -> str | int | float | list[int]:
    """The blocks that may reduce: one, unless all are searched or the method reduces in many from there on."""
    if config.plans_blocks:
        return "all"
    if config.reduction.multi_block:
        return "all" if isinstance(config.reducing_block, float) else list(range(config.reducing_block, depth))
    return config.reducing_block


def planned_for(
    config: PruningConfig,
    pl_module: L.LightningModule,
    images: Tensor,
    calibration: Calibration,
    objectives: Sequence[Objective],
    profile: CachedProfile | None = None,
    limit: TimeLimit | None = None,
    is_given: bool = False,
) -> list[Decision]:
    """Plans a schedule for each of several objectives, measured once for all of them.

    Args:
        config: The settings; its objective is not used.
        pl_module: The module, dense.
        images: (B, C, H, W) as the transformer receives them.
        calibration: Images, and labels where the protocol needs them.
        objectives: In any order.
        profile: The latency profile; that of `profiled` if None.
        limit: The time limit, which may have begun before; that of the config, beginning now, if None.
        is_given: Whether a user gave the profile, so that nobody knows whether it still holds.

    Raises:
        ArgumentError: As `check_labels`, and as `lightning_prune.plan`.
    """
    check_labels(config, calibration)
    limit = TimeLimit(config.time_limit, CLOCKS[config.clock]) if limit is None else limit
    if profile is None:
        with calibrating_if_none(calibration.images):
            profile = profiled(config, pl_module, images, limit=limit)
    transformer = find_vision_transformer(pl_module, config.module_path, config.restore)
    plans = plan_many(
        pl_module,
        images,
        objectives,
        calibration=calibration.images,
        methods=config.methods,
        blocks=_blocks(config, transformer.depth),
        profile=profile.profile,
        time_limit=config.time_limit if config.protocol == "paper" else limit.share(1.0),
        seed=config.seed,
        verbose=config.verbose,
        module_path=config.module_path,
        protocol=config.protocol,
        proxy=proxy_for(config, pl_module, transformer, calibration),
        labels=calibration.labels if config.protocol == "paper" else None,
        use_cache=config.use_cache,
        cache_dir=config.cache_dir,
        clock=limit.clock,
        profile_holds=not is_given,
        tail=config.tail,
        restore=config.restore,
    )
    return [Decision.from_plan(made, calibration.source, profile.reused) for made in plans]


def planned(first: FirstBatch, profile: CachedProfile | None = None, is_given: bool = False) -> Decision:
    """Plans a schedule by the objective of the config; the time limit includes sampling the calibration images.

    Args:
        first: The batch to plan on.
        profile: The latency profile; that of `profiled` if None.
        is_given: As of `planned_for`.

    Raises:
        ArgumentError: As `planned_for`, and if a batch holds no images.
        DataError: If there are no calibration images, or they have several sizes.
    """
    config, limit = first.config, first.limit
    objectives, seconds = [config.effective_objective], None if config.protocol == "paper" else limit.seconds
    with progress_bar("Planning", seconds, config.verbose):
        calibration = first.calibration(limit)
        where = first.module, first.images, calibration
        (decision,) = planned_for(config, *where, objectives, profile, limit, is_given)
    return decision
