"""Measures latency on the device at hand: against the token count, and of variants against each other."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import datetime
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune._utils.device import between_runs
from lightning_prune._utils.isolation import user_hooks
from lightning_prune._utils.progress import OnStep, note_progress, progress_bar
from lightning_prune._utils.validation import as_int, check, check_bool, check_images, check_int
from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.patching.schedule_forms import allocate_schedule, reducing_block, refuse_adaptive
from lightning_prune.profiling.clocks import read_clock
from lightning_prune.profiling.count_search import profile_builder, search_counts
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.interleaved_timer import LEAST_ROUNDS, InterleavedTimer, LatencyStats
from lightning_prune.profiling.latency_profile import LatencyProfile
from lightning_prune.profiling.model_variants import DENSE, Variant, VariantSwitch, settle_seconds
from lightning_prune.profiling.page_faults import fault_context
from lightning_prune.reduction import RandomDrop, Reduction, resolve
from lightning_prune.runtimes.base import Runtime, applied_runtime
from lightning_prune.runtimes.calibration import calibrating_if_none
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.in_place import is_compiled
from lightning_prune.runtimes.registry import parse_runtime
from lightning_prune.runtimes.token_curve import TokenCurve
from lightning_prune.runtimes.torch_runtime import TorchEager, raised_recompile_limit
from lightning_prune.schedule import KeepRates, Schedule

ProfilingMode = Literal["deployed", "paper"]

TOKEN_CURVE = RandomDrop(site="input")
"""Method of the profile of the token count alone: drops random tokens before block 0, so all blocks have one count."""


def profile_latency(
    model: nn.Module,
    example_inputs: Tensor,
    *,
    method: str | Reduction = TOKEN_CURVE,
    block: int | float = 0.25,
    counts: Sequence[int] | None = None,
    runtime: str | Runtime | None = None,
    time_limit: float | None = 30.0,
    protocol: ProfilingMode = "deployed",
    module_path: str | None = None,
    verbose: bool = True,
    clock: str | Callable[[], float] = "wall",
) -> LatencyProfile:
    """Measures the latency of the model for different token counts, on the device of the inputs.

    All counts run in turn, in rounds, after warm-up, with the device synchronised before and after each run; the
    figures are medians. A coarse grid comes first, then counts inside every suspected cliff, down to single tokens
    while time lasts. The model is restored to the bit, also after an error.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, C, H, W) images on the device, in the size and dtype that will be used.
        method: The reduction that removes the tokens, in the form in which it is used: at `block`, or spread over the
            blocks. Its own overhead is measured, too. By default random tokens are dropped before block 0, which gives
            the latency of the token count alone; `lightning_prune.plan` uses such a profile for all methods.
        block: Index of the reducing block, or a fraction of the depth (0.25 is the POMT paper's). For methods that
            reduce in many blocks, as ToMe, an index is the first of them and a fraction is ignored. Methods that act
            before block 0 ignore it.
        counts: Token counts (including prefix tokens) after the last reducing block, to measure instead of the grid.
            Dense is always added.
        runtime: What executes the model: `"torch"`, or `"torch.compile:mode=..."`. None keeps a runtime that is applied
            to the model already, and is `"torch"` otherwise.
        time_limit: Seconds, including compilation. Three rounds over `counts`, or over three counts and dense, are
            completed even after the limit. None measures 20 rounds.
        protocol: `"paper"` measures as POMT does (arXiv 2407.05941, section 3.2): every token count, with random tokens
            dropped before block 0. `method` then only limits the counts, and `block` is ignored.
        module_path: Dotted path of the transformer in `model`, needed where there are several.
        verbose: Shows a progress bar on a terminal.
        clock: What runs are timed by: `"wall"`; `"cpu"`, the CPU time of this process, which repeats better on a busy
            machine, at one thread; or a function that returns seconds. The time limit is wall time.

    Returns:
        The latency profile.

    Raises:
        ArgumentError: If an argument is unusable, the model is patched, or the images decide how many tokens go.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=4).eval()
        >>> images = torch.randn(1, 3, 224, 224)
        >>> profile = lp.profile_latency(model, images, counts=[100, 150], time_limit=1, verbose=False)
        >>> profile.tokens
        (100, 150, 197)
    """
    transformer = find_vision_transformer(model, module_path)
    check_measurable(transformer, example_inputs, time_limit, protocol)
    check_bool("verbose", verbose)
    clock = read_clock(clock, example_inputs.device.type)
    requested = resolve(method)
    refuse_adaptive(requested)
    if requested == TOKEN_CURVE and transformer.first_prunable_block:  # no token may go before block 0
        requested, block = RandomDrop(), transformer.first_prunable_block
    reduction = TOKEN_CURVE if protocol == "paper" else requested
    index = 0 if protocol == "paper" else reducing_block(requested, block, transformer)
    depth, prefix = transformer.depth, transformer.num_prefix_tokens
    start = clock()
    with (
        _applied(runtime, transformer, example_inputs),
        ready_to_run(transformer),
        progress_bar("Profiling latency", time_limit, verbose) as on_step,
    ):
        n = transformer.count_tokens(example_inputs)
        lowest = n - min(each.max_total_removed(n, prefix, depth, index) for each in (reduction, requested))
        possible = reduction.possible_counts(n, prefix, transformer.grid(example_inputs))
        if counts is not None:
            _check_counts(counts, lowest, n, possible)
        elif protocol == "paper":
            counts = range(lowest, n)
        with _switching_counts(transformer, example_inputs, reduction, index, n) as (prepare, run):
            timer = InterleavedTimer[int](
                prepare,
                run,
                between_runs(example_inputs.device),
                reference=n,
                clock=clock,
                settle_seconds=settle_seconds([applied_runtime(transformer)]),
            )
            build = profile_builder(reduction.name, index, depth, protocol)
            counted = _counting_runs(on_step)
            profile = search_counts(timer, build, counts, lowest, n, time_limit, counted, len(example_inputs), possible)
        context = measurement_context(transformer.compiled_root, example_inputs, clock)
        context["method_settings"] = {key: repr(value) for key, value in reduction.settings().items()}
        context |= {} if transformer.restore is None else {"restore": transformer.restore}
        context |= fault_context(example_inputs.device.type)
        context["measured"] = datetime.now().astimezone().isoformat(timespec="seconds")
    return replace(profile, seconds=clock() - start, context=context)


def compare_latency(
    model: nn.Module,
    example_inputs: Tensor,
    variants: Mapping[str, Variant | tuple[str | Reduction | None, Schedule | KeepRates] | None],
    *,
    rounds: int = 31,
    runtime: str | Runtime | None = None,
    time_limit: float | None = 20.0,
    module_path: str | None = None,
    verbose: bool = True,
    clock: str | Callable[[], float] = "wall",
    min_rounds: int = LEAST_ROUNDS,
) -> dict[str, LatencyStats]:
    """Times variants of one model against each other in one interleaved run.

    Args:
        model: Any module that contains one Vision Transformer.
        example_inputs: (B, C, H, W) images on the device.
        variants: Name -> (method, schedule), a `lightning_prune.profiling.Variant`, or None for the dense model. One
            must be None: ratios refer to it. The method is None for a schedule that names one for each block.
        rounds: Measurements of each variant, if time allows.
        runtime: What executes the model, as in `profile_latency`.
        time_limit: Seconds, or None.
        module_path: Dotted path of the transformer in `model`.
        verbose: Shows a progress bar on a terminal.
        clock: What runs are timed by, as in `profile_latency`.
        min_rounds: Rounds that are completed even after the limit; of fewer than three, no interval can be given.

    Returns:
        Name -> median milliseconds with spread, and the ratio to dense with its own.

    Raises:
        ArgumentError: If no variant is dense, or the model is patched.
        ScheduleError: If a schedule does not fit.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=2).eval()
        >>> pruned = ("topk", lp.Schedule.single(depth=2, block=0, remove=98))
        >>> variants = {"dense": None, "half": pruned}
        >>> stats = lp.compare_latency(model, torch.randn(1, 3, 224, 224), variants, time_limit=1, verbose=False)
        >>> stats["dense"].ratio
        1.0
    """
    transformer = find_vision_transformer(model, module_path)
    check_measurable(transformer, example_inputs, time_limit)
    check_int("rounds", rounds, 1)
    check_int("min_rounds", min_rounds, 1)
    check_bool("verbose", verbose)
    clock = read_clock(clock, example_inputs.device.type)
    check("variants", variants, "a mapping of names to variants", isinstance(variants, Mapping))
    for name, variant in variants.items():
        is_pair = isinstance(variant, tuple) and 1 <= len(variant) <= len(Variant._fields)
        check(f"variants[{name!r}]", variant, "(method, schedule), a Variant or None", variant is None or is_pair)
    chosen = {name: DENSE if variant is None else Variant(*variant) for name, variant in variants.items()}
    dense = next((name for name, variant in chosen.items() if variant == DENSE), None)
    if dense is None:
        raise ArgumentError(f"`variants` must contain None for the dense model, got {', '.join(variants) or 'none'}.")
    own_runtimes = [each.runtime for each in chosen.values() if each.runtime is not None]
    switch = VariantSwitch(transformer)
    deadline = float("inf") if time_limit is None else clock() + time_limit
    with (
        _applied(runtime, transformer, example_inputs),
        ready_to_run(transformer),
        progress_bar("Comparing latency", time_limit, verbose) as on_step,
    ):
        timer = InterleavedTimer[str](
            prepare=lambda name: switch.to(chosen[name]),
            run=lambda: transformer.run(example_inputs),
            synchronize=between_runs(example_inputs.device),
            reference=dense,
            clock=clock,
            settle_seconds=settle_seconds([applied_runtime(transformer), *own_runtimes]),
        )
        try:
            # The runs of a round, and before all rounds as many that warm up.
            counted = _counting_runs(on_step, len(chosen), rounds)
            timer.measure(variants, rounds, deadline, counted, min_rounds=min(min_rounds, rounds))
        finally:
            switch.off()
    return {name: timer.result(name) for name in variants}


def _counting_runs(on_step: OnStep, runs_per_round: int = 0, rounds: int = 0) -> OnStep:
    """Counts the runs of a timer where the progress is shown: in rounds, where their number is known.

    Args:
        on_step: Called after every run.
        runs_per_round: Runs of a round, and of the warm-up before all rounds; 0 where that is not known.
        rounds: Number of rounds at most.
    """
    runs = 0

    def counted() -> None:
        nonlocal runs
        runs += 1
        if not runs_per_round:
            note_progress(f"{runs} runs")
        else:
            number = min(runs // runs_per_round, rounds)
            note_progress(f"round {number} of {rounds}" if number else "warming up")
        on_step()

    return counted


@contextmanager
def _applied(runtime: str | Runtime | None, transformer: VisionTransformer, example_inputs: Tensor) -> Iterator[None]:
    now = applied_runtime(transformer) or TorchEager()
    with (
        calibrating_if_none(example_inputs),  # latency does not depend on the ranges
        (now if runtime is None else parse_runtime(runtime)).applied(transformer),
    ):
        yield


@contextmanager
def _switching_counts(
    transformer: VisionTransformer, example_inputs: Tensor, reduction: Reduction, block: int, n: int
) -> Iterator[tuple[Callable[[int], None], Callable[[], object]]]:
    """Gives a function that prepares a token count, and one that runs it.

    Where a runtime converts the model, one graph serves all counts if that can be; else each count is converted.
    """
    runtime = applied_runtime(transformer)
    if isinstance(runtime, ConvertedRuntime) and reduction == TOKEN_CURVE:
        try:
            curve = TokenCurve(runtime, transformer, example_inputs)
        except ExportError:
            pass
        else:
            yield curve.to, curve.run
            return
    depth, prefix = transformer.depth, transformer.num_prefix_tokens
    handle = PatchHandle(transformer, reduction, Schedule([0] * depth))
    try:
        yield (
            lambda count: handle.update(allocate_schedule(reduction, n - count, n, prefix, depth, block)),
            lambda: transformer.run(example_inputs),
        )
    finally:
        handle.remove()


@contextmanager
def ready_to_run(transformer: VisionTransformer) -> Iterator[None]:
    """Evaluation mode without autograd and without the user's hooks; a limit on compiled graphs for all variants.

    Buffers that a forward pass changes are put back; a warning names the hooks that are not called.
    """
    hooks = [] if transformer.restore is not None else user_hooks(transformer.outer)
    if hooks:
        names = ", ".join(sorted({getattr(hook, "__qualname__", type(hook).__qualname__) for hook in hooks}))
        warnings.warn(
            f"The {len(hooks)} forward hooks on the Vision Transformer ({names}) are not called while it is measured: "
            "no latency and no estimate of accuracy includes what they do.",
            stacklevel=4,
        )
    limit = raised_recompile_limit() if is_compiled(transformer.compiled_root) else nullcontext()
    with torch.no_grad(), transformer.isolated(), limit:
        yield


def check_measurable(
    transformer: VisionTransformer, example_inputs: Tensor, time_limit: float | None, protocol: str = "deployed"
) -> None:
    """Raises ArgumentError if a model cannot be measured as it is, or with these arguments."""
    check_images("example_inputs", example_inputs)
    number = isinstance(time_limit, int | float) and not isinstance(time_limit, bool)
    if time_limit is not None and not (number and time_limit > 0):
        raise ArgumentError(f"`time_limit` must be a number > 0, got {time_limit!r}.")
    if protocol not in ("deployed", "paper"):
        raise ArgumentError(f"`protocol` must be 'deployed' or 'paper', got {protocol!r}.")
    check_dense(transformer)


def check_dense(transformer: VisionTransformer) -> None:
    """Raises ArgumentError if the model is patched, as the patched model would be measured as the dense one."""
    if any(is_patched_module(module) for module in transformer.root.modules()):
        raise ArgumentError("`model` must be dense, got a patched model; remove the patch before measuring it.")


def _check_counts(counts: Any, lowest: int, n: int, possible: Sequence[int] | None) -> None:
    is_list = not isinstance(counts, str) and isinstance(counts, Sequence) and len(counts) > 0
    check("counts", counts, "a list of at least one number of tokens", is_list)
    wrong = [count for count in counts if (number := as_int(count)) is None or not lowest <= number <= n]
    if wrong:
        raise ArgumentError(f"`counts` must lie between {lowest} and {n}, got {wrong[0]!r}.")
    absent = [] if possible is None else sorted({*counts} - {*possible, n})
    if absent:
        near = sorted(possible or (), key=lambda count: abs(count - absent[0]))[:2]
        raise ArgumentError(
            f"`counts` must be possible numbers of tokens of the method, such as {near}, got {absent[0]!r}."
        )
