"""ToMe: bipartite soft matching (arXiv 2210.09461)."""

from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from lightning_prune._utils.validation import check_bool, check_choice
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import is_exported, precise_product
from lightning_prune.reduction.merge_schedule import allocate_tokens, max_allocatable
from lightning_prune.reduction.merging import merge, merge_into_targets
from lightning_prune.reduction.portable import descending_ranks, first_index, is_portable, joined, whole_numbers

Order = Literal["kept", "concatenated"]
_INFLECTION = {"constant": 0.0, "decreasing": -1.0}


def bipartite_matching(
    key: Tensor, remove: int, num_prefix_tokens: int, order: Order = "kept"
) -> tuple[Tensor, Tensor]:
    """Bipartite soft matching: which patch tokens are merged into which (arXiv 2210.09461, section 3).

    Patch tokens are divided alternately into two sets. By default those at odd indices among them (the second, the
    fourth, ...) are sources, those at even indices are destinations; with `order="concatenated"` those at even indices
    among all N tokens are sources. Each source is matched with the most similar destination, by the cosine of their
    keys averaged over heads, and the R most similar pairs are merged. Prefix tokens are left out.
    The keys are the operands of the dot product: after rotary embedding, and with talking heads (CaiT) the keys of all
    heads concatenated.

    Args:
        key: (B, H, N, D).
        remove: R; at most (N - P) // 2.
        num_prefix_tokens: P.
        order: See `ToMe`.

    Returns:
        (B, R) sources and (B, R) the destination of each, as indices among the N tokens.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import bipartite_matching
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> bipartite_matching(key, remove=1, num_prefix_tokens=0)
        (tensor([[3]]), tensor([[0]]))
    """
    first_source, first_destination = _first(num_prefix_tokens, order)
    source, destination = _matched(_pair_similarity(key, first_source, first_destination), remove)
    return source * 2 + first_source, destination * 2 + first_destination


def matched_targets(key: Tensor, remove: int, num_prefix_tokens: int) -> Tensor:
    """The portable form of `bipartite_matching`; of equally similar pairs the first is merged.

    Args:
        key: (B, H, N, D).
        remove: R.
        num_prefix_tokens: P.

    Returns:
        (B, N) float32, index of the token that each token is merged into; those that are left have their own.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import matched_targets
        >>> key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.1], [0.9, 0.0]]).view(1, 1, 4, 2)
        >>> matched_targets(key, remove=1, num_prefix_tokens=0)
        tensor([[0., 1., 2., 0.]])
    """
    first_source, first_destination = _first(num_prefix_tokens, "kept")
    own = whole_numbers(0, key.shape[2], key).expand(key.shape[0], -1)
    best, destination = _best_destinations(_pair_similarity(key, first_source, first_destination))
    merged = destination * 2 + first_destination
    sources = torch.where(descending_ranks(best) < remove, merged, own[:, first_source::2])
    return joined(own[:, :num_prefix_tokens], _alternating(own[:, first_destination::2], sources))


def concatenate_merged(
    tokens: Tensor, key: Tensor, remove: int, num_prefix_tokens: int, sizes: Tensor | None = None, trace: bool = False
) -> ReductionOutput:
    """Merges by `bipartite_matching` with `order="concatenated"`, and returns the tokens in that order.

    It is the order of the paper's step 5: the prefix tokens, the sources that are not merged, the destinations.

    Args:
        tokens: (B, N, C).
        key: (B, H, N, D).
        remove: R.
        num_prefix_tokens: P.
        sizes: (B, N) number of patches merged into each token; None if all are 1.
        trace: Whether to return `ReductionOutput.sources`.

    Returns:
        N - R tokens, their positions, which do not ascend, and their sizes.

    Source: arXiv 2210.09461, section 3.

    Example:
        >>> import torch
        >>> from lightning_prune.reduction.tome import concatenate_merged
        >>> key = torch.tensor([[9.0, 9.0], [0.0, 1.0], [1.0, 0.0], [1.0, 0.1], [1.0, 0.5]]).view(1, 1, 5, 2)
        >>> merged = concatenate_merged(torch.arange(5.0).view(1, 5, 1), key, remove=1, num_prefix_tokens=1)
        >>> merged.tokens.flatten().tolist(), merged.positions.tolist()
        ([0.0, 4.0, 1.0, 2.5], [[0, 4, 1, 3]])
    """
    count, prefix = tokens.shape[1], num_prefix_tokens
    first_source, first_destination = _first(prefix, "concatenated")
    start = prefix + len(range(first_source, count, 2))  # of the destinations

    def arranged(values: Tensor) -> Tensor:
        return joined(values[:, :prefix], values[:, first_source::2], values[:, first_destination::2])

    # The tokens are put into that order first, because merging keeps the order.
    table, weights = arranged(tokens), None if sizes is None else arranged(sizes)
    similarity = _pair_similarity(key, first_source, first_destination)
    if is_portable():
        best, destination = _best_destinations(similarity)
        own = whole_numbers(0, count, key).expand(key.shape[0], -1)
        target = torch.where(descending_ranks(best) < remove, destination + start, own[:, prefix:start])
        target = joined(own[:, :prefix], target, own[:, start:])
        merged = merge_into_targets(table, target, count - remove, weights, trace)
    else:
        source, destination = _matched(similarity, remove)
        merged = merge(table, source + prefix, destination + start, weights, trace)
    place, into = merged.positions, merged.sources
    at_source, at_destination = 2 * (place - prefix) + first_source, 2 * (place - start) + first_destination
    positions = torch.where(place < prefix, place, torch.where(place < start, at_source, at_destination))
    if into is not None:
        one, other = into[:, prefix:start], into[:, start:]
        pairs = (one, other) if first_source < first_destination else (other, one)
        into = joined(into[:, :prefix], _alternating(*pairs))
    return merged._replace(positions=positions, sources=into)


def _first(num_prefix_tokens: int, order: Order) -> tuple[int, int]:
    """The first source and the first destination; the two sets alternate from there."""
    source = num_prefix_tokens + (1 if order == "kept" else num_prefix_tokens % 2)
    return source, 2 * num_prefix_tokens + 1 - source


def _alternating(one: Tensor, other: Tensor) -> Tensor:
    """(B, m) and (B, m) or (B, m - 1) -> (B, n), the values of both in turn."""
    paired = torch.stack((one[:, : other.shape[1]], other), dim=2).flatten(1)
    return joined(paired, one[:, other.shape[1] :])


def _pair_similarity(key: Tensor, first_source: int, first_destination: int) -> Tensor:
    """The cosine of the mean keys of each source and each destination, (B, sources, destinations)."""
    # Sum and mean have the same cosine. `sum` with a dtype is a single pass over the keys, and half precision would
    # cause many ties.
    metric = key.sum(dim=1, dtype=torch.promote_types(key.dtype, torch.float32))
    metric = metric / torch.linalg.vector_norm(metric, dim=-1, keepdim=True).clamp(min=1e-12)
    return precise_product(metric[:, first_source::2], metric[:, first_destination::2].transpose(1, 2))


def _matched(similarity: Tensor, remove: int) -> tuple[Tensor, Tensor]:
    """The R most similar pairs, as indices among the sources and among the destinations, (B, R) each."""
    best, destination = similarity.max(dim=-1)
    source = best.topk(remove, dim=-1, sorted=is_exported()).indices  # TensorRT demands a sorted result
    return source, destination.gather(1, source)


def _best_destinations(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """The portable form: the similarity of each source to its best destination, and the index of the latter."""
    best = similarity.amax(dim=-1)
    return best, first_index(similarity == best.unsqueeze(-1))


class ToMe(Reduction):
    """Token Merging, as a method for `lightning_prune.patch`.

    Source: arXiv 2210.09461, sections 3 and 4.1. Differences from the published code: by default tokens that are left
    keep their order, so that neighbours are in different sets; a merged token keeps the position of its destination,
    so that models with rotary embeddings or position biases can be used; and a schedule removes exactly the requested
    total.

    Args:
        proportional_attention: Whether later blocks weight tokens by size: log(size) is added to the logits of each
            key. Blocks before the first merge are not affected.
        schedule: How `allocate` distributes a total over the blocks: `"constant"`, the same number in each, or
            `"decreasing"`, linearly from twice the mean in the first block to 0 in the last. It does not affect given
            schedules.
        order: The order of the tokens that are left, by which the next merging block divides them into two sets.
            `"kept"`: their order in the image. `"concatenated"`, as published: tokens at even indices, counted with the
            prefix tokens, are sources, and what is left is the prefix tokens, the sources that were not merged, and the
            destinations. With CLS, and with CLS and a distillation token, this gives the outputs of the published code.
            Without prefix tokens that code leaves the sources that were not merged in the order of their similarity,
            here they keep their order; models with more prefix tokens are not provided for there, here all are kept.

    Raises:
        ArgumentError: If an argument has another value.

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
    tracks_sizes = True
    is_lossless = True
    fused_tokens = 0
    multi_block = True

    def __init__(
        self,
        proportional_attention: bool = True,
        schedule: Literal["constant", "decreasing"] = "constant",
        order: Order = "kept",
    ) -> None:
        check_bool("proportional_attention", proportional_attention)
        check_choice("schedule", schedule, _INFLECTION)
        check_choice("order", order, get_args(Order))
        self.proportional_attention = proportional_attention
        self.schedule = schedule
        self.order = order

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Merges the R most similar pairs; see `bipartite_matching`, `merge` and `concatenate_merged`."""
        assert sequence.attention is not None  # provided because of `reads`
        tokens, key, prefix = sequence.tokens, sequence.attention.key, sequence.num_prefix_tokens
        if self.order == "concatenated":
            return concatenate_merged(tokens, key, remove, prefix, sequence.sizes, sequence.trace)
        if is_portable():
            target = matched_targets(key, remove, prefix)
            return merge_into_targets(tokens, target, tokens.shape[1] - remove, sequence.sizes, sequence.trace)
        source, destination = bipartite_matching(key, remove, prefix)
        return merge(tokens, source, destination, sequence.sizes, sequence.trace)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """Half of the patch tokens."""
        return max(tokens - num_prefix_tokens, 0) // 2

    def allocate(self, remove: int, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> list[int]:
        """Distributes the tokens over the blocks from `block` on; see `allocate_tokens`."""
        return allocate_tokens(remove, tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def max_total_removed(self, tokens: int, num_prefix_tokens: int, depth: int, block: int) -> int:
        """The total if each block of the schedule merges half of its patch tokens."""
        return max_allocatable(tokens, num_prefix_tokens, depth, block, _INFLECTION[self.schedule])

    def settings(self) -> dict[str, Any]:
        """`proportional_attention`, `schedule` and `order`."""
        return {"proportional_attention": self.proportional_attention, "schedule": self.schedule, "order": self.order}
