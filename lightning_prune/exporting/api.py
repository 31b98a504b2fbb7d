"""`export`: writes a model for the runtime in which it will run, and proves that it is the same model."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from lightning_prune._utils.files import write_document
from lightning_prune._utils.validation import (
    check,
    check_bool,
    check_choice,
    check_images,
    check_int,
    check_path,
    check_positive,
)
from lightning_prune.exporting.export_report import REPORT, ExportReport
from lightning_prune.exporting.exported_graph import (
    BatchSize,
    GraphForm,
    Precision,
    dense_graph,
    exported_copy,
    graph_of,
)
from lightning_prune.exporting.exported_latency import time_exported
from lightning_prune.exporting.exported_model import file_digest
from lightning_prune.exporting.folder import (
    check_data_config,
    data_config,
    new_folder,
    write_preprocessing,
    write_sample,
)
from lightning_prune.exporting.formats import parse_format
from lightning_prune.exporting.instructions import readme, runner
from lightning_prune.exporting.parity import TOLERANCES, check_parity, compare_outputs, in_batches
from lightning_prune.runtimes.base import without_autograd
from lightning_prune.schedule import ScheduleLike


def export(
    model: nn.Module,
    output: str | PathLike[str],
    example_inputs: Tensor,
    *,
    plan: ScheduleLike | None = None,
    format: str = "onnx",
    calibration: Tensor | None = None,
    opset: int | None = None,
    batch: BatchSize = "static",
    precision: Precision = "float32",
    graph: GraphForm = "native",
    preprocessing: Mapping[str, Any] | None = None,
    module_path: str | None = None,
    tolerance: float | None = None,
    rounds: int = 30,
    time_limit: float | None = 20.0,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model, dense or patched, as a folder that a runtime loads, and checks that it is the same model.

    The conversion is the one that is measured with `runtime="onnxruntime"` or `"openvino"`. The number of tokens of
    each block and the size of the images are constants of the file. The outputs of the file are compared with those of
    PyTorch in float32 with the same patch. With `"float32"` 99.5% of the images must be within the tolerance, and the
    others must be token flips: images in which two tokens have the same score up to rounding. With `"float16"` 99.5%
    must have the same class. Otherwise nothing is written. The model itself stays as it is.

    The folder holds the model, `schedule.yaml`, `sample.npz` (real images and expected outputs), `preprocessing.json`,
    `run.py` (runs the sample, without torch), `README.md` (commands to paste) and `report.json`.

    Args:
        model: Takes images and contains one Vision Transformer; exported as a whole, in evaluation mode, on the CPU.
        output: The folder; new or empty.
        example_inputs: (B, C, H, W) images, normalised, in the size that will be used.
        plan: A `Plan`, or a schedule that names its method, or the path of one, with which a dense model is exported.
        format: `"onnx"`, `"openvino"` or `"torch-export"` (`.pt2`).
        calibration: (N, C, H, W) images on which the outputs are compared, at least 256 if there are as many; the
            example inputs if None.
        opset: Version of ONNX's operators; that of PyTorch's exporter if None.
        batch: `"static"` for batches of B images, which all runtimes take; `"dynamic"` for any number.
        precision: Of weights and operators. With `"float16"` images and outputs stay float32.
        graph: `"portable"` for accelerators that refuse TopK, Gather or Scatter, see
            `lightning_prune.reduction.portable_graph`; `"native"` is usually faster.
        preprocessing: How images are prepared (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`), for
            `preprocessing.json`; what timm's configuration of the model says if None.
        module_path: Dotted path of the transformer in `model`, needed where there are several.
        tolerance: Largest relative error of an image, max |y - y_torch| / max |y_torch|; 1e-3 for float32 if None.
        rounds: Measurements of the latency, dense and exported; 0 measures none.
        time_limit: Seconds for measuring; one round is completed even after it. None for no limit.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The report, also in `report.json`: the path of the file, its largest error, operators, latency.

    Raises:
        ArgumentError: If an argument is invalid, the folder exists, or the model is patched and `plan` is given.
        DataError: If the outputs of the model are not finite.
        ExportError: If the model cannot be converted, which names the operator, or the outputs differ, with figures.
        FileWriteError: If a file cannot be written.
        RuntimeUnavailableError: If the runtime of the format is not installed; names the extra that installs it.
        ScheduleError: If the schedule does not fit the model.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
        >>> images = torch.randn(1, 3, 32, 32)
        >>> report = lp.export(
        ...     model, "exported", images, plan=lp.Schedule([2], "topk"), format="torch-export", rounds=0
        ... )
        >>> report.model.name, report.tokens, report.max_relative_error < 1e-5
        ('model.pt2', (3,), True)
    """
    _check(example_inputs, calibration, batch, precision, graph, tolerance, rounds, time_limit, overwrite)
    check_path("output", output)
    chosen = parse_format(format)
    if opset is not None:
        check("opset", opset, f"left out with format={format!r}, which has none", format == "onnx")
        check_int("opset", opset, 1, "a version of ONNX's operators")
    check_data_config(preprocessing)
    # Outside of inference mode, in which Lightning validates: what is made inside it cannot be exported.
    with torch.inference_mode(False), torch.no_grad(), new_folder(output, overwrite) as folder:
        images = _own_copy(example_inputs)
        compared = images if calibration is None else _own_copy(calibration)
        copied = exported_copy(model, plan, module_path)
        chosen.refuse(copied.model)
        transformer = copied.transformer
        patch = copied.patch(images)
        program = graph_of(copied.converted(precision), images, batch, graph)
        converted = chosen.convert(program, opset, batch == "dynamic")
        chosen.write(converted, folder)
        run = chosen.load(folder, tuple(images.shape))

        reference = without_autograd(copied)
        limit = TOLERANCES[precision] if tolerance is None else tolerance
        parity = compare_outputs(
            reference, lambda each: run(each)[0], compared, len(images), limit, transformer.num_classes > 1
        )
        check_parity(parity, precision)
        latency = None
        if rounds:
            dense = None if patch.method is None else chosen.load_graph(dense_graph(copied, precision, images))
            latency = time_exported(run, dense, images, rounds, time_limit, chosen.runtime.context())

        report = ExportReport(
            folder=folder,
            format=chosen.name,
            files={name: file_digest(folder / name) for name in chosen.files},
            input_shape=(images.shape[0], images.shape[1], images.shape[2], images.shape[3]),
            batch=batch,
            precision=precision,
            graph=graph,
            classes=transformer.num_classes,
            opset=chosen.opset(converted),
            method=patch.method,
            tokens=patch.tokens,
            parity=parity,
            latency=latency,
            operators=chosen.count_operators(converted),
            versions=chosen.versions(),
        )
        if patch.schedule is not None:
            patch.schedule.save(folder / "schedule.yaml")
        sample = compared[: len(images)] if len(compared) >= len(images) else images
        write_sample(folder, sample, in_batches(reference, sample, len(images)))
        write_preprocessing(folder, data_config(model, transformer.root, preprocessing))
        (folder / "run.py").write_text(runner(report), encoding="utf-8")
        (folder / "README.md").write_text(readme(report, chosen.input_name(converted)), encoding="utf-8")
        write_document(folder / REPORT, report.to_dict())
    return replace(report, folder=Path(output))


def _own_copy(images: Tensor) -> Tensor:
    return images.detach().to("cpu", torch.float32, copy=True)


def _check(
    example_inputs: Tensor,
    calibration: Tensor | None,
    batch: str,
    precision: str,
    graph: str,
    tolerance: float | None,
    rounds: int,
    time_limit: float | None,
    overwrite: bool,
) -> None:
    """Raises ArgumentError if an argument of `export` is invalid by itself."""
    check_images("example_inputs", example_inputs)
    if calibration is not None:
        check_images("calibration", calibration)
        size = tuple(example_inputs.shape[1:])
        check(
            "calibration",
            tuple(calibration.shape),
            f"images (N, {', '.join(map(str, size))}), the size of `example_inputs`",
            tuple(calibration.shape[1:]) == size,
        )
    check_choice("batch", batch, get_args(BatchSize))
    check_choice("precision", precision, get_args(Precision))
    check_choice("graph", graph, get_args(GraphForm))
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    check_int("rounds", rounds, 0, "a number of measurements")
    if time_limit is not None:
        check_positive("time_limit", time_limit, "seconds")
    check_bool("overwrite", overwrite)
