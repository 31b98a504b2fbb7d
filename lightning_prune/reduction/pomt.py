"""POMT: attention received and value magnitude pick the tokens, their mean replaces the rest (arXiv 2407.05941)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.base import AttentionInputs, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import (
    attention_probabilities,
    best_in_order,
    is_half_on_cpu,
    merge_into_nearest,
    take_tokens,
    with_prefix,
)

_AT_ONCE = {"cpu": 2**20}  # probabilities of an image: as many as its cache holds, so that each is made and read there
_AT_ONCE_ELSEWHERE = 2**24  # as many as keep a device busy; the memory that they take is bounded as well


def _chunks(query: Tensor, num_prefix_tokens: int) -> list[slice]:
    """The patch queries, in equal parts where there are many: their number depends on static shapes alone."""
    _, heads, tokens, _ = query.shape
    patches = tokens - num_prefix_tokens
    at_once = _AT_ONCE.get(query.device.type, _AT_ONCE_ELSEWHERE)
    if heads * patches * tokens <= at_once:
        return [slice(num_prefix_tokens, None)]
    parts = -(-heads * patches * tokens // at_once)
    step = -(-patches // parts)
    return [slice(start, start + step) for start in range(num_prefix_tokens, tokens, step)]


def pomt_scores(attention: AttentionInputs, num_prefix_tokens: int) -> Tensor:
    """Importance of every patch token (arXiv 2407.05941, section 3.3).

    With A[h, j, i] the attention of query j on key i and V[h, i, d] the values, patch token i scores a_i + s_i:
    a_i = sum over patch queries j of max over heads of A[h, j, i], divided by the largest a of the *same image*;
    s_i = softmax over all N tokens of (sum over d of max over heads of V[h, i, d]).
    The published code divides by the largest a of the whole batch, so its result depends on an image's batch-mates.

    Args:
        attention: Query, key and value of the block, (B, H, N, D) each.
        num_prefix_tokens: P, the first tokens, which are not scored.

    Returns:
        (B, N - P), float32 (float64 where the attention is).
    """
    precise = torch.promote_types(attention.value.dtype, torch.float32)
    if is_half_on_cpu(attention):
        attention = attention._replace(key=attention.key.float().contiguous())  # once, and not in each chunk
    chunks = [
        attention_probabilities(attention, queries).amax(dim=1)[:, :, num_prefix_tokens:].sum(dim=1, dtype=precise)
        for queries in _chunks(attention.query, num_prefix_tokens)
    ]
    received = sum(chunks[1:], chunks[0])
    received = received / received.amax(dim=-1, keepdim=True)
    magnitude = attention.value.amax(dim=1).sum(dim=-1, dtype=precise).softmax(dim=-1)
    return received + magnitude[:, num_prefix_tokens:]


def pomt_reduce(tokens: Tensor, attention: AttentionInputs, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the best N - P - R - 1 patch tokens in their order and appends the mean of the R + 1 others.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query, key and value of the block that the tokens went through.
        remove: R >= 1.
        num_prefix_tokens: P, kept as they are.

    Returns:
        N - R tokens, the mean token last.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction import AttentionInputs, pomt_reduce
        >>> q, k, v = torch.randn(3, 2, 4, 17, 8).unbind(0)
        >>> pomt_reduce(torch.randn(2, 17, 32), AttentionInputs(q, k, v), remove=5, num_prefix_tokens=1).tokens.shape
        torch.Size([2, 12, 32])
    """
    keep = tokens.shape[1] - num_prefix_tokens - remove - 1
    kept = best_in_order(pomt_scores(attention, num_prefix_tokens), keep)
    index = with_prefix(kept, num_prefix_tokens)
    left = take_tokens(tokens, index)
    # The dropped ones are never gathered: their sum is the difference of two sums that stream over memory.
    precise = torch.promote_types(tokens.dtype, torch.float32)
    dropped = tokens.sum(dim=1, keepdim=True, dtype=precise) - left.sum(dim=1, keepdim=True, dtype=precise)
    mean = (dropped / (remove + 1)).to(tokens.dtype)
    fused = index.new_full((index.shape[0], 1), -1)
    return ReductionOutput(torch.cat((left, mean), dim=1), torch.cat((index, fused), dim=1))


class POMT(Reduction):
    """Pruning One More Token's reduction, as a method for `lightning_prune.patch`.

    Source: arXiv 2407.05941, section 3.3. The paper reduces once, at 25% of the depth.

    Args:
        dropped: What becomes of the tokens that are not kept. `"mean"`, the paper's: their mean is one token, so that
            N - P - R - 1 are kept. `"nearest"`, ours: N - P - R are kept by the same score, and each of the R others is
            merged into the kept one most like it (see `merge_into_nearest`); the name is `"pomt-nearest"` then.
        proportional_attention: With `"nearest"`, whether the patches that a token stands for weigh it in the attention
            of later blocks, as in ToMe. The mean token has no weight in any case.

    Raises:
        ArgumentError: If `dropped` is neither, or `proportional_attention` is not a bool.

    Example:
        >>> import timm
        >>> import lightning_prune as lp
        >>> from lightning_prune.reduction import POMT
        >>> model = timm.create_model("vit_tiny_patch16_224").eval()
        >>> handle = lp.patch(model, POMT(dropped="nearest"), lp.Schedule.single(depth=12, block=3, remove=56))
    """

    name: str = "pomt"
    reads: ClassVar[frozenset[str]] = frozenset({"attention"})

    def __init__(self, dropped: Literal["mean", "nearest"] = "mean", proportional_attention: bool = True) -> None:
        if dropped not in ("mean", "nearest"):
            raise ArgumentError(f"`dropped` must be 'mean' or 'nearest', got {dropped!r}.")
        if not isinstance(proportional_attention, bool):
            raise ArgumentError(f"`proportional_attention` must be True or False, got {proportional_attention!r}.")
        self.dropped = dropped
        if dropped == "nearest":
            self.name = "pomt-nearest"
            self.is_lossless = self.tracks_sizes = True
            self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `pomt_reduce` and `merge_into_nearest`."""
        attention = sequence.attention
        assert attention is not None  # the patch provides what `reads` asks for
        if self.dropped == "mean":
            return pomt_reduce(sequence.tokens, attention, remove, sequence.num_prefix_tokens)
        scores = pomt_scores(attention, sequence.num_prefix_tokens)
        return merge_into_nearest(
            sequence.tokens, attention.key, scores, remove, sequence.num_prefix_tokens, sequence.sizes, sequence.trace
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens but one may go, which stays as it is or receives all others; with a mean token, but two."""
        return max(tokens - num_prefix_tokens - (2 if self.dropped == "mean" else 1), 0)

    def settings(self) -> dict[str, Any]:
        """`dropped` and `proportional_attention`, where they are not the paper's."""
        if self.dropped == "mean":
            return {}
        return {"dropped": self.dropped, "proportional_attention": self.proportional_attention}
