"""What the patch needs to know of a model family."""

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from lightning_prune.patching.blocks import Halves
from lightning_prune.patching.overlay import Overlay
from lightning_prune.patching.tap import AttentionTap
from lightning_prune.reduction.base import Attention


@dataclass(frozen=True)
class VisionTransformer:
    """A Vision Transformer found in a model, whatever library it comes from.

    Attributes:
        root: The transformer; calling it with images runs it.
        path: Its dotted path in the model that was searched; empty for the model itself.
        family: Who answers for it.
        blocks: Its blocks in order.
        prefix_tokens: P, class, distillation and register tokens, which stand before the patch tokens.
        has_class_token: Whether token 0 is a CLS token.
        tokens: N, tokens that enter block 0, prefix included; None where that depends on the image size.
        channels: C.
        entry: The module that receives the images.
        classes: Size of the output if it is logits; 0 if the model returns features.
        compiled: The `torch.compile` wrapper around `root`, where the model has one.
    """

    root: nn.Module
    path: str
    family: "Family"
    blocks: tuple[nn.Module, ...]
    prefix_tokens: int
    has_class_token: bool
    tokens: int | None
    channels: int
    entry: nn.Module
    classes: int
    compiled: nn.Module | None = None

    @property
    def runner(self) -> nn.Module:
        """What the user's model calls: the compiled wrapper where there is one."""
        return self.root if self.compiled is None else self.compiled

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)


class Family(ABC):
    """A kind of Vision Transformer: how to recognise one, and how its blocks come apart."""

    name: ClassVar[str]
    guard: ClassVar[type[Overlay] | None] = None  # laid over the root: refuses calls that need every token

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the root of a transformer of this family."""

    @abstractmethod
    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """The facts of one. Raises UnsupportedModelError, with the reason, where it cannot be pruned."""

    @abstractmethod
    def halves(self, block: nn.Module) -> Halves | None:
        """The recipe for this kind of block; None to cut after the whole block."""

    @abstractmethod
    def force_fused(self, block: nn.Module) -> list[nn.Module]:
        """Turns fused attention on in the block's attention modules where it is off; returns those it changed."""

    @abstractmethod
    def undo_fused(self, changed: list[nn.Module]) -> None:
        """The inverse of `force_fused`."""

    def tap(self, calls: list[Attention], log_sizes: Tensor | None) -> AbstractContextManager[Any]:
        """What records a block's attention in `calls`, and adds `log_sizes` to its logits, while the block runs.

        Families whose attention does not go through `scaled_dot_product_attention`, or not always, bring their own.
        """
        return AttentionTap(calls, log_sizes)

    def carry(self, args: tuple[Any, ...], kwargs: dict[str, Any], positions: Tensor) -> tuple[Any, Any]:
        """Adapts what a block receives besides tokens (a rotary embedding, a bias) to the tokens that are left.

        Called in blocks after a reduction; `positions` is (B, K), where each token stood in block 0, -1 for a token
        made of several. Families whose blocks receive nothing else keep this.
        """
        return args, kwargs

    @property
    def carries(self) -> bool:
        """Whether later blocks must be adapted by `carry` at all."""
        return type(self).carry is not Family.carry
