"""torchvision's VisionTransformer: vit_b_16, vit_b_32, vit_l_16, vit_l_32, vit_h_14. Tested with torchvision 0.29."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_prune.patching.attention_capture import CapturedAttention
from lightning_prune.patching.block_split import MULTIHEAD, AttnMlpSplit, runs
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.input_resize import InputResize, ResizedModule, ScalingSites, image_size_of
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.class_lookup import loaded_class, loaded_classes
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.patched_root import PatchedRoot
from lightning_prune.patching.resized_positions import resample_corners
from lightning_prune.reduction.base import AttentionInputs

_MODULE = "torchvision.models.vision_transformer"


class CapturedMultihead(CapturedAttention):
    """Captures `nn.MultiheadAttention`, which in evaluation runs projections and attention as one native call.

    A torch function mode would disable that fast path and change the output slightly. Therefore query, key and value
    are projected a second time, in reducing blocks only.
    """

    def read(self, x: Tensor) -> AttentionInputs:
        """Query, key and value by the packed projection."""
        module: Any = self
        parts = F.linear(x, module.in_proj_weight, module.in_proj_bias)
        query, key, value = parts.unflatten(2, (3, module.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return AttentionInputs(query, key, value)

    def with_key_bias(self, kwargs: dict[str, Any], log_sizes: Tensor) -> dict[str, Any]:
        """Passes the log-sizes as a float padding mask, which is added to the logits of each key."""
        module: Any = self
        return {**kwargs, "key_padding_mask": log_sizes.flatten(1).to(module.in_proj_weight.dtype)}


class ResizedRoot(ResizedModule, PatchedRoot):
    """Mixin for the class of the model: divides the scaled images into patches."""

    _prune_patch: InputResize

    def _process_input(self, x: Tensor) -> Tensor:
        """(B, channels, height, width) images -> (B, patches, C), row by row."""
        module: Any = self
        scaled = self._prune_patch.scale(x)
        rows, columns = self._prune_patch.grid(image_size_of(x))
        tokens: Tensor = module.conv_proj(scaled).reshape(x.shape[0], module.hidden_dim, rows * columns)
        return tokens.permute(0, 2, 1)


class ResizedEncoder(ResizedModule):
    """Mixin for the class of the encoder: adds the position embeddings of the smaller grid."""

    def forward(self, input: Tensor) -> Tensor:
        """Runs the encoder on tokens (B, N - R, C)."""
        module: Any = self
        patch = self._prune_patch
        old, new = patch.dense_grid(patch.fixed_size), patch.fixed_grid
        weights = module.pos_embedding
        if patch.keeps(weights):
            moved = patch.resample(("positions",), weights, lambda: resample_corners(weights, 1, old, new))
        else:
            moved = resample_corners(weights, 1, old, new)
        x = input + moved
        tokens: Tensor = module.ln(module.layers(module.dropout(x)))
        return tokens


class TorchvisionVisionTransformer(ModelAdapter):
    """Images of fixed size, with a CLS token and without register tokens."""

    name: ClassVar[str] = "torchvision VisionTransformer"

    def matches(self, module: nn.Module) -> bool:
        """Also matches subclasses, which users may define."""
        return isinstance(module, loaded_classes((f"{_MODULE}:VisionTransformer",)))

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        return VisionTransformer(
            root=root,
            path=path,
            adapter=self,
            blocks=tuple(model.encoder.layers.children()),
            num_prefix_tokens=1,
            has_class_token=True,
            num_tokens=model.seq_length,
            embed_dim=model.hidden_dim,
            patch_embed=model.conv_proj,
            num_classes=_classes(model),
        )

    def patch_division(self, root: nn.Module) -> PatchDivision:
        """See `ModelAdapter.patch_division`."""
        model: Any = root
        kind, encoder = loaded_classes((f"{_MODULE}:VisionTransformer", f"{_MODULE}:Encoder"))
        own: Any = original_class(model)
        if own._process_input is not vars(kind)["_process_input"] or not runs(model.encoder, encoder):
            raise self.unscalable(root, "its class has another forward than that of torchvision")
        return PatchDivision((model.patch_size,) * 2, (model.image_size,) * 2)

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """The model itself checks the size of images, and positions are resampled when weights are loaded only."""
        model: Any = transformer.root
        return ScalingSites({model: ResizedRoot, model.encoder: ResizedEncoder})

    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """None for a subclass with its own forward."""
        kind = loaded_class(f"{_MODULE}:EncoderBlock")
        return MULTIHEAD if kind is not None and runs(block, kind) else None

    def head_reason(self, root: nn.Module) -> str | None:
        """None for torchvision's own forward."""
        model: Any = root
        for name, module in (("VisionTransformer", root), ("Encoder", model.encoder)):
            kind = loaded_class(f"{_MODULE}:{name}")
            if kind is None or not runs(module, kind) or self.reads_patches(module, (), {}):
                return f"the forward of its {type(module).__name__} is not known to read prefix tokens only"
        return None

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """If its forward was replaced on the module itself."""
        return "forward" in root.__dict__

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """No block in torchvision's own forward, whose head reads the CLS token."""
        return frozenset() if self.head_reason(root) is None else None

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """See `ModelAdapter.final_norms`."""
        model: Any = root
        return (model.encoder.ln,)

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """`CapturedMultihead` only reads self-attention as torchvision builds it."""
        return multihead_unsupported_reason(transformer, "self_attention")

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """The only attention module of the block."""
        module: Any = block
        return {module.self_attention: CapturedMultihead}


def multihead_unsupported_reason(transformer: VisionTransformer, name: str) -> str | None:
    """Why `CapturedMultihead` cannot read the attention of a model; None if it can.

    Args:
        transformer: The transformer.
        name: Of the attention in each block.
    """
    for index, block in enumerate(transformer.blocks):
        attention = getattr(block, name, None)
        is_plain = (
            isinstance(attention, nn.MultiheadAttention)
            and attention.batch_first
            and attention.in_proj_weight is not None
            and attention.bias_k is None
            and not attention.add_zero_attn
        )
        if not is_plain:
            return (
                f"The attention of block {index} must be a batch-first nn.MultiheadAttention without extra keys to be "
                f"read, got {type(attention).__name__}."
            )
    return None


def _classes(model: Any) -> int:
    """Number of logits, by the last layer of the head, which users may replace or remove."""
    last = list(model.heads.modules())[-1]
    if isinstance(last, nn.Linear):
        return last.out_features
    return 0 if isinstance(last, nn.Identity) else int(model.num_classes)
