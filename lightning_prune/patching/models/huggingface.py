"""Vision Transformers of Hugging Face transformers."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.block_split import AttnMlpSplit
from lightning_prune.patching.class_swap import original_class
from lightning_prune.patching.input_resize import InputResize, ResizedInput, ResizedModule, ScalingSites
from lightning_prune.patching.models.base import ModelAdapter, VisionTransformer
from lightning_prune.patching.models.call_arguments import call_keywords
from lightning_prune.patching.models.unsupported import GRID_AFTER
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.token_state import TokenState

_RECORDED = ("output_hidden_states", "output_attentions")  # arguments that ask for what all tokens are in a block


class ResizedEmbeddings(ResizedModule):
    """Mixin for the class of embeddings that interpolate their positions only if they are asked to."""

    def forward(self, images: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the embeddings on the scaled images, with interpolated positions."""
        scaled = self._prune_patch.scale(images, any_size=bool(kwargs.get("interpolate_pos_encoding")))
        return super().forward(scaled, *args, **{**kwargs, "interpolate_pos_encoding": True})


class HuggingFace(ModelAdapter):
    """A model without a head, with a head, or as a tower of a larger model.

    The class of a patched root keeps its name, by which transformers looks up what to record for
    `output_hidden_states=True` and what to write into a saved config.

    Attributes:
        roots: Names of the model classes of this family.
        layers: Names of the classes of their blocks.
        class_token: Whether token 0 is a CLS token.
        any_size: Whether the model accepts images of any size, by interpolating its positional terms.
        interpolates: Whether it has position embeddings, which are interpolated for another size of images.
        has_position_inputs: Whether blocks receive inputs for all tokens: a mask during export, or a rotary embedding.
        pooling: Names of the roots whose output is computed from all patch tokens, not from the CLS token only.
        classifiers: Names of the roots that read prefix tokens only, and return no others.
        grids: Names of the roots that reshape their tokens to a grid after the blocks.
        towers: Names of the roots whose pooled output reads prefix tokens only, but which return all tokens with it.
    """

    roots: ClassVar[tuple[str, ...]]
    layers: ClassVar[tuple[str, ...]]
    class_token: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    interpolates: ClassVar[bool] = True
    has_position_inputs: ClassVar[bool] = False
    pooling: ClassVar[tuple[str, ...]] = ()
    classifiers: ClassVar[tuple[str, ...]] = ()
    towers: ClassVar[tuple[str, ...]] = ()
    grids: ClassVar[tuple[str, ...]] = ()

    def matches(self, module: nn.Module) -> bool:
        """Also matches subclasses, which users may define."""
        return _is_a(module, self.roots)

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `ModelAdapter.describe`."""
        kind = original_class(root)
        core = core_of(root)
        lists = (tuple(m) for m in core.modules() if isinstance(m, nn.ModuleList))
        blocks = next((each for each in lists if each and all(_is_a(m, self.layers) for m in each)), None)
        if blocks is None:
            raise UnsupportedModelError(f"{kind.__name__} contains no list of {' or '.join(self.layers)}.")
        prefix = self.num_prefix_tokens(core.embeddings)
        any_size = self.any_size or bool(call_keywords(root).get("interpolate_pos_encoding"))
        return VisionTransformer(
            root=root,
            path=path,
            adapter=self,
            blocks=blocks,
            num_prefix_tokens=prefix,
            has_class_token=self.class_token,
            num_tokens=None if any_size else prefix + _patches(core.config),
            embed_dim=core.config.hidden_size,
            patch_embed=core.embeddings,
            num_classes=_classes(root),
            has_position_inputs=self.has_position_inputs,
            pools_patches=_is_a(root, self.pooling),
        )

    def restore_reason(self, root: nn.Module) -> str | None:
        """Of backbones and of models that reconstruct their images."""
        return GRID_AFTER if _is_a(root, self.grids) else None

    def patch_division(self, root: nn.Module) -> PatchDivision:
        """See `ModelAdapter.patch_division`."""
        core = core_of(root)
        size, sides = _pair(core.config.image_size), _pair(core.config.patch_size)
        any_size = self.any_size or bool(call_keywords(root).get("interpolate_pos_encoding"))
        if self.interpolates and (size[0] // sides[0] != size[1] // sides[1] or sides[0] != sides[1]):
            raise self.unscalable(root, "transformers interpolates its positions for square images and patches only")
        return PatchDivision(sides, None if any_size else size)

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """The embeddings interpolate their positions, by their own function."""
        return ScalingSites({transformer.patch_embed: ResizedInput if self.any_size else ResizedEmbeddings})

    def num_prefix_tokens(self, embeddings: Any) -> int:
        """Class, distillation and register tokens."""
        registers = getattr(embeddings, "register_tokens", None)
        count = 0 if registers is None else int(registers.shape[1])
        return int(self.class_token) + int(hasattr(embeddings, "distillation_token")) + count

    @abstractmethod
    def known_split(self, block: nn.Module) -> AttnMlpSplit:
        """The split of a block of this family."""

    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """None for a user's subclass with its own forward."""
        is_known = original_class(block).forward.__module__.startswith("transformers.models.")
        return self.known_split(block) if is_known else None

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """Only the implementation `"sdpa"` calls torch's fused attention, which can be read."""
        implementation = core_of(transformer.root).config._attn_implementation
        if implementation == "sdpa":
            return None
        return (
            f"The attention implementation of this {original_class(transformer.root).__name__} must be 'sdpa' to be "
            f'read, got {implementation!r}. Call `model.set_attn_implementation("sdpa")` first.'
        )

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `ModelAdapter.check_call`. Most models pass the mask as a positional argument."""
        mask = args[0] if args else kwargs.get("attention_mask")
        if mask is not None and not _is_constant(mask):
            raise ArgumentError("`attention_mask` must be None in a model whose blocks remove tokens, got a mask.")
        super().check_call(args, kwargs)

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Drops the constant mask, which masks nothing but has the size of all tokens."""
        self.check_call(args, kwargs)
        if args:
            return (None, *args[1:]), kwargs
        return args, {**kwargs, "attention_mask": None} if "attention_mask" in kwargs else kwargs

    def head_reason(self, root: nn.Module) -> str | None:
        """By the names of the classes whose forward runs."""
        own = original_class(root).forward
        known = [f"{name}.forward" for name in (*self.classifiers, *self.towers)]
        if own.__qualname__ not in known:
            return f"its `{own.__qualname__}` is not known to read prefix tokens only"
        holders = [m for m in root.modules() if any(isinstance(each, nn.ModuleList) for each in m.children())]
        for module in (root, core_of(root), *holders):
            kind = original_class(module)
            if "forward" in vars(module) or not kind.forward.__module__.startswith("transformers.models."):
                return f"the forward of its {kind.__name__} is not known to read prefix tokens only"
        return None

    def returns_tokens(self, root: nn.Module) -> bool:
        """Of models without a head, and of the tower of CLIP."""
        return original_class(root).forward.__qualname__ in [f"{name}.forward" for name in self.towers]

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """If hidden states or attentions are asked for, in the call or in a config."""
        if any(kwargs.get(name) for name in _RECORDED) or "forward" in root.__dict__:
            return True
        for part in ("", "vit", "deit", "vision_model"):
            config = getattr(getattr(root, part, None) if part else root, "config", None)
            if config is not None and any(getattr(config, name, False) for name in _RECORDED):
                return True
        return False

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """Those whose hidden states are asked for, and the last unless the head reads prefix tokens only."""
        if "forward" in root.__dict__ or not original_class(root).forward.__module__.startswith("transformers.models."):
            return None
        stages = getattr(root, "out_indices", None)  # of a backbone, where 0 is what enters block 0
        wanted = self._hidden_states(root, kwargs)
        if wanted is True:
            return frozenset(range(-1, depth))
        states = wanted if isinstance(wanted, list | tuple) else [wanted] if isinstance(wanted, int) and wanted else []
        states = [*states, *(stages or ())]
        read = {(state if state >= 0 else depth + 1 + state) - 1 for state in states}
        if self.returns_tokens(root) or (stages is None and self.head_reason(root) is not None):
            read.add(depth - 1)
        return frozenset(read)

    def _hidden_states(self, root: nn.Module, kwargs: Mapping[str, Any]) -> Any:
        """Which hidden states a call returns: True for all, or indices from 0 for what enters block 0."""
        wanted = kwargs.get("output_hidden_states")
        if wanted is not None:
            return wanted
        for part in ("", "vit", "deit", "vision_model"):
            config = getattr(getattr(root, part, None) if part else root, "config", None)
            if config is not None and getattr(config, "output_hidden_states", False):
                return True
        return False

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """See `ModelAdapter.final_norms`."""
        core = core_of(root)
        return tuple(getattr(core, name) for name in ("layernorm", "norm") if hasattr(core, name))

    def output(self, result: Any) -> Tensor:
        """Logits if there are any, else projected or pooled features, else the CLS token or the mean of the tokens."""
        if isinstance(result, Tensor):
            return result
        values = tuple(result.values() if isinstance(result, Mapping) else result)
        named = result if isinstance(result, Mapping) else {}
        tensors = [each for each in values if isinstance(each, Tensor)]
        for found in (*(named.get(key) for key in ("logits", "image_embeds", "pooler_output")), *tensors):
            if isinstance(found, Tensor) and found.ndim == 2:  # tuples without names have the same order
                return found
        tokens = next(each for each in tensors if each.ndim == 3)
        return tokens[:, 0] if self.class_token else tokens.mean(dim=1)


def _is_a(module: nn.Module, names: tuple[str, ...]) -> bool:
    """Whether the module is an instance of one of these classes of transformers, or of a subclass."""
    mro = type(module).__mro__
    return any(each.__name__ in names and each.__module__.startswith("transformers.models.") for each in mro)


def _is_constant(mask: Any) -> bool:
    """Whether a mask is a single value expanded over all keys, as these models create it during `torch.export`."""
    return isinstance(mask, Tensor) and mask.stride(-1) == 0


def core_of(root: nn.Module) -> Any:
    """The model without its head: the module that has `embeddings`."""
    return next(m for m in root.modules() if isinstance(getattr(m, "embeddings", None), nn.Module))


def _patches(config: Any) -> int:
    height, width = _pair(config.image_size)
    down, across = _pair(config.patch_size)
    return (height // down) * (width // across)


def _pair(size: int | Iterable[int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _classes(root: Any) -> int:
    """Number of logits. Users may replace the head, or omit it by `num_labels=0`."""
    head = getattr(root, "classifier", getattr(root, "cls_classifier", None))
    if isinstance(head, nn.Linear):
        return head.out_features
    return 0 if head is None or isinstance(head, nn.Identity) else int(root.config.num_labels)
