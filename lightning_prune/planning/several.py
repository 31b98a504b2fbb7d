"""Planning over several blocks and several methods."""

import time
from collections.abc import Sequence

from torch import Tensor, nn

from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning.block_search import BlockSearch
from lightning_prune.planning.blocks_plan import BlocksPlan
from lightning_prune.planning.finalists import Finalist, decided
from lightning_prune.planning.given_profile import check_profile, is_foreign
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.objective import Objective, Utility
from lightning_prune.planning.search_arguments import check_inputs, usable_methods
from lightning_prune.profiling import LatencyProfile, profile_latency
from lightning_prune.reduction import Random, Reduction
from lightning_prune.schedule import Schedule

# What method="auto" searches: the two that lose least, and the two that cost least.
AUTO = ("tome", "pomt-nearest", "topk", "random")
CURVE = Random(site="input")  # on whose latency curve every method is planned: all tokens go before block 0
_HINT = (
    'plan_blocks needs a curve of Random(site="input"), as profile_latency(model, batch, method=Random(site="input")) '
    "measures it."
)


def plan_blocks(
    model: nn.Module,
    images: Tensor,
    *,
    example_batch: Tensor,
    methods: Sequence[str | Reduction] = AUTO,
    objective: Objective | None = None,
    profile: LatencyProfile | None = None,
    max_seconds: float = 30.0,
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
        images: (images, channels, height, width) unlabelled calibration images, of the size of `example_batch`.
        example_batch: (B, channels, height, width) images on the device, in the batch size that will be used.
        methods: Names or reductions that act in blocks.
        objective: `Utility()` if None.
        profile: A latency curve on which all tokens go before block 0, of `Random(site="input")`; measured if None.
            With one of another device nothing is timed here, and reducing is taken to cost nothing by itself.
        max_seconds: Time limit of each of: the curve, the run that prices all methods, the sensitivity of each method,
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
        >>> plan = plan_blocks(model, images, example_batch=images[:1], methods=["tome"], max_seconds=2, progress=False)
        >>> plan.schedule.depth
        4
    """
    (made,) = plan_blocks_for(
        model,
        images,
        [objective if objective is not None else Utility()],
        example_batch=example_batch,
        methods=methods,
        profile=profile,
        max_seconds=max_seconds,
        target=target,
        progress=progress,
    )
    return made


def plan_blocks_for(
    model: nn.Module,
    images: Tensor,
    objectives: Sequence[Objective],
    *,
    example_batch: Tensor,
    methods: Sequence[str | Reduction] = AUTO,
    profile: LatencyProfile | None = None,
    max_seconds: float = 30.0,
    target: str | None = None,
    progress: bool = True,
) -> list[BlocksPlan]:
    """A plan for each of several objectives: what `plan_blocks` makes, measured once for all of them.

    What is timed for one teaches the planner for those that follow.

    Args:
        model: As of `plan_blocks`, and so are those that are not named here.
        images: Likewise.
        objectives: What to plan for.
        example_batch: Likewise.
        methods: Likewise.
        profile: Likewise.
        max_seconds: Likewise.
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
        check_inputs(transformer, images, example_batch, objective, max_seconds)
    reductions = usable_methods(methods, transformer)
    foreign = False
    if profile is None:
        profile = profile_latency(
            model, example_batch, method=CURVE, max_seconds=max_seconds, target=target, progress=progress
        )
    else:
        check_profile(profile, transformer, CURVE, 0, "deployed", hint=_HINT)
        foreign = is_foreign(profile, transformer, example_batch)
    search = BlockSearch(model, transformer, images, example_batch, profile, foreign, max_seconds, target, progress)
    fronts = search.fronts(reductions)
    plans = []
    for objective in objectives:
        best = decided(search, fronts, objective)
        plans.append(_plan(search, fronts, best, objective, time.perf_counter() - start))
        start = time.perf_counter()
    return plans


def _plan(
    search: BlockSearch, fronts: Sequence[MethodFront], best: Finalist, objective: Objective, seconds: float
) -> BlocksPlan:
    curve, front, schedule = search.curve, best.front, best.entry.schedule
    n, tokens, reducing = curve.dense_tokens, schedule.tokens(curve.dense_tokens)[-1], schedule.reducing
    provenance = {
        "method": front.reduction.name,
        "settings": front.reduction.settings(),
        "objective": str(objective),
        "proxy": front.name,
        "tokens_dense": n,
        "tokens": tokens,
        **dict(curve.context),
    }
    made = BlocksPlan(
        schedule=Schedule(schedule.removed, provenance),
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
    return made.unless_slow()
