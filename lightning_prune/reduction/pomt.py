"""POMT: keeps tokens by received attention and value magnitude, and fuses the rest to their mean (arXiv 2407.05941)."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_prune._utils.validation import check_bool, check_choice
from lightning_prune.reduction.base import AttentionInputs, Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import (
    attention_probabilities,
    is_half_on_cpu,
    select_best,
)
from lightning_prune.reduction.merging import merge_into_nearest

_CHUNK = {"cpu": 2**20}  # attention probabilities per image in a chunk, so that it fits into the cache
_DEFAULT_CHUNK = 2**24  # enough to keep a GPU busy, with limited memory


def _chunks(query: Tensor, num_prefix_tokens: int) -> list[slice]:
    """Splits the patch queries into chunks of equal size; the number of chunks depends on static shapes only."""
    _, heads, tokens, _ = query.shape
    patches = tokens - num_prefix_tokens
    chunk = _CHUNK.get(query.device.type, _DEFAULT_CHUNK)
    if heads * patches * tokens <= chunk:
        return [slice(num_prefix_tokens, None)]
    parts = -(-heads * patches * tokens // chunk)
    step = -(-patches // parts)
    return [slice(start, start + step) for start in range(num_prefix_tokens, tokens, step)]


def pomt_scores(attention: AttentionInputs, num_prefix_tokens: int) -> Tensor:
    """Importance of every patch token (arXiv 2407.05941, section 3.3).

    With A[h, j, i] the attention of query j to key i and V[h, i, d] the values, patch token i has the score a_i + s_i:
    a_i = sum over patch queries j of max over heads of A[h, j, i], divided by the largest a of the *same image*;
    s_i = softmax over all N tokens of (sum over d of max over heads of V[h, i, d]).
    The published code divides by the largest a of the whole batch, so the result for an image depends on the others.

    Args:
        attention: Query, key and value of the block, (B, H, N, D) each.
        num_prefix_tokens: P, the first tokens, which are not scored.

    Returns:
        (B, N - P), float32 (float64 if the attention is).
    """
    precise = torch.promote_types(attention.value.dtype, torch.float32)
    if is_half_on_cpu(attention):
        attention = attention._replace(key=attention.key.float().contiguous())  # once instead of in each chunk
    chunks = [
        attention_probabilities(attention, queries).amax(dim=1)[:, :, num_prefix_tokens:].sum(dim=1, dtype=precise)
        for queries in _chunks(attention.query, num_prefix_tokens)
    ]
    received = sum(chunks[1:], chunks[0])
    received = received / received.amax(dim=-1, keepdim=True)
    magnitude = attention.value.amax(dim=1).sum(dim=-1, dtype=precise).softmax(dim=-1)
    return received + magnitude[:, num_prefix_tokens:]


def pomt_reduce(tokens: Tensor, attention: AttentionInputs, remove: int, num_prefix_tokens: int) -> ReductionOutput:
    """Keeps the N - P - R - 1 patch tokens with the highest scores, in their order, and appends the mean of the others.

    Args:
        tokens: (B, N, C) between attention and MLP.
        attention: Query, key and value of the block.
        remove: R >= 1.
        num_prefix_tokens: P, the first tokens, which are kept unchanged.

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
    kept = select_best(pomt_scores(attention, num_prefix_tokens), keep, num_prefix_tokens)
    left = kept.take(tokens)
    # The difference of two sums is faster than gathering the dropped tokens.
    precise = torch.promote_types(tokens.dtype, torch.float32)
    dropped = tokens.sum(dim=1, keepdim=True, dtype=precise) - left.sum(dim=1, keepdim=True, dtype=precise)
    mean = (dropped / (remove + 1)).to(tokens.dtype)
    fused = kept.positions.new_full((tokens.shape[0], 1), -1)
    return ReductionOutput(torch.cat((left, mean), dim=1), torch.cat((kept.positions, fused), dim=1))


class POMT(Reduction):
    """The reduction of Pruning One More Token, as a method for `lightning_prune.patch`.

    Source: arXiv 2407.05941, section 3.3. The paper reduces once, at 25% of the depth.

    Args:
        dropped: What happens to the tokens that are not kept. `"mean"`, as in the paper: N - P - R - 1 patch tokens are
            kept, and the mean of the others is appended as one token. `"nearest"`, ours: N - P - R are kept by the same
            score, and each of the others is merged into the most similar kept one (see `merge_into_nearest`); the
            method is then called `"pomt-nearest"`.
        proportional_attention: With `"nearest"`, whether merged tokens are weighted by their sizes in the attention of
            later blocks, as in ToMe. The mean token is never weighted.

    Raises:
        ArgumentError: If an argument has another value.

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
        check_choice("dropped", dropped, ("mean", "nearest"))
        check_bool("proportional_attention", proportional_attention)
        self.dropped = dropped
        self.fused_tokens = 1 if dropped == "mean" else 0
        if dropped == "nearest":
            self.name = "pomt-nearest"
            self.is_lossless = self.tracks_sizes = True
            self.proportional_attention = proportional_attention

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """See `pomt_reduce` and `merge_into_nearest`."""
        attention = sequence.attention
        assert attention is not None  # provided because of `reads`
        if self.dropped == "mean":
            return pomt_reduce(sequence.tokens, attention, remove, sequence.num_prefix_tokens)
        scores = pomt_scores(attention, sequence.num_prefix_tokens)
        return merge_into_nearest(
            sequence.tokens, attention.key, scores, remove, sequence.num_prefix_tokens, sequence.sizes, sequence.trace
        )

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one, or except two with a mean token."""
        return max(tokens - num_prefix_tokens - (2 if self.dropped == "mean" else 1), 0)

    def settings(self) -> dict[str, Any]:
        """`dropped` and `proportional_attention`, or nothing for the paper's method."""
        if self.dropped == "mean":
            return {}
        return {"dropped": self.dropped, "proportional_attention": self.proportional_attention}
