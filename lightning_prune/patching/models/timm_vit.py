"""timm's VisionTransformer, and the base class of the adapters for timm."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.errors import UnsupportedModelError
from lightning_prune.patching.block_split import PARALLEL, POST_NORM, PRE_NORM, AttnMlpSplit, runs
from lightning_prune.patching.class_swap import Setting, original_class
from lightning_prune.patching.input_resize import (
    InputResize,
    ResizedInput,
    ScalingSites,
    active_resize,
    image_size_of,
    own_setting,
)
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.class_lookup import loaded_class, loaded_classes
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.patched_root import IntermediatesGuard, PatchedRoot

# Forward functions of timm's attention modules that pass `attn_mask` to their fused call. A replaced function has
# another name or module.
_MASK_PASSING_FORWARDS = frozenset(
    {
        ("timm.layers.attention", "Attention.forward"),
        ("timm.layers.attention", "AttentionRope.forward"),
        ("timm.models.eva", "EvaAttention.forward"),
    }
)


_HEAD_METHODS = ("forward", "forward_features", "forward_head", "pool", "_pool")
# Patch embeddings whose tokens are the grid of a stride.
_EMBEDDINGS = ("timm.layers.patch_embed:PatchEmbed", "timm.layers.hybrid_embed:HybridEmbed")


class ResizedPatchEmbed(ResizedInput):
    """Scales the images down, and checks that the patch embedding gives the tokens of that grid."""

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the patch embedding on the scaled images."""
        tokens = super().forward(images, *args, **kwargs)
        rows, columns = self._prune_patch.grid(image_size_of(images))
        if tokens.shape[1:-1].numel() != rows * columns:
            raise UnsupportedModelError(
                f"The patch embedding of a scaled model must give {rows} x {columns} tokens of an image, got "
                f"{tuple(tokens.shape[1:-1])}."
            )
        return tokens


class GridGuard(IntermediatesGuard):
    """Gives the readers of timm's models all tokens."""

    def forward_features(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own method, which returns the tokens of the last block."""
        own: Any = super()  # the patched class, unknown to type checkers
        readers = self._prune_patch.readers
        if readers is None:
            return own.forward_features(*args, **kwargs)
        read = (readers.last,) if _are_of_timm(self, "forward_features") else None
        return readers.call(read, own.forward_features, args, kwargs)

    def forward_intermediates(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the model's own method, which reads the blocks that the call names."""
        readers = self._prune_patch.readers
        if readers is not None:
            read = self._read_blocks(args, kwargs) if _are_of_timm(self, "forward_intermediates") else None
            return readers.call(read, super().forward_intermediates, args, kwargs)
        return super().forward_intermediates(*args, **kwargs)

    def _read_blocks(self, args: Any, kwargs: dict[str, Any]) -> set[int]:
        patch = self._prune_patch
        assert patch.readers is not None
        depth, indices = len(patch.readers.blocks), patch.argument("indices", args, kwargs)
        if indices is None or isinstance(indices, int):  # the last of that number
            read = set(range(0 if indices is None else depth - indices, depth))
        else:
            read = {depth + index if index < 0 else index for index in indices}
        return read if patch.argument("intermediates_only", args, kwargs) else {*read, depth - 1}


def _are_of_timm(root: nn.Module, *names: str) -> bool:
    """Whether methods of a model are timm's own: what those read is known."""
    kind = original_class(root)
    own = (getattr(kind, name, None) for name in names)
    return all(each is None or each.__module__.startswith("timm.models.") for each in own) and not any(
        name in root.__dict__ for name in names
    )


class _Instead:
    """A module with other values of some attributes.

    Args:
        module: The module.
        values: Name -> value.
    """

    def __init__(self, module: nn.Module, **values: Any) -> None:
        vars(self).update(values, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(vars(self)["_module"], name)


class ResizedPositions(GridGuard):
    """Also keeps the position embeddings that timm would resample in every forward pass."""

    def _pos_embed(self, x: Tensor) -> Any:
        module: Any = self
        own: Any = original_class(self)
        weights, embed = module.pos_embed, module.patch_embed
        resize = active_resize(embed)
        if resize is None or weights is None or not resize.keeps(weights):
            return own._pos_embed(self, x)
        from timm.layers import resample_abs_pos_embed

        grid, prefix = (x.shape[1], x.shape[2]), 0 if module.no_embed_class else module.num_prefix_tokens
        positions = resize.resample(
            ("positions", grid), weights, lambda: resample_abs_pos_embed(weights, grid, embed.grid_size, prefix)
        )
        # timm resamples nothing that has the size of the grid already.
        same = _Instead(self, pos_embed=positions, patch_embed=_Instead(embed, grid_size=grid))
        return own._pos_embed(same, x)


class TimmAdapter(ModelAdapter):
    """Base of the adapters for timm's models, which have an attribute for the number of prefix tokens.

    The CLS token is looked up by name, because 24 of timm's models have prefix tokens but no CLS. Tested with timm
    1.0.31.

    Attributes:
        roots: Names of the model classes, for `loaded_class`; subclasses are included.
        splits: Name of the class of a block -> its split.
        heads: Names of the model classes whose head reads prefix tokens only, with `global_pool="token"`.
    """

    guard: ClassVar[type[PatchedRoot]] = GridGuard
    roots: ClassVar[tuple[str, ...]]
    splits: ClassVar[dict[str, AttnMlpSplit]]
    heads: ClassVar[tuple[str, ...]] = ()

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
            num_classes=0 if isinstance(getattr(model, "head", None), nn.Identity) else model.num_classes,
            pools_patches=getattr(model, "global_pool", "token") not in ("token", ""),
        )

    def count(self, model: Any) -> int | None:
        """N, or None if it depends on the image size."""
        if own_setting(model, "dynamic_img_size", self.entry(model)):
            return None
        return int(model.patch_embed.num_patches + model.num_prefix_tokens)

    def patch_division(self, root: nn.Module) -> PatchDivision:
        """See `ModelAdapter.patch_division`."""
        model: Any = root
        reason = self.unscalable_reason(model)
        embed = model.patch_embed
        if reason is None and not any(runs(embed, kind) for kind in loaded_classes(_EMBEDDINGS)):
            reason = f"its patch embedding, {original_class(embed).__name__}, is none of timm's own"
        if reason is not None:
            raise self.unscalable(root, reason)
        size = None if own_setting(model, "dynamic_img_size", embed) or embed.img_size is None else embed.img_size
        division = PatchDivision(
            tuple(embed.feat_ratio(as_scalar=False)), None if size is None else tuple(size), bool(embed.dynamic_img_pad)
        )
        if size is not None and division.grid(*size) != tuple(embed.grid_size):
            raise self.unscalable(root, f"its {tuple(embed.grid_size)} patches do not divide images of {tuple(size)}")
        return division

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """As models that are built with `dynamic_img_size=True`, which resample their positions in every forward."""
        model: Any = transformer.root
        embed = model.patch_embed
        settings: tuple[tuple[nn.Module, str, Any], ...] = ()
        if not model.dynamic_img_size:
            settings = (
                (model, "dynamic_img_size", True),
                (embed, "strict_img_size", False),
                (embed, "flatten", False),
                (embed, "output_fmt", type(embed.output_fmt)("NHWC")),
            )
        return ScalingSites({embed: ResizedPatchEmbed}, settings, ResizedPositions)

    def unscalable_reason(self, model: Any) -> str | None:
        """Why a model cannot run on smaller images; None if it can: by default, if its `_pos_embed` is timm's own."""
        own = getattr(original_class(model), "_pos_embed", None)
        if own is None or not own.__module__.startswith("timm.models."):
            return "timm does not resample its positions for images of another size"
        return None

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

    def head_reason(self, root: nn.Module) -> str | None:
        """See `ModelAdapter.head_reason`."""
        kind = original_class(root)
        known = loaded_classes(self.heads)
        for name in _HEAD_METHODS:
            own = getattr(kind, name, None)
            if own is not None and not any(vars(each).get(name) is own for each in known):
                return f"its `{name}` is not known to read prefix tokens only"
        if any(name in root.__dict__ for name in _HEAD_METHODS):
            return "its forward, or a method of its head, was replaced on the module itself"
        if self.reads_patches(root, (), {}):
            return f"its head reads patch tokens (global_pool={getattr(root, 'global_pool', None)!r})"
        return None

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """By the pooling, which `reset_classifier` and users change."""
        model: Any = root
        if model.global_pool != "token" or getattr(model, "attn_pool", None) is not None:
            return True
        return any(name in root.__dict__ for name in _HEAD_METHODS)

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """That of the last block, unless the head reads prefix tokens only."""
        if not _are_of_timm(root, "forward", "forward_features"):
            return None
        return frozenset((depth - 1,)) if self.head_reason(root) is not None else frozenset()

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """See `ModelAdapter.final_norms`."""
        model: Any = root
        return (model.norm,)

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
    heads: ClassVar[tuple[str, ...]] = (*roots, "timm.models.deit:VisionTransformerDistilled")
    splits: ClassVar[dict[str, AttnMlpSplit]] = {
        "timm.models.vision_transformer:Block": PRE_NORM,
        "timm.models.vision_transformer:ResPostBlock": POST_NORM,
        "timm.models.vision_transformer:ParallelThingsBlock": PARALLEL,
    }
