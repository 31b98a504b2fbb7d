"""Digests of tensors and weights: what tells two of them apart, to the bit."""

import hashlib
import os

import torch
from torch import Tensor, nn


def tensor_digest(value: Tensor) -> str:
    """A digest of shape, dtype and every bit of a tensor."""
    return hashlib.sha256(tensor_bytes(value)).hexdigest()[:32]


def weights_digest(model: nn.Module) -> str:
    """A digest of every parameter and buffer that a checkpoint would hold, names, shapes and dtypes included."""
    found = hashlib.sha256()
    for name, value in sorted(model.state_dict(keep_vars=True).items()):  # detaching inference tensors is an error
        found.update(name.encode())
        found.update(tensor_bytes(value) if isinstance(value, Tensor) else repr(value).encode())
    return found.hexdigest()[:32]


def tensor_bytes(value: Tensor) -> bytes:
    """Shape, dtype and every bit of a tensor; of one that has no bytes of its own, those of what it stands for.

    Random bytes where the values are not there or cannot be read, as of weights on the meta device, which libraries
    leave in the place of weights that they keep elsewhere: no two are known to be the same.
    """
    try:
        return _readable_bytes(value)
    except (RuntimeError, TypeError):  # a missing operation is a RuntimeError, too
        return os.urandom(32)


def _readable_bytes(value: Tensor) -> bytes:
    if value.is_nested:  # its shape is a symbol, which differs each time
        return b"".join([f"nested {value.layout}".encode(), *map(tensor_bytes, value.unbind())])
    head = f"{tuple(value.shape)} {value.dtype} {value.layout}".encode()
    if hasattr(value, "__tensor_flatten__"):  # made of other tensors, as quantized weights are
        names, context = value.__tensor_flatten__()
        parts = [tensor_bytes(getattr(value, name)) for name in names]
        return b"".join([head, repr((type(value).__name__, names, context)).encode(), *parts])
    with torch.no_grad():
        if value.is_quantized:
            value = value.dequantize()
        elif value.layout is not torch.strided:
            value = value.to_dense()
        try:
            flat = value.cpu().contiguous().reshape(-1)
            return head + flat.view(torch.uint8).numpy().tobytes() if flat.numel() else head
        except (RuntimeError, TypeError):  # other subclasses
            return head + value.float().cpu().contiguous().reshape(-1).numpy().tobytes()
