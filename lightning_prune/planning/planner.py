"""From a latency profile and an accuracy proxy to a schedule."""

import time
import warnings
from collections.abc import Sequence
from math import hypot

import numpy as np
import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer
from lightning_prune.planning.objective import Column, Objective, Utility
from lightning_prune.planning.plan import Plan
from lightning_prune.profiling import LatencyProfile, Proxy, compare_latency, profile_latency, resolve_block
from lightning_prune.profiling.context import is_compiled, measurement_context
from lightning_prune.profiling.curve import SAVING
from lightning_prune.profiling.latency import Protocol, check_dense, ready_to_run
from lightning_prune.progress import ticking
from lightning_prune.reduction import Random, Reduction, resolve
from lightning_prune.schedule import Schedule

_FIRST = 4  # counts at which the proxy is measured before any choice
_MOST = 8  # counts at which it is measured after that
_WORTHWHILE = 0.002  # a better score by less is not worth another pass over the calibration images
PAPER_IMAGES = 1024  # whose accuracy the POMT paper looks at


class ProxyCurve:
    """The accuracy proxy at token counts, each measured once and only when it is asked for.

    Args:
        model: Any module that contains one Vision Transformer; dense and unpatched.
        images: (images, channels, height, width) calibration images.
        profile: The latency curve whose counts may be asked for.
        method: The reduction.
        labels: (images,) int64 or None; see `lightning_prune.profiling.Proxy`.
        batch_size: Images in one forward pass. If None, the profile's, or 32 if that is less and nothing is compiled.
        target: Dotted path of the transformer in `model`.
        progress: Shows a bar on a terminal.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        profile: LatencyProfile,
        method: str | Reduction = "pomt",
        *,
        labels: Tensor | None = None,
        batch_size: int | None = None,
        target: str | None = None,
        progress: bool = True,
    ) -> None:
        _check_images(images)
        self.profile = profile
        self.values: dict[int, float] = {profile.dense_tokens: 1.0}
        self._transformer = find_vision_transformer(model, target)
        check_dense(self._transformer)
        self._reduction = Random(site="input") if profile.protocol == "paper" else resolve(method)
        self._show = progress
        device = next(self._transformer.root.parameters()).device
        with ready_to_run(self._transformer), ticking("Running the dense model", None, progress) as tick:
            size = batch_size or _proxy_batch(profile, self._transformer)
            self._proxy = Proxy(self._transformer, images, device, size, labels, tick)
        self.name = self._proxy.name

    def __call__(self, tokens: int) -> float:
        """The proxy at one token count, relative to dense."""
        if tokens not in self.values:
            removed = self.profile.dense_tokens - tokens
            schedule = Schedule.single(self.profile.depth, self.profile.block, removed)
            with (
                ready_to_run(self._transformer),
                ticking(f"Accuracy at {tokens} tokens", None, self._show),
                PatchHandle(self._transformer, self._reduction, schedule),
            ):
                self.values[tokens] = self._proxy.measure()
        return self.values[tokens]


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
        block: Index of the reducing block, or a fraction of the depth.
        protocol: `"paper"` reproduces POMT's computation (arXiv 2407.05941, section 3.2): latency and accuracy of
            random tokens dropped before block 0, at every count, accuracy on 1024 labelled images. Hours on a CPU.
        labels: (images,) int64; the proxy is then top-1 accuracy. Needed by `protocol="paper"`.
        curve: A proxy curve to go on with, when several objectives are planned for on one profile.
        confirm: Whether to time the winner beside the dense model at the end.
        max_seconds: Time limit of latency profiling, and again of the proxy's refinement.
        target: Dotted path of the transformer in `model`.
        progress: Shows bars on a terminal.

    Returns:
        The plan: schedule, curve, reasons, measured and predicted latency.

    Raises:
        ArgumentError: If an argument is unusable or one that is needed is missing.
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
    _check_images(images)
    reduction = resolve(method)
    transformer = find_vision_transformer(model, target)
    index = resolve_block(block, transformer.depth)
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
        _warn_if_foreign(profile, transformer, images if example_batch is None else example_batch, example_batch)
    if curve is None:
        curve = ProxyCurve(model, images, profile, reduction, labels=labels, target=target, progress=progress)
    tokens, reason = _choose(profile, curve, objective, exhaustive=protocol == "paper", max_seconds=max_seconds)
    removed = profile.dense_tokens - tokens
    schedule = Schedule.single(transformer.depth, index, removed)
    dense = pruned = None
    if removed and confirm:
        if example_batch is None:
            example_batch = _batch_of(images, int(profile.context.get("batch_size", 1)), transformer)
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


def _choose(
    profile: LatencyProfile, curve: ProxyCurve, objective: Objective, exhaustive: bool, max_seconds: float | None
) -> tuple[int, str]:
    """The token count to deploy and why; dense where nothing is saved."""
    n = profile.dense_tokens
    useful = [count for count in profile.tokens if count < n and profile.saves(count)]
    if not useful:
        return n, _why_dense(profile)
    # The paper's argmax is over every count; else a count that saves nothing is no candidate.
    counts = list(profile.tokens) if exhaustive else [*useful, n]
    latency = np.array([profile.at(count) for count in counts])
    deadline = time.perf_counter() + (max_seconds if max_seconds is not None else float("inf"))
    for count in counts if exhaustive else _spread(useful):
        curve(count)
    before = len(curve.values)  # what an earlier objective asked for is no reason to ask for less
    while not exhaustive and len(curve.values) - before < _MOST and time.perf_counter() < deadline:
        promising = _promising(counts, latency, curve, objective)
        if promising is None:
            break
        curve(promising)
    measured = [count for count in counts if count in curve.values]
    accuracy = np.array([curve.values[count] for count in measured])
    chosen = measured[objective.best(np.array([profile.at(count) for count in measured]), accuracy)]
    if chosen == n:
        return n, f"Dense is best by the objective ({objective}): every faster count costs too much."
    saved = 100 * (1 - profile.at(chosen) / profile.dense_ms)
    kept = 100 * curve.values[chosen]
    return chosen, f"Best by {objective}: {saved:.1f}% less latency, {kept:.2f}% of the dense {curve.name}."


def _why_dense(profile: LatencyProfile) -> str:
    """Why no count is worth having: the device gains nothing, or the measurement cannot tell."""
    fastest = profile.tokens[int(np.argmin(profile.milliseconds))]
    gained = 1 - profile.at(fastest) / profile.dense_ms
    if gained <= SAVING:
        closest = f"{fastest} tokens, by {100 * gained:.1f}%" if fastest < profile.dense_tokens else "dense itself"
        return (
            f"The curve is flat: no measured count is faster than dense by more than 2% (the fastest is {closest}). "
            "Pruning would cost accuracy for nothing."
        )
    noise = 2 * hypot(profile.error(fastest), profile.error(profile.dense_tokens)) / profile.dense_ms
    return (
        f"The measurement is too noisy to choose by: {fastest} tokens seem {100 * gained:.1f}% faster than dense, within "
        f"a noise of {100 * noise:.0f}%. Stop what else runs on this machine, or raise `max_seconds`."
    )


def _promising(counts: Sequence[int], latency: Column, curve: ProxyCurve, objective: Objective) -> int | None:
    """The count to measure next: where the objective expects its best, then the gaps beside it that may hide better.

    Between measured counts the proxy is first taken to be straight. It is usually better than that, but hardly better
    than at the next larger count; a gap is entered while even this would make a difference.
    """
    known = [count for count in counts if count in curve.values]
    straight = np.interp(counts, known, [curve.values[count] for count in known])
    best = objective.best(latency, straight)
    if counts[best] not in curve.values:
        return counts[best]
    place = known.index(counts[best])
    for low, high in ((place - 1, place), (place, place + 1)):
        if low < 0 or high >= len(known):
            continue
        gap = [i for i, count in enumerate(counts) if known[low] < count < known[high]]
        hopeful = straight.copy()
        hopeful[gap] = curve.values[known[high]]
        score = objective.score(latency, hopeful)
        if gap and score[gap].max() > score[best] + _WORTHWHILE:
            return counts[gap[len(gap) // 2]]
    return None


def _spread(counts: Sequence[int]) -> list[int]:
    """A few counts spread over the curve, the most tokens among them: budgets live near dense."""
    positions = np.linspace(0, len(counts) - 1, min(_FIRST, len(counts))).round().astype(int)
    return [counts[position] for position in dict.fromkeys(positions.tolist())]


def _batch_of(images: Tensor, size: int, transformer: VisionTransformer) -> Tensor:
    """A batch of the profiled size on the model's device, from however many images there are."""
    device = next(transformer.root.parameters()).device
    return images[torch.arange(size) % len(images)].to(device)


def _check_images(images: object) -> None:
    if not isinstance(images, Tensor) or images.ndim != 4 or not len(images):
        came = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ArgumentError(f"`images` must be a tensor (images, channels, height, width), got {came}.")


def _warn_if_foreign(
    profile: LatencyProfile, transformer: VisionTransformer, images: Tensor, example_batch: Tensor | None
) -> None:
    """Says where a profile was measured under other conditions than those of this run: its latencies may not hold."""
    here = measurement_context(transformer.runner, _batch_of(images, 1, transformer))
    here["batch_size"] = None if example_batch is None else len(example_batch)
    for key in ("device", "batch_size", "image_shape", "precision", "compiled"):
        there = profile.context.get(key)
        if None not in (there, here[key]) and there != here[key]:
            warnings.warn(f"The profile was measured elsewhere: {key} {there} there, {here[key]} here.", stacklevel=3)


def _proxy_batch(profile: LatencyProfile, transformer: VisionTransformer) -> int:
    """The profiled batch size where the model is compiled for it; otherwise one that keeps the device busy."""
    size = int(profile.context.get("batch_size", 1))
    return size if is_compiled(transformer.runner) else max(size, 32)


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
