"""`bundle`: writes what measures a latency profile on a device that has numpy and a runtime, but no torch."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_prune._utils.digests import weights_digest
from lightning_prune._utils.documents import write_document
from lightning_prune._utils.files import slug
from lightning_prune._utils.formatting import model_title
from lightning_prune._utils.isolation import hooks_read
from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.validation import check_bool, check_images, check_path
from lightning_prune.errors import ArgumentError, ExportError, UnsupportedModelError
from lightning_prune.exporting.bundle_profile import DESCRIPTION, FORMAT, VERSION, file_digest
from lightning_prune.exporting.exported_graph import exported_copy
from lightning_prune.exporting.folder import new_folder
from lightning_prune.exporting.instructions import bundle_readme
from lightning_prune.patching import PatchHandle, VisionTransformer, find_vision_transformer
from lightning_prune.patching.models.call_arguments import call_keywords, calling_with
from lightning_prune.patching.token_readers import RestoreMode, check_restore
from lightning_prune.planning.method_selection import Methods, usable_methods
from lightning_prune.planning.overhead_probes import (
    SHALLOW_PROBES,
    has_shallow_copy,
    shallow_copy,
    shallow_schedules,
)
from lightning_prune.planning.probed_schedules import schedules_to_probe
from lightning_prune.profiling.environment import measurement_context
from lightning_prune.profiling.measurement import TOKEN_CURVE, check_dense
from lightning_prune.reduction import Reduction, spec_of
from lightning_prune.runtimes.base import Runtime
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.graph_export import export_graph
from lightning_prune.runtimes.registry import parse_runtime
from lightning_prune.runtimes.token_curve import FEWEST_TOKENS, export_token_curve
from lightning_prune.schedule import Schedule

MEASURING_FILES = (
    "errors.py",
    "_utils/documents.py",
    "_utils/files.py",
    "_utils/processor.py",
    "_utils/validation.py",
    "exporting/bundle_graphs.py",
    "exporting/bundle_profile.py",
    "profiling/clocks.py",
    "profiling/count_search.py",
    "profiling/interleaved_timer.py",
    "profiling/latency_profile.py",
    "profiling/page_faults.py",
    "runtimes/graph_sessions.py",
)
"""Files of this package that a bundle holds as they are: none of them imports torch, or any other file."""
_PACKAGE = Path(__file__).parents[1]
_GRAPHS, _MEASURING = "graphs", "measuring"


@dataclass(frozen=True)
class DeviceBundle:
    """What `bundle` wrote.

    Attributes:
        folder: The folder.
        runtime: Spec of the runtime that its graphs are for.
        methods: Specs of the methods whose overhead it measures.
        tokens: N, the tokens of the dense model.
        files: Name of each file in the folder -> its SHA-256; without `bundle.json`, which holds them.
        megabytes: Size of all files.
    """

    folder: Path
    runtime: str
    methods: tuple[str, ...]
    tokens: int
    files: Mapping[str, str]
    megabytes: float


def bundle(
    model: torch.nn.Module,
    output: str | PathLike[str],
    example_inputs: Tensor,
    *,
    runtime: str | Runtime = "onnxruntime",
    methods: Methods = "auto",
    module_path: str | None = None,
    restore: RestoreMode | None = None,
    overwrite: bool = False,
    verbose: bool = True,
) -> DeviceBundle:
    """Writes a folder that measures the latency profile of a model on a device without torch.

    Copy the folder to the device and run `python profile.py` there: it needs Python 3.11, numpy and the runtime, and
    writes `profile.json`. `plan(..., profile=LatencyProfile.load("profile.json"))`, or the command `plan --profile`,
    then plans for that device, and `export` writes the model for it.

    The folder holds the dense model as a graph for any number of tokens, the graphs from which the overhead of each
    method follows (two schedules each, in a copy of the first four blocks where the model has eight or more), and the
    files of this package that measure. The weights are those of the model, in float32.

    Args:
        model: Contains one Vision Transformer, dense.
        output: The folder; new or empty.
        example_inputs: (B, C, H, W) images in the batch size and image size that will be used.
        runtime: `"onnxruntime"` or `"openvino"`, with settings, such as `"openvino:precision=bf16"`. Where the device
            has an execution provider that is not here, `profile.py --provider` names it.
        methods: The methods that will be planned with: `"auto"`, a name, a reduction, or several of them. Another
            method can be planned with, too, but is then taken to have no overhead.
        module_path: Dotted path of the transformer in `model`, needed where there are several.
        restore: How removed tokens are given back to a dense head, as of `lightning_prune.patch`. The graphs are then
            of the module that reads all tokens.
        overwrite: Whether an existing folder is replaced.
        verbose: Shows a progress bar on a terminal.

    Returns:
        What was written.

    Raises:
        ArgumentError: If an argument is invalid, the folder exists, the model is patched, or the runtime has no graphs.
        ExportError: If the model, or a method, cannot be converted; names it.
        FileWriteError: If a file cannot be written.
        RuntimeUnavailableError: If the runtime is not installed; names the extra that installs it.
        UnsupportedModelError: As `lightning_prune.patch`.

    Example:
        >>> import timm
        >>> import torch
        >>> import lightning_prune as lp
        >>> model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=64).eval()
        >>> made = lp.bundle(model, "bundle", torch.randn(1, 3, 64, 64), methods="topk", verbose=False)
        >>> made.runtime, made.methods, made.tokens, (made.folder / "profile.py").exists()
        ('onnxruntime', ('topk',), 17, True)
    """
    check_images("example_inputs", example_inputs)
    check_path("output", output)
    check_bool("overwrite", overwrite)
    check_bool("verbose", verbose)
    chosen = parse_runtime(runtime)
    if not isinstance(chosen, ConvertedRuntime):
        raise ArgumentError(
            f"`runtime` must be one that runs graphs without torch, such as 'onnxruntime' or 'openvino', got "
            f"{chosen.name!r}, which needs torch on the device; `profile_latency` measures it there."
        )
    settings = chosen.device_settings()
    check_restore(restore)
    given = find_vision_transformer(model, module_path, restore)
    check_dense(given)
    usable = usable_methods(methods, "all", given)
    # Outside of inference mode, in which Lightning validates: what is made inside it cannot be exported.
    with torch.inference_mode(False), torch.no_grad(), new_folder(output, overwrite) as folder:
        images = example_inputs.detach().to("cpu", torch.float32, copy=True)
        copied = exported_copy(model, None, module_path, restore).model
        transformer = find_vision_transformer(copied, module_path, restore)
        reason = chosen.unsupported_reason(transformer.outer)
        if reason is not None:
            raise ArgumentError(f"`model` must be one that {chosen.name} can run, got one that cannot: {reason}")
        with (
            calling_with(transformer.root, call_keywords(given.root)),
            progress_bar("Writing the bundle", None, verbose),
            hooks_read(restore is not None),
        ):
            described = _write_graphs(folder, chosen, transformer, images, usable)
        _copy_measuring_files(folder)
        tensors = (*transformer.outer.parameters(), *transformer.outer.buffers())
        names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
        document = {
            "format": FORMAT,
            "version": VERSION,
            "runtime": {"spec": chosen.name, **settings},
            "shape": list(images.shape),
            **described,
            "context": _context(transformer, images, chosen),
            "weights": weights_digest(transformer.outer),
            "weights_bytes": sum(each.nbytes for each in tensors),
            "files": {name: file_digest(folder / name) for name in sorted(names)},
        }
        specs = tuple(str(spec_of(reduction)) for reduction, _ in usable.values())
        readme = bundle_readme(model_title(document["context"]), settings["package"], images.shape, specs)
        (folder / "README.md").write_text(readme, encoding="utf-8")
        write_document(folder / DESCRIPTION, document)
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return DeviceBundle(Path(output), chosen.name, specs, described["tokens"], document["files"], size / 1e6)


def _write_graphs(
    folder: Path,
    runtime: ConvertedRuntime,
    transformer: VisionTransformer,
    images: Tensor,
    methods: Mapping[str, tuple[Reduction, Sequence[int]]],
) -> dict[str, Any]:
    """Writes all graphs, and returns what `bundle.json` says of them."""
    graphs = folder / _GRAPHS
    graphs.mkdir()
    n, keywords = transformer.count_tokens(images), call_keywords(transformer.root)
    if transformer.first_prunable_block:
        raise ExportError(
            f"The latency curve of {type(transformer.root).__name__} cannot be bundled: no token may go before block 0 "
            f"({transformer.first_prunable_reason}). `profile_latency` measures it where torch is."
        )
    (curve, *_) = runtime.save(export_token_curve(transformer, images), graphs, "tokens", counts=True)
    probed, copy = _probed(transformer), None
    if probed.depth < transformer.depth:
        copy = _save(runtime, probed, images, graphs, f"first_{probed.depth}_blocks", keywords)
        schedules = shallow_schedules(probed, methods, n)
    else:
        whole = schedules_to_probe(transformer, methods, n)
        schedules = {label: found[::2][:SHALLOW_PROBES] for label, found in whole.items()}
    listed = []
    for label, (reduction, _) in methods.items():
        for number, schedule in enumerate(schedules[label]):
            name = f"{slug(label)}_{number}"
            try:
                file = _save(
                    runtime, probed, images, graphs, name, call_keywords(transformer.root), reduction, schedule
                )
            except ExportError as error:
                raise ExportError(
                    f"The method {label} cannot be bundled; leave it out of `methods`. {error}"
                ) from error
            listed.append({"method": str(spec_of(reduction)), "removed": list(schedule.removed), "file": file})
    lowest = n - TOKEN_CURVE.max_total_removed(n, transformer.num_prefix_tokens, transformer.depth, 0)
    return {
        "tokens": n,
        "lowest": max(lowest, FEWEST_TOKENS),
        "depth": transformer.depth,
        "method": TOKEN_CURVE.name,
        "curve": f"{_GRAPHS}/{curve}",
        "probes": {"copy": copy, "graphs": listed},
    }


def _probed(transformer: VisionTransformer) -> VisionTransformer:
    """Where the overheads are measured: a copy of the first blocks if that is much smaller, else the whole."""
    if has_shallow_copy(transformer):
        try:
            return shallow_copy(transformer)
        except UnsupportedModelError:
            pass
    return transformer


def _save(
    runtime: ConvertedRuntime,
    transformer: VisionTransformer,
    images: Tensor,
    folder: Path,
    name: str,
    keywords: Mapping[str, Any],
    reduction: Reduction | None = None,
    schedule: Schedule | None = None,
) -> str:
    """Writes the graph of a transformer, dense or with a schedule; returns the path of its file in the bundle."""
    if reduction is None:
        graph = export_graph(transformer.outer, (images,), keywords)
    else:
        with PatchHandle(transformer, reduction, schedule):
            graph = export_graph(transformer.outer, (images,), keywords)
    return f"{folder.name}/{runtime.save(graph, folder, name)[0]}"


def _copy_measuring_files(folder: Path) -> None:
    """Copies `profile.py` and what it imports; a package of its own, so that an installed one is not taken for it."""
    package = folder / _MEASURING / _PACKAGE.name
    for name in MEASURING_FILES:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(_PACKAGE / name, package / name)
    for each in {package, *((package / name).parent for name in MEASURING_FILES)}:
        (each / "__init__.py").touch()
    shutil.copyfile(_PACKAGE / "exporting" / "bundle_launcher.py", folder / "profile.py")


def _context(transformer: VisionTransformer, images: Tensor, runtime: ConvertedRuntime) -> dict[str, Any]:
    """What a profile says of the model and of how its graphs were made; the device adds what it is itself."""
    own = {**measurement_context(transformer.outer, images), **runtime.context()}
    for name in ("device", "device_type", "threads", "runtime_precision"):
        own.pop(name, None)
    own |= {} if transformer.restore is None else {"restore": transformer.restore}
    return {**own, "method_settings": {key: repr(value) for key, value in TOKEN_CURVE.settings().items()}}
