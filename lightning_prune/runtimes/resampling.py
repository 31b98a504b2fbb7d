"""Resampled positions as constants of a graph.

A model that takes images of several sizes resamples its positions in every forward pass. In a graph the size is fixed,
so that the result is a constant. It has to be one: runtimes lack such operators, or compute them in another way.
OpenVINO 2026.4 ignores the antialiasing of a bicubic ONNX `Resize`: outputs of a small NaFlexViT were 6 to 17% off.
"""

from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx import GraphModule, Node
from torch.fx.node import map_arg

_RESAMPLING = ("upsample", "grid_sampler")


def with_constant_positions(
    program: ExportedProgram, inputs: tuple[Tensor, ...], dynamic_shapes: Any
) -> ExportedProgram:
    """A program in which everything that is resampled from weights alone is a constant.

    Args:
        program: As `torch.export` makes it.
        inputs: What it was made from.
        dynamic_shapes: As of `torch.export.export`.

    Returns:
        The program itself if nothing is resampled, or only what depends on the inputs.
    """
    kinds = {each.arg.name: each.kind for each in program.graph_signature.input_specs}
    weights = {name for name, kind in kinds.items() if kind != InputKind.USER_INPUT}
    if not _resampled(_constant(program.graph_module, weights)):
        return program
    module = program.module(check_guards=False)
    assert isinstance(module, GraphModule)
    constant = _constant(module, set())
    values: dict[Node, Any] = {}
    for node in constant:
        if node.op == "get_attr":
            values[node] = _attribute(module, str(node.target))
        else:
            arguments: Any = map_arg((node.args, node.kwargs), values.__getitem__)
            assert callable(node.target)
            values[node] = node.target(*arguments[0], **arguments[1])
    for number, node in enumerate(_resampled(constant)):
        name = f"resampled_{number}"
        module.register_buffer(name, values[node].detach().clone())
        with module.graph.inserting_before(node):
            node.replace_all_uses_with(module.graph.get_attr(name))
    module.graph.eliminate_dead_code()
    module.recompile()
    return torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes, strict=False)


def _constant(module: GraphModule, weights: set[str]) -> list[Node]:
    """The nodes that depend on weights alone, in order."""
    found: dict[Node, None] = {}
    for node in module.graph.nodes:
        computed = node.op == "call_function" and node.all_input_nodes and all(n in found for n in node.all_input_nodes)
        if node.op == "get_attr" or node.name in weights or computed:
            found[node] = None
    return list(found)


def _resampled(nodes: list[Node]) -> list[Node]:
    return [node for node in nodes if any(name in str(node.target) for name in _RESAMPLING) and node.op != "get_attr"]


def _attribute(module: GraphModule, path: str) -> Any:
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name)
    return found
