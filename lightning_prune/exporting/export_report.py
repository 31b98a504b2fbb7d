"""The report of an export: what was written, how far it agrees with the model, and how fast it is."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any, ClassVar, Literal

from lightning_prune._utils.documents import SavedDocument, load_saved
from lightning_prune._utils.validation import check_path
from lightning_prune.errors import FileFormatError
from lightning_prune.exporting.image_input import ImageInput
from lightning_prune.exporting.parity import Parity
from lightning_prune.exporting.runtime_graph import RuntimeGraph

GraphForm = Literal["native", "portable"]
"""How tokens are selected and merged, see `lightning_prune.reduction.portable_graph`."""
REPORT = "report.json"
"""Name of the report in the folder."""
_BEFORE: dict[int, dict[str, Any]] = {
    1: {"inputs": {}, "graph_choice": None, "in_runtime": None, "tail": False, "quantization": None},
    2: {"tail": False, "quantization": None},
    3: {"quantization": None},
}
"""What documents of earlier versions leave out."""


@dataclass(frozen=True)
class TimedLatency:
    """Latency of a batch in the runtime, dense and as exported, timed in one interleaved run.

    Attributes:
        dense_ms: Median milliseconds of the dense model.
        exported_ms: Median milliseconds of the exported model; that of dense if it removes no tokens.
        speedup: Dense over exported.
        speedup_stderr: Its standard error.
        rounds: Number of measurements.
        context: What the latency depends on: versions, threads, provider, precision.
        dense_p90_ms: 90th percentile of the dense model; None in reports of earlier releases.
        exported_p90_ms: That of the exported model.
    """

    dense_ms: float
    exported_ms: float
    speedup: float
    speedup_stderr: float
    rounds: int
    context: Mapping[str, Any]
    dense_p90_ms: float | None = None
    exported_p90_ms: float | None = None


@dataclass(frozen=True)
class GraphChoice:
    """Which form of the graph was taken by `graph="auto"`, and why.

    Attributes:
        form: Native or portable.
        native_ms: Median milliseconds of a batch in the runtime; None if the runtime does not accept the graph.
        portable_ms: Likewise, timed in the same interleaved run.
        reason: Why this form was taken.
    """

    form: GraphForm
    native_ms: float | None
    portable_ms: float | None
    reason: str


@dataclass(frozen=True)
class ExportReport(SavedDocument):
    """What `export` wrote; `report.json` in the folder.

    Attributes:
        folder: The folder.
        format: Name of the format.
        files: Name of each file of the model, the one to load first -> its SHA-256.
        input_shape: (B, C, H, W) of the images.
        inputs: Which images the file takes: normalised ones, or images in 8 bits.
        batch: Whether B is static or dynamic.
        precision: Of weights and operators.
        quantization: The quantizer, and in how many bits weights are; None in floating point.
        graph: How tokens are selected and merged: native or portable.
        graph_choice: Why that form, and the latency of both; None if the form was given.
        classes: Number of classes; 0 for a model that returns features.
        opset: Version of ONNX's operators, read from the file; None for other formats.
        method: Name of the method, `"mixed"` for several; None for a dense model.
        tokens: Tokens that leave each block; None for a dense model, and where the images decide.
        tail: Whether patch tokens that no head reads leave the last block before its MLP (see `lightning_prune.patch`).
        parity: How far the file agrees with PyTorch.
        latency: How fast it is; None if it was not timed.
        operators: Operator -> how often it is in the file, the most frequent first.
        in_runtime: What the runtime makes of the file; None where it does not say.
        versions: Package -> version.
    """

    FORMAT: ClassVar[str] = "lightning_prune.export"
    VERSIONS: ClassVar[tuple[int, ...]] = (1, 2, 3, 4)

    folder: Path = field(compare=False)
    format: str
    files: Mapping[str, str]
    input_shape: tuple[int, int, int, int]
    inputs: ImageInput
    batch: str
    precision: str
    quantization: str | None
    graph: str
    graph_choice: GraphChoice | None
    classes: int
    opset: int | None
    method: str | None
    tokens: tuple[int, ...] | None
    tail: bool
    parity: Parity
    latency: TimedLatency | None
    operators: Mapping[str, int]
    in_runtime: RuntimeGraph | None
    versions: Mapping[str, str]

    @property
    def model(self) -> Path:
        """The file to load."""
        return self.folder / next(iter(self.files))

    @property
    def max_relative_error(self) -> float:
        """Largest relative error of an image against PyTorch in float32 with the same patch."""
        return self.parity.max_relative_error

    @classmethod
    def read(cls, folder: str | PathLike[str]) -> "ExportReport":
        """Reads the report of an exported folder.

        Raises:
            FileFormatError: If there is none, or it is damaged.
        """
        check_path("folder", folder)
        found = load_saved(Path(folder) / REPORT, cls)
        return cls(**{**vars(found), "folder": Path(folder)})

    def _to_values(self) -> dict[str, Any]:
        values = {key: value for key, value in asdict(self).items() if key not in ("folder", "format")}
        values["inputs"] = self.inputs.to_dict()
        values["input_shape"] = list(self.input_shape)
        values["tokens"] = None if self.tokens is None else list(self.tokens)
        return {"model_format": self.format, **values}  # `format` is that of the document

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], version: int) -> "ExportReport":
        try:
            values = {**_BEFORE.get(version, {}), **values}
            plain = {each.name: values[each.name] for each in fields(cls) if each.name not in ("folder", "format")}
            tokens, latency = plain["tokens"], plain["latency"]
            choice, in_runtime, inputs = plain["graph_choice"], plain["in_runtime"], plain["inputs"]
            made = {
                "input_shape": tuple(plain["input_shape"]),
                "tokens": None if tokens is None else tuple(tokens),
                "parity": Parity(**plain["parity"]),
                "inputs": ImageInput.from_dict(inputs),
                "graph_choice": None if choice is None else GraphChoice(**choice),
                "in_runtime": None if in_runtime is None else RuntimeGraph.from_dict(in_runtime),
                "latency": None if latency is None else TimedLatency(**latency),
            }
            return cls(**{**plain, **made, "folder": Path(), "format": values["model_format"]})
        except (KeyError, TypeError, AttributeError) as error:
            raise FileFormatError(f"an entry is missing or invalid: {error}.") from error
