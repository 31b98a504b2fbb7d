"""timm's transformers without fused attention: CaiT (talking heads) and ConViT."""

from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.patching.attention_capture import CapturedAttention
from lightning_prune.patching.block_split import ONE_DROP, AttnMlpSplit
from lightning_prune.patching.models.base import VisionTransformer
from lightning_prune.patching.models.class_lookup import loaded_class
from lightning_prune.patching.models.timm_vit import TimmAdapter
from lightning_prune.reduction.base import AttentionInputs


def project_heads(module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value (B, H, N, D), computed by the module's projection."""
    batch, tokens, channels = x.shape
    parts = module.qkv(x).reshape(batch, tokens, 3, module.num_heads, channels // module.num_heads)
    query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
    return query, key, value


class CapturedTalkingHeads(CapturedAttention):
    """Captures the attention of CaiT, which mixes the logits of the heads before softmax (arXiv 2003.02436)."""

    def read(self, x: Tensor) -> AttentionInputs:
        """Expresses the mixed logits as a dot product over the channels of all heads, by mixing the queries.

        The bias of the mixing is the same for all keys of a row, so softmax cancels it. The second mixing, after
        softmax, does not give probabilities and is left out.
        """
        module: Any = self
        query, key, value = project_heads(module, x)
        batch, heads, tokens, width = query.shape
        mixed = torch.einsum("hg,bgnd->bhngd", module.proj_l.weight, query * module.scale)
        shared = key.permute(0, 2, 1, 3).reshape(batch, 1, tokens, heads * width).expand(-1, heads, -1, -1)
        return AttentionInputs(mixed.flatten(3), shared, value, None, 1.0)


class CapturedSelfAttention(CapturedAttention):
    """Captures the attention of ConViT's blocks without positional attention."""

    def read(self, x: Tensor) -> AttentionInputs:
        """Projects the tokens to query, key and value."""
        module: Any = self
        return AttentionInputs(*project_heads(module, x), None, module.scale)


class TimmUnfused(TimmAdapter):
    """Captures attention from its inputs. This repeats one projection, in reducing blocks only."""

    supports_key_bias: ClassVar[bool] = False
    captured_classes: ClassVar[dict[str, type[CapturedAttention]]] = {
        "timm.models.cait:TalkingHeadAttn": CapturedTalkingHeads,
        "timm.models.convit:MHSA": CapturedSelfAttention,
    }

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """The attention modules of known classes."""
        kinds = {loaded_class(name): mixin for name, mixin in self.captured_classes.items()}
        return {module: kinds[type(module)] for module in block.modules() if type(module) in kinds}


class TimmCait(TimmUnfused):
    """CaiT. The CLS token is added in separate blocks, after those that can reduce."""

    name: ClassVar[str] = "timm Cait"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.cait:Cait",)
    splits: ClassVar[dict[str, AttnMlpSplit]] = {"timm.models.cait:LayerScaleBlock": ONE_DROP}

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        tokens = int(model.patch_embed.num_patches)
        return replace(
            super().describe(root, path),
            num_prefix_tokens=0,
            has_class_token=False,
            num_tokens=tokens,
            pools_patches=True,
        )


class TimmConVit(TimmUnfused):
    """ConViT. Its first blocks attend by position on the whole grid; the CLS token is added after them."""

    name: ClassVar[str] = "timm ConVit"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.convit:ConVit",)
    heads: ClassVar[tuple[str, ...]] = roots
    splits: ClassVar[dict[str, AttnMlpSplit]] = {"timm.models.convit:Block": ONE_DROP}

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        return replace(
            super().describe(root, path),
            first_prunable_block=int(model.local_up_to_layer),
            first_prunable_reason="earlier blocks attend by position on the whole grid",
        )
