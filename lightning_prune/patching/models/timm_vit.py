"""timm's transformers whose tokens stay (B, N, C) in `blocks`: what they have in common, and the plain ones."""

from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.block_split import PARALLEL, POST_NORM, PRE_NORM, AttnMlpSplit, runs
from lightning_prune.patching.class_swap import PatchedModule, RootPatch
from lightning_prune.patching.models.base import ModelAdapter, Setting, VisionTransformer, loaded_class, loaded_classes

# The functions of timm's own attention modules that pass `attn_mask` to their fused call. A function that somebody put
# in place of one has another name, or is from elsewhere.
_MASK_PASSING_FORWARDS = frozenset(
    {
        ("timm.layers.attention", "Attention.forward"),
        ("timm.layers.attention", "AttentionRope.forward"),
        ("timm.models.eva", "EvaAttention.forward"),
    }
)


class GridGuard(PatchedModule):
    """Refuses to fold the tokens that are left into the grid of all tokens, which can fit by accident, and silently."""

    _prune_patch: RootPatch

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own, for tokens in a row only."""
        own: Any = super()  # the class that this one is laid over, which a type checker cannot know
        position = self._prune_patch.layout
        layout = kwargs.get("output_fmt", args[position] if 0 <= position < len(args) else "NCHW")
        if layout == "NCHW":
            raise UnsupportedModelError(
                "forward_intermediates(output_fmt='NCHW') folds tokens into a grid, but this model removes tokens; "
                "use output_fmt='NLC', or remove the patch."
            )
        return own.forward_intermediates(*args, **kwargs)


class TimmAdapter(ModelAdapter):
    """Models of timm, which have their number of prefix tokens (0, 1, 2, 5, ...) as an attribute.

    The CLS token is looked up by name: 24 of timm's names have prefix tokens but no CLS. Tested with timm 1.0.31.

    Attributes:
        roots: Classes of the models, as `loaded_class` reads them; subclasses count.
        recipes: Class of a block -> how it comes apart.
    """

    guard: ClassVar[type[PatchedModule] | None] = GridGuard
    roots: ClassVar[tuple[str, ...]]
    recipes: ClassVar[dict[str, AttnMlpSplit]]

    def matches(self, module: nn.Module) -> bool:
        """Subclasses count: users write their own."""
        return isinstance(module, loaded_classes(self.roots))

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        model: Any = root
        dropout = getattr(model, "patch_drop", None)
        if dropout is not None and not isinstance(dropout, nn.Identity) and model.training:
            raise UnsupportedModelError(
                "The model drops patches while training (patch_drop_rate); call `.eval()` first."
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
        """N, or None where the images decide."""
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
        """By the known class whose forward the block runs; a subclass with one of its own is cut after."""
        for name, recipe in self.recipes.items():
            kind = loaded_class(name)
            if kind is not None and runs(block, kind):
                return recipe
        return None

    def mask_passthrough(self, block: nn.Module) -> Callable[..., Any] | None:
        """Known blocks do, with the attention that timm builds them with."""
        forward: Callable[..., Any] | None = getattr(type(getattr(block, "attn", None)), "forward", None)
        name = getattr(forward, "__module__", None), getattr(forward, "__qualname__", None)
        passes = name in _MASK_PASSING_FORWARDS
        return forward if passes and self.attn_mlp_split(block) is not None else None

    def force_fused(self, block: nn.Module) -> list[Setting]:
        """`fused_attn` is an attribute of each attention module, set when the model was built."""
        changed = [Setting(m, "fused_attn", False) for m in block.modules() if vars(m).get("fused_attn") is False]
        for setting in changed:
            vars(setting.module)["fused_attn"] = True
        return changed


class TimmVisionTransformer(TimmAdapter):
    """DeiT, ViT, DINOv2, CLIP and SigLIP towers and their kin, hybrids included: positions are added to the tokens."""

    name: ClassVar[str] = "timm VisionTransformer"
    roots: ClassVar[tuple[str, ...]] = ("timm.models.vision_transformer:VisionTransformer",)
    recipes: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.vision_transformer:Block": PRE_NORM,
        "timm.models.vision_transformer:ResPostBlock": POST_NORM,
        "timm.models.vision_transformer:ParallelThingsBlock": PARALLEL,
    }
