"""Adapters: the interface between patching and the model families."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from lightning_prune._utils.isolation import hooks_read, isolated
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching.attention_capture import CapturedAttention, CaptureSlot, Capturing, SDPARecorder
from lightning_prune.patching.block_split import AttnMlpSplit
from lightning_prune.patching.class_swap import Setting, original_class
from lightning_prune.patching.input_resize import InputResize, ResizedInput, ScalingSites
from lightning_prune.patching.models.call_arguments import call_keywords
from lightning_prune.patching.models.dense_outputs import unit_features
from lightning_prune.patching.patch_division import PatchDivision
from lightning_prune.patching.patched_root import PatchedRoot
from lightning_prune.patching.token_readers import RestoreMode
from lightning_prune.patching.token_state import TokenState
from lightning_prune.reduction.base import AttentionInputs


@dataclass(frozen=True)
class VisionTransformer:
    """A Vision Transformer found in a model, whatever library it comes from.

    Attributes:
        root: The transformer; calling it with images runs it.
        path: Its dotted path in the model that was searched; empty for the model itself.
        adapter: The adapter of its model family.
        blocks: Its blocks in order.
        num_prefix_tokens: P, the class, distillation and register tokens, which come before the patch tokens.
        has_class_token: Whether token 0 is a CLS token.
        num_tokens: N, tokens that enter the first prunable block, prefix included; None if it depends on the images.
        embed_dim: C.
        patch_embed: The module that receives the images.
        num_classes: Number of logits; 0 if the model, or its reader, returns features.
        has_position_inputs: Whether blocks receive another input for each token (a rotary embedding, a bias), which
            must be selected for the tokens that are left.
        pools_patches: Whether the model's output is computed from all patch tokens, by a mean or by attention, and not
            from the CLS token only. A merged token is then weighted by its number of patches.
        first_prunable_block: Index of the first block that can reduce.
        first_prunable_reason: Why the blocks before it cannot.
        compiled_wrapper: The `torch.compile` wrapper around `root`, if there is one.
        restore: How tokens that a patch removes are given back to whoever reads all of them; None if they are not.
        reader: The module around `root` that reads them, with a dense head for example: its call is what runs and is
            measured. None where the transformer is called and returns logits or one vector for each image.
        reads_logits: Whether the reader returns logits (B, `num_classes`), and not features.
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
    restore: RestoreMode | None = None
    reader: nn.Module | None = None
    reads_logits: bool = False

    @property
    def compiled_root(self) -> nn.Module:
        """The module that is called to run the transformer: the compiled wrapper of `outer`, else `outer`."""
        return self.outer if self.compiled_wrapper is None else self.compiled_wrapper

    @property
    def outer(self) -> nn.Module:
        """The module that holds all that runs: `reader`, else `root`."""
        return self.root if self.reader is None else self.reader

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def grid(self, images: Tensor | None = None) -> tuple[int, int] | None:
        """Rows and columns of the patches of the dense model.

        Args:
            images: (B, channels, height, width), for a model that takes images of any size.

        Returns:
            The grid; None if the model cannot run on scaled images, or takes any size and no images are given.
        """
        try:
            division = self.adapter.patch_division(self.root)
        except UnsupportedModelError:
            return None
        size = division.image_size
        if images is not None:
            size = int(images.shape[-2]), int(images.shape[-1])
        return None if size is None else division.grid(*size)

    def run(self, images: Tensor) -> Any:
        """Calls the transformer as the user's model does, with the further arguments of `calling_with`."""
        return self.compiled_root(images, **call_keywords(self.root))

    def run_eagerly(self, images: Tensor) -> Any:
        """Runs `forward` itself: without hooks on the module, and without a compiled graph of it."""
        return self.outer.forward(images, **call_keywords(self.root))

    @contextmanager
    def isolated(self) -> Iterator[None]:
        """See `lightning_prune._utils.isolation.isolated`; where tokens are given back, hooks may read them."""
        with hooks_read(self.restore is not None), isolated(self.outer):
            yield

    def count_tokens(self, images: Tensor) -> int:
        """N, the number of tokens that enter the first prunable block, counted in a forward pass.

        Args:
            images: (B, channels, height, width) on the model's device.

        Raises:
            ArgumentError: If the model cannot run on them.
        """
        counts: list[int] = []
        hook = self.blocks[self.first_prunable_block].register_forward_pre_hook(
            lambda _, args: counts.append(args[0].shape[1])
        )
        try:
            with torch.no_grad(), self.isolated():
                self.run_eagerly(images)  # not a compiled graph, which would not call the hook
        except (AssertionError, AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            taker = "the Vision Transformer" if self.reader is None else f"{type(self.reader).__name__}, which reads it"
            raise ArgumentError(
                f"`images` must be valid inputs of {taker}, got {tuple(images.shape)}, {images.dtype}: {error} Pass "
                "images as your module passes them to it (`images_from_batch` of TokenPruning)."
            ) from error
        finally:
            hook.remove()
        if not counts:
            name = type(self.outer).__name__
            raise ArgumentError(f"`model` must run its Vision Transformer, got {name}, which does not.")
        return counts[0]

    def outputs(self, images: Tensor) -> Tensor:
        """Runs the transformer: (B, classes) logits or (B, C) features of (B, channels, height, width) images."""
        return self.output(self.run(images))

    def output(self, result: Any) -> Tensor:
        """The vector of each image in what `run` returns: by `ModelAdapter.output`; `unit_features` of a reader."""
        if self.reads_logits:
            assert isinstance(result, Tensor)
            return result
        if self.reader is None:
            return self.adapter.output(result)
        return unit_features(result, self.embed_dim, getattr(self.reader, "output_fmt", None) == "NHWC")


class SplitCheckInput(NamedTuple):
    """The input for checking the split of a block: number of tokens, and further arguments."""

    tokens: int
    kwargs: dict[str, Any]


class ModelAdapter(ABC):
    """A family of Vision Transformers: how to recognise them, and how to split their blocks.

    Attributes:
        name: Name of the family in messages.
        guard: Mixin for the root of a patched model; some reject calls which need all tokens.
        supports_key_bias: Whether log-sizes can be added to the logits of its attention (proportional attention of
            ToMe).
    """

    name: ClassVar[str]
    guard: ClassVar[type[PatchedRoot]] = PatchedRoot
    supports_key_bias: ClassVar[bool] = True

    @abstractmethod
    def matches(self, module: nn.Module) -> bool:
        """Whether `module` is the root of a transformer of this family."""

    @abstractmethod
    def describe(self, root: nn.Module, path: str) -> VisionTransformer:
        """Describes a transformer. Raises UnsupportedModelError, with the reason, if it cannot be pruned."""

    def patch_division(self, root: nn.Module) -> PatchDivision:
        """How a model divides its images into patches, if it can run on images that are scaled down.

        Raises:
            UnsupportedModelError: If it cannot; says why.
        """
        raise self.unscalable(root, "how its positions are resampled for images of another size is not known")

    def unscalable(self, root: nn.Module, reason: str) -> UnsupportedModelError:
        """The error of a model that cannot run on images that are scaled down."""
        return UnsupportedModelError(
            f"The images of this {original_class(root).__name__} cannot be scaled down before it: {reason}."
        )

    def scaling_sites(self, transformer: VisionTransformer, resize: InputResize) -> ScalingSites:
        """What has to change in a model with a `patch_division` so that it runs on smaller images.

        Args:
            transformer: Without scaling; its blocks may be patched.
            resize: The scaling; the `_prune_patch` of every mixin.
        """
        return ScalingSites({transformer.patch_embed: ResizedInput})

    @abstractmethod
    def attn_mlp_split(self, block: nn.Module) -> AttnMlpSplit | None:
        """The split of this kind of block; None to remove tokens after the whole block."""

    def split_check_input(self, transformer: VisionTransformer) -> SplitCheckInput:
        """The input for checking a split: few tokens, unless blocks require all of them."""
        return SplitCheckInput(transformer.num_prefix_tokens + 4, {})

    def attention_unsupported_reason(self, transformer: VisionTransformer) -> str | None:
        """Why the attention of this model cannot be read, and what to do about it; None if it can."""
        return None

    def force_fused(self, block: nn.Module) -> list[Setting]:
        """Enables fused attention in the block; returns the settings that it changed."""
        return []

    def unfused_attention(self, block: nn.Module) -> dict[nn.Module, type[CapturedAttention]]:
        """Attention modules of the block without a fused call, and the mixins that capture their inputs."""
        return {}

    def recorder(
        self,
        calls: list[AttentionInputs],
        log_sizes: Tensor | None,
        arrived: TokenState | None,
        num_prefix_tokens: int,
        capture_slot: CaptureSlot | None,
    ) -> AbstractContextManager[Any]:
        """A context manager that records a block's attention, and may change its logits, while the block runs.

        Args:
            calls: The list to append the inputs to.
            log_sizes: (B, 1, 1, N) to add to the logits of each key, or None.
            arrived: State of the tokens after earlier reductions; None if all tokens are left.
            num_prefix_tokens: P.
            capture_slot: The slot of the block's `unfused_attention` modules; None if it has none.
        """
        return SDPARecorder(calls, log_sizes) if capture_slot is None else Capturing(capture_slot, calls, log_sizes)

    def mask_passthrough(self, block: nn.Module) -> Callable[..., Any] | None:
        """Returns `block.attn.forward` if it passes `attn_mask` unchanged to its only fused call, else None."""
        return None

    @property
    def requires_recorder(self) -> bool:
        """Whether every block after a reduction must run in `recorder`, even if its attention is not read."""
        return False

    def check_call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Rejects arguments that a reducing block does not support.

        Raises:
            ArgumentError: If an attention mask was passed, which is for all tokens.
            UnsupportedModelError: If the attention is causal.
        """
        if kwargs.get("attn_mask") is not None:
            raise ArgumentError("`attn_mask` must be None in a model whose blocks remove tokens, got a mask.")
        if kwargs.get("is_causal"):
            raise UnsupportedModelError("Token reduction needs bidirectional attention, got causal attention.")

    def adapt_position_inputs(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], arrived: TokenState, num_prefix_tokens: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Adapts the position inputs of a block, such as a rotary embedding, to the tokens that are left.

        Called in blocks after a reduction. By default there are no position inputs.
        """
        return args, kwargs

    def head_reason(self, root: nn.Module) -> str | None:
        """Why `root.forward` may read patch tokens that leave the last block; None if it reads prefix tokens only.

        Only of known classes: one with a forward or a head of its own may read anything.
        """
        return "its head is not known to read prefix tokens only"

    def returns_tokens(self, root: nn.Module) -> bool:
        """Whether `root.forward` also returns all tokens, as that of models without a head may."""
        return False

    def reads_patches(self, root: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
        """Whether a call of `root.forward` reads or returns patch tokens that leave the last block.

        Looked at in each call, and traced: the settings of a model, or the call, may ask for them.

        Args:
            root: One for which `head_reason` is None.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
        """
        return False

    def restore_reason(self, root: nn.Module) -> str | None:
        """Why a model runs only if removed tokens are given back; None if it runs without."""
        return None

    def read_blocks(
        self, root: nn.Module, depth: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> frozenset[int] | None:
        """The blocks whose outputs a call of `root.forward` reads, with all tokens.

        Looked at in each call, and traced.

        Args:
            root: The transformer.
            depth: Number of blocks.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            Indices of blocks; None if any may be read, as in models whose forward is not known.
        """
        return None

    def final_norms(self, root: nn.Module) -> tuple[nn.Module, ...]:
        """The norms that run on all tokens after the last block."""
        return ()

    def output(self, result: Any) -> Tensor:
        """Logits or features (B, D) from the output of the root."""
        assert isinstance(result, Tensor)
        return result
