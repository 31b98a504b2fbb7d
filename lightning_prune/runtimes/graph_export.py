"""Exporting a module as a graph that other runtimes can convert: static shapes, no autograd, no hooks of the user."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from lightning_prune._utils.isolation import isolated
from lightning_prune._utils.trees import tree_unflatten
from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.runtimes.in_place import force_eager, uncompiled
from lightning_prune.runtimes.resampling import with_constant_positions


@dataclass(frozen=True)
class ExportedGraph:
    """A graph of a module for inputs of one shape.

    Attributes:
        program: The graph as `torch.export` makes it.
        inputs: The example inputs that become inputs of the graph.
    """

    program: ExportedProgram
    inputs: tuple[Tensor, ...]

    def unflatten(self, tensors: Sequence[Tensor]) -> Any:
        """The output of the module from the tensors that the graph returns, in their order."""
        left = iter(tensors)
        values = [next(left) if isinstance(each, str) else each for each in self.program.graph_signature.user_outputs]
        spec = self.program.call_spec.out_spec
        return values[0] if spec is None else tree_unflatten(values, spec)


class _WithConstants(nn.Module):
    """A module with some of its arguments: passed to the exporter, they would become inputs of the graph."""

    def __init__(self, module: nn.Module, keywords: Mapping[str, Any]) -> None:
        super().__init__()
        self.module, self.keywords = module, dict(keywords)

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs, **self.keywords)


def export_graph(
    module: nn.Module,
    inputs: tuple[Tensor, ...],
    keywords: Mapping[str, Any] | None = None,
    dynamic_shapes: Any = None,
) -> ExportedGraph:
    """Exports a module as it is, dense or patched; the module itself stays as it is.

    Args:
        module: In evaluation mode while it is exported; the user's forward hooks are not a part of the graph.
        inputs: Positional arguments; the graph is for their shapes, unless `dynamic_shapes` says otherwise.
        keywords: Further arguments, which become constants of the graph; no tensors.
        dynamic_shapes: As of `torch.export.export`.

    Raises:
        ExportError: If the module cannot be exported; says why.

    Example:
        >>> import torch
        >>> from lightning_prune.runtimes.graph_export import export_graph
        >>> graph = export_graph(torch.nn.Linear(3, 2), (torch.ones(1, 3),))
        >>> graph.unflatten([torch.zeros(1, 2)])
        tensor([[0., 0.]])
    """
    with torch.no_grad(), isolated(module), uncompiled(module), force_eager():
        try:
            exported = _WithConstants(module, keywords).eval() if keywords else module
            program = torch.export.export(exported, inputs, dynamic_shapes=dynamic_shapes, strict=False)
            program = with_constant_positions(program, inputs, dynamic_shapes)
        except ArgumentError:  # of this package, which says what to do
            raise
        except Exception as error:  # whatever the user's module raises while it is traced
            first_line = str(error).strip().partition("\n")[0]
            raise ExportError(
                f"{type(module).__name__} cannot be exported by torch.export: {type(error).__name__}: {first_line}"
            ) from error
    return ExportedGraph(program, inputs)
