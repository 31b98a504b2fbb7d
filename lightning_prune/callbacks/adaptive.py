"""Deciding for methods of which the images decide how many tokens go: nothing is planned, but all is measured."""

from torch import Tensor, nn

from lightning_prune.callbacks.decision import Decision
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer
from lightning_prune.profiling import compare_latency, measurement_context
from lightning_prune.profiling.latency import count_tokens, ready_to_run
from lightning_prune.profiling.variant import Variant
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


def measure_adaptive(
    model: nn.Module, images: Tensor, reduction: Reduction, max_seconds: float, target: str | None, progress: bool
) -> Decision:
    """Times the model with an adaptive method beside the dense one, on one batch.

    Args:
        model: Contains the Vision Transformer, which is dense.
        images: (B, channels, height, width).
        reduction: The method.
        max_seconds: Time limit.
        target: Dotted path of the transformer, where there are several.
        progress: Shows a bar on a terminal.

    Raises:
        ArgumentError: If the method was made for another model.
        UnsupportedModelError: If the model cannot do what the method needs.
    """
    transformer = find_vision_transformer(model, target)
    with ready_to_run(transformer):
        n = count_tokens(transformer, images)
        left = _tokens_left(transformer, images, reduction)
        context = measurement_context(transformer.runner, images)
    variants = {"dense": None, "pruned": Variant(reduction)}
    timings = compare_latency(model, images, variants, max_seconds=max_seconds, target=target, progress=progress)
    dense, pruned = timings["dense"], timings["pruned"]
    return Decision(
        schedule=Schedule([0] * transformer.depth),
        method=reduction.name,
        dense_tokens=n,
        tokens=left,
        dense_ms=dense.milliseconds,
        latency_ms=pruned.milliseconds,
        speedup=1 / pruned.ratio,
        predicted_ms=None,
        reason=f"The images decide; the longest of this batch is left with {left} of {n} tokens.",
        context=context,
        adaptive=True,
    )


def _tokens_left(transformer: VisionTransformer, images: Tensor, reduction: Reduction) -> int:
    """Tokens that leave the first block, those of the longest image; seen in a real forward pass."""
    handle = PatchHandle(transformer, reduction)
    seen: list[int] = []
    block = transformer.blocks[transformer.first]
    hook = block.register_forward_hook(lambda _, args, output: seen.append(output.shape[1]))
    try:
        transformer.root.forward(images)  # past a compiled graph, which would not see the hook
    finally:
        hook.remove()
        handle.remove()
    return seen[0]
