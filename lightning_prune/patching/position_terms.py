"""Selects positional terms, rotary embeddings and attention biases, for the tokens that are left."""

import torch
from torch import Tensor

from lightning_prune.reduction.portable import exact_product, is_portable, one_hot


def patch_positions(positions: Tensor, num_prefix_tokens: int) -> Tensor:
    """Converts positions among all tokens to positions among the patch tokens.

    Args:
        positions: (B, K) positions in block 0, the P prefix tokens first; -1 for fused tokens.
        num_prefix_tokens: P.

    Returns:
        (B, K - P) positions of the patch tokens; -1 for fused tokens.
    """
    patches = positions[:, num_prefix_tokens:]
    return torch.where(patches < 0, -1, patches - num_prefix_tokens)


def take_rotation(table: Tensor, index: Tensor, neutral: Tensor) -> Tensor:
    """The rows of a rotary embedding for the tokens that are left.

    A fused token has no position: it gets `neutral`, which does not rotate.

    Args:
        table: (N, D); or (H, N, D), different for each head; or (B, 1 or H, N, D), different for each image.
        index: (B, K) positions among the N; -1 for fused tokens.
        neutral: (D,).

    Returns:
        (B, 1 or H, K, D).
    """
    count = table.shape[-2]
    table = torch.cat((table, neutral.to(table).expand(*table.shape[:-2], 1, -1)), dim=-2)
    index = torch.where(index < 0, count, index)
    if is_portable():
        return exact_product(one_hot(index, count + 1).to(table.dtype).unsqueeze(1), table)
    if table.ndim == 2:
        return table[index].unsqueeze(1)
    if table.ndim == 3:
        return table[:, index].transpose(0, 1)
    heads, width = table.shape[1], table.shape[-1]
    return table.gather(2, index[:, None, :, None].expand(-1, heads, -1, width))


def take_bias(bias: Tensor, positions: Tensor, num_prefix_tokens: int) -> Tensor:
    """The rows and columns of an attention bias for the tokens that are left.

    A fused token has no position: it gets the mean over all patch tokens, the expected bias for an unknown position.
    Zero would not be neutral, because the mean of learned biases is not zero.

    Args:
        bias: (1 or B, H, N, N) or (H, N, N), added to the attention logits.
        positions: (B, K) positions among the N, the P prefix tokens first; -1 for fused tokens.
        num_prefix_tokens: P.

    Returns:
        (B, H, K, K).
    """
    count = bias.shape[-1]
    bias = bias.unsqueeze(0) if bias.ndim == 3 else bias
    bias = torch.cat((bias, bias[:, :, num_prefix_tokens:].mean(dim=2, keepdim=True)), dim=2)
    bias = torch.cat((bias, bias[..., num_prefix_tokens:].mean(dim=3, keepdim=True)), dim=3)
    index = torch.where(positions < 0, count, positions)
    if is_portable():
        chosen = one_hot(index, count + 1).to(bias.dtype).unsqueeze(1)
        return exact_product(exact_product(chosen, bias), chosen.transpose(2, 3))
    batch, left = index.shape
    pairs = (index[:, :, None] * (count + 1) + index[:, None, :]).flatten(1)
    table = bias.flatten(2).expand(batch, -1, -1)
    return table.gather(2, pairs[:, None].expand(-1, table.shape[1], -1)).unflatten(2, (left, left))
