"""`export`: writes a model for the runtime in which it will run, and proves that it is the same model."""

from collections.abc import Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_prune._utils.documents import write_document
from lightning_prune._utils.validation import (
    check,
    check_between,
    check_bool,
    check_choice,
    check_images,
    check_int,
    check_path,
    check_positive,
)
from lightning_prune.exporting.export_report import REPORT, ExportReport, GraphForm
from lightning_prune.exporting.exported_graph import BatchSize, dense_graph, exported_copy, graph_of
from lightning_prune.exporting.exported_latency import faster_graph, time_exported
from lightning_prune.exporting.exported_model import file_digest
from lightning_prune.exporting.folder import (
    check_data_config,
    data_config,
    new_folder,
    write_preprocessing,
    write_sample,
)
from lightning_prune.exporting.image_input import ImageInput, InputForm, input_of
from lightning_prune.exporting.instructions import readme, runner
from lightning_prune.exporting.parity import check_parity, compare_outputs, in_batches
from lightning_prune.exporting.precision import AGREEMENT, PRECISIONS, TOLERANCES, Precision
from lightning_prune.exporting.registry import parse_format
from lightning_prune.patching.models import restoring
from lightning_prune.patching.patched_root import restore_mode
from lightning_prune.patching.token_readers import RestoreMode, check_restore
from lightning_prune.runtimes.base import without_autograd
from lightning_prune.runtimes.calibration import calibrating_with
from lightning_prune.schedule import ScheduleLike


def export(
    model: nn.Module,
    output: str | PathLike[str],
    example_inputs: Tensor,
    *,
    plan: ScheduleLike | None = None,
    format: str = "onnx",
    calibration: Tensor | None = None,
    inputs: InputForm = "float32",
    opset: int | None = None,
    batch: BatchSize = "static",
    precision: Precision = "float32",
    reduce_range: bool | None = None,
    min_agreement: float | None = None,
    graph: GraphForm | Literal["auto"] = "native",
    preprocessing: Mapping[str, Any] | None = None,
    module_path: str | None = None,
    restore: RestoreMode | None = None,
    tolerance: float | None = None,
    rounds: int = 30,
    time_limit: float | None = 20.0,
    overwrite: bool = False,
) -> ExportReport:
    """Writes a model, dense or patched, as a folder that a runtime loads, and checks that it is the same model.

    The conversion is the one that is measured with `runtime="onnxruntime"` or `"openvino"`. The number of tokens of
    each block and the size of the images are constants of the file. The outputs of the file are compared with those of
    PyTorch in float32 with the same patch. With `"float32"` 99.5% of the images must be within the tolerance, and the
    others must be token flips: images in which two tokens have the same score up to rounding. In lower precisions a
    share of the images, `min_agreement`, must have the same class. Otherwise nothing is written. The model itself stays
    as it is.

    The folder holds the model, `schedule.yaml`, `sample.npz` (real images and expected outputs), `preprocessing.json`,
    `run.py` (runs the sample, without torch), `README.md` (commands to paste) and `report.json`.

    Args:
        model: Takes images and contains one Vision Transformer; exported as a whole, in evaluation mode, on the CPU.
        output: The folder; new or empty.
        example_inputs: (B, C, H, W) images, normalised, in the size that will be used; with `inputs="uint8"` also
            uint8.
        plan: A `Plan`, or a schedule that names its method, or the path of one, with which a dense model is exported.
        format: `"onnx"`, `"openvino"`, `"torch-export"` (`.pt2`), `"aotinductor"` (`.pt2`, compiled for processors like
            this one, which takes minutes) or `"executorch"` (`.pte`).
        calibration: (N, C, H, W) images like the example, on which the outputs are compared, at least 256 if there are
            as many; `"int8"` takes its ranges from the first 32. The example inputs if None.
        inputs: What the file takes: `"float32"` for normalised images, or `"uint8"` for images of 0 to 255, which it
            scales and normalises itself. Normalised images are rounded to these levels before anything is compared.
        opset: Version of ONNX's operators, from 17 on, as far as the model can be converted; that of PyTorch's exporter
            if None.
        batch: `"static"` for batches of B images, which all runtimes take; `"dynamic"` for any number.
        precision: Of weights and operators. Outputs, and normalised images, stay float32. `"float16"` and `"bfloat16"`
            where the runtime has them; `"int8"` by the quantizer of ONNX Runtime or OpenVINO, with ranges of
            activations from `calibration`; `"int8-dynamic"` with those of each batch, in ONNX Runtime.
        reduce_range: Whether weights in 8 bits take half of their range, as x86 processors without VNNI need: sums of
            products saturate there, and outputs are wrong. None: what this machine needs; say so for another one.
        min_agreement: Least share of the images that must have the same class as in PyTorch, in lower precisions than
            float32; 0.995 for float16 and bfloat16, 0.9 for int8 if None. For a model without classes, of images within
            the tolerance.
        graph: `"portable"` for accelerators that refuse TopK, Gather or Scatter, see
            `lightning_prune.reduction.portable_graph`; `"native"` is usually faster; `"auto"` times both in the runtime
            and takes the faster one that it accepts.
        preprocessing: How images are prepared (`input_size`, `mean`, `std`, `interpolation`, `crop_pct`), for
            `preprocessing.json` and `inputs="uint8"`; what timm's configuration of the model says if None.
        module_path: Dotted path of the transformer in `model`, needed where there are several.
        restore: How removed tokens are given back to a dense head with `plan`, as of `lightning_prune.patch`; a model
            that is patched already gives them back as it was patched.
        tolerance: Largest relative error of an image, max |y - y_torch| / max |y_torch|; 1e-3 for float32 if None.
        rounds: Measurements of the latency, dense and exported; 0 measures none.
        time_limit: Seconds for measuring; three rounds are completed even after it. None for no limit.
        overwrite: Whether an existing folder is replaced.

    Returns:
        The path of the file, its largest error, operators and latency; also in `report.json`.

    Raises:
        ArgumentError: If an argument is invalid, the folder exists, the model is patched and `plan` or `restore` is
            given, it is quantized already, or its normalisation is needed and not known.
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
    check_choice("inputs", inputs, get_args(InputForm))
    _check_images(example_inputs, calibration, inputs)
    check_restore(restore)
    _check(batch, precision, min_agreement, graph, tolerance, rounds, time_limit, overwrite)
    check_path("output", output)
    chosen = parse_format(format, precision=precision, reduce_range=reduce_range)
    if opset is not None:
        check("opset", opset, f"left out with format={format!r}, which has none", format == "onnx")
        check_int("opset", opset, 1, "a version of ONNX's operators")
    check_data_config(preprocessing)
    mode = restore or restore_mode(model)
    # Outside of inference mode, in which Lightning validates: what is made inside it cannot be exported.
    with torch.inference_mode(False), torch.no_grad(), restoring(mode), new_folder(output, overwrite) as folder:
        copied = exported_copy(model, plan, module_path, restore)
        chosen.refuse(copied.model)
        transformer = copied.transformer
        config = data_config(model, transformer.root, preprocessing)
        taken = input_of(inputs, config, example_inputs.shape[1])
        images = _own_copy("example_inputs", example_inputs, taken)
        compared = images if calibration is None else _own_copy("calibration", calibration, taken)
        patch = copied.patch(images)
        passed = taken.encoded(images)
        exported = copied.converted(precision, taken)
        with calibrating_with(taken.encoded(compared)):
            choice = None
            if graph == "auto" and patch.method is not None:
                choice = faster_graph(exported, passed, chosen, rounds, time_limit)
            form: GraphForm = "native" if graph == "auto" else graph
            form = form if choice is None else choice.form
            program = graph_of(exported, passed, batch, form)
            converted = chosen.convert(program, opset, batch == "dynamic")
            chosen.write(converted, folder)
            run = chosen.load(folder, tuple(images.shape))
            dense = None
            if rounds and not patch.is_dense:
                dense = chosen.load_graph(dense_graph(exported, passed))

        reference = without_autograd(copied)
        parity = compare_outputs(
            reference,
            lambda each: run(taken.encoded(each))[0],
            compared,
            len(images),
            TOLERANCES[precision] if tolerance is None else tolerance,
            transformer.num_classes > 1,
            AGREEMENT.get(precision) if min_agreement is None else min_agreement,
        )
        check_parity(parity)
        context = chosen.runtime.context()
        latency = time_exported(run, dense, passed, rounds, time_limit, context) if rounds else None

        report = ExportReport(
            folder=folder,
            format=chosen.name,
            files={name: file_digest(folder / name) for name in chosen.files if (folder / name).exists()},
            input_shape=(images.shape[0], images.shape[1], images.shape[2], images.shape[3]),
            inputs=taken,
            batch=batch,
            precision=precision,
            quantization=context.get("quantization"),
            graph=form,
            graph_choice=choice,
            classes=transformer.num_classes,
            opset=chosen.opset(converted),
            method=patch.method,
            tokens=patch.tokens,
            tail=patch.tail,
            parity=parity,
            latency=latency,
            operators=chosen.count_operators(converted),
            in_runtime=chosen.in_runtime(folder, tuple(images.shape)),
            versions=chosen.versions(),
        )
        if patch.schedule is not None:
            patch.schedule.save(folder / "schedule.yaml")
        sample = compared[: len(images)] if len(compared) >= len(images) else images
        write_sample(folder, taken.encoded(sample), in_batches(reference, sample, len(images)))
        write_preprocessing(folder, config, taken)
        (folder / "run.py").write_text(runner(report), encoding="utf-8")
        (folder / "README.md").write_text(readme(report, chosen.input_name(converted)), encoding="utf-8")
        write_document(folder / REPORT, report.to_dict())
    return replace(report, folder=Path(output))


def _own_copy(name: str, images: Tensor, taken: ImageInput) -> Tensor:
    """Normalised images in float32 on the CPU, as they are after the exported model got them."""
    copied = images.detach().to("cpu", copy=True).contiguous()
    copied = copied if copied.dtype == torch.uint8 else copied.float()
    return copied if taken.form == "float32" else taken.decoded(taken.levels(name, copied)[0])


def _check_images(example_inputs: Tensor, calibration: Tensor | None, inputs: str) -> None:
    """Raises ArgumentError if the images are none, or have different sizes, or dtypes that the file does not take."""
    for name, images in (("example_inputs", example_inputs), ("calibration", calibration)):
        if images is None and name == "calibration":
            continue
        check_images(name, images)
        assert images is not None
        if images.dtype == torch.uint8:
            expected = "normalised images, or `inputs` 'uint8' for images in 8 bits"
            check(name, images.dtype, expected, inputs == "uint8")
    if calibration is not None:
        size = tuple(example_inputs.shape[1:])
        check(
            "calibration",
            tuple(calibration.shape),
            f"images (N, {', '.join(map(str, size))}), the size of `example_inputs`",
            tuple(calibration.shape[1:]) == size,
        )


def _check(
    batch: str,
    precision: str,
    min_agreement: float | None,
    graph: str,
    tolerance: float | None,
    rounds: int,
    time_limit: float | None,
    overwrite: bool,
) -> None:
    """Raises ArgumentError if an argument of `export` is invalid by itself."""
    check_choice("batch", batch, get_args(BatchSize))
    check_choice("precision", precision, PRECISIONS)
    if min_agreement is not None:
        check_between("min_agreement", min_agreement, 0, 1, "a share")
        check(
            "min_agreement",
            min_agreement,
            "left out with precision='float32', which is judged by its error (`tolerance`)",
            precision in AGREEMENT,
        )
    check_choice("graph", graph, (*get_args(GraphForm), "auto"))
    if tolerance is not None:
        check_positive("tolerance", tolerance)
    check_int("rounds", rounds, 0, "a number of measurements")
    check("rounds", rounds, "at least 1 with graph='auto', which is chosen by latency", rounds > 0 or graph != "auto")
    if time_limit is not None:
        check_positive("time_limit", time_limit, "seconds")
    check_bool("overwrite", overwrite)
