"""Measuring latency against tokens: the cut that will be deployed, interleaved, within a time limit."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from typing import Literal

import torch
from torch import Tensor, nn

from lightning_prune._utils.progress import progress_bar
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer
from lightning_prune.patching.block_split import eval_mode
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block, refuse_adaptive
from lightning_prune.profiling.count_search import explore, profile_builder
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.interleaved_timer import InterleavedTimer, LatencyStats
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.model_variants import DENSE, Variant, VariantSwitch
from lightning_prune.reduction import RandomDrop, Reduction, resolve
from lightning_prune.runtimes.torch_runtime import is_compiled, raised_recompile_limit
from lightning_prune.schedule import KeepRates, Schedule

Protocol = Literal["deployed", "paper"]


def profile_latency(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    method: str | Reduction = "pomt",
    block: int | float = 0.25,
    counts: Sequence[int] | None = None,
    time_limit: float | None = 30.0,
    protocol: Protocol = "deployed",
    target: str | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> LatencyProfile:
    """Measures the latency of the model for different numbers of tokens, on the device that the batch is on.

    Each count is measured as it will be deployed: by `method` in the form that it is used in, at `block` or spread over
    the blocks, its own price included. All counts are run in turn, in rounds, after warm-up, with the device
    synchronised before and after; figures are medians. A coarse grid comes first, then counts inside every suspected
    cliff, down to single tokens while time lasts. The model is restored to the bit, also after an error.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, channels, height, width) images on the device, in the size and dtype that will be used.
        method: The reduction.
        block: Index of the reducing block, or a fraction of the depth (0.25 is the POMT paper's). Of methods that
            reduce in many blocks, as ToMe, an index is the first of them and a fraction plays no part; neither does
            for methods that act before block 0.
        counts: Token counts (prefix included) that leave the last reducing block, to measure instead of the grid;
            dense is always added.
        time_limit: Time limit, compilation included; three rounds over `counts`, or over three counts and dense, are
            completed all the same. None measures 20 rounds.
        protocol: `"paper"` measures as POMT does (arXiv 2407.05941, section 3.2): every token count, random tokens
            dropped before block 0; `method` then only says how far it could go, and `block` plays no part.
        target: Dotted path of the transformer in `model`, needed where there are several.
        progress: Shows a bar on a terminal.
        clock: Seconds; the time limit is on it too. A test hands in one that it drives itself.

    Raises:
        ArgumentError: If an argument is unusable, the model is patched, or the images decide how many tokens go.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> batch = torch.randn(1, 3, 224, 224)
        >>> profile = lp.profile_latency(model, batch, counts=[100, 150], time_limit=1, progress=False)
        >>> profile.tokens
        (100, 150, 197)
    """
    transformer = find_vision_transformer(model, target)
    check_measurable(transformer, example_inputs, time_limit, protocol)
    deployed = resolve(method)
    refuse_adaptive(deployed)
    reduction = RandomDrop(site="input") if protocol == "paper" else deployed
    index = 0 if protocol == "paper" else reducing_block(deployed, block, transformer)
    depth, prefix = transformer.depth, transformer.prefix_tokens
    start = clock()
    with ready_to_run(transformer), progress_bar("Profiling latency", time_limit, progress) as tick:
        n = count_tokens(transformer, example_inputs)
        lowest = n - min(each.most(n, prefix, depth, index) for each in (reduction, deployed))
        if counts is not None:
            _check_counts(counts, lowest, n)
        elif protocol == "paper":
            counts = range(lowest, n)
        handle = PatchHandle(transformer, reduction, Schedule([0] * depth))
        try:
            race = InterleavedTimer[int](
                prepare=lambda count: handle.update(allocate_schedule(reduction, n - count, n, prefix, depth, index)),
                run=lambda: transformer.runner(example_inputs),
                device=example_inputs.device,
                reference=n,
                clock=clock,
            )
            build = profile_builder(reduction.name, index, depth, protocol)
            profile = explore(race, build, counts, lowest, n, time_limit, tick, len(example_inputs))
        finally:
            handle.remove()
        context = measurement_context(transformer.runner, example_inputs)
        context["method_settings"] = {key: repr(value) for key, value in reduction.settings().items()}
        context["measured"] = datetime.now().astimezone().isoformat(timespec="seconds")
    return replace(profile, seconds=clock() - start, context=context)


def compare_latency(
    model: nn.Module,
    example_inputs: Tensor,
    variants: Mapping[str, Variant | tuple[str | Reduction, Schedule | KeepRates] | None],
    *,
    rounds: int = 31,
    time_limit: float | None = 20.0,
    target: str | None = None,
    progress: bool = True,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, LatencyStats]:
    """Times deployed variants of one model against each other, in one interleaved run.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, channels, height, width) images on the device.
        variants: Name -> (method, schedule), a `lightning_prune.profiling.Variant`, or None for the unpruned model, of
            which there must be one: ratios refer to it.
        rounds: Measurements of each variant, if time allows.
        time_limit: Time limit, or None; one round is completed all the same.
        target: Dotted path of the transformer in `model`.
        progress: Shows a bar on a terminal.
        clock: Seconds; the time limit is on it too. A test hands in one that it drives itself.

    Returns:
        Name -> median milliseconds with spread, and the ratio to dense with its own.

    Raises:
        ArgumentError: If no variant is dense, or the model is patched.
        ScheduleError: If a schedule does not fit.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> variants = {"dense": None, "pruned": ("tome", lp.Schedule([0, 60, 0, 0]))}
        >>> timings = lp.compare_latency(model, torch.randn(1, 3, 224, 224), variants, rounds=3, progress=False)
        >>> timings["pruned"].milliseconds == timings["pruned"].ratio * timings["dense"].milliseconds
        True
    """
    transformer = find_vision_transformer(model, target)
    check_measurable(transformer, example_inputs, time_limit, "deployed")
    wanted = {name: DENSE if variant is None else Variant(*variant) for name, variant in variants.items()}
    dense = next((name for name, variant in wanted.items() if variant == DENSE), None)
    if dense is None:
        raise ArgumentError("`variants` must hold one None, the dense model that the others are compared with.")
    switch = VariantSwitch(transformer)
    deadline = float("inf") if time_limit is None else clock() + time_limit
    with ready_to_run(transformer), progress_bar("Comparing latency", time_limit, progress) as tick:
        race = InterleavedTimer[str](
            prepare=lambda name: switch.to(wanted[name]),
            run=lambda: transformer.runner(example_inputs),
            device=example_inputs.device,
            reference=dense,
            clock=clock,
        )
        try:
            race.measure(variants, rounds, deadline, tick)
        finally:
            switch.off()
    return {name: race.result(name) for name in variants}


def count_tokens(transformer: VisionTransformer, images: Tensor) -> int:
    """Tokens that enter the first block that can reduce, for images of this size, seen in a real forward pass."""
    return transformer.count_tokens(images)


@contextmanager
def ready_to_run(transformer: VisionTransformer) -> Iterator[None]:
    """Evaluation mode without autograd, and room for as many compiled variants as profiling needs."""
    room = raised_recompile_limit() if is_compiled(transformer.runner) else nullcontext()
    with torch.no_grad(), eval_mode(transformer.root), room:
        yield


def check_measurable(
    transformer: VisionTransformer, batch: Tensor, time_limit: float | None, protocol: str = "deployed"
) -> None:
    """Raises ArgumentError if a model cannot be measured as it is, or with these arguments."""
    if not isinstance(batch, Tensor) or batch.ndim != 4 or not batch.shape[0]:
        came = tuple(batch.shape) if isinstance(batch, Tensor) else type(batch).__name__
        raise ArgumentError(f"`example_inputs` must be images (batch, channels, height, width), got {came}.")
    number = isinstance(time_limit, int | float) and not isinstance(time_limit, bool)
    if time_limit is not None and not (number and time_limit > 0):
        raise ArgumentError(f"`time_limit` must be a number > 0, got {time_limit!r}.")
    if protocol not in ("deployed", "paper"):
        raise ArgumentError(f"`protocol` must be 'deployed' or 'paper', got {protocol!r}.")
    check_dense(transformer)


def check_dense(transformer: VisionTransformer) -> None:
    """Raises ArgumentError if the model is patched: measuring would take the user's patch for the dense model."""
    if any(is_patched_module(block) for block in transformer.blocks):
        raise ArgumentError("The model is patched; remove the patch before measuring it.")


def _check_counts(counts: Sequence[int], lowest: int, n: int) -> None:
    wrong = [count for count in counts if not lowest <= count <= n]
    if wrong:
        raise ArgumentError(f"`counts` must lie between {lowest} and {n}, got {wrong[0]}.")
