"""The commands `profile` and `plan`."""

import re
from collections.abc import Collection, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console

from lightning_prune._utils.documents import write_document
from lightning_prune._utils.files import other_kinds, output_folder
from lightning_prune._utils.progress import progress_bar
from lightning_prune._utils.validation import check
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.decision_panel import print_decision
from lightning_prune.callbacks.first_batch import FirstBatch, on_first_batch
from lightning_prune.callbacks.planned_schedule import planned, profiled
from lightning_prune.comparison.request_reading import read_runtimes
from lightning_prune.errors import PruneError
from lightning_prune.planning import Plan
from lightning_prune.profiling import TOKEN_CURVE, LatencyProfile, SimulatedDevice, profile_latency, simulate_latency
from lightning_prune.profiling.profile_reuse import CachedProfile
from lightning_prune.report.plots import plot
from lightning_prune.report.tables import profile_table, runtimes_table, shape_of
from lightning_prune.runtimes.in_place import is_compiled, uncompiled


def run_profile(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    device: str | None,
    runtimes: Sequence[str] | None = None,
    clock: str | None = None,
    **data: Any,
) -> LatencyProfile:
    """Measures or simulates latency against the number of tokens; prints a table, writes profile.json and profile.png.

    With several runtimes, or if the model is compiled, in which case its profile without compilation is measured as
    well, all curves are in one picture, and each further profile has a file of its own.

    Args:
        trainer: Its accelerator and precision are used.
        model: Contains the Vision Transformer.
        config: Method, block, time limit and folder of stored profiles.
        output: Folder for the files.
        device: `simulated:...`, see `SimulatedDevice.parse`; None for the trainer's device.
        runtimes: What executes the model, one after another; the runtime of the config if None.
        clock: What runs are timed by, `"wall"` or `"cpu"`; the clock of the config if None.
        data: `datamodule` or `dataloaders`.

    Returns:
        The profile; that of the first runtime.

    Raises:
        ArgumentError: If `output` cannot be written to, `device` is invalid, or a setting has no effect on it.
        DataError: If there is no batch to profile on.
        FileWriteError: If a file cannot be written, after the table is printed.
    """
    config = config if clock is None else replace(config, clock=clock)
    simulated = None if device is None else SimulatedDevice.parse(device)
    check("protocol", config.protocol, "'deployed' on a simulated device", simulated is None or _is_deployed(config))
    check("clock", config.clock, "'wall' on a simulated device", simulated is None or config.clock == "wall")
    check("runtimes", runtimes, "left out with a simulated device", runtimes is None or simulated is None)
    named = [config.runtime] if runtimes is None else [each.name for each in read_runtimes(runtimes, config.runtime)]
    configs = [replace(config, runtime=name) for name in named]

    def measure(first: FirstBatch) -> tuple[CachedProfile, LatencyProfile | None]:
        with progress_bar("Profiling latency", config.time_limit, config.verbose):
            measured = _profile(first, simulated, of_method=True)
        compiled = runtimes is None and simulated is None and is_compiled(first.module)
        return measured, _eager_profile(first, measured.profile) if compiled else None

    with output_folder(output, other_kinds()) as folder:
        found = [on_first_batch(trainer, model, each, measure, **data) for each in configs]
        measured, eager = found[0]
        profile = measured.profile
        others = [each.profile for each, _ in found[1:]] + ([] if eager is None else [eager])
        if trainer.is_global_zero:
            console = Console(markup=False)  # the table is printed before anything is written, which may fail
            console.print(profile_table(profile))
            if measured.reused:
                when = profile.context.get("measured", "earlier")
                console.print(
                    f"Stored profile, measured {when}; --prune.use_cache false measures again.", soft_wrap=True
                )
            if others:
                console.print(runtimes_table([profile, *others]))
            console.print(shape_of(profile), soft_wrap=True)
            paths = [profile.save(folder / "profile.json"), folder / "profile.png"]
            plot(profile, paths[1], others=others)
            paths += [each.save(folder / _file_name(each)) for each in others]
            _remove_others(folder, paths)
            console.print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
        return profile


def run_plan(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    profile: str | None,
    device: str | None,
    **data: Any,
) -> Plan:
    """Plans a schedule without validating it; writes schedule.yaml, plan.json, plan.png and profile.json.

    Args:
        trainer: Its accelerator and precision are used.
        model: Contains the Vision Transformer.
        config: Method, objective, calibration.
        output: Folder for the files.
        profile: File of a latency profile, possibly of another device; None measures one here.
        device: `simulated:...`; None for the trainer's device.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: See `run_profile`; also if both `profile` and `device` are given, or a setting has no effect.
        DataError: If there is no batch to plan on.
        FileFormatError: If `profile` does not hold a profile.
        FileWriteError: If a file cannot be written, after the plan is printed.
    """
    if profile is not None:
        check("device", device, "left out with `profile`, which holds the latencies", device is None)
    check("protocol", config.protocol, "'deployed' for `plan`", _is_deployed(config))
    check("schedule", config.schedule, "left out for `plan`, which plans one", config.schedule == "auto")
    given = None if profile is None else CachedProfile(LatencyProfile.load(profile), reused=False)
    simulated = None if device is None else SimulatedDevice.parse(device)

    def decide(first: FirstBatch) -> Decision:
        with progress_bar("Planning", config.time_limit, config.verbose):
            latency = _profile(first, simulated) if given is None else given
            return planned(first, latency, is_given=given is not None)

    with output_folder(output, other_kinds("plan.json")) as folder:
        decision = on_first_batch(trainer, model, config, decide, **data)
        result = decision.plan
        assert result is not None
        if trainer.is_global_zero:
            print_decision(decision)
            if _is_another(folder / "profile.json", result.profile):
                (folder / "profile.png").unlink(missing_ok=True)  # the curve of the one that is replaced
                _remove_others(folder, [])
            paths = [
                result.schedule.save(folder / "schedule.yaml"),
                write_document(folder / "plan.json", result.to_dict()),
                result.profile.save(folder / "profile.json"),
                folder / "plan.png",
            ]
            plot(result, paths[-1])
            Console(markup=False).print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
        return result


def _file_name(profile: LatencyProfile) -> str:
    return f"profile_{re.sub(r'[^A-Za-z0-9.]+', '-', str(profile.context.get('runtime', 'torch')))}.json"


def _load_if_profile(path: Path) -> LatencyProfile | None:
    try:
        return LatencyProfile.load(path)
    except PruneError:
        return None


def _is_another(path: Path, profile: LatencyProfile) -> bool:
    """Whether there is another profile in the place of a file."""
    earlier = _load_if_profile(path)
    return earlier is not None and earlier != profile


def _remove_others(folder: Path, written: Collection[Path]) -> None:
    """Removes the curves of other runtimes that an earlier `profile` wrote, which were not measured with the new one.

    A profile that somebody copied there stays, unless it has the very name that this package gives.
    """
    for path in set(folder.glob("profile_*.json")).difference(written):
        profile = _load_if_profile(path)
        if profile is not None and path.name == _file_name(profile):
            path.unlink()


def _is_deployed(config: PruningConfig) -> bool:
    return config.protocol == "deployed"


def _eager_profile(first: FirstBatch, compiled: LatencyProfile) -> LatencyProfile | None:
    """The profile of a compiled model without compilation, at the same counts; None if a wrapper compiles it."""
    config = first.config
    with uncompiled(first.module):
        if is_compiled(first.module):
            return None
        return profile_latency(
            first.module,
            first.images,
            method=TOKEN_CURVE if config.uses_token_curve else config.reduction,
            block=0 if config.uses_token_curve else config.reducing_block,
            counts=compiled.tokens[:-1],
            time_limit=config.time_limit,
            protocol=config.protocol,
            module_path=config.module_path,
            verbose=config.verbose,
            clock=config.clock,
        )


def _profile(first: FirstBatch, simulated: SimulatedDevice | None, of_method: bool = False) -> CachedProfile:
    config = first.config
    if simulated is None:
        return profiled(config, first.module, first.images, of_method)
    # The latencies of a method in one block are exact, overhead included, so that a plan can be based on them.
    general = config.uses_token_curve or (config.reduction.multi_block and not of_method)
    method, block = (TOKEN_CURVE, 0) if general else (config.reduction, config.reducing_block)
    profile = simulate_latency(
        first.module,
        first.images,
        simulated,
        method=method,
        block=block,
        time_limit=config.time_limit,
        module_path=config.module_path,
    )
    return CachedProfile(profile, reused=False)
