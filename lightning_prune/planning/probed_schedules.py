"""The schedules of each method whose timings tell the parts of its overhead apart."""

from collections.abc import Mapping, Sequence

import numpy as np

from lightning_prune.patching import VisionTransformer
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule

Methods = Mapping[str, tuple[Reduction, Sequence[int]]]
"""Label of a method -> the method, and the blocks in which it may reduce."""

PROBES = 4
"""Schedules that `probe_schedules` returns."""


def probe_schedules(
    reduction: Reduction,
    tokens: int,
    num_prefix_tokens: int,
    blocks: Sequence[int],
    depth: int,
    grid: tuple[int, int] | None = None,
) -> list[Schedule]:
    """Schedules whose timings tell the parts of the overhead apart.

    One block early, one late, four blocks, and three blocks where two get few tokens. If only one block may reduce, it
    removes four different numbers of tokens.

    Args:
        reduction: The method.
        tokens: N.
        num_prefix_tokens: P.
        blocks: Blocks that may reduce, ascending.
        depth: Number of blocks.
        grid: Rows and columns of the patches; None if they are not known.
    """
    first, middle, last = blocks[0], blocks[len(blocks) // 2], blocks[-1]
    late = blocks[max(len(blocks) - 2, 0)]
    four = [blocks[place] for place in np.linspace(0, len(blocks) - 1, 4).astype(int)]
    wanted = [  # (block, tokens to remove) of each schedule; of equal blocks the first counts
        [(first, tokens // 2)],
        [(late, tokens // 3)],
        [(block, tokens // 12) for block in four],
        [(first, tokens * 2 // 3), (middle, tokens // 12), (last, tokens // 12)],
    ]
    found = []
    for cuts in wanted:
        removed, left = [0] * depth, tokens
        for block, cut in sorted(dict(reversed(cuts)).items()):
            removed[block] = reduction.nearest_removed(cut, left, num_prefix_tokens, grid)
            left -= removed[block]
        found.append(Schedule(removed))
    return found


def schedules_to_probe(
    transformer: VisionTransformer, methods: Methods, dense_tokens: int
) -> dict[str, list[Schedule]]:
    """Some schedules of every method, of the whole depth.

    Args:
        transformer: The Vision Transformer.
        methods: Label -> the method and the blocks that may reduce.
        dense_tokens: N.
    """
    prefix, depth = transformer.num_prefix_tokens, transformer.depth
    return {
        label: probe_schedules(reduction, dense_tokens, prefix, blocks, depth, transformer.grid())
        for label, (reduction, blocks) in methods.items()
    }
