"""A fake accelerator: tensors have shapes, dtypes and devices, but no data."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_prune._utils.trees import tree_leaves

DEVICE = "cuda"


class OnOneDevice(TorchDispatchMode):
    """Records operations that use another device or synchronise, which would end the capture of a CUDA graph."""

    def __init__(self) -> None:
        super().__init__()
        self.elsewhere: list[str] = []
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += 1
        tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
        by_mask = "index_put" in str(func) and any(tensor.dtype == torch.bool for tensor in tree_leaves(args[1]))
        if by_mask or any(tensor.device.type != DEVICE for tensor in tensors):  # a mask is counted by the host
            self.elsewhere.append(str(func))
        return result


def move(model: nn.Module, dtype: torch.dtype) -> None:
    """Moves the parameters and buffers of a model to the fake device; to be called within `away`."""

    def there(value: Tensor) -> Tensor:
        return torch.empty(value.shape, dtype=dtype if value.is_floating_point() else value.dtype, device=DEVICE)

    for module in model.modules():
        for name, value in module._parameters.items():
            if value is not None:
                module._parameters[name] = nn.Parameter(there(value), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = there(buffer)


@contextmanager
def away() -> Iterator[None]:
    """Raises for `item`, for shapes that depend on data, and for mixed devices."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        yield
