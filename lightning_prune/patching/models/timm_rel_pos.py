"""timm's transformers with relative-position biases: BEiT, BEiT v2, and VisionTransformerRelPos."""

from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.patching.attention_capture import Bias, CaptureSlot, SDPARecorder
from lightning_prune.patching.block_split import GAMMA, POST_NORM, PRE_NORM, AttnMlpSplit
from lightning_prune.patching.models.base import SplitCheckInput, VisionTransformer
from lightning_prune.patching.models.timm_vit import TimmAdapter
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction.base import AttentionInputs


class TimmRelPos(TimmAdapter):
    """A bias for every pair of tokens, made in each block or shared by all, reaches fused attention as its mask.

    It is gathered there, where own and shared are already one, and nowhere else.
    """

    name: ClassVar[str] = "timm Beit and VisionTransformerRelPos"
    roots: ClassVar[tuple[str, ...]] = (
        "timm.models.beit:Beit",
        "timm.models.vision_transformer_relpos:VisionTransformerRelPos",
    )
    recipes: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.beit:Block": GAMMA,
        "timm.models.vision_transformer_relpos:RelPosBlock": PRE_NORM,
        "timm.models.vision_transformer_relpos:ResPostRelPosBlock": POST_NORM,
    }

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        return replace(super().describe(root, path), has_position_inputs=True)

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """The bias of a block fits all tokens only."""
        assert transformer.num_tokens is not None
        return SplitCheckInput(transformer.num_tokens, {})

    @property
    def requires_recorder(self) -> bool:
        """Every block has a bias."""
        return True

    def recorder(
        self,
        calls: list[AttentionInputs],
        log_sizes: Tensor | None,
        arrived: TokenState | None,
        num_prefix_tokens: int,
        capture_slot: CaptureSlot | None,
    ) -> AbstractContextManager[Any]:
        """Gathers the bias to the tokens that are left."""
        return SDPARecorder(calls, log_sizes, Bias(arrived, num_prefix_tokens) if arrived is not None else None)
