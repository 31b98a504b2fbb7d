"""Random tokens and attention for tests of reductions."""

from typing import Any

import torch
from torch import Tensor

from lightning_prune.reduction import AttentionInputs, Reduction, ReductionOutput, TokenSequence

PRECISIONS = [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)]


def draw(
    batch: int = 3,
    patches: int = 11,
    prefix: int = 1,
    class_token: bool | None = None,
    heads: int = 2,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
    **more: Any,
) -> TokenSequence:
    """A random sequence, the same for each dtype up to rounding. With prefix tokens it has a class token by default."""
    generator = torch.Generator().manual_seed(seed)
    tokens, channels = prefix + patches, 4
    parts = torch.randn(3, batch, heads, tokens, channels, generator=generator, dtype=torch.float64).to(dtype)
    x, entering = torch.randn(2, batch, tokens, heads * channels, generator=generator, dtype=torch.float64).to(dtype)
    has = prefix > 0 if class_token is None else class_token
    return TokenSequence(x, prefix, has, AttentionInputs(*parts), entering=entering, **more)


def image(sequence: TokenSequence, index: int) -> TokenSequence:
    """The sequence of one image of the batch."""

    def alone(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[index : index + 1]

    attention, entering = sequence.attention, sequence.entering
    assert attention is not None
    assert entering is not None
    return sequence._replace(
        tokens=sequence.tokens[index : index + 1],
        attention=AttentionInputs(*(part[index : index + 1] for part in attention[:3])),
        sizes=alone(sequence.sizes),
        entering=alone(entering),
    )


def check_alone_and_together(method: Reduction, remove: int = 5) -> None:
    """The result of an image is the same alone, in any batch, and next to an image with huge values."""
    sequence = draw(5, 21, dtype=torch.float32, trace=True)
    together = method.reduce(sequence, remove)
    for b in range(5):
        alone = method.reduce(image(sequence, b), remove)
        assert torch.equal(alone.positions[0], together.positions[b])
        torch.testing.assert_close(alone.tokens[0], together.tokens[b], rtol=1e-5, atol=1e-6)
        for one, all_ in ((alone.sizes, together.sizes), (alone.sources, together.sources)):
            assert (one is None) is (all_ is None)
            if one is not None and all_ is not None:
                assert torch.equal(one[0], all_[b])


def check_one_graph(method: Reduction, remove: int = 4) -> None:
    """The reduction compiles as one graph and exports, with the same results."""
    sequence = draw(2, dtype=torch.float32)

    class Module(torch.nn.Module):
        def forward(
            self, tokens: Tensor, query: Tensor, key: Tensor, value: Tensor, entering: Tensor
        ) -> ReductionOutput:
            attention = AttentionInputs(query, key, value)
            return method.reduce(TokenSequence(tokens, 1, True, attention, entering=entering, trace=True), remove)

    assert sequence.attention is not None
    assert sequence.entering is not None
    inputs = (sequence.tokens, *sequence.attention[:3], sequence.entering)
    module = Module()
    expected = module(*inputs)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    exported = torch.export.export(module, inputs).module()
    for found in (compiled(*inputs), exported(*inputs)):
        torch.testing.assert_close(tuple(found), tuple(expected), rtol=1e-6, atol=1e-6)
