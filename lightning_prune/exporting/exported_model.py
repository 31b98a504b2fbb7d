"""An exported folder as a module: runs the file that is shipped."""

import hashlib
import warnings
from os import PathLike
from pathlib import Path

from torch import Tensor, nn

from lightning_prune._utils.validation import check, check_images
from lightning_prune.errors import ArgumentError, FileFormatError
from lightning_prune.exporting.export_report import ExportReport
from lightning_prune.exporting.folder import read_preprocessing
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.exporting.image_input import EXACT
from lightning_prune.exporting.parity import in_batches
from lightning_prune.exporting.registry import parse_format
from lightning_prune.runtimes.graph_store import RunGraph
from lightning_prune.runtimes.registry import parse_runtime


class ExportedModel(nn.Module):
    """Runs the file of an exported folder; made by `load_exported`.

    Args:
        report: Of the folder.
        format: Of the file, with the runtime that runs it.

    Raises:
        ExportError: If the runtime does not accept the file.

    Attributes:
        report: What `export` found.
        num_classes: Number of classes; 0 for a model that returns features.
        pretrained_cfg: How images are prepared, where that is known, under the name that timm gives it.
    """

    def __init__(self, report: ExportReport, format: ExportFormat) -> None:
        super().__init__()
        self.report, self.num_classes = report, report.classes
        self.pretrained_cfg = read_preprocessing(report.folder)
        self._format = format
        self._runs: dict[int, RunGraph] = {}
        self._warned = False
        self._run_of(report.input_shape[0])

    def forward(self, images: Tensor) -> Tensor:
        """Runs the model; one of static batch size runs other numbers of images in batches that are filled up.

        Args:
            images: (N, C, H, W), in the size for which the model was exported: normalised, or uint8 where the file
                normalises itself (`report.inputs`). Such a file gets normalised images as what they were before; a
                warning says so if they were not images in 8 bits, and are rounded to these.

        Returns:
            (N, classes) logits, or features, in float32.

        Raises:
            ArgumentError: If the images have another size, or were not normalised as `preprocessing.json` says.
        """
        check_images("images", images)
        batch, *size = self.report.input_shape
        if list(images.shape[1:]) != size:
            raise ArgumentError(
                f"`images` must be (B, {', '.join(map(str, size))}), for which the model was exported, got "
                f"{tuple(images.shape)}."
            )
        count = batch if self.report.batch == "static" else len(images)
        run = self._run_of(count)
        found = in_batches(lambda each: run(each)[0], self._passed(images.detach().cpu()).contiguous(), count)
        return found.to(images.device)

    def extra_repr(self) -> str:
        """The file."""
        return str(self.report.model)

    def _passed(self, images: Tensor) -> Tensor:
        """The images as the file takes them."""
        inputs = self.report.inputs
        if inputs.form == "float32":
            check("images", images.dtype, "normalised images in floating point", images.is_floating_point())
            return images.float()
        levels, rounding = inputs.levels("images", images)
        if rounding > EXACT and not self._warned:
            self._warned = True
            warnings.warn(
                f"The images are rounded by up to {rounding:.2f} of 255 levels: the exported model takes uint8 images, "
                f"and these are none that were normalised with mean {inputs.mean} and std {inputs.std}.",
                stacklevel=3,
            )
        return levels

    def _run_of(self, count: int) -> RunGraph:
        """What runs batches of a size; made once for each."""
        if count not in self._runs:
            _, *size = self.report.input_shape
            self._runs[count] = self._format.load(self.report.folder, (count, *size))
        return self._runs[count]


def load_exported(folder: str | PathLike[str], runtime: str | None = None) -> ExportedModel:
    """Loads an exported folder, so that the very file that is shipped is run, timed and validated.

    Args:
        folder: As `lightning_prune.export` wrote it.
        runtime: Spec of the runtime, such as `"openvino:device=GPU"`; that of the format on the CPU if None.

    Returns:
        A module that takes (N, C, H, W) images and runs in the runtime.

    Raises:
        ArgumentError: If the runtime is not that of the format.
        ExportError: If the runtime does not accept the file.
        FileFormatError: If a file is missing, damaged or not the one that was exported.
        RuntimeUnavailableError: If the runtime is not installed; names the extra that installs it.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32).eval()
        >>> handle = lp.patch(model, "topk", [2])
        >>> images = torch.randn(1, 3, 32, 32)
        >>> report = lp.export(model, "out", images, format="torch-export", rounds=0)
        >>> torch.allclose(lp.load_exported("out")(images), model(images), atol=1e-4)
        True
    """
    if runtime is not None:
        parse_runtime(runtime)
    report = ExportReport.read(folder)
    check_files(report)
    return ExportedModel(report, parse_format(report.format, runtime, report.precision))


def check_files(report: ExportReport) -> None:
    """Raises FileFormatError unless the files of a model are those that were exported."""
    for name, expected in report.files.items():
        path = report.folder / name
        try:
            found = file_digest(path)
        except OSError as error:
            raise FileFormatError(f"Cannot read {path}: {error.strerror or error}.") from error
        if found != expected:
            raise FileFormatError(
                f"{path} was changed since it was exported: its SHA-256 is {found[:16]}..., that in the report is "
                f"{expected[:16]}.... Export the model again."
            )


def file_digest(path: Path) -> str:
    """The SHA-256 of a file, as a hexadecimal number."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
