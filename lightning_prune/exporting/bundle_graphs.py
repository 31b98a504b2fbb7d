"""The graphs of a bundle in their runtime, on the device: loaded when they are run first, and kept while memory lasts.

It needs numpy and the runtime alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from lightning_prune._utils.processor import processor_name
from lightning_prune.errors import ArgumentError, ExportError, PruneError, RuntimeUnavailableError
from lightning_prune.runtimes.graph_sessions import (
    CPU_PROVIDER,
    TOKENS,
    onnx_session,
    openvino_settings,
    run_onnx,
    run_openvino,
)

_MEMORY_SHARE = 0.25  # of the memory of the device, for graphs: each holds a copy of its weights
_FEWEST_GRAPHS = 4
_CPUS = (CPU_PROVIDER, "CPU")


def bundled_graphs(folder: Path, described: Mapping[str, Any], provider: str | None, threads: int) -> "BundledGraphs":
    """The graphs of a bundle in the runtime that it is for.

    Args:
        folder: The bundle.
        described: The content of `bundle.json`.
        provider: The execution provider of ONNX Runtime or the device of OpenVINO; that of the bundle if None.
        threads: Threads on a CPU.

    Raises:
        ArgumentError: If there is no such provider here.
        RuntimeUnavailableError: If the runtime is not installed; names what to install.
    """
    kind = {each.package: each for each in (OnnxGraphs, OpenVINOGraphs)}[described["runtime"]["package"]]
    return kind(folder, described, provider or described["runtime"]["provider"], threads)


class BundledGraphs(ABC):
    """Runs the graphs of a bundle on random images.

    Args:
        folder: The bundle.
        described: The content of `bundle.json`.
        provider: Where the graphs run.
        threads: Threads on a CPU.

    Attributes:
        package: The runtime, as it is installed.
        name: The runtime as a spec.
        device: Name of what computes.
        device_type: `"cpu"`, or the provider in lower case.
    """

    package: ClassVar[str]
    _provider_key: ClassVar[str]

    def __init__(self, folder: Path, described: Mapping[str, Any], provider: str, threads: int) -> None:
        try:
            known = self._providers()
        except ImportError as error:
            raise RuntimeUnavailableError(
                f"`{self.package}` must be installed here, got: {error}. Install it: pip install {self.package}"
            ) from error
        if provider not in known:
            raise ArgumentError(f"`provider` must be one of {', '.join(known)}, got {provider!r}.")
        self._folder, self._described, self._runtime = folder, described, described["runtime"]
        self._provider, self._threads = provider, threads
        self._images = np.random.default_rng(0).standard_normal(described["shape"]).astype(np.float32)
        self._loaded: OrderedDict[tuple[str, int | None], Callable[[], Any]] = OrderedDict()
        self._known: set[tuple[str, int | None]] = set()
        self._kept = max(int(_MEMORY_SHARE * _memory() / max(described["weights_bytes"], 1)), _FEWEST_GRAPHS)
        self.device_type = "cpu" if provider in _CPUS else provider.removesuffix("ExecutionProvider").lower()
        self.device = processor_name() if self.device_type == "cpu" else self._device_name()
        self.name = self._spec()

    def to(self, file: str, count: int | None = None) -> None:
        """Makes `run` run a graph; loads it where it is not there.

        Args:
            file: Of the graph.
            count: Tokens that enter block 0, of the graph for all counts; None for the others.

        Raises:
            ExportError: If the runtime does not accept it.
        """
        key = file, count
        if key not in self._loaded:
            inputs = [self._images] if count is None else [self._images, np.arange(count, dtype=np.int64)]
            try:
                self._loaded[key] = self._load(self._folder / file, count, inputs)
            except PruneError:
                raise
            except Exception as error:  # the errors of the runtimes have no common base class
                raise ExportError(f"{self.package} does not accept {self._folder / file}: {error}") from error
            if key in self._known:
                self._loaded[key]()  # loaded again, and it was warmed up only before
            self._known.add(key)
        self._loaded.move_to_end(key)
        while len(self._loaded) > self._kept:
            self._loaded.popitem(last=False)
        self._now = self._loaded[key]

    def run(self) -> Any:
        """Runs the graph, and returns its outputs as the runtime gives them."""
        return self._now()

    def context(self) -> dict[str, Any]:
        """What latencies depend on besides the device: the runtime, its version and its settings."""
        return {"runtime": self.name, self.package: self._version(), "provider": self._provider}

    @abstractmethod
    def _providers(self) -> list[str]:
        """The names of what may compute here. Raises ImportError where the runtime is not installed."""

    @abstractmethod
    def _load(self, path: Path, count: int | None, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        """A function that runs a graph on its inputs."""

    @abstractmethod
    def _version(self) -> str:
        """The version of the runtime."""

    def _device_name(self) -> str:
        return f"{self._provider.removesuffix('ExecutionProvider')} with {processor_name()}"

    def _spec(self) -> str:
        settings: dict[str, Any] = {} if self._provider in _CPUS else {self._provider_key: self._provider}
        others = self._runtime["settings"].items()
        settings |= {key: value for key, value in others if (key, value) != ("precision", "f32")}  # the default
        if self._runtime["threads"] is not None:
            settings["threads"] = self._threads
        order = ("provider", "device", "precision", "threads", "quantize", "reduce_range")
        named = [f"{key}={settings[key]}" for key in order if key in settings]
        return f"{self.package}:{','.join(named)}" if named else self.package


class OnnxGraphs(BundledGraphs):
    """In ONNX Runtime."""

    package = "onnxruntime"
    _provider_key = "provider"

    def _providers(self) -> list[str]:
        import onnxruntime

        found: list[str] = onnxruntime.get_available_providers()
        return found

    def _load(self, path: Path, count: int | None, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        dimensions = {} if count is None else {TOKENS: count}
        unfused = self._runtime["disabled_optimizers"]
        session = onnx_session(str(path), self._provider, self._threads, dimensions, unfused)
        if session.get_providers()[0] != self._provider:
            raise ArgumentError(f"`provider` must be one that starts here, got {self._provider!r}, which did not.")
        return run_onnx(session, inputs)

    def _version(self) -> str:
        import onnxruntime

        return str(onnxruntime.__version__)


class OpenVINOGraphs(BundledGraphs):
    """In OpenVINO."""

    package = "openvino"
    _provider_key = "device"

    def _providers(self) -> list[str]:
        import openvino

        self._core = openvino.Core()
        self._computes = ""
        found: list[str] = self._core.available_devices
        return found

    def context(self) -> dict[str, Any]:
        """See `BundledGraphs.context`; the precision is read back from a graph."""
        return {**super().context(), "runtime_precision": self._computes}

    def _load(self, path: Path, count: int | None, inputs: Sequence[np.ndarray]) -> Callable[[], Any]:
        model = self._core.read_model(path)
        if count is not None:
            model.reshape({port: list(array.shape) for port, array in zip(model.inputs, inputs, strict=True)})
        settings = openvino_settings(self._provider, self._runtime["settings"]["precision"], self._threads)
        compiled = self._core.compile_model(model, self._provider, settings)
        self._computes = str(compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name())
        return run_openvino(compiled, inputs)

    def _version(self) -> str:
        import openvino

        return str(openvino.get_version())

    def _device_name(self) -> str:
        return str(self._core.get_property(self._provider, "FULL_DEVICE_NAME"))


def _memory() -> float:
    """Bytes of memory of the device; 4 GiB where the system does not say it."""
    try:
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):
        return 4.0 * 2**30
