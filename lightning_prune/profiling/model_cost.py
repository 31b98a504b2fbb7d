"""What a forward pass costs on any device: multiply-accumulates, and memory for weights and activations."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_prune._utils.trees import tree_leaves
from lightning_prune.patching import VisionTransformer
from lightning_prune.runtimes.in_place import force_eager, uncompiled


class ModelCost(NamedTuple):
    """What a forward pass of a model costs, as it is patched.

    Attributes:
        gmacs: 10^9 multiply-accumulates of matrix products and convolutions, for one image.
        peak_memory_mib: MiB of weights and buffers, and of the activations of a batch that exist at the same time. What
            kernels allocate inside of them is not included.
    """

    gmacs: float
    peak_memory_mib: float


def count_model_cost(transformer: VisionTransformer, images: Tensor) -> ModelCost:
    """Counts what a forward pass costs, in two passes without compilation.

    To be used inside `lightning_prune.profiling.measurement.ready_to_run`. Attention is counted as the two products
    that it is by definition, whatever kernel computes it.

    Args:
        transformer: The Vision Transformer, dense or patched.
        images: (B, C, H, W) on its device.

    Example:
        >>> import timm
        >>> import torch
        >>> from lightning_prune.patching import find_vision_transformer
        >>> from lightning_prune.profiling.measurement import ready_to_run
        >>> from lightning_prune.profiling.model_cost import count_model_cost
        >>> transformer = find_vision_transformer(timm.create_model("vit_tiny_patch16_224"))
        >>> with ready_to_run(transformer):
        ...     round(count_model_cost(transformer, torch.randn(1, 3, 224, 224)).gmacs, 2)
        1.25
    """
    root = transformer.outer
    with torch.no_grad(), force_eager(), uncompiled(root):
        with _plain_attention(), FlopCounterMode(display=False) as flops:
            transformer.run_eagerly(images)
        storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(root)}
        with _LiveMemory(images) as live:
            transformer.run_eagerly(images)
    weights = sum(storages.values())
    return ModelCost(flops.get_total_flops() / 2 / len(images) / 1e9, (weights + live.peak_bytes) / 2**20)


@contextmanager
def _plain_attention() -> Iterator[None]:
    """Attention by two matrix products, which are counted; fused operations of some devices are not."""
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one fused operation for the whole of `nn.MultiheadAttention`
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)


def _tensors(root: torch.nn.Module) -> list[Tensor]:
    return [t for t in (*root.parameters(), *root.buffers()) if t.layout is torch.strided]


class _LiveMemory(TorchDispatchMode):
    """Follows the storages that operations create until they are freed.

    Args:
        inputs: Count from the beginning.
    """

    def __init__(self, inputs: Tensor) -> None:
        super().__init__()
        self._bytes, self.peak_bytes = 0, 0
        self._known: set[int] = set()
        self._follow(inputs)

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        existing = {_identity(leaf) for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor) and _identity(leaf) not in existing:
                self._follow(leaf)
        return result

    def _follow(self, tensor: Tensor) -> None:
        identity = _identity(tensor)
        if identity in self._known or tensor.layout is not torch.strided:
            return
        storage = tensor.untyped_storage()
        size = storage.nbytes()
        self._known.add(identity)
        self._bytes += size
        self.peak_bytes = max(self.peak_bytes, self._bytes)
        weakref.finalize(storage, self._forget, identity, size)

    def _forget(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self._bytes -= size


def _identity(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
