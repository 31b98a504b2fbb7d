"""Planning a schedule: `plan` for one block, `plan_blocks` over blocks and methods."""

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.patching.compatibility import check_reduction
from lightning_prune.patching.schedule_forms import refuse_adaptive
from lightning_prune.planning.candidates import Candidate, decided
from lightning_prune.planning.multi_block import BlockSearch, MethodFront, method_labels
from lightning_prune.planning.objectives import Objective, Utility
from lightning_prune.planning.profile_validation import check_profile, is_other_environment, nothing_timed
from lightning_prune.planning.results import BlocksPlan, Plan
from lightning_prune.planning.single_block import BudgetSearch, OnDevice, TimedChoice, choose, confirmed, refine
from lightning_prune.profiling import LatencyProfile, profile_latency, reducing_block
from lightning_prune.profiling.accuracy_proxy import ProxyCurve, check_images
from lightning_prune.profiling.measurement import ProfilingMode, check_measurable
from lightning_prune.reduction import RandomDrop, Reduction, resolve, spec_of
from lightning_prune.schedule import MeasurementSource, Schedule


def check_inputs(
    transformer: VisionTransformer, images: object, example_inputs: Tensor, objective: object, time_limit: float
) -> None:
    """Raises ArgumentError, with what was expected and what came, where one of these cannot be used."""
    check_images(images)
    if time_limit is None:  # which profiling takes for no limit, and a search would never end
        raise ArgumentError("`time_limit` must be a number > 0, got None.")
    check_measurable(transformer, example_inputs, time_limit)
    assert isinstance(images, Tensor)
    if images.shape[1:] != example_inputs.shape[1:]:
        raise ArgumentError(
            f"`images` must be of the size of `example_inputs`, {tuple(example_inputs.shape[1:])}, got "
            f"{tuple(images.shape[1:])}."
        )
    if not isinstance(objective, Objective):
        raise ArgumentError(f"`objective` must be an Objective such as Utility(0.5), got {objective!r}.")


def usable_methods(methods: Sequence[str | Reduction], transformer: VisionTransformer) -> list[Reduction]:
    """The methods that can be used with this model; at least one.

    Args:
        methods: Names or reductions.
        transformer: The Vision Transformer.

    Raises:
        ArgumentError: If one does not act in blocks, the images decide how many tokens go, or two are the same.
        UnsupportedModelError: If none fits.
    """
    if not isinstance(methods, list | tuple):
        raise ArgumentError(f"`methods` must be a list of names or reductions, got {methods!r}.")
    if not methods:
        raise ArgumentError("`methods` must hold at least one method, got none.")
    found: list[Reduction] = []
    reasons: list[str] = []
    for method in methods:
        reduction = resolve(method)
        _check_hash(reduction)
        if reduction.site != "block" or reduction.adaptive:
            raise ArgumentError(
                f"Only methods that act in blocks can be planned over several of them; {reduction.name} does not."
            )
        try:
            check_reduction(transformer, reduction, at=None)
            found.append(reduction)
        except UnsupportedModelError as error:
            reasons.append(f"{reduction.name}: {error}")
    if not found:
        raise UnsupportedModelError(f"None of the methods can be used with this model. {'; '.join(reasons)}")
    method_labels(found)
    return found


def _check_hash(reduction: Reduction) -> None:
    try:
        hash(reduction)
    except TypeError as error:
        raise ArgumentError(
            "A method that is searched over blocks must have a hash, by which what was measured of it is kept (a "
            f"dataclass: frozen=True, and settings that have one); got {reduction!r}: {error}."
        ) from error


PAPER_IMAGES = 1024  # whose accuracy the POMT paper looks at


def plan(
    model: nn.Module,
    images: Tensor,
    *,
    profile: LatencyProfile | None = None,
    example_inputs: Tensor | None = None,
    method: str | Reduction = "pomt",
    objective: Objective | None = None,
    block: int | float = 0.25,
    protocol: ProfilingMode = "deployed",
    labels: Tensor | None = None,
    curve: ProxyCurve | None = None,
    confirm: bool = True,
    time_limit: float | None = 30.0,
    target: str | None = None,
    progress: bool = True,
) -> Plan:
    """Chooses how many tokens to remove, from what the device and the model say.

    Only counts at which both latency and the proxy were measured can be chosen, and the chosen count is exactly the
    deployed one. The proxy is measured at a few counts, then where the objective expects its best, until that point
    is a measured one. Where pruning saves less than 2% or less than the noise, the schedule removes nothing and says
    so. The winner is finally timed beside the dense model.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        images: (images, channels, height, width) calibration images; 512 unlabelled ones are enough.
        profile: Its latency profile; measured on `example_inputs` if None. One of another device is planned for as it
            is: nothing is timed here then.
        example_inputs: Images on the device in the batch size that will be used; needed without `profile`, and for
            the final comparison. If None, as many of `images` as the profile's batch size says.
        method: The reduction to deploy.
        objective: `Utility()` if None.
        block: Index of the reducing block, or a fraction of the depth; see `lightning_prune.profile_latency`.
        protocol: `"paper"` reproduces POMT's computation (arXiv 2407.05941, section 3.2): latency and accuracy of
            random tokens dropped before block 0, at every count, accuracy on 1024 labelled images. Hours on a CPU.
        labels: (images,) int64; the proxy is then top-1 accuracy. Needed by `protocol="paper"`.
        curve: A proxy curve to go on with, when several objectives are planned for on one profile.
        confirm: Whether to look closer at the latency around the winner, and to time it beside the dense model.
        time_limit: Time limit of latency profiling, and again of the proxy, which runs the dense model and four
            counts over the images all the same.
        target: Dotted path of the transformer in `model`.
        progress: Shows bars on a terminal.

    Returns:
        The plan: schedule, curve, reasons, measured and predicted latency.

    Raises:
        ArgumentError: If an argument is unusable, one that is needed is missing, or the images decide how many tokens
            go, as with methods that are adaptive.
        UnsupportedModelError: As `lightning_prune.patch`.
        DataError: If labels are out of range or outputs not finite.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> images = torch.randn(8, 3, 224, 224)
        >>> plan = lp.plan(model, images, example_inputs=images[:1], time_limit=2, progress=False)
        >>> plan.tokens == 197 - plan.removed
        True
    """
    start = time.perf_counter()
    objective = objective if objective is not None else Utility()
    if not isinstance(objective, Objective):
        raise ArgumentError(f"`objective` must be an Objective such as Utility(0.5), got {objective!r}.")
    check_images(images)
    reduction = resolve(method)
    transformer = find_vision_transformer(model, target)
    refuse_adaptive(reduction)
    index = reducing_block(reduction, block, transformer)
    if protocol == "paper":
        if labels is None:
            raise ArgumentError("`labels` are needed by protocol='paper', whose accuracy is top-1 on labelled images.")
        images, labels = images[:PAPER_IMAGES], labels[:PAPER_IMAGES]
    if curve is not None:
        if profile not in (None, curve.profile):
            raise ArgumentError("`curve` is a proxy curve on another profile than `profile`.")
        profile = curve.profile
    foreign = False
    if profile is None:
        if example_inputs is None:
            raise ArgumentError("`example_inputs` is needed to measure a profile: images on the device; got None.")
        profile = profile_latency(
            model,
            example_inputs,
            method=reduction,
            block=index,
            protocol=protocol,
            time_limit=None if protocol == "paper" else time_limit,
            module_path=target,
            verbose=progress,
        )
    else:
        check_profile(profile, transformer, reduction, index, protocol)
        if example_inputs is None:
            example_inputs = _batch_of(images, int(profile.context.get("batch_size", 1)), transformer)
        foreign = is_other_environment(profile, transformer, example_inputs)
    if curve is None:
        curve = ProxyCurve(model, images, profile, reduction, labels=labels, target=target, progress=progress)

    n, prefix, depth = profile.dense_tokens, transformer.prefix_tokens, transformer.depth
    device = OnDevice(model, example_inputs, reduction, index, n, prefix, depth, time_limit, target, progress)

    def choose_by(wanted: Objective) -> tuple[int, str]:
        return choose(curve.profile, curve, wanted, exhaustive=protocol == "paper", time_limit=time_limit)

    found = TimedChoice(*choose_by(objective))
    if foreign:
        found = found._replace(reason=nothing_timed(found.reason, profile))
    elif confirm:
        if protocol == "deployed" and time_limit is not None:
            deadline = time.perf_counter() + time_limit / 4
            closer = refine(profile, curve, objective, device.measure, lambda: time.perf_counter() < deadline)
            if closer is not profile:
                curve.profile = profile = closer
                found = TimedChoice(*choose_by(objective))
        chosen = (found.tokens, found.reason)
        attempt = BudgetSearch(chosen, n, curve.profile.dense_ms, objective, choose_by, lambda: _fastest(curve))
        found = confirmed(attempt, device.compare)
    made_on = MeasurementSource.from_context(
        profile.context,
        objective=str(objective),
        dense_tokens=profile.dense_tokens,
        protocol=protocol,
        proxy=curve.name,
    )
    made = Plan(
        schedule=Schedule(device.schedule(found.tokens).removed, spec_of(reduction), made_on),
        method=reduction.name,
        block=index,
        objective=objective,
        profile=profile,
        proxy=curve.name,
        accuracy=dict(curve.values),
        tokens=found.tokens,
        reason=found.reason,
        dense=found.dense,
        pruned=found.pruned,
        seconds=time.perf_counter() - start,
    )
    return made.or_dense_if_slower()


def _fastest(curve: ProxyCurve) -> tuple[int, str]:
    """The fastest count, and what to say of it; its proxy is measured."""
    profile = curve.profile
    tokens = min(profile.tokens, key=profile.latency_ms)
    return tokens, f"The fastest count: {100 * curve(tokens):.2f}% of the dense {curve.name}."


def _batch_of(images: Tensor, size: int, transformer: VisionTransformer) -> Tensor:
    """A batch of the profiled size on the model's device, from however many images there are."""
    device = next(transformer.root.parameters()).device
    return images[torch.arange(size) % len(images)].to(device)


# What method="auto" searches: the two that lose least, and the two that cost least.
AUTO = ("tome", "pomt-nearest", "topk", "random")
CURVE = RandomDrop(site="input")  # on whose latency curve every method is planned: all tokens go before block 0
_HINT = (
    'plan_blocks needs a curve of Random(site="input"), as profile_latency(model, batch, method=Random(site="input")) '
    "measures it."
)


def plan_blocks(
    model: nn.Module,
    images: Tensor,
    *,
    example_inputs: Tensor,
    methods: Sequence[str | Reduction] = AUTO,
    objective: Objective | None = None,
    profile: LatencyProfile | None = None,
    time_limit: float = 30.0,
    target: str | None = None,
    progress: bool = True,
) -> BlocksPlan:
    """Chooses which blocks reduce, by how much and by which method.

    How much every block minds is measured by itself, as KL divergence from the dense outputs; these costs add up, and
    so do latencies, so that a dynamic programme finds the front of all schedules exactly. The best of every method, by
    the objective and the measured proxy, are timed beside dense in one interleaved run. That teaches the latency model
    of each, which may then propose another, a few times at most; the best that was timed is the plan.

    How many images the sensitivity is measured on depends on the pace of the machine, and is the same for all methods;
    the plan says it. A seed alone does not fix the plan where the time limit cuts it short.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        images: (images, channels, height, width) unlabelled calibration images, of the size of `example_inputs`.
        example_inputs: (B, channels, height, width) images on the device, in the batch size that will be used.
        methods: Names or reductions that act in blocks.
        objective: `Utility()` if None.
        profile: A latency curve on which all tokens go before block 0, of `RandomDrop(site="input")`; measured if None.
            With one of another device nothing is timed here, and reducing is taken to cost nothing by itself.
        time_limit: Time limit of each of: the curve, the run that prices all methods, the sensitivity of each method,
            the proxies of the first choice of each method, and thrice each run that times finalists; no schedule is
            proposed any more when twice as long has gone by since the first of these. Run in any case: the dense model
            over all images, every method at five schedules over all images, and its sensitivity on the first 8 images.
        target: Dotted path of the transformer in `model`.
        progress: Shows bars on a terminal.

    Returns:
        The plan, with the front of every method.

    Raises:
        ArgumentError: If an argument is unusable, or a budget cannot be reached.
        UnsupportedModelError: If the model cannot be pruned by any of the methods.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.planning import plan_blocks
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> images = torch.randn(8, 3, 224, 224)
        >>> plan = plan_blocks(model, images, example_inputs=images[:1], methods=["tome"], time_limit=2, progress=False)
        >>> plan.schedule.depth
        4
    """
    (made,) = plan_blocks_for(
        model,
        images,
        [objective if objective is not None else Utility()],
        example_inputs=example_inputs,
        methods=methods,
        profile=profile,
        time_limit=time_limit,
        target=target,
        progress=progress,
    )
    return made


def plan_blocks_for(
    model: nn.Module,
    images: Tensor,
    objectives: Sequence[Objective],
    *,
    example_inputs: Tensor,
    methods: Sequence[str | Reduction] = AUTO,
    profile: LatencyProfile | None = None,
    time_limit: float = 30.0,
    target: str | None = None,
    progress: bool = True,
) -> list[BlocksPlan]:
    """A plan for each of several objectives: what `plan_blocks` makes, measured once for all of them.

    What is timed for one teaches the planner for those that follow.

    Args:
        model: As of `plan_blocks`, and so are those that are not named here.
        images: Likewise.
        objectives: What to plan for.
        example_inputs: Likewise.
        methods: Likewise.
        profile: Likewise.
        time_limit: Likewise.
        target: Likewise.
        progress: Likewise.

    Returns:
        One plan each. The first says the time of what all share.

    Raises:
        ArgumentError, UnsupportedModelError: As `plan_blocks`, if but one of the objectives cannot be reached.
    """
    start = time.perf_counter()
    transformer = find_vision_transformer(model, target)
    for objective in objectives:
        check_inputs(transformer, images, example_inputs, objective, time_limit)
    reductions = usable_methods(methods, transformer)
    foreign = False
    if profile is None:
        profile = profile_latency(
            model, example_inputs, method=CURVE, time_limit=time_limit, module_path=target, verbose=progress
        )
    else:
        check_profile(profile, transformer, CURVE, 0, "deployed", hint=_HINT)
        foreign = is_other_environment(profile, transformer, example_inputs)
    search = BlockSearch(model, transformer, images, example_inputs, profile, foreign, time_limit, target, progress)
    fronts = search.fronts(reductions)
    plans = []
    for objective in objectives:
        best = decided(search, fronts, objective)
        plans.append(_plan(search, fronts, best, objective, time.perf_counter() - start))
        start = time.perf_counter()
    return plans


def _plan(
    search: BlockSearch, fronts: Sequence[MethodFront], best: Candidate, objective: Objective, seconds: float
) -> BlocksPlan:
    curve, front, schedule = search.curve, best.front, best.entry.schedule
    n, tokens, reducing = curve.dense_tokens, schedule.tokens(curve.dense_tokens)[-1], schedule.reducing
    made_on = MeasurementSource.from_context(curve.context, objective=str(objective), dense_tokens=n, proxy=front.name)
    made = BlocksPlan(
        schedule=Schedule(schedule.removed, spec_of(front.reduction), made_on),
        method=front.reduction.name,
        label=front.label,
        block=min(reducing) if reducing else search.transformer.first,
        objective=objective,
        profile=curve,
        proxy=front.name,
        accuracy={n: 1.0, tokens: front.accuracy(best.entry)},
        tokens=tokens,
        reason=best.reason,
        dense=best.dense,
        pruned=best.pruned,
        seconds=seconds,
        front=tuple(e for each in fronts for e in each.everything(best.entry if each is front else None)),
        predicted_ratio=front.ratio(best.entry),
        reduction=front.reduction,
        images=search.seen,
        sensitivity_seconds=search.seconds,
    )
    return made.or_dense_if_slower()
