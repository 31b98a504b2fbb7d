"""Runtimes by spec: `torch`, `torch.compile:mode=blocks`, ..."""

from importlib import import_module
from inspect import signature

from lightning_prune._utils.spec import Spec
from lightning_prune._utils.validation import check_name
from lightning_prune.errors import ArgumentError, RuntimeUnavailableError
from lightning_prune.runtimes.base import Runtime

RUNTIMES: dict[str, str] = {
    "torch": "lightning_prune.runtimes.torch_runtime:TorchEager",
    "torch.compile": "lightning_prune.runtimes.torch_runtime:TorchCompile",
}
"""Name -> module and class, imported at first use: most runtimes need a package that is not installed everywhere."""


def parse_runtime(runtime: str | Runtime) -> Runtime:
    """The runtime of a spec `name[:key=value,...]`; a `Runtime` is returned as it is.

    Args:
        runtime: The spec, such as `"torch"` or `"torch.compile:mode=blocks"`.

    Returns:
        The runtime. Its `name` is the shortest spec of it.

    Raises:
        ArgumentError: If there is no such runtime (suggests the nearest), or it does not take these settings.
        RuntimeUnavailableError: If it needs a package that is not installed; names it.

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
    check_name("runtime", spec.name, RUNTIMES, runtime)
    kind = _load(spec.name)
    try:
        signature(kind).bind(**spec.settings)
    except TypeError as error:
        raise ArgumentError(
            f"`runtime` must have settings that {spec.name!r} takes, got {runtime!r}: {error}."
        ) from error
    return kind(**spec.settings)


def _load(name: str) -> type[Runtime]:
    module, _, attribute = RUNTIMES[name].partition(":")
    try:
        kind: type[Runtime] = getattr(import_module(module), attribute)
    except ImportError as error:
        raise RuntimeUnavailableError(
            f"The runtime {name!r} needs a package that is not installed here: {error}."
        ) from error
    return kind
