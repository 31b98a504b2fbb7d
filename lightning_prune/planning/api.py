"""Planning: how many tokens each block removes, and by which method, so that an objective is best met."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune._utils.validation import check, check_bool, check_int
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.patching.models import restoring
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.planning.measurements import Measurements
from lightning_prune.planning.method_selection import Blocks, Methods, usable_methods
from lightning_prune.planning.objectives import AccuracyBudget, Objective
from lightning_prune.planning.paper_protocol import plan_by_paper
from lightning_prune.planning.plan_search import dense_plan, finished, searched
from lightning_prune.planning.profile_validation import check_profile, foreign_conditions, warn_of_change
from lightning_prune.planning.reasons import dense_reason
from lightning_prune.planning.results import Plan
from lightning_prune.profiling import TOKEN_CURVE, LatencyProfile, profile_latency
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.measurement import ProfilingMode, check_measurable
from lightning_prune.profiling.output_kinds import choose_proxy
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.calibration import calibrating_if_none
from lightning_prune.runtimes.registry import parse_runtime

PROFILE_SHARE = 0.3  # of the time limit, for measuring the latency curve


def plan(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    calibration: Tensor,
    methods: Methods = "auto",
    blocks: Blocks = "all",
    objective: Objective | None = None,
    profile: LatencyProfile | None = None,
    runtime: str | Runtime | None = None,
    proxy: str = "auto",
    time_limit: float | None = 60.0,
    seed: int = 0,
    verbose: bool = True,
    module_path: str | None = None,
    protocol: ProfilingMode = "deployed",
    labels: Tensor | None = None,
    use_cache: bool = True,
    cache_dir: str | Path | None = None,
    clock: str | Callable[[], float] = "wall",
    tail: bool | None = None,
    restore: RestoreMode | None = None,
) -> Plan:
    """Plans which blocks remove tokens, how many, and by which method.

    1. The latency curve: latency of the model against its number of tokens.
    2. The overhead of each method, from a few of its schedules, timed in one run.
    3. The sensitivity of each block to each method: divergence from the dense outputs when only it reduces. Images of
       whose class the dense model is unsure come first, and a method that is surely worse than others after some of
       them, by two standard errors wherever the objective may choose, is measured no further.
    4. A dynamic programme finds the Pareto front of all schedules, since latencies and divergences of the blocks add
       up: for each method, and for schedules that use another method in each block.
    5. The best candidate of each front, by the objective and the measured proxy, is timed against the dense model; one
       of several methods where it promises more. Timings correct the predictions, and other candidates are timed, a
       few times at most.

    Nothing is removed if the device gains nothing, or if every faster schedule costs too much; the reason says so. A
    budget that cannot be met is no error: `Plan.met` is False, and the reason says the best that can be had.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        example_inputs: (B, C, H, W) images on the device, in the batch size that will be used.
        calibration: (images, C, H, W) unlabelled images of the same size; 512 are enough. A quantized runtime takes its
            ranges from the first of them.
        methods: `"auto"`, a name, a reduction, or several of them, the preferred one first if time is short.
        blocks: Blocks that may reduce: `"all"`, an index, a fraction of the depth, or several of them. Methods that
            act before block 0 are not bound by it.
        objective: `AccuracyBudget(0.005)` if None.
        profile: A latency curve of this model; measured if None. If it is of another device, nothing is timed here:
            the speed-up is predicted from the profile, and the reason says so. The overheads of methods are those that
            the profile holds (that of a `bundle` does); other methods are taken to have none. Of one of this device the
            dense latency is timed again, and a warning says both figures where they differ by more than their noise.
        runtime: What executes the model: `"torch"`, or `"torch.compile:mode=..."`. None keeps a runtime that is applied
            to the model already, else `"torch"`.
        proxy: Estimate of accuracy, by what the outputs are: `"soft_agreement"` for classes, `"tag_agreement"` for
            independent tags, `"r2"` for numbers, `"cosine"` for features. `"auto"` chooses by the number of outputs,
            the configuration of a Hugging Face model, and the losses and metrics in `model`; `Plan.proxy` says which.
        time_limit: Seconds in total, profiling included; None for no limit. Measurements are shortened to fit: fewer
            calibration images, then fewer methods. At least one candidate is timed.
        seed: Of the choice of calibration images, if there is not time for all.
        verbose: Shows progress bars on a terminal.
        module_path: Dotted path of the transformer in `model`, needed if there are several.
        protocol: `"paper"` is POMT's computation (arXiv 2407.05941, section 3.2); see `plan_by_paper`.
        labels: (images,) int64 labels of the calibration images; needed by `protocol="paper"`, unused otherwise.
        use_cache: False neither uses nor keeps estimates of accuracy of other runs. They are those of the same weights,
            images and methods, and are made once.
        cache_dir: Folder of what is kept; None for the one of the user (see `lightning_prune.profiling.ProfileStore`).
        clock: What latencies are timed by: `"wall"`, `"cpu"` or a function, as in `profile_latency`. The time limit is
            wall time.
        tail: Whether what removes tokens also has the exact tail, as of `lightning_prune.patch`: None where it changes
            no output. With it nothing is lost, nor saved, by what the last block removes.
        restore: How removed tokens are given back to a dense head, as of `lightning_prune.patch`. What runs and is
            timed then is `model` itself, called with images; it may return any tensors. The estimate of accuracy is
            their mean cosine similarity to those of the dense model, over taps, positions and images
            (`"patch_cosine"`). In PyTorch only.

    Returns:
        The plan.

    Raises:
        ArgumentError: If an argument is unusable, or the images decide how many tokens a method removes.
        UnsupportedModelError: If none of the methods can be used with this model.
        DataError: If outputs are not finite, or a label is out of range.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> images = torch.randn(8, 3, 224, 224)
        >>> plan = lp.plan(model, images[:1], calibration=images, methods="tome", time_limit=2, verbose=False)
        >>> plan.tokens == 197 - plan.total_removed
        True
    """
    (made,) = plan_many(
        model,
        example_inputs,
        [objective if objective is not None else AccuracyBudget()],
        calibration=calibration,
        methods=methods,
        blocks=blocks,
        profile=profile,
        runtime=runtime,
        proxy=proxy,
        time_limit=time_limit,
        seed=seed,
        verbose=verbose,
        module_path=module_path,
        protocol=protocol,
        labels=labels,
        use_cache=use_cache,
        cache_dir=cache_dir,
        clock=clock,
        tail=tail,
        restore=restore,
    )
    return made


def plan_many(  # noqa: D417  all other arguments are those of `plan`
    model: nn.Module,
    example_inputs: Tensor,
    objectives: Sequence[Objective],
    *,
    calibration: Tensor,
    methods: Methods = "auto",
    blocks: Blocks = "all",
    profile: LatencyProfile | None = None,
    runtime: str | Runtime | None = None,
    proxy: str = "auto",
    time_limit: float | None = 60.0,
    seed: int = 0,
    verbose: bool = True,
    module_path: str | None = None,
    protocol: ProfilingMode = "deployed",
    labels: Tensor | None = None,
    use_cache: bool = True,
    cache_dir: str | Path | None = None,
    clock: str | Callable[[], float] = "wall",
    tail: bool | None = None,
    restore: RestoreMode | None = None,
    profile_holds: bool = False,
) -> list[Plan]:
    """One plan for each of several objectives, from one measurement; the time limit is that of all together.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        example_inputs: (B, C, H, W) images on the device.
        objectives: What to plan for.
        profile_holds: Whether it is known that the dense model takes as long as `profile` says; otherwise it is timed.

    Raises:
        ArgumentError, UnsupportedModelError, DataError: As `plan`.
    """
    check_int("seed", seed, 0)
    check_bool("verbose", verbose)
    check_bool("use_cache", use_cache)
    check("cache_dir", cache_dir, "a folder or None", cache_dir is None or isinstance(cache_dir, str | PathLike))
    check("labels", labels, "a tensor or None", labels is None or isinstance(labels, Tensor))
    check("tail", tail, "True, False or None", tail is None or isinstance(tail, bool))
    check("protocol", protocol, "'deployed' with `restore`", restore is None or protocol == "deployed")
    transformer = find_vision_transformer(model, module_path, restore)
    _check_arguments(transformer, example_inputs, calibration, objectives, proxy, time_limit, protocol)
    clock = read_clock(clock, example_inputs.device.type)
    limit = TimeLimit(time_limit, clock)
    usable = usable_methods(methods, blocks, transformer)
    if profile is not None:
        check_profile(profile, transformer, protocol)
    seconds = None if protocol == "paper" else time_limit  # which bounds only the least part of that
    with (
        progress_bar("Planning", seconds, verbose),
        restoring(restore),
        calibrating_if_none(calibration),
        nullcontext() if runtime is None else parse_runtime(runtime).applied(transformer),
    ):
        foreign = [] if profile is None else foreign_conditions(profile, transformer, example_inputs, clock)
        if profile is not None and not foreign and not profile_holds:
            warn_of_change(profile, model, example_inputs, limit, module_path)
        if protocol == "paper":
            common = model, transformer, example_inputs, objectives, calibration
            return plan_by_paper(*common, labels, usable, profile, limit, module_path, verbose)
        if profile is None:
            profile = profile_latency(
                model,
                example_inputs,
                method=TOKEN_CURVE,
                time_limit=limit.share(PROFILE_SHARE),
                module_path=module_path,
                verbose=verbose,
                clock=clock,
            )
        flat = dense_reason(profile)
        if flat is not None:
            plans = [dense_plan(usable, objective, profile, flat, foreign) for objective in objectives]
        else:
            images = shuffled(calibration, seed)
            where = model, transformer, images, example_inputs, profile, bool(foreign)
            plans = searched(
                Measurements(*where, limit, module_path, verbose, proxy, use_cache, cache_dir, tail),
                usable,
                objectives,
                foreign,
            )
    return [finished(made, limit.elapsed) for made in plans]


def shuffled(images: Tensor, seed: int) -> Tensor:
    """Images in a random order, so that the first of them are a sample of all."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))]


def _check_arguments(
    transformer: VisionTransformer,
    example_inputs: Tensor,
    calibration: object,
    objectives: Sequence[object],
    proxy: str,
    time_limit: float | None,
    protocol: str,
) -> None:
    """Raises ArgumentError before anything is measured if an argument cannot be used."""
    check_measurable(transformer, example_inputs, time_limit, protocol)
    if not isinstance(calibration, Tensor) or calibration.ndim != 4 or not len(calibration):
        got = tuple(calibration.shape) if isinstance(calibration, Tensor) else type(calibration).__name__
        raise ArgumentError(f"`calibration` must be images (images, C, H, W), got {got}.")
    if calibration.shape[1:] != example_inputs.shape[1:]:
        size, got = tuple(example_inputs.shape[1:]), tuple(calibration.shape[1:])
        raise ArgumentError(f"`calibration` must be of the size of `example_inputs`, {size}, got {got}.")
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise ArgumentError(f"`objective` must be an Objective such as AccuracyBudget(0.005), got {objective!r}.")
    choose_proxy(transformer.root, transformer, proxy)  # raises where it does not fit
