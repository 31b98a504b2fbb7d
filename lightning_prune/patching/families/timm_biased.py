"""timm's transformers with relative-position biases: BEiT, BEiT v2, and VisionTransformerRelPos."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

from timm.models import beit
from timm.models import vision_transformer_relpos as relpos
from torch import Tensor, nn

from lightning_prune.patching.blocks import GAMMA, POST_NORM, PRE_NORM, Halves
from lightning_prune.patching.families.base import Trial, VisionTransformer
from lightning_prune.patching.families.timm import TimmFamily
from lightning_prune.patching.survivors import Survivors
from lightning_prune.patching.tap import AttentionTap, Bias
from lightning_prune.patching.told import Ear
from lightning_prune.reduction.base import Attention


class TimmBiased(TimmFamily):
    """A bias for every pair of tokens, made in each block or shared by all, reaches fused attention as its mask.

    It is gathered there, where own and shared are already one, and nowhere else.
    """

    name: ClassVar[str] = "timm Beit and VisionTransformerRelPos"
    roots = (beit.Beit, relpos.VisionTransformerRelPos)
    recipes: ClassVar[dict[type[nn.Module], Halves]] = {
        beit.Block: GAMMA,
        relpos.RelPosBlock: PRE_NORM,
        relpos.ResPostRelPosBlock: POST_NORM,
    }

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `Family.describe`."""
        return replace(super().describe(root, path), carries=True)

    def trial(self, transformer: VisionTransformer) -> Trial:
        """The bias of a block fits all tokens only."""
        assert transformer.tokens is not None
        return Trial(transformer.tokens, {})

    @property
    def always_taps(self) -> bool:
        """Every block has a bias."""
        return True

    def tap(
        self,
        calls: list[Attention],
        log_sizes: Tensor | None,
        arrived: Survivors | None,
        prefix_tokens: int,
        ear: Ear | None,
    ) -> AbstractContextManager[Any]:
        """Gathers the bias to the tokens that are left."""
        return AttentionTap(calls, log_sizes, Bias(arrived, prefix_tokens) if arrived is not None else None)
