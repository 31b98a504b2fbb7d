"""One graph of a model for all its token counts: which tokens enter block 0 is an input of the graph.

A profile needs the latency at dozens of token counts, and exporting a model takes seconds each time. Here it is
exported once; the runtime makes the number of tokens static when it loads the graph, which takes a fraction of that.
"""

from collections import OrderedDict
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lightning_prune.errors import ExportError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.patching.models.call_arguments import call_keywords
from lightning_prune.reduction.base import Reduction, ReductionOutput, TokenSequence
from lightning_prune.reduction.functional import take_tokens
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph, export_graph
from lightning_prune.runtimes.graph_sessions import TOKENS
from lightning_prune.runtimes.graph_store import graphs_to_keep
from lightning_prune.schedule import Schedule

FEWEST_TOKENS = 3
"""That the graph takes: sizes of 0, 1 and 2 get graphs of their own."""

_kept: ContextVar[Tensor] = ContextVar("kept")


class _GivenTokens(Reduction):
    """Keeps the tokens whose indices `_kept` holds: (K,) int64, ascending, the same for all images."""

    name = "given"
    site: Literal["block", "input"] = "input"

    def reduce(self, sequence: TokenSequence, remove: int) -> ReductionOutput:
        """Keeps the given tokens, whatever their number."""
        index = _kept.get().expand(sequence.tokens.shape[0], -1)
        return ReductionOutput(take_tokens(sequence.tokens, index), index)

    def max_removed(self, tokens: int, num_prefix_tokens: int) -> int:
        """All patch tokens except one."""
        return max(tokens - num_prefix_tokens - 1, 0)


class _WithTokens(nn.Module):
    """What runs of a transformer, with an input that says which tokens enter block 0."""

    def __init__(self, transformer: VisionTransformer) -> None:
        super().__init__()
        self.outer = transformer.outer
        self.keywords = dict(call_keywords(transformer.root))

    def forward(self, images: Tensor, kept: Tensor) -> Any:
        """Runs the transformer on (B, C, H, W) images and (K,) indices of tokens."""
        before = _kept.set(kept)
        try:
            return self.outer(images, **self.keywords)
        finally:
            _kept.reset(before)


def export_token_curve(transformer: VisionTransformer, example_inputs: Tensor) -> ExportedGraph:
    """Exports a dense transformer with the indices of the tokens that enter block 0 as its second input.

    Args:
        transformer: Dense, with tokens that may go before block 0. Those that its reader gets back are copies.
        example_inputs: (B, C, H, W) images; their shape is static.

    Returns:
        A graph of `images` and `kept` (`TOKENS`,) int64.

    Raises:
        ExportError: If the model cannot be exported for any number of tokens.
    """
    n = transformer.count_tokens(example_inputs)
    kept = torch.arange(n - 1, device=example_inputs.device)
    module = _WithTokens(transformer).eval()
    if transformer.restore is not None:  # the neighbours of `delta` are no part of a graph for all counts
        transformer = replace(transformer, restore="copy")
    with PatchHandle(transformer, _GivenTokens(), Schedule([1] + [0] * (transformer.depth - 1))):
        sizes = {"images": None, "kept": {0: torch.export.Dim(TOKENS, min=FEWEST_TOKENS, max=n)}}
        return export_graph(module, (example_inputs, kept), dynamic_shapes=sizes)


class TokenCurve:
    """Runs a transformer with any number of tokens from block 0 on, in a runtime that converts.

    Args:
        runtime: Where it runs.
        transformer: Dense.
        example_inputs: (B, C, H, W) images.

    Raises:
        ExportError: As `export_token_curve`, or if the runtime does not accept the graph.
    """

    def __init__(self, runtime: ConvertedRuntime, transformer: VisionTransformer, example_inputs: Tensor) -> None:
        if transformer.first_prunable_block:
            raise ExportError("No token may go before block 0 of this model.")
        self._images = example_inputs
        self._load = runtime.load_counts(export_token_curve(transformer, example_inputs))
        self._graphs: OrderedDict[int, Callable[..., list[Tensor]]] = OrderedDict()
        self._kept_graphs = graphs_to_keep(transformer.outer)
        self._kept = torch.arange(transformer.count_tokens(example_inputs), device=example_inputs.device)
        self._count = len(self._kept)

    def to(self, count: int) -> None:
        """Makes `run` run with this many tokens; loads the graph at the first time."""
        if count not in self._graphs:
            self._graphs[count] = self._load(count)
        self._graphs.move_to_end(count)
        while len(self._graphs) > self._kept_graphs:
            self._graphs.popitem(last=False)
        self._count = count

    def run(self) -> list[Tensor]:
        """The tensors that the transformer returns for the first tokens of the images."""
        return self._graphs[self._count](self._images, self._kept[: self._count])
