"""What the vision models of Hugging Face's transformers have in common.

transformers is an extra and never imported: models are recognised by the names of their classes and of the modules that
define these. Tested with transformers 5.2.0, 5.4.0, 5.10.4, 5.16.1 and 5.23.0. Versions 5.0 and 5.1 replace the
`forward` of every block, patched or not, to record `output_hidden_states`, and do not put it back.
"""

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.blocks import Halves
from lightning_prune.patching.families.base import Family, VisionTransformer
from lightning_prune.patching.families.refused import why_refused
from lightning_prune.patching.overlay import own_class
from lightning_prune.patching.survivors import Survivors


class HuggingFace(Family):
    """A model alone, under a head, or as the tower of a larger model.

    No overlay may be laid over a root: transformers looks up by the name of its class what to record for
    `output_hidden_states=True` and what to write into a saved config.

    Attributes:
        roots: Names of the classes that models of this family can be.
        layers: Names of the classes that their blocks can be.
        class_token: Whether token 0 is a CLS token.
        any_size: Whether it takes images of all sizes, by fitting its positional terms to them.
        carries: Whether blocks receive what is made for all tokens: a mask while exporting, a rotary embedding.
        pooling: Names of the roots that return something made of all patch tokens, not of the CLS token alone.
    """

    roots: ClassVar[tuple[str, ...]]
    layers: ClassVar[tuple[str, ...]]
    class_token: ClassVar[bool] = True
    any_size: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    pooling: ClassVar[tuple[str, ...]] = ()

    def matches(self, module: nn.Module) -> bool:
        """Subclasses count: users write their own."""
        return _is_a(module, self.roots)

    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """See `Family.describe`."""
        kind = own_class(root)
        reason = why_refused(kind)
        if reason is not None:
            at = f" at {path!r}" if path else ""
            raise UnsupportedModelError(f"{kind.__name__}{at} cannot be pruned: {reason}.")
        core = core_of(root)
        lists = (tuple(m) for m in core.modules() if isinstance(m, nn.ModuleList))
        blocks = next((each for each in lists if each and all(_is_a(m, self.layers) for m in each)), None)
        if blocks is None:
            raise UnsupportedModelError(f"{kind.__name__} holds no list of {' or '.join(self.layers)}.")
        prefix = self.prefix_tokens(core.embeddings)
        return VisionTransformer(
            root=root,
            path=path,
            family=self,
            blocks=blocks,
            prefix_tokens=prefix,
            has_class_token=self.class_token,
            tokens=None if self.any_size else prefix + _patches(core.config),
            channels=core.config.hidden_size,
            entry=core.embeddings,
            classes=_classes(root),
            carries=self.carries,
            pools=_is_a(root, self.pooling),
        )

    def prefix_tokens(self, embeddings: Any) -> int:
        """Class, distillation and register tokens."""
        registers = getattr(embeddings, "register_tokens", None)
        count = 0 if registers is None else int(registers.shape[1])
        return int(self.class_token) + int(hasattr(embeddings, "distillation_token")) + count

    @abstractmethod
    def recipe(self, block: nn.Module) -> Halves:
        """How a block of this family comes apart."""

    def halves(self, block: nn.Module) -> Halves | None:
        """A subclass of users with a forward of its own is cut after."""
        theirs = own_class(block).forward.__module__.startswith("transformers.models.")
        return self.recipe(block) if theirs else None

    def unreadable(self, transformer: VisionTransformer) -> str | None:
        """Attention is read through torch's fused function, which one of the implementations to choose from calls."""
        used = core_of(transformer.root).config._attn_implementation
        if used == "sdpa":
            return None
        return (
            f"The attention of this {own_class(transformer.root).__name__} is set to {used!r}, where it cannot be "
            f'read; call `model.set_attn_implementation("sdpa")` first.'
        )

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """See `Family.check_call`; most models pass the mask by position."""
        mask = args[0] if args else kwargs.get("attention_mask")
        if mask is not None and not _hides_nothing(mask):
            raise ArgumentError(
                "`attention_mask` is made for all tokens; a model whose blocks remove tokens cannot use it."
            )
        super().check_call(args, kwargs)

    def carry(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: Survivors, prefix_tokens: int
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
