"""From a latency profile and an accuracy proxy to a schedule."""

import time

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import VisionTransformer, find_vision_transformer
from lightning_prune.planning.choice import choose
from lightning_prune.planning.confirm import Attempt, Confirmed, confirmed
from lightning_prune.planning.given_profile import check_profile, is_foreign, nothing_timed
from lightning_prune.planning.objective import Objective, Utility
from lightning_prune.planning.on_device import OnDevice
from lightning_prune.planning.plan import Plan
from lightning_prune.planning.proxy_curve import ProxyCurve, check_images
from lightning_prune.planning.refine import refine
from lightning_prune.profiling import LatencyProfile, profile_latency, reducing_block
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
        profile: Its latency profile; measured on `example_batch` if None. One of another device is planned for as it
            is: nothing is timed here then.
        example_batch: Images on the device in the batch size that will be used; needed without `profile`, and for
            the final comparison. If None, as many of `images` as the profile's batch size says.
        method: The reduction to deploy.
        objective: `Utility()` if None.
        block: Index of the reducing block, or a fraction of the depth; see `lightning_prune.profile_latency`.
        protocol: `"paper"` reproduces POMT's computation (arXiv 2407.05941, section 3.2): latency and accuracy of
            random tokens dropped before block 0, at every count, accuracy on 1024 labelled images. Hours on a CPU.
        labels: (images,) int64; the proxy is then top-1 accuracy. Needed by `protocol="paper"`.
        curve: A proxy curve to go on with, when several objectives are planned for on one profile.
        confirm: Whether to look closer at the latency around the winner, and to time it beside the dense model.
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
    foreign = False
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
        check_profile(profile, transformer, reduction, index, protocol)
        if example_batch is None:
            example_batch = _batch_of(images, int(profile.context.get("batch_size", 1)), transformer)
        foreign = is_foreign(profile, transformer, example_batch)
    if curve is None:
        curve = ProxyCurve(model, images, profile, reduction, labels=labels, target=target, progress=progress)

    n, prefix, depth = profile.dense_tokens, transformer.prefix_tokens, transformer.depth
    device = OnDevice(model, example_batch, reduction, index, n, prefix, depth, max_seconds, target, progress)

    def choose_by(wanted: Objective) -> tuple[int, str]:
        return choose(curve.profile, curve, wanted, exhaustive=protocol == "paper", max_seconds=max_seconds)

    found = Confirmed(*choose_by(objective))
    if foreign:
        found = found._replace(reason=nothing_timed(found.reason, profile))
    elif confirm:
        if protocol == "deployed" and max_seconds is not None:
            deadline = time.perf_counter() + max_seconds / 4
            closer = refine(profile, curve, objective, device.measure, lambda: time.perf_counter() < deadline)
            if closer is not profile:
                curve.profile = profile = closer
                found = Confirmed(*choose_by(objective))
        chosen = (found.tokens, found.reason)
        attempt = Attempt(chosen, n, curve.profile.dense_ms, objective, choose_by, lambda: _fastest(curve))
        found = confirmed(attempt, device.compare)
    provenance = {
        "method": reduction.name,
        "settings": reduction.settings(),
        "objective": str(objective),
        "protocol": protocol,
        "proxy": curve.name,
        "tokens_dense": profile.dense_tokens,
        "tokens": found.tokens,
        **dict(profile.context),
    }
    made = Plan(
        schedule=Schedule(device.schedule(found.tokens).removed, provenance),
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
    return made.unless_slow()


def _fastest(curve: ProxyCurve) -> tuple[int, str]:
    """The fastest count, and what to say of it; its proxy is measured."""
    profile = curve.profile
    tokens = min(profile.tokens, key=profile.at)
    return tokens, f"The fastest count: {100 * curve(tokens):.2f}% of the dense {curve.name}."


def _batch_of(images: Tensor, size: int, transformer: VisionTransformer) -> Tensor:
    """A batch of the profiled size on the model's device, from however many images there are."""
    device = next(transformer.root.parameters()).device
    return images[torch.arange(size) % len(images)].to(device)
