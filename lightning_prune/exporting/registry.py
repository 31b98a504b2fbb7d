"""The formats of exported models by name."""

from lightning_prune._utils.validation import check_name
from lightning_prune.errors import ArgumentError
from lightning_prune.exporting.aotinductor_format import AOTInductorFormat
from lightning_prune.exporting.executorch_format import ExecuTorchFormat
from lightning_prune.exporting.formats import ExportFormat
from lightning_prune.exporting.onnx_format import OnnxFormat
from lightning_prune.exporting.openvino_format import OpenVINOFormat
from lightning_prune.exporting.torch_format import TorchExportFormat

FORMATS: dict[str, type[ExportFormat]] = {
    each.name: each for each in (OnnxFormat, OpenVINOFormat, TorchExportFormat, AOTInductorFormat, ExecuTorchFormat)
}
"""Name -> class."""


def parse_format(
    name: str, runtime: str | None = None, precision: str = "float32", reduce_range: bool | None = None
) -> ExportFormat:
    """The format of a name.

    Args:
        name: One of `FORMATS`.
        runtime: See `ExportFormat`.
        precision: See `export`.
        reduce_range: See `export`.

    Raises:
        ArgumentError: If there is no such format or precision, or `runtime` is that of another format.
        RuntimeUnavailableError: If its runtime is not installed.
    """
    if not isinstance(name, str):
        raise ArgumentError(f"`format` must be one of {', '.join(map(repr, FORMATS))}, got {name!r}.")
    check_name("format", name, FORMATS)
    return FORMATS[name](runtime, precision, reduce_range)
