"""Runtimes by spec: `torch`, `torch.compile:mode=blocks`, `onnxruntime:provider=CPUExecutionProvider`, ..."""

from importlib import import_module
from importlib.metadata import entry_points
from inspect import signature

from lightning_prune._utils.spec import Spec
from lightning_prune._utils.validation import check_name
from lightning_prune.errors import ArgumentError, RuntimeUnavailableError
from lightning_prune.runtimes.base import Runtime

ENTRY_POINTS = "lightning_prune.runtimes"
"""Group of the entry points by which other packages add runtimes."""


RUNTIMES: dict[str, str] = {
    "torch": "lightning_prune.runtimes.torch_runtime:TorchEager",
    "torch.compile": "lightning_prune.runtimes.torch_runtime:TorchCompile",
    "onnxruntime": "lightning_prune.runtimes.onnx_runtime:OnnxRuntime",
    "openvino": "lightning_prune.runtimes.openvino_runtime:OpenVINO",
    "aotinductor": "lightning_prune.runtimes.aotinductor_runtime:AOTInductor",
    "executorch": "lightning_prune.runtimes.executorch_runtime:ExecuTorch",
}
"""Name -> module and class, imported at first use: most runtimes need a package that is not installed everywhere."""
EXTRAS = {"onnxruntime": "onnx", "openvino": "openvino"}
"""Name -> the extra of this package that installs what the runtime needs."""
PACKAGES = {"executorch": "executorch"}
"""Name -> the package that the runtime needs, where that is in no extra."""


def known_runtimes() -> dict[str, str]:
    """Name -> the runtimes of this package, and those that other installed packages add by an entry point."""
    return {**{each.name: each.value for each in entry_points(group=ENTRY_POINTS)}, **RUNTIMES}


def parse_runtime(runtime: str | Runtime) -> Runtime:
    """The runtime of a spec `name[:key=value,...]`; a `Runtime` is returned as it is.

    Args:
        runtime: The spec, such as `"torch"`, `"torch.compile:mode=blocks"` or `"openvino:precision=bf16"`.

    Returns:
        The runtime. Its `name` is the shortest spec of it.

    Raises:
        ArgumentError: If there is no such runtime (suggests the nearest), or it does not take these settings.
        RuntimeUnavailableError: If it needs a package that is not installed; names it, and what installs it.

    Example:
        >>> from lightning_prune.runtimes import parse_runtime
        >>> parse_runtime("torch.compile:mode=blocks").mode
        'blocks'
        >>> parse_runtime("torch.compile:mode=default").name
        'torch.compile'
    """
    if isinstance(runtime, Runtime):
        return runtime
    spec = Spec.of(runtime, "runtime")
    known = RUNTIMES if spec.name in RUNTIMES else known_runtimes()
    check_name("runtime", spec.name, known, runtime)
    kind = _load(spec.name, known[spec.name])
    try:
        signature(kind).bind(**spec.settings)
    except TypeError as error:
        raise ArgumentError(
            f"`runtime` must have settings that {spec.name!r} takes, got {runtime!r}: {error}."
        ) from error
    return kind(**spec.settings)


def _load(name: str, place: str) -> type[Runtime]:
    module, _, attribute = place.partition(":")
    try:
        kind: type[Runtime] = getattr(import_module(module), attribute)
    except ImportError as error:
        install = f" Install it: pip install 'lightning-prune[{EXTRAS[name]}]'." if name in EXTRAS else ""
        install = f" Install it: pip install {PACKAGES[name]}." if name in PACKAGES else install
        raise RuntimeUnavailableError(
            f"The runtime {name!r} needs a package that is not installed here: {error}.{install}"
        ) from error
    return kind
