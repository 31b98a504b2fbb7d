"""timm's encoders of vision-language models, which fold their tokens back into their grid after the blocks.

They run only if removed tokens are given back.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.patching.block_split import GAMMA, AttnMlpSplit
from lightning_prune.patching.models.base import SplitCheckInput, VisionTransformer
from lightning_prune.patching.models.timm_positions import TimmRope
from lightning_prune.patching.models.timm_vit import TimmAdapter
from lightning_prune.patching.models.unsupported import GRID_AFTER
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction.functional import take_tokens


def _plain_attention(block: Any, x: Tensor, rope: Tensor | None = None) -> Tensor:
    return x + block.drop_path1(block.attn(block.norm1(x), rope=rope))


def _plain_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path2(block.mlp(block.norm2(x)))


def _sandwich_attention(block: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x + block.drop_path(block.norm2(block.attn(block.norm1(x), *args, **kwargs)))


def _sandwich_mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.drop_path(block.norm4(block.mlp(block.norm3(x))))


_PLAIN = AttnMlpSplit(_plain_attention, _plain_mlp)
_SANDWICH = AttnMlpSplit(_sandwich_attention, _sandwich_mlp)


class GridEncoder(TimmAdapter):
    """Base of the encoders: images of any size, no prefix tokens, and no head."""

    def count(self, model: Any) -> int | None:
        """None, because it depends on the image size."""
        return None

    def has_class_token(self, model: Any) -> bool:
        """None of them has one."""
        return False

    def unscalable_reason(self, model: Any) -> str | None:
        """They would fold all tokens into the grid of the scaled image."""
        return GRID_AFTER

    def head_reason(self, root: nn.Module) -> str | None:
        """The grid is read."""
        return GRID_AFTER

    def restore_reason(self, root: nn.Module) -> str | None:
        """See `ModelAdapter.restore_reason`."""
        return GRID_AFTER

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """That of `DeepseekVitEncoder`; others have none."""
        norm = getattr(root, "norm", None)
        return () if norm is None else (norm,)


class TimmQwen(GridEncoder, TimmRope):
    """The encoder of Qwen3-VL, alone or in `Qwen3VitClassifier`."""

    name: ClassVar[str] = "timm Qwen3VitEncoder"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.qwen3_vit:Qwen3VitEncoder",)
    splits: ClassVar[dict[str, AttnMlpSplit]] = {"timm.models.eva:EvaBlock": GAMMA}


class TimmDeepseek(GridEncoder, TimmRope):
    """The encoder of DeepSeek-VL, alone or in `DeepseekVitClassifier`."""

    name: ClassVar[str] = "timm DeepseekVitEncoder"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.deepseek_vit:DeepseekVitEncoder",)
    splits: ClassVar[dict[str, AttnMlpSplit]] = {"timm.models.deepseek_vit:DeepseekVitBlock": _PLAIN}

    def mask_passthrough(self, block: nn.Module) -> Callable[..., Any] | None:
        """None: its blocks take no mask."""
        return None


class TimmGemma(GridEncoder):
    """The encoder of Gemma 4, alone or in `Gemma4VitClassifier`, on images.

    Its blocks receive the cosines and the sines of all tokens, (B, N, D) each.
    """

    name: ClassVar[str] = "timm Gemma4VitEncoder"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.gemma4_vit:Gemma4VitEncoder",)
    splits: ClassVar[dict[str, AttnMlpSplit]] = {"timm.models.gemma4_vit:Gemma4Block": _SANDWICH}

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        return replace(super().describe(root, path), has_position_inputs=True)

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """With the rotation by no angle."""
        block: Any = transformer.blocks[0]
        weight = next(block.parameters())
        tokens = 4
        cosine = torch.ones(1, tokens, block.attn.head_dim, dtype=weight.dtype, device=weight.device)
        return SplitCheckInput(tokens, {"rope_cos": cosine, "rope_sin": torch.zeros_like(cosine)})

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Selects the rotation of the tokens that are left; a fused token is not rotated."""
        tables = [args[i] if i < len(args) else kwargs[name] for i, name in enumerate(("rope_cos", "rope_sin"))]
        cosine = arrived.adapt_once(tables[0], lambda table: _take(table, arrived.positions, 1.0))
        sine = arrived.adapt_once(tables[1], lambda table: _take(table, arrived.positions, 0.0))
        return (cosine, sine, *args[2:]), {k: v for k, v in kwargs.items() if k not in ("rope_cos", "rope_sin")}


def _take(table: Tensor, positions: Tensor, at_rest: float) -> Tensor:
    taken = take_tokens(table, positions.clamp(min=0))
    return torch.where((positions < 0).unsqueeze(2), at_rest, taken)
