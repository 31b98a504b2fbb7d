"""Checks that a schedule fits a model and a method, before the model is changed."""

from collections.abc import Mapping

from lightning_prune.errors import ArgumentError, ScheduleError, UnsupportedModelError
from lightning_prune.patching.block_split import AttnMlpSplit, computes_tokens_alone, verify_split
from lightning_prune.patching.models import VisionTransformer
from lightning_prune.patching.patched_block import too_many
from lightning_prune.reduction import Reduction
from lightning_prune.reduction.resize import grid_of_count
from lightning_prune.schedule import KeepRates, Schedule


def check_depth(transformer: VisionTransformer, schedule: Schedule | KeepRates) -> None:
    """Raises ScheduleError if the schedule has another number of blocks than the model."""
    if schedule.depth != transformer.depth:
        raise ScheduleError(f"`schedule` must have {transformer.depth} blocks, as the model, got {schedule.depth}.")


def check_reduction(
    transformer: VisionTransformer, reduction: Reduction, block: int | None, reduces: bool = True
) -> None:
    """Raises if the reduction cannot be used with this transformer, regardless of the number of tokens.

    Args:
        transformer: The transformer.
        reduction: The method.
        block: The first block that reduces; None for the first that can.
        reduces: Whether any block reduces.

    Raises:
        ScheduleError: If that block cannot remove tokens.
        UnsupportedModelError: If the model does not support the reduction.
        ArgumentError: If the reduction was made for another model.
    """
    kind = type(transformer.root).__name__
    first = transformer.first_prunable_block
    if block is not None and block < first:
        raise ScheduleError(
            f"`schedule` must remove tokens from block {first} on in this {kind}, got block {block}: "
            f"{transformer.first_prunable_reason}."
        )
    if reduction.proportional_attention and not transformer.adapter.supports_key_bias:
        raise UnsupportedModelError(
            f"{reduction.name} weights the attention of later blocks by token sizes, which the attention of this "
            f"{kind} does not support. Use proportional_attention=False or another method."
        )
    if reduction.adaptive and transformer.pools_patches and not reduction.is_lossless:
        raise UnsupportedModelError(
            f"{reduction.name} pads images that have fewer tokens than others in the batch, and this {kind} pools over "
            "its patch tokens, including padding. Use a model that reads its CLS token."
        )
    if transformer.restore == "delta" and (reduction.adaptive or reduction.scales_images):
        what = "pads images that have fewer tokens" if reduction.adaptive else "removes no tokens of a sequence"
        raise ArgumentError(f"`restore` must be 'auto' or 'copy' with {reduction.name}, which {what}, got 'delta'.")
    if transformer.restore is not None and reduction.adaptive and not reduction.is_lossless:
        raise UnsupportedModelError(
            f"`restore` must be None with {reduction.name}, which pads images that have fewer tokens and drops others."
        )
    if reduces and ("attention" in reduction.reads or reduction.proportional_attention):
        reason = transformer.adapter.attention_unsupported_reason(transformer)
        if reason is not None:
            raise UnsupportedModelError(reason)
    if reduces and reduction.scales_images:
        transformer.adapter.patch_division(transformer.root)  # raises if the images cannot be scaled
    reason = reduction.unsupported_reason(transformer.root) if reduces else None
    if reason is not None:
        raise ArgumentError(reason)


def check_schedule(
    transformer: VisionTransformer, reduction: Reduction | Mapping[int, Reduction], schedule: Schedule | KeepRates
) -> None:
    """Raises if the schedule does not fit the transformer and the reduction.

    If the number of tokens depends on the image size, it is checked in the forward pass instead.

    Args:
        transformer: The transformer.
        reduction: The method, or the method of each reducing block.
        schedule: The schedule.

    Raises:
        ScheduleError: If the schedule has another depth or removes too many tokens; names the numbers.
        UnsupportedModelError: If the model does not support the reduction.
        ArgumentError: If the reduction was made for another model.
    """
    check_depth(transformer, schedule)
    reducing = schedule.reducing
    if isinstance(reduction, Reduction):
        check_reduction(transformer, reduction, min(reducing) if reducing else None, bool(reducing))
        reductions = dict.fromkeys(reducing, reduction)
    else:
        reductions = dict(reduction)
        _check_mixed(transformer, reductions)
    for block, each in reductions.items():
        if each.site == "input" and block:
            raise ScheduleError(
                f"`schedule` must remove tokens in block 0 only, before which {each.name} acts, got block {block}."
            )
    if transformer.num_tokens is None:
        return
    if isinstance(schedule, KeepRates):
        schedule = schedule.schedule(transformer.num_tokens, transformer.num_prefix_tokens)
    count = transformer.num_tokens
    for index, remove in schedule.reducing.items():
        grid = transformer.grid() if reductions[index].scales_images else None
        if grid is not None:
            grid_of_count(*grid, count - transformer.num_prefix_tokens - remove)  # raises if there is none
            count -= remove
            continue
        max_removed = reductions[index].max_removed(count, transformer.num_prefix_tokens)
        if remove > max_removed:
            raise ScheduleError(too_many(index, count, remove, max_removed, reductions[index].name))
        count -= remove


def verified_split(transformer: VisionTransformer, index: int) -> AttnMlpSplit | None:
    """How to run a block in two parts; None where it has none, or its parts do not give what the block gives.

    Args:
        transformer: The transformer, whose block is not patched.
        index: Of the block.
    """
    block, adapter = transformer.blocks[index], transformer.adapter
    attn_mlp_split = adapter.attn_mlp_split(block)
    if attn_mlp_split is None:
        return None
    tokens, kwargs = adapter.split_check_input(transformer)
    is_same = verify_split(block, attn_mlp_split, tokens, transformer.embed_dim, kwargs)
    return attn_mlp_split if is_same else None


def head_reason(transformer: VisionTransformer, requested: bool = False) -> str | None:
    """Why the head of a transformer allows no exact tail (see `lightning_prune.patch`); None if it does.

    Args:
        transformer: The transformer.
        requested: Whether it was asked for by `tail=True`; then the model may return prefix tokens only.
    """
    if transformer.reader is not None and transformer.restore is not None:
        return "all tokens of its last block are read"
    reason = transformer.adapter.head_reason(transformer.root)
    if reason is not None:
        return reason
    if not requested and transformer.adapter.returns_tokens(transformer.root):
        return "it returns all tokens; `tail=True` makes it return prefix tokens only"
    if not transformer.num_prefix_tokens or transformer.first_prunable_block >= transformer.depth:
        return "no prefix tokens enter its last block"
    return None


def last_block_reason(transformer: VisionTransformer, attn_mlp_split: AttnMlpSplit | None) -> str | None:
    """Why the last block of a transformer allows no exact tail; None if it does.

    Args:
        transformer: The transformer, dense.
        attn_mlp_split: The `verified_split` of its last block.
    """
    if "forward" in vars(transformer.blocks[-1]):
        return "the `forward` of its last block was replaced on the module itself"
    if attn_mlp_split is None:
        return "its last block cannot be run in two parts, attention and MLP"
    block, prefix = transformer.blocks[-1], transformer.num_prefix_tokens
    norms = transformer.adapter.final_norms(transformer.root)
    if computes_tokens_alone(block, attn_mlp_split, norms, prefix + 4, transformer.embed_dim, prefix):
        return None
    return "its last MLP, or the norm after it, computes tokens from one another"


def has_exact_tail(transformer: VisionTransformer) -> bool:
    """Whether a transformer that removes tokens has the exact tail, by default.

    Args:
        transformer: The transformer, dense.

    Example:
        >>> import timm
        >>> from lightning_prune.patching import find_vision_transformer, has_exact_tail
        >>> has_exact_tail(find_vision_transformer(timm.create_model("vit_tiny_patch16_224", depth=1)))
        True
        >>> pooled = timm.create_model("vit_tiny_patch16_224", depth=1, global_pool="avg")
        >>> has_exact_tail(find_vision_transformer(pooled))
        False
    """
    reason = head_reason(transformer)
    return (reason or last_block_reason(transformer, verified_split(transformer, transformer.depth - 1))) is None


def _check_mixed(transformer: VisionTransformer, reductions: Mapping[int, Reduction]) -> None:
    for block, reduction in reductions.items():
        if reduction.adaptive:
            raise ArgumentError(
                f"`method` must hold methods with a fixed number of tokens, got {reduction.name} for block {block}."
            )
        check_reduction(transformer, reduction, block)
    if any(reduction.scales_images for reduction in reductions.values()):
        readers = [reduction.name for reduction in reductions.values() if "pixels" in reduction.reads]
        if readers:
            raise UnsupportedModelError(f"{readers[0]} reads the pixels, so it cannot be combined with scaled images.")
    lossless = {reduction.is_lossless for reduction in reductions.values() if not reduction.scales_images}
    if transformer.pools_patches and len(lossless) > 1:
        raise UnsupportedModelError(
            f"This {type(transformer.root).__name__} pools over its patch tokens, so methods that merge tokens cannot "
            "be combined with methods that drop tokens."
        )
