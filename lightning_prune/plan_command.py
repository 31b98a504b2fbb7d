"""`lightning-prune profile` and `plan`: what tokens cost and which to remove, here or on a device that is elsewhere."""

from typing import Any

import lightning as L
from rich.console import Console
from torch import Tensor

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.decision import Decision
from lightning_prune.callbacks.planned import planned, profiled, sample
from lightning_prune.comparison import writable
from lightning_prune.compiling import is_compiled, uncompiled
from lightning_prune.errors import ArgumentError
from lightning_prune.files import write_document
from lightning_prune.first_batch import on_first_batch
from lightning_prune.planning import Plan
from lightning_prune.profiling import LatencyProfile, SimulatedDevice, profile_latency, simulate_latency
from lightning_prune.profiling.reuse import Found
from lightning_prune.reduction import Random
from lightning_prune.report.panel import print_decision
from lightning_prune.report.profile import beside_eager, profile_table, shape_of


def run_profile(
    trainer: L.Trainer, model: L.LightningModule, pruner: TokenPruning, output: str, device: str | None, **data: Any
) -> LatencyProfile:
    """Measures latency against tokens, or simulates it; prints a table, writes profile.json and profile.png.

    Of a model that is compiled in place the curve without that is measured, too, and drawn and written beside it.

    Args:
        trainer: Its accelerator and precision count.
        model: Contains the Vision Transformer.
        pruner: Method, block, time limit, and where profiles are kept.
        output: Folder for the files.
        device: `simulated:...`, as `SimulatedDevice.parse` takes it; None for the trainer's.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: If `output` cannot be written to, `device` is none, a setting plays no part on it, or there is no
            batch to profile on.
    """
    simulated = None if device is None else SimulatedDevice.parse(device)
    if pruner.protocol != "deployed" and device is not None:
        raise ArgumentError(f"What is deployed is simulated; got protocol={pruner.protocol!r} with device={device!r}.")
    _refuse_refresh(pruner, device=device)
    folder = writable(output)

    def work(pl_module: L.LightningModule, _: Any, images: Tensor) -> tuple[Found, LatencyProfile | None]:
        found = _found(pruner, pl_module, images, simulated)
        compiled = simulated is None and is_compiled(pl_module)
        return found, _eager(pruner, pl_module, images, found.profile) if compiled else None

    found, eager = on_first_batch(trainer, model, pruner, work, **data)
    profile = found.profile
    if trainer.is_global_zero:
        paths = [profile.save(folder / "profile.json"), folder / "profile.png"]
        profile.plot(paths[1], eager)
        if eager is not None:
            paths.append(eager.save(folder / "profile_eager.json"))
        console = Console(markup=False)
        console.print(profile_table(profile))
        if found.reused:
            console.print(f"Measured {profile.context.get('measured', 'before')}, and kept; --refresh measures anew.")
        if eager is not None:
            console.print(beside_eager(profile, eager))
        console.print(f"{shape_of(profile)} Written: {', '.join(map(str, paths))}", soft_wrap=True)
    return profile


def run_plan(
    trainer: L.Trainer,
    model: L.LightningModule,
    pruner: TokenPruning,
    output: str,
    profile: str | None,
    device: str | None,
    **data: Any,
) -> Plan:
    """Plans a schedule without validating it; writes schedule.yaml, plan.json, plan.png and profile.json.

    Args:
        trainer: Its accelerator and precision count.
        model: Contains the Vision Transformer.
        pruner: Method, objective, calibration.
        output: Folder for the files.
        profile: The file of a profile, which may be of another device; None measures one here.
        device: `simulated:...`; None for the trainer's.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: As `run_profile`, and if both `profile` and `device` are given, or a setting plays no part.
        FileFormatError: If `profile` is no profile.
    """
    if profile is not None and device is not None:
        raise ArgumentError(f"`profile` and `device` are two sources of latencies; got {profile} and {device}.")
    if pruner.protocol != "deployed":
        raise ArgumentError(f"`plan` plans what is deployed; got protocol={pruner.protocol!r}.")
    if not (isinstance(pruner.schedule, str) and pruner.schedule == "auto"):
        raise ArgumentError(f"`plan` makes a schedule, and takes none; got schedule={pruner.schedule!r}.")
    _refuse_refresh(pruner, profile=profile, device=device)
    given = None if profile is None else LatencyProfile.load(profile)
    simulated = None if device is None else SimulatedDevice.parse(device)
    folder = writable(output)

    def work(pl_module: L.LightningModule, batch: Any, images: Tensor) -> Decision:
        found = _found(pruner, pl_module, images, simulated) if given is None else Found(given, reused=False)
        return planned(pruner, pl_module, images, sample(pruner, trainer, pl_module, batch), found)

    decision = on_first_batch(trainer, model, pruner, work, **data)
    made = decision.plan
    assert made is not None
    if trainer.is_global_zero:
        paths = [
            made.schedule.save(folder / "schedule.yaml"),
            write_document(folder / "plan.json", made.to_dict()),
            made.profile.save(folder / "profile.json"),
            folder / "plan.png",
        ]
        made.plot(paths[-1])
        print_decision(decision)
        Console(markup=False).print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
    return made


def _eager(
    pruner: TokenPruning, pl_module: L.LightningModule, images: Tensor, compiled: LatencyProfile
) -> LatencyProfile | None:
    """The curve of a compiled model without its graphs, at the same counts; None where a wrapper compiles it."""
    with uncompiled(pl_module):
        if is_compiled(pl_module):
            return None
        return profile_latency(
            pl_module,
            images,
            method=Random(site="input") if pruner.searches else pruner.reduction,
            block=0 if pruner.searches else pruner.place,
            counts=compiled.tokens[:-1],
            max_seconds=pruner.max_seconds,
            protocol=pruner.protocol,
            target=pruner.target,
            progress=pruner.verbose,
        )


def _refuse_refresh(pruner: TokenPruning, **sources: str | None) -> None:
    """Raises ArgumentError where a profile is to be measured anew, and none is measured."""
    for name, value in sources.items():
        if pruner.refresh and value is not None:
            raise ArgumentError(f"`refresh` plays no part where `{name}` gives the latencies; got {name}={value!r}.")


def _found(
    pruner: TokenPruning, pl_module: L.LightningModule, images: Tensor, simulated: SimulatedDevice | None
) -> Found:
    if simulated is None:
        return profiled(pruner, pl_module, images)
    method, block = (Random(site="input"), 0) if pruner.searches else (pruner.reduction, pruner.place)
    profile = simulate_latency(
        pl_module,
        images,
        simulated,
        method=method,
        block=block,
        max_seconds=pruner.max_seconds,
        target=pruner.target,
    )
    return Found(profile, reused=False)
