"""The vision tower of BLIP of Hugging Face, alone or in a captioning, answering or retrieval model.

The text decoder attends to the tokens that leave the tower, however many they are, so a caption needs nothing restored.
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.patching.attention_capture import CapturedAttention
from lightning_prune.patching.block_split import TOWER, AttnMlpSplit
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.patching.models.huggingface import HuggingFace
from lightning_prune.reduction.base import AttentionInputs


class CapturedBlipAttention(CapturedAttention):
    """Captures BLIP's attention, which multiplies queries and keys itself. Projects the tokens a second time."""

    def read(self, x: Tensor) -> AttentionInputs:
        """Query, key and value by the packed projection."""
        module: Any = self
        parts = module.qkv(x).unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        return AttentionInputs(query, key, value, None, module.scale)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the module; its block passes the tokens by name."""
        if "hidden_states" in kwargs:
            args = (kwargs.pop("hidden_states"), *args)
        return super().forward(*args, **kwargs)


class HuggingFaceBlip(HuggingFace):
    """BLIP's vision tower; positions are interpolated if the call asks for it."""

    name: ClassVar[str] = "Hugging Face BLIP"
    roots: ClassVar[tuple[str, ...]] = ("BlipVisionModel",)
    layers: ClassVar[tuple[str, ...]] = ("BlipEncoderLayer",)
    towers: ClassVar[tuple[str, ...]] = roots
    supports_key_bias: ClassVar[bool] = False

    def known_split(self, block: nn.Module) -> AttnMlpSplit:
        """As CLIP's."""
        return TOWER

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """None: it has one implementation, which is captured."""
        return None

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """The only attention module of the block."""
        module: Any = block
        return {module.self_attn: CapturedBlipAttention}

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """See `ModelAdapter.final_norms`."""
        model: Any = root
        return (model.post_layernorm,)
