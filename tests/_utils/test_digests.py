"""Digests of tensors of every kind: the same for the same values, others for others."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from lightning_prune._utils.digests import tensor_digest, weights_digest

X = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))


class Sub(Tensor):
    """A subclass without a storage format of its own."""


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "float": lambda x: x,
    "bfloat16": lambda x: x.bfloat16(),
    "float8": lambda x: x.to(torch.float8_e4m3fn),
    "complex": lambda x: torch.complex(x, x).conj(),
    "bool": lambda x: x > 0,
    "sparse": lambda x: x.to_sparse(),
    "sparse rows": lambda x: x.to_sparse_csr(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 3, torch.qint8),
    "quantized by channel": lambda x: torch.quantize_per_channel(
        x, torch.full((4,), 0.1), torch.zeros(4), 0, torch.quint8
    ),
    "subclass": lambda x: x.as_subclass(Sub),
    "parameter": lambda x: nn.Parameter(x.clone()),
    "nested": lambda x: torch.nested.nested_tensor([x[0], x[1, :3]]),
    "jagged": lambda x: torch.nested.nested_tensor([x[0], x[1, :3]], layout=torch.jagged),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_tensors_are_told_apart_by_their_values(kind: str) -> None:
    make = KINDS[kind]
    other = X.clone()
    other[0, 0] = 0.5  # which was negative
    assert tensor_digest(make(X)) == tensor_digest(make(X.clone()))
    assert tensor_digest(make(X)) != tensor_digest(make(other))


@pytest.mark.filterwarnings("ignore")
def test_the_kind_is_told_apart() -> None:
    digests = {tensor_digest(KINDS[kind](X)) for kind in ("float", "bfloat16", "sparse", "sparse rows", "quantized")}
    assert len(digests) == 5
    scales = [torch.quantize_per_tensor(X * scale, 0.1 * scale, 3, torch.qint8) for scale in (1, 2)]
    assert torch.equal(*(each.int_repr() for each in scales))
    assert tensor_digest(scales[0]) != tensor_digest(scales[1])


@pytest.mark.parametrize(
    "make",
    [lambda: torch.empty(4, 6, device="meta"), nn.UninitializedParameter],
    ids=["meta", "uninitialized"],
)
def test_values_that_are_not_there_are_never_the_same(make: Callable[[], Tensor]) -> None:
    module = nn.Module()
    module.register_buffer("held", make())
    assert weights_digest(module) != weights_digest(module)
