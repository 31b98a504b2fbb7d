"""AOTInductor: a model is compiled ahead of time by PyTorch's inductor and a C++ compiler into a library."""

import re
import tempfile
import warnings
import zipfile
from collections import Counter
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_prune.errors import ExportError, RuntimeUnavailableError
from lightning_prune.runtimes.base import torch_context
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import ExportedGraph
from lightning_prune.runtimes.graph_store import RunGraph

_SUFFIX = ".pt2"
_SETTINGS = {"aot_inductor.enable_line_tables": False}  # they hold paths of this machine
_CALLS = re.compile(r"(?<!void )(?<!void  )\b(?:aoti_torch_(?:cpu|cuda)_(\w+)|((?:cpp|triton)\w*_fused_\w+))\(")


class CompiledPackage(NamedTuple):
    """What AOTInductor makes of a graph.

    Attributes:
        content: Of the file (`.pt2`).
        compiled: Kernel that was compiled, named after the operators in it -> how often it is called.
        others: Operator -> how often a kernel of PyTorch's own is called for it.
    """

    content: bytes
    compiled: dict[str, int]
    others: dict[str, int]


class AOTInductor(ConvertedRuntime):
    """PyTorch's inductor ahead of time: a library for one shape, for processors such as that of this machine.

    Every token count and every schedule is compiled by a C++ compiler, which takes from half a minute to minutes; a
    warning says so before the first. A library for any number of tokens would have other kernels than those for one.
    The number of threads is that of PyTorch when the model is compiled.

    Raises:
        RuntimeUnavailableError: If there is no C++ compiler.

    Example:
        >>> from lightning_prune.runtimes import parse_runtime
        >>> parse_runtime("aotinductor").compiles
        True
    """

    name = "aotinductor"

    def __init__(self) -> None:
        self.compiler = cpp_compiler()

    def context(self) -> dict[str, Any]:
        """See `Runtime.context`."""
        return {**torch_context(self.name), "compiler": self.compiler}

    def load(self, graph: ExportedGraph) -> RunGraph:
        """See `ConvertedRuntime.load`. Takes from half a minute to minutes."""
        package = compile_package(graph).content
        strides = [each.stride() for each in graph.inputs]
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / f"model{_SUFFIX}"
            path.write_bytes(package)
            return load_package(path, strides)


def compile_package(graph: ExportedGraph) -> CompiledPackage:
    """Compiles a graph; warns that this takes long.

    Args:
        graph: Of a module, with static shapes, or with a dynamic one.

    Raises:
        ExportError: If inductor cannot compile the graph.
        RuntimeUnavailableError: If there is no C++ compiler.
    """
    cpp_compiler()
    warnings.warn(
        "AOTInductor compiles every token count and every schedule by a C++ compiler: each takes from half a minute to "
        "minutes.",
        stacklevel=3,
    )
    try:
        with torch.no_grad():
            path = Path(torch._inductor.aoti_compile_and_package(graph.program, inductor_configs=dict(_SETTINGS)))
    except Exception as error:  # whatever inductor raises; a compiler's message may be pages long
        first_line = str(error).strip().partition("\n")[0]
        raise ExportError(f"AOTInductor cannot compile the graph: {type(error).__name__}: {first_line}") from error
    try:
        return _without_sources(path)
    finally:  # each holds a copy of the weights
        for each in (path, path.with_suffix(".so")):
            each.unlink(missing_ok=True)


def _without_sources(path: Path) -> CompiledPackage:
    """Reads a package, and leaves the sources out: nothing needs them, and they hold paths of this machine."""
    kept, sources = BytesIO(), []
    with zipfile.ZipFile(path) as package, zipfile.ZipFile(kept, "w") as written:
        for each in package.infolist():
            content = package.read(each)
            if each.filename.endswith(".cpp"):
                sources.append(content.decode("utf-8"))
            else:
                written.writestr(each, content)
    compiled, others = Counter[str](), Counter[str]()
    for other, name in _CALLS.findall("\n".join(sources)):
        (others if other else compiled)[other or name] += 1
    return CompiledPackage(kept.getvalue(), dict(compiled.most_common()), dict(others.most_common()))


def load_package(path: Path, strides: list[tuple[int, ...]] | None = None) -> RunGraph:
    """Loads a package, which may be deleted afterwards.

    Args:
        path: The file.
        strides: Of each input, on which the compiled code relies; those of contiguous tensors if None.

    Raises:
        ExportError: If PyTorch cannot load it, for example on another processor.
    """
    try:
        loader = torch._inductor.aoti_load_package(path).loader
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        raise ExportError(f"AOTInductor cannot load {path.name}: {first_line}") from error

    def run(*tensors: Tensor) -> list[Tensor]:
        if strides is None:
            held = [tensor.contiguous() for tensor in tensors]
        else:
            held = [_with_stride(tensor, stride) for tensor, stride in zip(tensors, strides, strict=True)]
        with torch.no_grad():
            return list(loader.run(held))

    return run


def _with_stride(tensor: Tensor, stride: tuple[int, ...]) -> Tensor:
    if tensor.stride() == stride:
        return tensor
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


@cache
def cpp_compiler() -> str:
    """The C++ compiler that inductor finds.

    Raises:
        RuntimeUnavailableError: If there is none.
    """
    from torch._inductor.cpp_builder import get_cpp_compiler

    try:
        return get_cpp_compiler()
    except RuntimeError as error:
        raise RuntimeUnavailableError(
            "The runtime 'aotinductor' needs a C++ compiler, and none is found here. Install one, such as g++, or name "
            "it by the environment variable CXX."
        ) from error
