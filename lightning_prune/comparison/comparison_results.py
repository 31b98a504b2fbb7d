"""The results of a comparison: its rows, the best of them, and what is written of both."""

import importlib.metadata
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_prune import __version__
from lightning_prune._utils.documents import read_document, write_document
from lightning_prune._utils.files import slug, staging_folder, user_path
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.comparison.best_variant import BestVariant
from lightning_prune.comparison.class_changes import ClassChange
from lightning_prune.comparison.planned_variants import ComparisonPlan, PlannedVariant
from lightning_prune.errors import ArgumentError
from lightning_prune.patching import TokenTrace
from lightning_prune.report.html_page import write_page
from lightning_prune.report.plots import plot
from lightning_prune.report.rows import Row
from lightning_prune.report.tables import write_table
from lightning_prune.report.token_maps import save_tokens
from lightning_prune.schedule import MethodSpec, Schedule

_FORMAT, _VERSION = "lightning_prune.comparison", 1
_FILES = (
    *("results.csv", "results.json", "schedule.yaml", "profile.json", "profile.png"),
    *("pareto.png", "tokens.png", "report.html"),
)
_PACKAGES = ("torch", "lightning", "timm", "torchvision", "transformers", "numpy")

Normalisation = tuple[Sequence[float], Sequence[float]]


@dataclass(frozen=True)
class Comparison:
    """The results of `lightning_prune.compare`.

    Attributes:
        rows: One for each variant, dense first.
        plan: Schedules and timings, target speed-ups that were not reached, and the context of the measurement.
        best: The best variant by the objective that was stated; None where none was.
        config: Everything that was asked for, as plain values.
        command: What was typed or called.
        pictures: A few images of the dataset, on the CPU; None on ranks other than 0.
        traces: Variant -> what became of the patches of these images; one variant for each method.
        normalisation: Mean and standard deviation by which the images were normalised; None where not known.
        files: What was written, without the schedules of the single variants.
        classes: Variant -> the changes of its classes, the worst first; None where they were not asked for.
    """

    rows: tuple[Row, ...]
    plan: ComparisonPlan
    best: BestVariant | None = None
    config: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    pictures: Tensor | None = None
    traces: Mapping[str, TokenTrace] = field(default_factory=dict)
    normalisation: Normalisation | None = None
    files: tuple[Path, ...] = ()
    classes: Mapping[str, Sequence[ClassChange]] | None = None

    def to_dict(self) -> dict[str, Any]:
        """The results as plain values, as `results.json` holds them."""
        plan = self.plan
        changes = {name: [each.to_dict() for each in found] for name, found in (self.classes or {}).items()}
        return {
            "format": _FORMAT,
            "version": _VERSION,
            "rows": [row.to_dict() for row in self.rows],
            "best": None if self.best is None else asdict(self.best),
            "unreached": [asdict(unreached) for unreached in plan.unreached],
            "variants": {p.variant: _described(p) for p in plan.planned if not p.is_dense},
            **({} if self.classes is None else {"classes": changes}),
            "context": dict(plan.context),
            "energy": plan.energy,
            "calibration": plan.calibration,
            "started": plan.started,
            "seconds": round(plan.seconds, 1),
            "command": self.command,
            "config": dict(self.config),
            "versions": _versions(),
        }

    def save(self, folder: str | Path) -> list[Path]:
        """Writes tables, schedules, plots and the report; each file appears whole, and all or none.

        `schedules/<variant>.yaml` can be given to `--prune.schedule`; so can `schedule.yaml`, the best by the objective
        that was stated, which is only written where one was.

        Args:
            folder: Where; created if need be.

        Returns:
            The files written, without the schedules of the single variants.

        Raises:
            FileWriteError: If one cannot be written, for example on a full disk; names it.
        """
        folder = user_path(folder)
        document, earlier = self.to_dict(), _written_earlier(folder)
        with staging_folder(folder) as stage:
            write_table(stage / "results.csv", self.rows, per_class=self.classes is not None)
            write_document(stage / "results.json", document)
            for planned in self.plan.planned:
                if planned.schedule is not None:
                    planned.schedule.save(stage / "schedules" / f"{slug(planned.variant)}.yaml")
            self._write_best(stage)
            if self.plan.profile is not None:
                self.plan.profile.save(stage / "profile.json")
                plot(self.plan.profile, stage / "profile.png")
            plot(document, stage / "pareto.png")
            self._write_tokens(stage)
            write_page(document, stage)
            schedules = [f"schedules/{path.name}" for path in (stage / "schedules").glob("*.yaml")]
            for path in sorted((stage / "schedules").glob("*.yaml")):
                (folder / "schedules").mkdir(exist_ok=True)
                path.replace(folder / "schedules" / path.name)
            names = [name for name in _FILES if (stage / name).exists()]
            for path in earlier - {folder / name for name in (*names, *schedules)}:
                path.unlink(missing_ok=True)  # of an earlier comparison, whose figures would stand next to the new ones
            return [(stage / name).replace(folder / name) for name in names]

    def _write_best(self, stage: Path) -> None:
        if self.best is None:
            return
        planned = {planned.variant: planned for planned in self.plan.planned}
        schedule = planned[self.best.variant].schedule
        if schedule is None:  # of dense, in floating point or in 8 bits
            known = next((p.schedule for p in self.plan.planned if p.schedule is not None), None)
            depths = [each.depth for each in (known, self.plan.profile) if each is not None]
            if not depths:
                return
            made_on = MeasurementSource.from_context(
                self.plan.context,
                dense_tokens=self.plan.dense_tokens,
                runtime=planned[self.best.variant].execution,
            )
            method = known.method if known is not None and isinstance(known.method, MethodSpec) else None
            schedule = Schedule([0] * depths[0], method, made_on)
        write_document(
            stage / "schedule.yaml",
            {**schedule.to_dict(), "variant": self.best.variant, "reason": self.best.reason},
        )

    def _write_tokens(self, stage: Path) -> None:
        drawable = {name: trace for name, trace in self.traces.items() if trace.grid is not None}
        if self.pictures is None or not drawable or self.pictures.shape[1] not in (1, 3):
            return
        known = self.normalisation
        fits = known is not None and {*map(len, known)} <= {1, self.pictures.shape[1]}
        mean, std = known if known is not None and fits else (None, None)
        save_tokens(self.pictures, drawable, stage / "tokens.png", mean, std)


def read_results(path: str | Path) -> dict[str, Any]:
    """Reads a `results.json`.

    Args:
        path: The file.

    Raises:
        FileFormatError: If it cannot be read, or another release wrote it; names the file.
    """
    return read_document(path, _FORMAT, _VERSION)


def check_output_paths(folder: Path) -> None:
    """Checks that no folder is in the place of a file to be written, nor the reverse, before hours of work.

    Raises:
        ArgumentError: If there is one.
    """
    for path in (folder / name for name in _FILES):
        if path.is_dir():
            raise ArgumentError(f"`output` must have room for the file {path.name}, got a folder of that name: {path}")
    for path in (folder / "schedules", folder / "state"):
        if path.exists() and not path.is_dir():
            raise ArgumentError(f"`output` must have room for the folder {path.name}, got a file of that name: {path}")


def normalisation_of(module: Any) -> Normalisation | None:
    """Mean and standard deviation by which images are normalised, where the module has a timm `data_config`."""
    config: Any = getattr(module, "data_config", None)
    try:
        mean, std = (tuple(float(value) for value in config[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    return mean, std


def _written_earlier(folder: Path) -> set[Path]:
    """What an earlier comparison has written to a folder, without its state; nothing where there was none."""
    try:
        document = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return set()
    if not isinstance(document, Mapping) or document.get("format") != _FORMAT:  # of any version
        return set()
    variants = document.get("variants")
    described = variants.values() if isinstance(variants, Mapping) else ()
    files = [str(each.get("file")) for each in described if isinstance(each, Mapping)]
    schedules = {folder / "schedules" / Path(file).name for file in files if file.startswith("schedules/")}
    return {folder / name for name in _FILES} | schedules


def _described(planned: PlannedVariant) -> dict[str, Any]:
    about: dict[str, Any] = {
        **(planned.plan or {}),
        "method": planned.method,
        "settings": dict(planned.settings),
        "note": planned.note,
    }
    if planned.schedule is not None:
        about |= {"schedule": planned.schedule.to_dict(), "file": f"schedules/{slug(planned.variant)}.yaml"}
    if planned.keep_rates is not None:
        about["keep_rates"] = planned.keep_rates.to_dict()
    return about


def _versions() -> dict[str, str]:
    """Versions of Python and of the packages that the model may depend on."""
    loaded = [name for name in _PACKAGES if name in sys.modules]
    python = ".".join(map(str, sys.version_info[:3]))
    return {"lightning_prune": __version__, "python": python} | {n: importlib.metadata.version(n) for n in loaded}
