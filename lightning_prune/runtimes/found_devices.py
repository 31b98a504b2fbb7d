"""Which runtimes work here: the devices and providers that each of them finds, or why it cannot be used."""

import contextlib
import io
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from lightning_prune._utils.device import device_name
from lightning_prune._utils.readings import NotReadable, attempt
from lightning_prune.errors import PruneError
from lightning_prune.runtimes.registry import known_runtimes, parse_runtime

NOT_LISTED = "accelerator"
"""In the place of the accelerators of PyTorch where it cannot list them."""
_SILENT = 4  # of ONNX Runtime's levels of severity: fatal errors only
_TRIED_ELSEWHERE = ("CPUExecutionProvider", "AzureExecutionProvider")  # always there; runs on another machine


def devices_of_runtimes() -> dict[str, Any]:
    """Name of each runtime -> what it finds here.

    Returns:
        Of PyTorch, ONNX Runtime and OpenVINO the devices or providers; of the others that they are ready. The reason
        where a runtime cannot be used.

    Example:
        >>> from lightning_prune.runtimes.found_devices import devices_of_runtimes
        >>> devices_of_runtimes()["torch"]["cpu"] != ""
        True
    """
    return {name: _found_by(name) for name in known_runtimes()}


def _found_by(name: str) -> Any:
    try:
        parse_runtime(name)
    except PruneError as error:
        return f"not usable: {error}"
    except Exception as error:  # a library that is broken may raise anything when it is imported
        return f"not usable: {type(error).__name__}: {error}"
    readers: dict[str, Callable[[], Any]] = {
        "torch": torch_devices,
        "onnxruntime": onnx_providers,
        "openvino": openvino_devices,
    }
    return attempt(readers[name]) if name in readers else "ready"


def torch_devices() -> dict[str, str | NotReadable]:
    """Device -> its product name or why it cannot be read, of all that PyTorch finds."""
    accelerators = attempt(_accelerators)
    devices = [torch.device("cpu"), *([] if isinstance(accelerators, NotReadable) else accelerators)]
    found = {str(device): attempt(partial(device_name, device)) for device in devices}
    return found | ({NOT_LISTED: accelerators} if isinstance(accelerators, NotReadable) else {})


def _accelerators() -> list[torch.device]:
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None:
        return []
    return [torch.device(kind.type, index) for index in range(torch.accelerator.device_count())]


def onnx_providers() -> dict[str, str]:
    """Execution provider -> whether a session runs with it: the build may have one whose libraries are missing."""
    import onnxruntime as ort

    return {name: "ready" if name == "CPUExecutionProvider" else _tried(name) for name in ort.get_available_providers()}


def openvino_devices() -> dict[str, str | NotReadable]:
    """Device -> its product name or why it cannot be read, of all that OpenVINO finds."""
    import openvino as ov

    core = ov.Core()

    def product(name: str) -> str:
        return str(core.get_property(name, "FULL_DEVICE_NAME")).strip()

    return {name: attempt(partial(product, name)) for name in core.available_devices}


def _tried(provider: str) -> str:
    """Whether a session of one operator has a provider."""
    if provider in _TRIED_ELSEWHERE:
        return "in the build, not tried"
    import onnxruntime as ort

    try:
        from onnx import TensorProto, helper

        ports = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("a", "b")]
        graph = helper.make_graph([helper.make_node("Relu", ["a"], ["b"])], "one", ports[:1], ports[1:])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        with contextlib.redirect_stdout(io.StringIO()):  # it prints when it falls back to another provider
            session = ort.InferenceSession(model.SerializeToString(), options, providers=[provider])
    except Exception as error:  # whatever the libraries raise is the answer
        return f"in the build, but {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    loaded = session.get_providers()
    return "ready" if provider in loaded else f"in the build, but a session has {', '.join(loaded)}"
