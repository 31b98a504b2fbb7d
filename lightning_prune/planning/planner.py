"""From a latency profile and an accuracy proxy to a schedule."""

import time
import warnings

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.planning.choice import choose
from lightning_prune.planning.objective import Objective, Utility
from lightning_prune.planning.plan import Plan
from lightning_prune.planning.proxy_curve import ProxyCurve, check_images
from lightning_prune.profiling import (
    LatencyProfile,
    compare_latency,
    measurement_context,
    profile_latency,
    reducing_block,
    spread_schedule,
)
from lightning_prune.profiling.latency import Protocol
from lightning_prune.profiling.spreading import refuse_adaptive
from lightning_prune.reduction import Reduction, resolve
from lightning_prune.schedule import Schedule

PAPER_IMAGES = 1024  # whose accuracy the POMT paper looks at


def plan(
    model: nn.Module,
    images: Tensor,
    *,
    profile: LatencyProfile | None = None,
    example_batch: Tensor | None = None,
    method: str | Reduction = "pomt",
    objective: Objective | None = None,
    block: int | float = 0.25,
    protocol: Protocol = "deployed",
    labels: Tensor | None = None,
    curve: ProxyCurve | None = None,
    confirm: bool = True,
    max_seconds: float | None = 30.0,
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
        profile: Its latency profile; measured on `example_batch` if None.
        example_batch: Images on the device in the batch size that will be used; needed without `profile`, and for
            the final comparison. If None, as many of `images` as the profile's batch size says.
        method: The reduction to deploy.
        objective: `Utility()` if None.
        block: Index of the reducing block, or a fraction of the depth; see `lightning_prune.profile_latency`.
        protocol: `"paper"` reproduces POMT's computation (arXiv 2407.05941, section 3.2): latency and accuracy of
            random tokens dropped before block 0, at every count, accuracy on 1024 labelled images. Hours on a CPU.
        labels: (images,) int64; the proxy is then top-1 accuracy. Needed by `protocol="paper"`.
        curve: A proxy curve to go on with, when several objectives are planned for on one profile.
        confirm: Whether to time the winner beside the dense model at the end.
        max_seconds: Time limit of latency profiling, and again of the proxy, which runs the dense model and four
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
        >>> plan = lp.plan(model, images, example_batch=images[:1], max_seconds=2, progress=False)
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
    if profile is None:
        if example_batch is None:
            raise ArgumentError("`example_batch` is needed to measure a profile: images on the device; got None.")
        profile = profile_latency(
            model,
            example_batch,
            method=reduction,
            block=index,
            protocol=protocol,
            max_seconds=None if protocol == "paper" else max_seconds,
            target=target,
            progress=progress,
        )
    else:
        _check_profile(profile, transformer, reduction, index, protocol)
        if example_batch is None:
            example_batch = _batch_of(images, int(profile.context.get("batch_size", 1)), transformer)
        _warn_if_foreign(profile, transformer, example_batch)
    if curve is None:
        curve = ProxyCurve(model, images, profile, reduction, labels=labels, target=target, progress=progress)
    tokens, reason = choose(profile, curve, objective, exhaustive=protocol == "paper", max_seconds=max_seconds)
    removed = profile.dense_tokens - tokens
    n, prefix, depth = profile.dense_tokens, transformer.prefix_tokens, transformer.depth
    schedule = spread_schedule(reduction, removed, n, prefix, depth, index)
    dense = pruned = None
    if removed and confirm:
        variants = {"dense": None, "pruned": (reduction, schedule)}
        timings = compare_latency(
            model, example_batch, variants, max_seconds=_final_seconds(max_seconds), target=target, progress=progress
        )
        dense, pruned = timings["dense"], timings["pruned"]
    provenance = {
        "method": reduction.name,
        "settings": reduction.settings(),
        "objective": str(objective),
        "protocol": protocol,
        "proxy": curve.name,
        "tokens_dense": profile.dense_tokens,
        "tokens": tokens,
        **dict(profile.context),
    }
    made = Plan(
        schedule=Schedule(schedule.removed, provenance),
        method=reduction.name,
        block=index,
        objective=objective,
        profile=profile,
        proxy=curve.name,
        accuracy=dict(curve.values),
        tokens=tokens,
        reason=reason,
        dense=dense,
        pruned=pruned,
        seconds=time.perf_counter() - start,
    )
    return made.unless_slow()


def _batch_of(images: Tensor, size: int, transformer: VisionTransformer) -> Tensor:
    """A batch of the profiled size on the model's device, from however many images there are."""
    device = next(transformer.root.parameters()).device
    return images[torch.arange(size) % len(images)].to(device)


def _warn_if_foreign(profile: LatencyProfile, transformer: VisionTransformer, example_batch: Tensor) -> None:
    """Says where a profile was measured under other conditions than those of this run: its latencies may not hold."""
    here = measurement_context(transformer.runner, example_batch)
    for key in ("device", "batch_size", "image_shape", "precision", "compiled"):
        there = profile.context.get(key)
        if there is not None and there != here[key]:
            warnings.warn(f"The profile was measured elsewhere: {key} {there} there, {here[key]} here.", stacklevel=3)


def _final_seconds(max_seconds: float | None) -> float:
    return 20.0 if max_seconds is None else max(1.0, max_seconds / 3)


def _check_profile(
    profile: LatencyProfile, transformer: VisionTransformer, reduction: Reduction, block: int, protocol: str
) -> None:
    if profile.depth != transformer.depth:
        raise ArgumentError(f"`profile` is of a model with {profile.depth} blocks; this one has {transformer.depth}.")
    if transformer.tokens is not None and profile.dense_tokens != transformer.tokens:
        raise ArgumentError(f"`profile` is of {profile.dense_tokens} tokens; this model has {transformer.tokens}.")
    if profile.protocol != protocol:
        raise ArgumentError(f"`profile` was measured by protocol {profile.protocol!r}, not {protocol!r}.")
    if protocol == "deployed" and (profile.method, profile.block) != (reduction.name, block):
        raise ArgumentError(
            f"`profile` is of {profile.method} at block {profile.block}; "
            f"asked for is {reduction.name} at block {block}."
        )
