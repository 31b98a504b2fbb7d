"""timm's VisionTransformer, and the base class of the adapters for timm."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.block_split import PARALLEL, POST_NORM, PRE_NORM, AttnMlpSplit, runs
from lightning_prune.patching.class_swap import PatchedModule, RootPatch
from lightning_prune.patching.models.base import ModelAdapter, Setting, VisionTransformer, loaded_class, loaded_classes

# Forward functions of timm's attention modules that pass `attn_mask` to their fused call. A replaced function has
# another name or module.
_MASK_PASSING_FORWARDS = frozenset(
    {
        ("timm.layers.attention", "Attention.forward"),
        ("timm.layers.attention", "AttentionRope.forward"),
        ("timm.models.eva", "EvaAttention.forward"),
    }
)


class GridGuard(PatchedModule):
    """Rejects calls that reshape the remaining tokens to the grid of all tokens, which may fit by chance."""

    _prune_patch: RootPatch

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own method for sequences of tokens; rejects the grid layout."""
        own: Any = super()  # the patched class, unknown to type checkers
        position = self._prune_patch.layout
        layout = kwargs.get("output_fmt", args[position] if 0 <= position < len(args) else "NCHW")
        if layout == "NCHW":
            raise UnsupportedModelError(
                "`output_fmt` must be 'NLC' in a model whose blocks remove tokens, got 'NCHW'; or remove the patch."
            )
        return own.forward_intermediates(*args, **kwargs)


class TimmAdapter(ModelAdapter):
    """Base of the adapters for timm's models, which have an attribute for the number of prefix tokens.

    The CLS token is looked up by name, because 24 of timm's models have prefix tokens but no CLS. Tested with timm
    1.0.31.

    Attributes:
        roots: Names of the model classes, for `loaded_class`; subclasses are included.
        splits: Name of the class of a block -> its split.
    """

    guard: ClassVar[type[PatchedModule] | None] = GridGuard
    roots: ClassVar[tuple[str, ...]]
    splits: ClassVar[dict[str, AttnMlpSplit]]

    def matches(self, module: nn.Module) -> bool:
        """Also matches subclasses, which users may define."""
        return isinstance(module, loaded_classes(self.roots))

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        dropout = getattr(model, "patch_drop", None)
        if dropout is not None and not isinstance(dropout, nn.Identity) and model.training:
            raise UnsupportedModelError(
                "`model` must be in evaluation mode, because it drops patches in training mode (patch_drop_rate). Call "
                "`.eval()` first."
            )
        return VisionTransformer(
            root=root,
            path=path,
            adapter=self,
            blocks=tuple(model.blocks),
            num_prefix_tokens=model.num_prefix_tokens,
            has_class_token=self.has_class_token(model),
            num_tokens=self.count(model),
            embed_dim=model.embed_dim,
            patch_embed=self.entry(model),
            num_classes=0 if isinstance(model.head, nn.Identity) else model.num_classes,
            pools_patches=getattr(model, "global_pool", "token") not in ("token", ""),
        )

    def count(self, model: Any) -> int | None:
        """N, or None if it depends on the image size."""
        if getattr(model, "dynamic_img_size", False):
            return None
        return int(model.patch_embed.num_patches + model.num_prefix_tokens)

    def entry(self, model: Any) -> nn.Module:
        """The module that receives the images."""
        embed: nn.Module = model.patch_embed
        return embed

    def has_class_token(self, model: Any) -> bool:
        """Whether token 0 is a CLS token."""
        return model.cls_token is not None

    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """The split of the class whose forward the block uses; None for a subclass with its own forward."""
        for name, split in self.splits.items():
            kind = loaded_class(name)
            if kind is not None and runs(block, kind):
                return split
        return None

    def mask_passthrough(self, block: nn.Module) -> Callable[..., Any] | None:
        """For known blocks with timm's own attention modules."""
        forward: Callable[..., Any] | None = getattr(type(getattr(block, "attn", None)), "forward", None)
        name = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
        passes = name in _MASK_PASSING_FORWARDS
        return forward if passes and self.attn_mlp_split(block) is not None else None

    def force_fused(self, block: nn.Module) -> list[Setting]:
        """Sets `fused_attn`, an attribute of each attention module."""
        changed = [Setting(m, "fused_attn", False) for m in block.modules() if vars(m).get("fused_attn") is False]
        for setting in changed:
            vars(setting.module)["fused_attn"] = True
        return changed


class TimmVisionTransformer(TimmAdapter):
    """DeiT, ViT, DINOv2, CLIP, SigLIP and others, hybrids included; positions are added to the tokens."""

    name: ClassVar[str] = "timm VisionTransformer"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.vision_transformer:VisionTransformer",)
    splits: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.vision_transformer:Block": PRE_NORM,
        "timm.models.vision_transformer:ResPostBlock": POST_NORM,
        "timm.models.vision_transformer:ParallelThingsBlock": PARALLEL,
    }
