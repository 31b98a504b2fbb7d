"""ToMe: the tokens that are most alike become one (arXiv 2210.09461)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.base import Reduced, Reduction, Sequence
from lightning_prune.reduction.functional import precise_product
from lightning_prune.reduction.merging import merge
from lightning_prune.reduction.tome_schedule import most_removed, spread_removed

_INFLECTION = {"constant": 0.0, "decreasing": -1.0}


def bipartite_matching(key: Tensor, remove: int, prefix_tokens: int) -> tuple[Tensor, Tensor]:
    """Which patch tokens merge into which: bipartite soft matching (arXiv 2210.09461, section 3).

    Patch tokens alternate between two sets: those at odd places among them (the second, the fourth, ...) may go, those
    at even places may be gone into. Each of the first finds the one of the second that it is most similar to, by the
    cosine of their keys averaged over the heads, and the R most similar pairs merge. Prefix tokens take no part, and of
    an odd number of patch tokens the larger set is that of the destinations. Keys are those that met queries: with
    rotary embeddings turned by them, and in talking heads (CaiT) those of all heads side by side.

    Args:
        key: (B, H, N, D).
        remove: R; at most (N - P) // 2, the size of the first set.
        prefix_tokens: P.

    Returns:
        (B, R) tokens that go, and (B, R) the token that each goes into, both as indices among the N.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import bipartite_matching
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> bipartite_matching(key, remove=1, prefix_tokens=0)
        (tensor([[3]]), tensor([[0]]))
    """
    # A cosine does not tell the sum from the mean. With a dtype it is one pass over the keys, and half precision would
    # tie many similarities.
    metric = key.sum(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=1e-12)
    odd, even = metric[:, prefix_tokens + 1 :: 2], metric[:, prefix_tokens::2]
    likeness, partner = precise_product(odd, even.transpose(1, 2)).max(dim=-1)
    chosen = likeness.topk(remove, dim=-1, sorted=False).indices
    return chosen * 2 + (prefix_tokens + 1), partner.gather(1, chosen) * 2 + prefix_tokens


class ToMe(Reduction):
    """Token Merging, as a method for `lightning_prune.patch`.

    Source: arXiv 2210.09461, sections 3 and 4.1. Differences from the published code: tokens that are left keep their
    order, so neighbours stay in different sets; a merged token has the place of its destination, so models with rotary
    embeddings or position biases work; and a schedule removes exactly the total that is asked for.

    Args:
        proportional_attention: Whether later blocks weigh a token as many as it was made of: log(size) is added to the
            logits of its key. Blocks before the first merge keep their attention as it is.
        schedule: How `spread` shares a total among the blocks: `"constant"`, as many in each, or `"decreasing"`,
            linearly from twice the mean in the first block to none in the last. Schedules that are given outright are
            not touched.

    Raises:
        ArgumentError: If an argument is neither of what it may be.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import ToMe, tome_schedule
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> with lp.patch(model, ToMe(), tome_schedule(r=8, depth=12, tokens=197)) as handle:
        ...     handle.schedule.tokens(197)[-1]
        101
    """

    name = "tome"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})
    keeps_sizes = True
    merges = True

    def __init__(
        self, proportional_attention: bool = True, schedule: Literal["constant", "decreasing"] = "constant"
    ) -> None:
        if not isinstance(proportional_attention, bool):
            raise ArgumentError(f"`proportional_attention` must be True or False, got {proportional_attention!r}.")
        if schedule not in tuple(_INFLECTION):  # which asks for no hash: a list is said to be wrong, too
            raise ArgumentError(f"`schedule` must be 'constant' or 'decreasing', got {schedule!r}.")
        self.proportional_attention = proportional_attention
        self.schedule = schedule

    def reduce(self, sequence: Sequence, remove: int) -> Reduced:
        """Merges the R most similar pairs; see `bipartite_matching` and `merge`."""
        assert sequence.attention is not None  # the patch provides what `reads` asks for
        source, destination = bipartite_matching(sequence.attention.key, remove, sequence.prefix_tokens)
        return merge(sequence.tokens, source, destination, sequence.sizes, sequence.trace)

    def capacity(self, tokens: int, prefix_tokens: int) -> int:
        """Half of the patch tokens: those of the set that may go."""
        return max(tokens - prefix_tokens, 0) // 2

    def spread(self, remove: int, tokens: int, prefix_tokens: int, depth: int, block: int) -> list[int]:
        """What each block from `block` on merges; none before it. See `spread_removed`."""
        return spread_removed(remove, tokens, prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def most(self, tokens: int, prefix_tokens: int, depth: int, block: int) -> int:
        """What is gone if each block of the schedule merges half of what it finds."""
        return most_removed(tokens, prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def settings(self) -> dict[str, Any]:
        """`proportional_attention` and `schedule`."""
        return {"proportional_attention": self.proportional_attention, "schedule": self.schedule}
