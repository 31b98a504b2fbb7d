"""ExecuTorch: a model is lowered to a program for devices without PyTorch, with XNNPACK's kernels for most of it."""

from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import executorch.extension.pybindings.portable_lib as bindings
import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.devtools.backend_debug import get_delegation_info
from executorch.exir import to_edge_transform_and_lower
from executorch.runtime import Runtime as ProgramRuntime
from torch import Tensor, nn

from lightning_prune.errors import ArgumentError, ExportError
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph

_pool_threads: list[int] = []
"""The number of threads of this process's pool, once a program was loaded."""


class EdgeProgram(NamedTuple):
    """What ExecuTorch makes of a graph.

    Attributes:
        content: Of the file (`.pte`).
        delegated: Operator -> how often XNNPACK runs it.
        others: Operator -> how often ExecuTorch's own kernels run it, which are slower.
    """

    content: bytes
    delegated: dict[str, int]
    others: dict[str, int]


class ExecuTorch(ConvertedRuntime):
    """ExecuTorch on a CPU, with XNNPACK; for static shapes.

    Its pool of threads is one for the process: it has as many as PyTorch has when the first program is loaded.

    Example:
        >>> from lightning_prune.runtimes import parse_runtime
        >>> parse_runtime("executorch")
        ExecuTorch('executorch')
    """

    name = "executorch"
    weight_dtypes = (torch.float32, torch.float16)

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return {
            "runtime": self.name,
            "executorch": version("executorch"),
            "torch": str(torch.__version__),  # its exporter makes the graph
            "provider": "XNNPACK",
            "threads": _pool_threads[0] if _pool_threads else torch.get_num_threads(),
        }

    def unsupported_reason(self, model: nn.Module) -> str | None:
        """See `Runtime.unsupported_reason`."""
        if any(each.device.type != "cpu" for each in model.parameters()):
            return "the weights are not on the CPU."
        return super().unsupported_reason(model)

    def load(self, graph: ExportedGraph) -> RunGraph:
        """See `ConvertedRuntime.load`."""
        return load_program(to_edge_program(graph).content)


def to_edge_program(graph: ExportedGraph) -> EdgeProgram:
    """Lowers a graph with static shapes.

    Raises:
        ExportError: If it cannot be lowered, or ExecuTorch has no kernel for an operator; names it.
    """
    try:
        with torch.no_grad():
            lowered = to_edge_transform_and_lower(graph.program, partitioner=[XnnpackPartitioner()])
            counts = get_delegation_info(lowered.exported_program().graph_module).delegation_by_operator
            made = lowered.to_executorch()
    except Exception as error:  # whatever its passes raise
        first_line = str(error).strip().partition("\n")[0]
        raise ExportError(f"The graph cannot be lowered to ExecuTorch: {type(error).__name__}: {first_line}") from error
    known = ProgramRuntime.get().operator_registry.operator_names
    plans = made.executorch_program.execution_plan
    needed = {f"{each.name}.{each.overload}".rstrip(".") for plan in plans for each in plan.operators}
    if missing := sorted(needed - known):
        raise ExportError(f"ExecuTorch has no kernel for {', '.join(missing)}.")
    counts.pop("getitem", None)  # takes one of several outputs, which is no operator
    delegated = {name: each.delegated for name, each in counts.items() if each.delegated}
    others = {name: each.non_delegated for name, each in counts.items() if each.non_delegated}
    return EdgeProgram(bytes(made.buffer), delegated, others)


def load_program(program: bytes | Path) -> RunGraph:
    """Loads a program, or the file of one, which is read at once.

    Raises:
        ArgumentError: If PyTorch has another number of threads than ExecuTorch's pool.
        ExportError: If ExecuTorch does not accept it.
    """
    _start_pool(torch.get_num_threads())
    content = program.read_bytes() if isinstance(program, Path) else program
    try:
        loaded = ProgramRuntime.get().load_program(content)
        loaded.load_method("forward")
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ExportError(f"ExecuTorch does not accept the program: {first_line}") from error

    def run(*tensors: Tensor) -> list[Tensor]:
        # Through the program, so that it lives as long as what runs it: it holds the weights.
        outputs = loaded.load_method("forward").execute([tensor.contiguous() for tensor in tensors])
        return [each.clone() for each in outputs]  # the next run writes to the same memory

    return run


def _start_pool(threads: int) -> None:
    """Gives the pool a number of threads; once, as loaded programs hold on to it."""
    if not _pool_threads:
        bindings._unsafe_reset_threadpool(threads)
        _pool_threads.append(threads)
    elif _pool_threads[0] != threads:
        raise ArgumentError(
            f"The number of threads of PyTorch must be {_pool_threads[0]}, with which ExecuTorch was started in this "
            f"process, got {threads}."
        )
