"""The two parts of each kind of block: attention with its residual, and MLP with its residual."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.isolation import isolated
from lightning_prune.patching.class_swap import original_class


class AttnMlpSplit(NamedTuple):
    """Runs a block in two parts: `mlp(block, attention(block, x, *args, **kwargs))` is `block(x, *args, **kwargs)`."""

    attention: Callable[..., Tensor]
    mlp: Callable[[Any, Tensor], Tensor]


def _pre_norm_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.ls1(block.attn(block.norm1(x), *args, **kwargs)))


def _pre_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))


def _post_norm_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(block.norm1(block.attn(x, *args, **kwargs)))


def _post_norm_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.norm2(block.mlp(x)))


def _parallel_attention(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([attn(x) for attn in block.attns]).sum(dim=0)


def _parallel_mlp(block: Any, x: Tensor) -> Tensor:
    return x + torch.stack([ffn(x) for ffn in block.ffns]).sum(dim=0)


def _gamma_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path1(_times(block.gamma_1, block.attn(block.norm1(x), *args, **kwargs)))


def _gamma_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(_times(block.gamma_2, block.mlp(block.norm2(x))))


def _one_drop_attention(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path(_times(getattr(block, "gamma_1", None), block.attn(block.norm1(x))))


def _one_drop_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path(_times(getattr(block, "gamma_2", None), block.mlp(block.norm2(x))))


def _times(gamma: Tensor | None, x: Tensor) -> Tensor:
    return x if gamma is None else gamma * x


def _multihead_attention(block: Any, x: Tensor) -> Tensor:
    y = block.ln_1(x)
    return block.dropout(block.self_attention(y, y, y, need_weights=False)[0]) + x


def _multihead_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.mlp(block.ln_2(x))


def _dropout_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.dropout(_first(block.attention(block.layernorm_before(x), *args, **kwargs))) + x


def _dropout_mlp(block: Any, x: Tensor) -> Tensor:
    return block.dropout(block.mlp(block.layernorm_after(x))) + x


def _output_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _first(block.attention(block.layernorm_before(x), *args, **kwargs)) + x


def _output_mlp(block: Any, x: Tensor) -> Tensor:
    return block.output(block.intermediate(block.layernorm_after(x)), x)


def _layer_scale_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return block.drop_path(block.layer_scale1(_first(block.attention(block.norm1(x), *args, **kwargs)))) + x


def _layer_scale_mlp(block: Any, x: Tensor) -> Tensor:
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x)))) + x


def _tower_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + _first(block.self_attn(block.layer_norm1(x), *args, **kwargs))


def _tower_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.mlp(block.layer_norm2(x))


def _first(result: Any) -> Tensor:
    """The output of attention, which most modules of transformers return in a tuple with the weights."""
    attention: Tensor = result[0] if isinstance(result, tuple) else result
    return attention


PRE_NORM = AttnMlpSplit(_pre_norm_attention, _pre_norm_mlp)
POST_NORM = AttnMlpSplit(_post_norm_attention, _post_norm_mlp)
PARALLEL = AttnMlpSplit(_parallel_attention, _parallel_mlp)
GAMMA = AttnMlpSplit(_gamma_attention, _gamma_mlp)  # layer scale as a parameter of the block, or None
ONE_DROP = AttnMlpSplit(_one_drop_attention, _one_drop_mlp)  # the same drop path for both parts
MULTIHEAD = AttnMlpSplit(_multihead_attention, _multihead_mlp)  # torchvision, with nn.MultiheadAttention
DROPOUT = AttnMlpSplit(_dropout_attention, _dropout_mlp)  # transformers: ViT, DeiT
OUTPUT = AttnMlpSplit(_output_attention, _output_mlp)  # the same in early releases of version 5
LAYER_SCALE = AttnMlpSplit(_layer_scale_attention, _layer_scale_mlp)  # transformers: DINOv2, DINOv3
TOWER = AttnMlpSplit(_tower_attention, _tower_mlp)  # transformers: CLIP, SigLIP


def runs(block: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a block uses the forward of this class. The forward of a subclass may do more."""
    return original_class(block).forward is kind.forward


def verify_split(
    block: nn.Module, attn_mlp_split: AttnMlpSplit, tokens: int, channels: int, kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Whether the two parts give bit-identical outputs to the block's own forward, on random tokens.

    The split is chosen by the forward of the block; this also checks its submodules. It runs in evaluation mode without
    autograd, restores the training flags, and does not use the global generator. Blocks without local data (on the meta
    device, or sharded) are not checked.

    Args:
        block: The block, unpatched.
        attn_mlp_split: The split to check.
        tokens: Number of tokens to run it on.
        channels: C.
        kwargs: Further arguments of the block.
    """
    x = _noise(block, tokens, channels)
    if x is None:
        return True
    more = {name: _like(value, x) for name, value in (kwargs or {}).items()}
    with torch.no_grad(), isolated(block, is_whole=False):
        try:
            expected = block.forward(x, **more)  # without its hooks
            return torch.equal(attn_mlp_split.mlp(block, attn_mlp_split.attention(block, x, **more)), expected)
        except (AttributeError, TypeError):
            return False  # the block has other submodules


def computes_tokens_alone(
    block: nn.Module, attn_mlp_split: AttnMlpSplit, norms: Iterable[nn.Module], tokens: int, channels: int, kept: int
) -> bool:
    """Whether the MLP of a block, and norms after it, give the first tokens the same outputs without the others.

    Up to rounding, on random tokens; see `verify_split` for how they run. Norms that use statistics of a batch in
    training do not.

    Args:
        block: The block, unpatched.
        attn_mlp_split: How it runs in two parts.
        norms: The norms.
        tokens: Number of tokens to run them on.
        channels: C.
        kept: Number of the first tokens.
    """
    parts = [part for module in (block, *norms) for part in module.modules()]
    if any(isinstance(part, nn.modules.batchnorm._BatchNorm) for part in parts):
        return False
    x = _noise(block, tokens, channels)
    if x is None:
        return True
    with torch.no_grad(), isolated(block, is_whole=False):
        every, alone = attn_mlp_split.mlp(block, x), attn_mlp_split.mlp(block, x[:, :kept])
    for norm in norms:
        with torch.no_grad(), isolated(norm, is_whole=False):
            every, alone = norm(every), norm(alone)
    difference = (every[:, :kept] - alone).abs().max()
    return bool(difference <= torch.finfo(x.dtype).eps ** 0.5 * every.abs().max())


def _noise(block: nn.Module, tokens: int, channels: int) -> Tensor | None:
    """Random tokens (1, N, C) in the dtype and on the device of a block; None if it has no local data."""
    parameter = next((p for p in block.parameters() if p.is_floating_point()), torch.empty(0))
    if parameter.is_meta or type(parameter) not in (Tensor, nn.Parameter):
        return None
    noise = torch.randn(1, tokens, channels, generator=torch.Generator("cpu").manual_seed(0), device="cpu")
    return noise.to(device=parameter.device, dtype=parameter.dtype)


def _like(value: Any, x: Tensor) -> Any:
    if isinstance(value, tuple):
        return tuple(_like(each, x) for each in value)
    return value.to(device=x.device, dtype=x.dtype) if isinstance(value, Tensor) else value
