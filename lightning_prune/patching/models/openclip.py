"""The image tower of OpenCLIP's own models. Those with a trunk of timm are timm's."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.attention_capture import CapturedAttention
from lightning_prune.patching.block_split import AttnMlpSplit, runs
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.class_lookup import loaded_class, loaded_classes
from lightning_prune.patching.models.torchvision_vit import CapturedMultihead, multihead_unsupported_reason
from lightning_prune.patching.patched_root import IntermediatesGuard, PatchedRoot

_MODULE = "open_clip.transformer"
_METHODS = ("forward", "_embeds", "_pool", "_global_pool")


def _attention(
    block: Any, x: Tensor, k_x: Tensor | None = None, v_x: Tensor | None = None, attn_mask: Tensor | None = None
) -> Tensor:
    return x + block.ls_1(block.attention(q_x=block.ln_1(x), k_x=k_x, v_x=v_x, attn_mask=attn_mask))


def _mlp(block: Any, x: Tensor) -> Tensor:
    return x + block.ls_2(block.mlp(block.ln_2(x)))


_RESIDUAL = AttnMlpSplit(_attention, _mlp)


class OpenCLIPVisionTransformer(ModelAdapter):
    """Images of fixed size, with a CLS token; pooled by it, or by the mean of the patches, or by attention."""

    name: ClassVar[str] = "OpenCLIP VisionTransformer"
    guard: ClassVar[type[PatchedRoot]] = IntermediatesGuard

    def matches(self, module: nn.Module) -> bool:
        """Also matches subclasses, which users may define."""
        return isinstance(module, loaded_classes((f"{_MODULE}:VisionTransformer",)))

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        if not getattr(model.transformer, "batch_first", True):
            raise UnsupportedModelError(
                "`model` must have blocks of (B, N, C) tokens, got an OpenCLIP tower of (N, B, C). Build it with "
                "batch_first=True."
            )
        dropout = model.patch_dropout
        if model.training and getattr(dropout, "prob", 0.0) > 0:
            raise UnsupportedModelError(
                "`model` must be in evaluation mode, because it drops patches in training mode (patch_dropout). Call "
                "`.eval()` first."
            )
        return VisionTransformer(
            root=root,
            path=path,
            adapter=self,
            blocks=tuple(model.transformer.resblocks),
            num_prefix_tokens=1,
            has_class_token=True,
            num_tokens=int(model.positional_embedding.shape[0]),
            embed_dim=int(model.conv1.out_channels),
            patch_embed=model.conv1,
            num_classes=0,
            pools_patches=model.attn_pool is not None or model.pool_type != "tok",
        )

    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """None for custom blocks, and for a subclass with its own forward."""
        kind = loaded_class(f"{_MODULE}:ResidualAttentionBlock")
        return _RESIDUAL if kind is not None and runs(block, kind) else None

    def head_reason(self, root: nn.Module) -> str | None:
        """None for OpenCLIP's own forward, where it pools by the CLS token."""
        kind = loaded_class(f"{_MODULE}:VisionTransformer")
        own = original_class(root)
        if kind is None or any(getattr(own, name) is not vars(kind)[name] for name in _METHODS):
            return f"the forward of its {own.__name__} is not known to read prefix tokens only"
        return "its head reads patch tokens" if self.reads_patches(root, (), {}) else None

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """By the pooling; or if it returns tokens, too, or a method was replaced on the module itself."""
        model: Any = root
        is_pooled = model.attn_pool is not None or model.pool_type != "tok"
        return is_pooled or bool(model.output_tokens) or any(name in root.__dict__ for name in _METHODS)

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """That of the last block, unless only the CLS token is read."""
        if self.head_reason(root) is None:
            return frozenset()
        is_own = original_class(root).forward.__module__ == _MODULE and "forward" not in root.__dict__
        return frozenset((depth - 1,)) if is_own else None

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """See `ModelAdapter.final_norms`."""
        model: Any = root
        return (model.ln_post,)

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """Only the self-attention of `nn.MultiheadAttention` is read."""
        return multihead_unsupported_reason(transformer, "attn")

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """The only attention module of the block."""
        module: Any = block
        return {module.attn: CapturedMultihead}

    def output(self, result: Any) -> Tensor:
        """The pooled features, (B, D), with or without the tokens."""
        found = result[0] if isinstance(result, tuple) else result
        assert isinstance(found, Tensor)
        return found
