"""Vision Transformers of Hugging Face transformers."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.block_split import DROPOUT, LAYER_SCALE, OUTPUT, TOWER, AttnMlpSplit
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.models.base import ModelAdapter, SplitCheckInput, VisionTransformer
from lightning_prune.patching.models.unsupported import unsupported_reason
from lightning_prune.patching.position_terms import patch_positions, take_rotation
from lightning_prune.patching.token_state import TokenState


class HuggingFace(ModelAdapter):
    """A model alone, under a head, or as the tower of a larger model.

    No overlay may be laid over a root: transformers looks up by the name of its class what to record for
    `output_hidden_states=True` and what to write into a saved config.

    Attributes:
        roots: Names of the classes that models of this family can be.
        layers: Names of the classes that their blocks can be.
        class_token: Whether token 0 is a CLS token.
        any_size: Whether it takes images of all sizes, by fitting its positional terms to them.
        has_position_inputs: Whether blocks receive what is made for all tokens: a mask while exporting, a rotary
            embedding.
        pooling: Names of the roots that return something made of all patch tokens, not of the CLS token alone.
    """

    roots: ClassVar[tuple[str, ...]]
    layers: ClassVar[tuple[str, ...]]
    class_token: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    has_position_inputs: ClassVar[bool] = False
    pooling: ClassVar[tuple[str, ...]] = ()

    def matches(self, module: nn.Module) -> bool:
        """Subclasses count: users write their own."""
        return _is_a(module, self.roots)

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        kind = original_class(root)
        reason = unsupported_reason(kind)
        if reason is not None:
            at = f" at {path!r}" if path else ""
            raise UnsupportedModelError(f"{kind.__name__}{at} cannot be pruned: {reason}.")
        core = core_of(root)
        lists = (tuple(m) for m in core.modules() if isinstance(m, nn.ModuleList))
        blocks = next((each for each in lists if each and all(_is_a(m, self.layers) for m in each)), None)
        if blocks is None:
            raise UnsupportedModelError(f"{kind.__name__} holds no list of {' or '.join(self.layers)}.")
        prefix = self.num_prefix_tokens(core.embeddings)
        return VisionTransformer(
            root=root,
            path=path,
            adapter=self,
            blocks=blocks,
            num_prefix_tokens=prefix,
            has_class_token=self.class_token,
            num_tokens=None if self.any_size else prefix + _patches(core.config),
            embed_dim=core.config.hidden_size,
            patch_embed=core.embeddings,
            num_classes=_classes(root),
            has_position_inputs=self.has_position_inputs,
            pools_patches=_is_a(root, self.pooling),
        )

    def num_prefix_tokens(self, embeddings: Any) -> int:
        """Class, distillation and register tokens."""
        registers = getattr(embeddings, "register_tokens", None)
        count = 0 if registers is None else int(registers.shape[1])
        return int(self.class_token) + int(hasattr(embeddings, "distillation_token")) + count

    @abstractmethod
    def recipe(self, block: nn.Module) -> AttnMlpSplit:
        """How a block of this family comes apart."""

    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """A subclass of users with a forward of its own is cut after."""
        theirs = original_class(block).forward.__module__.startswith("transformers.models.")
        return self.recipe(block) if theirs else None

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """Attention is read through torch's fused function, which one of the implementations to choose from calls."""
        used = core_of(transformer.root).config._attn_implementation
        if used == "sdpa":
            return None
        return (
            f"The attention of this {original_class(transformer.root).__name__} is set to {used!r}, where it cannot be "
            f'read; call `model.set_attn_implementation("sdpa")` first.'
        )

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `ModelAdapter.check_call`; most models pass the mask by position."""
        mask = args[0] if args else kwargs.get("attention_mask")
        if mask is not None and not _hides_nothing(mask):
            raise ArgumentError(
                "`attention_mask` is made for all tokens; a model whose blocks remove tokens cannot use it."
            )
        super().check_call(args, kwargs)

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Does without the mask that hides nothing, which has the size of all tokens."""
        self.check_call(args, kwargs)
        if args:
            return (None, *args[1:]), kwargs
        return args, {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else kwargs

    def output(self, result: Any) -> Tensor:
        """Logits, else projected or pooled features, else the CLS token or the mean of the patch tokens."""
        if isinstance(result, Tensor):
            return result
        values = tuple(result.values() if isinstance(result, Mapping) else result)
        named = result if isinstance(result, Mapping) else {}
        tensors = [each for each in values if isinstance(each, Tensor)]
        for found in (*(named.get(key) for key in ("logits", "image_embeds", "pooler_output")), *tensors):
            if isinstance(found, Tensor) and found.ndim == 2:  # without names they stand in the same order
                return found
        tokens = next(each for each in tensors if each.ndim == 3)
        return tokens[:, 0] if self.class_token else tokens.mean(dim=1)


def _is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the module's class, or one that it derives from, is one of these of transformers."""
    mro = type(module).__mro__
    return any(each.__name__ in names and each.__module__.startswith("transformers.models.") for each in mro)


def _hides_nothing(mask: Any) -> bool:
    """Whether it is one value spread over all keys, as in the mask that `torch.export` makes these models build."""
    return isinstance(mask, Tensor) and mask.stride(-1) == 0


def core_of(root: nn.Module) -> Any:
    """The model without its head: what embeds the images."""
    return next(m for m in root.modules() if isinstance(getattr(m, "embeddings", None), nn.Module))


def _patches(config: Any) -> int:
    height, width = _pair(config.image_size)
    down, across = _pair(config.patch_size)
    return (height // down) * (width // across)


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _classes(root: Any) -> int:
    """Size of the logits; heads may be replaced, or left out by `num_labels=0`."""
    head = getattr(root, "classifier", getattr(root, "cls_classifier", None))
    if isinstance(head, nn.Linear):
        return head.out_features
    return 0 if head is None or isinstance(head, nn.Identity) else int(root.config.num_labels)


class HuggingFaceViT(HuggingFace):
    """ViT and DeiT: absolute positions, added once."""

    name: ClassVar[str] = "Hugging Face ViT and DeiT"
    roots: ClassVar[tuple[str, ...]] = (
        "ViTModel",
        "ViTForImageClassification",
        "ViTForMaskedImageModeling",
        "DeiTModel",
        "DeiTForImageClassification",
        "DeiTForImageClassificationWithTeacher",
        "DeiTForMaskedImageModeling",
    )
    layers: ClassVar[tuple[str, ...]] = ("ViTLayer", "DeiTLayer")
    has_position_inputs = True

    def recipe(self, block: nn.Module) -> AttnMlpSplit:
        """The MLP is one module, or two in the first versions 5."""
        return OUTPUT if hasattr(block, "intermediate") else DROPOUT


class HuggingFaceDinov2(HuggingFace):
    """DINOv2 with and without registers: positions are fitted to the size of the images."""

    name: ClassVar[str] = "Hugging Face DINOv2"
    roots: ClassVar[tuple[str, ...]] = (
        "Dinov2Model",
        "Dinov2ForImageClassification",
        "Dinov2WithRegistersModel",
        "Dinov2WithRegistersForImageClassification",
    )
    layers: ClassVar[tuple[str, ...]] = ("Dinov2Layer", "Dinov2WithRegistersLayer")
    pooling: ClassVar[tuple[str, ...]] = ("Dinov2ForImageClassification", "Dinov2WithRegistersForImageClassification")
    any_size = True
    has_position_inputs = True

    def recipe(self, block: nn.Module) -> AttnMlpSplit:
        """Layer scale and drop path in both."""
        return LAYER_SCALE


class HuggingFaceDinov3(HuggingFaceDinov2):
    """DINOv3: every block receives `position_embeddings`, (cosine, sine), (N - P, D) each, of the patch tokens."""

    name: ClassVar[str] = "Hugging Face DINOv3"
    roots: ClassVar[tuple[str, ...]] = ("DINOv3ViTModel",)
    layers: ClassVar[tuple[str, ...]] = ("DINOv3ViTLayer",)

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """Any angles will do."""
        tokens = super().split_check_input(transformer).tokens
        config = core_of(transformer.root).config
        angles = torch.linspace(0, 1, config.hidden_size // config.num_attention_heads, device="cpu")
        angles = angles.expand(tokens - transformer.num_prefix_tokens, -1)
        return SplitCheckInput(tokens, {"position_embeddings": (angles.cos(), angles.sin())})

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Gathers the rotary embedding to the tokens that are left; a fused token is not rotated."""
        args, kwargs = super().adapt_position_inputs(args, kwargs, arrived, num_prefix_tokens)
        cosine, sine = kwargs["position_embeddings"]

        def gather(table: Tensor, unrotated: float) -> Tensor:
            index = patch_positions(arrived.positions, num_prefix_tokens)
            return take_rotation(table, index, table.new_full(table.shape[-1:], unrotated))

        left = (
            arrived.adapt_once(cosine, lambda table: gather(table, 1.0)),
            arrived.adapt_once(sine, lambda table: gather(table, 0.0)),
        )
        return args, {**kwargs, "position_embeddings": left}


class HuggingFaceCLIP(HuggingFace):
    """CLIP's vision tower; the text tower is never touched."""

    name: ClassVar[str] = "Hugging Face CLIP"
    roots: ClassVar[tuple[str, ...]] = (
        "CLIPVisionModel",
        "CLIPVisionModelWithProjection",
        "CLIPVisionTransformer",
        "CLIPForImageClassification",
    )
    layers: ClassVar[tuple[str, ...]] = ("CLIPEncoderLayer",)
    pooling: ClassVar[tuple[str, ...]] = ("CLIPForImageClassification",)

    def recipe(self, block: nn.Module) -> AttnMlpSplit:
        """The same block in both towers."""
        return TOWER

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """The mask has no default."""
        return SplitCheckInput(super().split_check_input(transformer).tokens, {"attention_mask": None})


class HuggingFaceSigLIP(HuggingFaceCLIP):
    """SigLIP's vision tower: no CLS token, pooled by attention."""

    name: ClassVar[str] = "Hugging Face SigLIP"
    roots: ClassVar[tuple[str, ...]] = ("SiglipVisionModel", "SiglipVisionTransformer", "SiglipForImageClassification")
    layers: ClassVar[tuple[str, ...]] = ("SiglipEncoderLayer",)
    class_token = False
    pooling: ClassVar[tuple[str, ...]] = roots
