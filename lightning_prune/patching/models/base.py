"""Adapters: what patching needs to know of a kind of model."""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CapturedAttention, CaptureSlot, Capturing, SDPARecorder
from lightning_prune.patching.block_split import AttnMlpSplit, eval_mode
from lightning_prune.patching.class_swap import PatchedModule
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction.base import AttentionInputs


@dataclass(frozen=True)
class VisionTransformer:
    """A Vision Transformer found in a model, whatever library it comes from.

    Attributes:
        root: The transformer; calling it with images runs it.
        path: Its dotted path in the model that was searched; empty for the model itself.
        adapter: How models of its kind are patched.
        blocks: Its blocks in order.
        num_prefix_tokens: P, the class, distillation and register tokens, which come before the patch tokens.
        has_class_token: Whether token 0 is a CLS token.
        num_tokens: N, tokens that enter the first prunable block, prefix included; None where the image size decides.
        embed_dim: C.
        patch_embed: The module that receives the images.
        num_classes: Size of the output if it is logits; 0 if the model returns features.
        has_position_inputs: Whether blocks receive something for each token besides the tokens (a rotary embedding, a
            bias), which must be gathered to the tokens that are left.
        pools_patches: Whether the model's output is made of all patch tokens, by a mean or by attention, and not of the
            CLS token alone. A merged token then counts as often as it holds patches.
        first_prunable_block: Index of the first block that can reduce.
        first_prunable_reason: Why the blocks before it cannot.
        compiled_wrapper: The `torch.compile` wrapper around `root`, where the model has one.
    """

    root: nn.Module
    path: str
    adapter: "ModelAdapter"
    blocks: tuple[nn.Module, ...]
    num_prefix_tokens: int
    has_class_token: bool
    num_tokens: int | None
    embed_dim: int
    patch_embed: nn.Module
    num_classes: int
    has_position_inputs: bool = False
    pools_patches: bool = False
    first_prunable_block: int = 0
    first_prunable_reason: str = ""
    compiled_wrapper: nn.Module | None = None

    @property
    def compiled_root(self) -> nn.Module:
        """What the user's model calls: the compiled wrapper where there is one."""
        return self.root if self.compiled_wrapper is None else self.compiled_wrapper

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def count_tokens(self, images: Tensor) -> int:
        """N, tokens that enter the first block that can reduce, counted in a forward pass of such images.

        Args:
            images: (B, channels, height, width) on the model's device.

        Raises:
            ArgumentError: If the model cannot run on them.
        """
        seen: list[int] = []
        hook = self.blocks[self.first_prunable_block].register_forward_pre_hook(
            lambda _, args: seen.append(args[0].shape[1])
        )
        try:
            with torch.no_grad(), eval_mode(self.root):
                self.root.forward(images)  # past a compiled graph, which would not see the hook
        except (AssertionError, RuntimeError) as error:
            raise ArgumentError(
                f"The Vision Transformer cannot run on images {tuple(images.shape)}, {images.dtype}: {error} Give "
                "those that it receives itself, after all that your module does to them (`images_from_batch` of "
                "TokenPruning)."
            ) from error
        finally:
            hook.remove()
        return seen[0]

    def outputs(self, images: Tensor) -> Tensor:
        """Runs the transformer: (B, classes) logits or (B, C) features of (B, channels, height, width) images."""
        return self.adapter.output(self.compiled_root(images))


def loaded_class(name: str) -> type[nn.Module] | None:
    """The class that another library calls `name`, as in `"timm.models.eva:Eva"`.

    Nothing is imported: where its module is not, no model can be of the class. None there, and where a release of the
    library has renamed the class, which then costs the adapter that looks for it and nothing else.
    """
    module, _, attribute = name.partition(":")
    kind = getattr(sys.modules.get(module), attribute, None)
    return kind if isinstance(kind, type) else None


def loaded_classes(names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """Those of the classes that `loaded_class` finds."""
    return tuple(kind for kind in map(loaded_class, names) if kind is not None)


class SplitCheckInput(NamedTuple):
    """What to try a block on: tokens, and what else it must be given."""

    tokens: int
    kwargs: dict[str, Any]


class Setting(NamedTuple):
    """An attribute of a module as it was before a patch changed it."""

    module: nn.Module
    name: str
    value: Any

    def restore(self) -> None:
        """Puts it back."""
        vars(self.module)[self.name] = self.value


class ModelAdapter(ABC):
    """A kind of Vision Transformer: how to recognise one, and how its blocks come apart.

    Attributes:
        name: What messages call it.
        guard: Laid over the root of a patched model: refuses calls that need every token.
        supports_key_bias: Whether log-sizes can be added to the logits of its attention (proportional attention of
            ToMe).
    """

    name: ClassVar[str]
    guard: ClassVar[type[PatchedModule] | None] = None
    supports_key_bias: ClassVar[bool] = True

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the root of a transformer of this kind."""

    @abstractmethod
    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """The facts of one. Raises UnsupportedModelError, with the reason, where it cannot be pruned."""

    @abstractmethod
    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """The recipe for this kind of block; None to cut after the whole block."""

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """On what to check a recipe: few tokens, unless blocks only work on all of them."""
        return SplitCheckInput(transformer.num_prefix_tokens + 4, {})

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """Why the attention cannot be read as the model is set up now, with the way out; None where it can."""
        return None

    def force_fused(self, block: nn.Module) -> list[Setting]:
        """Turns fused attention on in the block's attention modules where it is off; returns what it changed."""
        return []

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """Attention modules of the block that make no fused call, and what to lay over them so that they tell."""
        return {}

    def recorder(
        self,
        calls: list[AttentionInputs],
        log_sizes: Tensor | None,
        arrived: TokenState | None,
        num_prefix_tokens: int,
        capture_slot: CaptureSlot | None,
    ) -> AbstractContextManager[Any]:
        """What records a block's attention, and may change its logits, while the block runs.

        Args:
            calls: Where to record.
            log_sizes: (B, 1, 1, N) to be added to the logits of every key, or None.
            arrived: State of the tokens that earlier reductions left; None where all tokens are left.
            num_prefix_tokens: P.
            capture_slot: The slot of the block's `unfused_attention` modules; None where it has none.
        """
        return SDPARecorder(calls, log_sizes) if capture_slot is None else Capturing(capture_slot, calls, log_sizes)

    def mask_passthrough(self, block: nn.Module) -> Callable[..., Any] | None:
        """Returns `block.attn.forward` if it passes `attn_mask` unchanged to its one fused call, else None."""
        return None

    @property
    def requires_recorder(self) -> bool:
        """Whether a block after a reduction must run in `tap` even if nothing is read there and nothing weighed."""
        return False

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Refuses what a reducing block cannot honour.

        Raises:
            ArgumentError: If an attention mask came, which is made for all tokens.
            UnsupportedModelError: If attention is to be causal.
        """
        if kwargs.get("attn_mask") is not None:
            raise ArgumentError("`attn_mask` is made for all tokens; a model whose blocks remove tokens cannot use it.")
        if kwargs.get("is_causal"):
            raise UnsupportedModelError("Token reduction needs bidirectional attention; this block's is causal.")

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adapts what a block receives besides tokens (a rotary embedding) to the tokens that are left.

        Called in blocks after a reduction. Families whose blocks receive nothing else keep this.
        """
        return args, kwargs

    def output(self, result: Any) -> Tensor:
        """Logits or features (B, D) out of what the root returns."""
        assert isinstance(result, Tensor)
        return result
