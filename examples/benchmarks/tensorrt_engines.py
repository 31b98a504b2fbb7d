"""Builds TensorRT engines from exported ONNX folders, checks them against the samples, and times them in one run.

The folders are those of `lightning-prune export --format onnx`; the first is what the others are compared with, so
give the dense model first. Engines are strongly typed: they compute in the precision of the file. A float16 engine is
that of a folder exported with `--precision float16`. Needs a CUDA device and `pip install tensorrt`.

    lightning-prune export --config my.yaml --prune.schedule 0 --format onnx --output dense
    lightning-prune export --config my.yaml --schedule schedule.yaml --format onnx --output pruned
    python examples/benchmarks/tensorrt_engines.py dense pruned --output results/tensorrt

Ends with status 1 if the outputs of an engine are further from those of PyTorch than the tolerance of its export.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tables import Row, context_of, print_table, write_table

from lightning_prune.exporting import ExportReport
from lightning_prune.exporting.exported_model import check_files
from lightning_prune.exporting.parity import relative_errors
from lightning_prune.profiling import InterleavedTimer, between_runs
from lightning_prune.profiling.interleaved_timer import OWN_MEMORY


def tensorrt_module() -> ModuleType:
    """TensorRT's Python package, where it and a CUDA device are."""
    try:
        import tensorrt
    except ImportError as error:
        sys.exit(f"TensorRT is needed (pip install tensorrt), on a machine with an NVIDIA GPU: {error}")
    if not torch.cuda.is_available():
        sys.exit(f"A CUDA device is needed, and torch {torch.__version__} finds none.")
    module: ModuleType = tensorrt
    return module


class Engine:
    """An engine with buffers on the device; it runs the batch that `images` holds.

    Args:
        trt: TensorRT's package.
        model: ONNX file.
        shape: Of its input; static in the engine.
        tf32: Whether products of float32 may be computed in TF32.

    Raises:
        RuntimeError: If TensorRT does not take the model; says what it says.
    """

    def __init__(self, trt: ModuleType, model: Path, shape: Sequence[int], tf32: bool = False) -> None:
        start = time.perf_counter()
        logger = trt.Logger(trt.Logger.WARNING)
        builder = trt.Builder(logger)
        network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(model)):
            said = "; ".join(str(parser.get_error(index)) for index in range(parser.num_errors))
            raise RuntimeError(f"TensorRT cannot read {model}: {said}")
        config = builder.create_builder_config()
        if not tf32:
            config.clear_flag(trt.BuilderFlag.TF32)
        name = network.get_input(0).name
        if -1 in tuple(network.get_input(0).shape):  # any number of images
            profile = builder.create_optimization_profile()
            profile.set_shape(name, tuple(shape), tuple(shape), tuple(shape))
            config.add_optimization_profile(profile)
        plan = builder.build_serialized_network(network, config)
        if plan is None:
            raise RuntimeError(f"TensorRT cannot build an engine of {model}; its log says why.")
        self._runtime = trt.Runtime(logger)  # has to live as long as the engine
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        self._context = self._engine.create_execution_context()
        self._context.set_input_shape(name, tuple(shape))
        self.build_seconds, self.bytes = time.perf_counter() - start, plan.nbytes
        self._buffers: dict[str, torch.Tensor] = {}
        for index in range(self._engine.num_io_tensors):
            each = self._engine.get_tensor_name(index)
            dtype = torch.from_numpy(np.empty(0, trt.nptype(self._engine.get_tensor_dtype(each)))).dtype
            self._buffers[each] = torch.empty(tuple(self._context.get_tensor_shape(each)), dtype=dtype, device="cuda")
            self._context.set_tensor_address(each, self._buffers[each].data_ptr())
        self.images = self._buffers[name]
        self.output = next(buffer for each, buffer in self._buffers.items() if each != name)
        self._stream = torch.cuda.Stream()

    def run(self) -> torch.Tensor:
        """The output for `images`; the next run writes to the same memory."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise RuntimeError("TensorRT could not run the engine; its log says why.")
        self._stream.synchronize()
        return self.output


def error_on_sample(folder: Path, engine: Any) -> float:
    """The largest relative error of an engine on the images of `sample.npz`, against PyTorch in float32."""
    sample = np.load(folder / "sample.npz")
    engine.images.copy_(torch.from_numpy(sample["images"]))
    torch.cuda.synchronize() if torch.cuda.is_available() else None
    found = engine.run().float().cpu()
    return float(relative_errors(torch.from_numpy(sample["expected"]), found).max())


def measure(
    reports: Sequence[ExportReport],
    engines: Sequence[Any],
    rounds: int,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Row]:
    """Checks the engines, and times them against the first in one interleaved run."""
    errors = [error_on_sample(report.folder, engine) for report, engine in zip(reports, engines, strict=True)]
    current = [0]
    wait = between_runs(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    timer = InterleavedTimer[int](
        lambda index: current.__setitem__(0, index), lambda: engines[current[0]].run(), wait, 0, clock=clock,
        settle_seconds=OWN_MEMORY,
    )  # fmt: skip
    timer.measure(range(1, len(engines)), rounds, clock() + seconds)
    rows = []
    for index, (report, engine, error) in enumerate(zip(reports, engines, errors, strict=True)):
        found = timer.result(index)
        rows.append(
            {
                "folder": report.folder.name,
                "method": report.method or "dense",
                "tokens_left": "" if report.tokens is None else report.tokens[-1],
                "precision": report.precision,
                "graph": report.graph,
                "batch": report.input_shape[0],
                "ms": round(found.milliseconds, 4),
                "p90_ms": round(found.p90_ms or 0.0, 4),
                "over_first": round(found.ratio, 4),
                "over_first_error": round(found.ratio_stderr, 4),
                "rounds": found.rounds,
                "max_relative_error": f"{error:.2e}",
                "tolerance": report.parity.tolerance,
                "agrees": error <= report.parity.tolerance,
                "build_seconds": round(engine.build_seconds, 1),
                "engine_mib": round(engine.bytes / 2**20, 1),
            }
        )
    return rows


def read_reports(folders: Sequence[Path]) -> list[ExportReport]:
    """The reports of exported folders, which hold ONNX files for batches of one size."""
    reports = [ExportReport.read(folder) for folder in folders]
    for report in reports:
        check_files(report)
        if report.format != "onnx":
            sys.exit(f"The folders must hold ONNX files, got {report.folder} with format {report.format!r}.")
        if report.input_shape != reports[0].input_shape:
            sys.exit(
                f"The folders must be for images of one shape, got {reports[0].input_shape} in {reports[0].folder} and "
                f"{report.input_shape} in {report.folder}."
            )
    return reports


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path, help="exported ONNX folders, dense first")
    parser.add_argument("--rounds", type=int, default=301)
    parser.add_argument("--seconds", type=float, default=30.0, help="limit of the timing")
    parser.add_argument("--tf32", action="store_true", help="let products of float32 be computed in TF32")
    parser.add_argument("--output", type=Path, required=True, help="folder for tensorrt.csv")
    args = parser.parse_args()
    reports = read_reports(args.folders)
    trt = tensorrt_module()
    engines = [Engine(trt, report.model, report.input_shape, args.tf32) for report in reports]
    rows = measure(reports, engines, args.rounds, args.seconds)
    context = context_of("cuda") | {"tensorrt": str(trt.__version__), "tf32": str(args.tf32)}
    args.output.mkdir(parents=True, exist_ok=True)
    write_table(args.output / "tensorrt.csv", rows, context)
    print_table(f"TensorRT {trt.__version__}, {context['device']}", rows)
    wrong = [row["folder"] for row in rows if not row["agrees"]]
    if wrong:
        sys.exit(f"Not the same model in TensorRT: {', '.join(wrong)}. tensorrt.csv has the errors.")


if __name__ == "__main__":
    main()
