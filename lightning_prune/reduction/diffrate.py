"""DiffRate's schedules, with all removed tokens merged (arXiv 2305.17997)."""

from itertools import accumulate, pairwise
from math import ceil
from typing import Any, ClassVar, NamedTuple

from lightning_prune._utils.validation import check, check_bool
from lightning_prune.errors import ScheduleError
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.cls_attention import topk_scores
from lightning_prune.reduction.merging import merge_into_nearest


class DiffRateTables(NamedTuple):
    """Published schedules of one model: the tokens, prefix included, that leave the attention of each block."""

    tokens: int  # N, with one prefix token
    counts: dict[str, tuple[int, ...]]  # by GMACs, the weakest first


TABLES: dict[int, DiffRateTables] = {
    12: DiffRateTables(  # DeiT-S
        197,
        {
            "3.1": (197, 196, 186, 164, 150, 141, 133, 121, 103, 78, 68, 3),
            "2.9": (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
            "2.7": (197, 188, 170, 147, 131, 119, 109, 96, 76, 54, 45, 3),
            "2.5": (197, 186, 160, 133, 119, 107, 96, 82, 66, 43, 37, 3),
            "2.3": (197, 180, 156, 127, 109, 98, 80, 66, 52, 37, 31, 3),
        },
    ),
    24: DiffRateTables(  # ViT-L of MAE
        197,
        {
            "42.3": (
                *(197, 197, 196, 194, 193, 192, 187, 183, 181, 173, 154, 146),
                *(137, 127, 123, 114, 105, 98, 87, 75, 43, 45, 32, 32),
            ),
            "34.7": (
                *(197, 193, 190, 185, 173, 164, 159, 154, 142, 137, 121, 111),
                *(103, 97, 82, 76, 67, 61, 58, 48, 35, 32, 18, 18),
            ),
        },
    ),
    32: DiffRateTables(  # ViT-H of MAE
        257,
        {
            "124.5": (
                *(257, 254, 251, 244, 238, 223, 221, 203, 194, 192, 191, 190, 188, 184, 188, 185),
                *(184, 183, 185, 183, 183, 185, 183, 183, 185, 183, 179, 167, 177, 133, 136, 136),
            ),
            "83.7": (
                *(257, 252, 240, 212, 186, 172, 160, 163, 148, 142, 138, 132, 118, 114, 111, 108),
                *(103, 102, 105, 106, 109, 105, 108, 99, 96, 96, 95, 86, 79, 77, 56, 56),
            ),
        },
    ),
}
"""Depth of the model -> its schedules: `merge_kept_num` of the authors' compression_rate.json, for frozen weights."""


def diffrate_counts(remove: int, tokens: int, num_prefix_tokens: int, depth: int, first: int = 0) -> list[int]:
    """Distributes `remove` tokens over the blocks as DiffRate's published schedules do.

    A total between two schedules, or between the weakest and none, is interpolated in each block. The shares of patch
    tokens that are left are those of the schedules, so that the numbers of tokens may be others. Where a schedule rises
    from one block to the next, the lower number is used.

    The last block removes nothing, and counts for nothing in the totals. For DeiT the schedules leave three tokens
    there, because a head that reads CLS does not see the others; a head that pools over the patch tokens would see
    little else. Those of MAE, whose heads pool, remove nothing there.

    Args:
        remove: Total number of tokens to remove; at most `max_diffrate`.
        tokens: N, tokens that enter block 0.
        num_prefix_tokens: P.
        depth: Number of blocks; 12 (schedules of DeiT-S), 24 (ViT-L of MAE) or 32 (ViT-H of MAE).
        first: Index of the first block that removes tokens; it removes those of the blocks before it as well.

    Returns:
        The number for each block, with the sum `remove`.

    Raises:
        ArgumentError: If an argument is out of its range.
        ScheduleError: If there is no schedule for models of this depth, or `remove` is more than `max_diffrate`.

    Source: arXiv 2305.17997; https://github.com/OpenGVLab/DiffRate, compression_rate.json.

    Example:
        >>> from lightning_prune.reduction import diffrate_counts
        >>> diffrate_counts(166, tokens=197, num_prefix_tokens=1, depth=12)
        [0, 17, 24, 29, 18, 11, 18, 14, 14, 15, 6, 0]
        >>> diffrate_counts(56, tokens=197, num_prefix_tokens=1, depth=12)
        [0, 0, 5, 9, 6, 4, 4, 5, 8, 11, 4, 0]
    """
    check("remove", remove, "an integer >= 0", remove >= 0)
    check("first", first, f"a block index from 0 to {depth - 1}", 0 <= first < depth)
    if depth not in TABLES:
        *others, last = TABLES
        raise ScheduleError(
            f"`schedule` must be the number of tokens for each block with diffrate-merge in a model of {depth} blocks: "
            f"schedules were published for models of {', '.join(map(str, others))} and {last} blocks."
        )
    patches, largest = tokens - num_prefix_tokens, max_diffrate(tokens, num_prefix_tokens, depth)
    if remove > largest:
        raise ScheduleError(
            f"`remove` must be at most {largest} of {patches} patch tokens, as in the strongest published schedule, "
            f"got {remove}."
        )
    if not remove:
        return [0] * depth
    share = (patches - remove) / patches
    weaker, stronger = next((one, other) for one, other in pairwise(_shares(depth)) if share >= other[-1] - _ROUNDING)
    weight = (weaker[-1] - share) / (weaker[-1] - stronger[-1])
    left = [round(patches * ((1 - weight) * one + weight * other)) for one, other in zip(weaker, stronger, strict=True)]
    left = [patches] * first + [max(count, patches - remove) for count in left[first:-1]] + [patches - remove]
    return [before - after for before, after in pairwise([patches, *left])]


def max_diffrate(tokens: int, num_prefix_tokens: int, depth: int) -> int:
    """The largest total that `diffrate_counts` can distribute, that of the strongest schedule.

    Example:
        >>> from lightning_prune.reduction.diffrate import max_diffrate
        >>> max_diffrate(tokens=197, num_prefix_tokens=1, depth=12)
        166
    """
    patches = tokens - num_prefix_tokens
    return patches - max(ceil(patches * _shares(depth)[-1][-1] - _ROUNDING), 1) if patches > 0 else 0


_ROUNDING = 1e-9


def _shares(depth: int) -> list[list[float]]:
    """The share of patch tokens that leave each block, of no schedule and of each one; the last two are equal."""
    tokens, tables = TABLES[depth]
    lowest = [list(accumulate(counts[:-1], min)) for counts in tables.values()]
    found = [[(count - 1) / (tokens - 1) for count in counts] for counts in lowest]
    return [[*shares, shares[-1]] for shares in ([1.0] * (depth - 1), *found)]


class DiffRateMerge(Reduction):
    """Merges the patch tokens that CLS attends to least into the most similar others, in DiffRate's numbers.

    It is not all of DiffRate, which prunes some of them and merges the rest: here each goes into the most similar token
    that is kept, as by `merge_into_nearest`, with the scores of `topk_scores`. What is DiffRate's is how many tokens
    leave each block, found by its authors by gradient descent for models whose weights stay as they are; see
    `diffrate_counts`. They are used where a total is given; a given schedule may have any numbers, in any model.

    Source: arXiv 2305.17997, and the authors' compression_rate.json.

    Args:
        proportional_attention: Whether later blocks weight tokens by size: log(size) is added to the logits of each
            key. Blocks before the first merge are not affected.

    Raises:
        ArgumentError: If the argument has another value.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, "diffrate-merge", 152) as handle:
        ...     handle.schedule.removed
        (0, 9, 18, 23, 16, 12, 10, 13, 20, 22, 9, 0)
    """

    name = "diffrate-merge"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    tracks_sizes = True
    is_lossless = True
    fused_tokens = 0
    multi_block = True

    def __init__(self, proportional_attention: bool = True) -> None:
        check_bool("proportional_attention", proportional_attention)
        self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `merge_into_nearest`."""
        attention, prefix = sequence.attention, sequence.num_prefix_tokens
        assert attention is not None  # provided because of `reads`
        scores = topk_scores(attention, prefix, sequence.has_class_token)
        return merge_into_nearest(
            sequence.tokens, attention.key, scores, remove, prefix, sequence.sizes, sequence.trace
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """See `diffrate_counts`."""
        return diffrate_counts(remove, tokens, num_prefix_tokens, depth, block)

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """That of the strongest schedule. Where none is published, `allocate` says so."""
        known = depth in TABLES
        return max_diffrate(tokens, num_prefix_tokens, depth) if known else self.max_removed(tokens, num_prefix_tokens)

    def settings(self) -> dict[str, Any]:
        """`proportional_attention`."""
        return {"proportional_attention": self.proportional_attention}
