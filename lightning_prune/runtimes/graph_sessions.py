"""Graphs in files, made ready to run in ONNX Runtime and OpenVINO: the settings under which latency is measured.

It needs numpy and the runtime alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

CPU_PROVIDER = "CPUExecutionProvider"
TOKENS = "tokens"
"""Name of the dynamic dimension of a graph that is converted once for all token counts."""
_ON_CUDA = ("CUDAExecutionProvider", "TensorrtExecutionProvider")


def onnx_session(
    model: bytes | str,
    provider: str,
    threads: int,
    dimensions: Mapping[str, int] | None = None,
    disabled_optimizers: Sequence[str] | None = None,
    optimized: str | None = None,
) -> Any:
    """A session of ONNX Runtime.

    Args:
        model: The model, serialised, or the path of its file.
        provider: The execution provider; operators that it does not have run by the CPU provider.
        threads: Threads of one operator on a CPU.
        dimensions: Name -> size of symbolic dimensions, which become static.
        disabled_optimizers: Names of passes that are left out.
        optimized: File to which the optimised model is written, with its large weights next to it; the session then
            notes, too, which provider runs what.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Threads of a session that waits would take the cores from the one that is timed.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, size in (dimensions or {}).items():
        options.add_free_dimension_override_by_name(name, size)
    if optimized is not None:
        options.optimized_model_filepath = optimized
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    providers = [provider] if provider == CPU_PROVIDER else [provider, CPU_PROVIDER]
    return ort.InferenceSession(model, options, providers=providers, disabled_optimizers=disabled_optimizers)


def openvino_settings(device: str, precision: str, threads: int) -> dict[str, Any]:
    """The properties with which OpenVINO compiles a model.

    Args:
        device: Such as `CPU`.
        precision: Such as `f32`; `default` leaves it to OpenVINO.
        threads: Threads on a CPU.
    """
    settings: dict[str, Any] = {"PERFORMANCE_HINT": "LATENCY", "NUM_STREAMS": "1"}
    if precision != "default":
        settings["INFERENCE_PRECISION_HINT"] = precision
    if device == "CPU":
        settings["INFERENCE_NUM_THREADS"] = threads
    return settings


def run_onnx(session: Any, arrays: Sequence[np.ndarray]) -> Callable[[], object]:
    """A function that runs a session on arrays, which are where the provider computes before it is called.

    It returns the outputs, as values of ONNX Runtime.

    Args:
        session: The session.
        arrays: Its inputs, in their order.
    """
    import onnxruntime as ort

    place = "cuda" if session.get_providers()[0] in _ON_CUDA else "cpu"
    binding = session.io_binding()
    held = [ort.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array), place, 0) for array in arrays]
    for each, value in zip(session.get_inputs(), held, strict=True):
        binding.bind_ortvalue_input(each.name, value)
    for each in session.get_outputs():
        binding.bind_output(each.name, place)

    def run(_held: Sequence[Any] = held) -> Any:  # the session reads their memory
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        return binding.get_outputs()

    return run


def run_openvino(compiled: Any, arrays: Sequence[np.ndarray]) -> Callable[[], object]:
    """A function that runs a compiled model on arrays, and returns its outputs.

    Args:
        compiled: The compiled model.
        arrays: Its inputs, in their order.
    """
    import openvino as ov

    request = compiled.create_infer_request()
    held = [np.ascontiguousarray(array) for array in arrays]
    shared = {place: ov.Tensor(array, shared_memory=True) for place, array in enumerate(held)}
    return lambda: request.infer(shared, share_outputs=False)
