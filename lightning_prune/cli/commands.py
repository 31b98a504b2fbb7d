"""The commands `profile`, `plan` and `vocabulary`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from rich.console import Console
from torch import Tensor

from lightning_prune._utils.files import ensure_output_dir, write_document
from lightning_prune._utils.validation import check
from lightning_prune.callbacks import PruningConfig
from lightning_prune.callbacks.batches import images_from_batch
from lightning_prune.callbacks.decision import Decision, planned, print_decision, profiled
from lightning_prune.callbacks.first_batch import FirstBatch, on_first_batch
from lightning_prune.callbacks.hooks import command_run
from lightning_prune.errors import DataError
from lightning_prune.patching import find_vision_transformer
from lightning_prune.planning import Plan
from lightning_prune.profiling import TOKEN_CURVE, LatencyProfile, SimulatedDevice, profile_latency, simulate_latency
from lightning_prune.profiling.cache import CachedProfile
from lightning_prune.profiling.measurement import ready_to_run
from lightning_prune.reduction import tokens_per_image
from lightning_prune.reduction.patchify import patch_side
from lightning_prune.reduction.vocabulary import Vocabulary, WordLearner
from lightning_prune.report.plots import plot
from lightning_prune.report.tables import against_eager, profile_table, shape_of
from lightning_prune.runtimes.torch_runtime import is_compiled, uncompiled


def run_profile(
    trainer: L.Trainer, model: L.LightningModule, config: PruningConfig, output: str, device: str | None, **data: Any
) -> LatencyProfile:
    """Measures or simulates latency against the number of tokens; prints a table, writes profile.json and profile.png.

    Where a model is compiled in place, its profile without compilation is measured too, and drawn and written.

    Args:
        trainer: Its accelerator and precision are used.
        model: Contains the Vision Transformer.
        config: Method, block, time limit, and where profiles are kept.
        output: Folder for the files.
        device: `simulated:...`, as `SimulatedDevice.parse` takes it; None for the trainer's.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: If `output` cannot be written to, `device` is not a device, or a setting has no effect on it.
        DataError: If there is no batch to profile on.
    """
    simulated = None if device is None else SimulatedDevice.parse(device)
    check("protocol", config.protocol, "'deployed' on a simulated device", simulated is None or _is_deployed(config))
    folder = ensure_output_dir(output)

    def work(first: FirstBatch) -> tuple[CachedProfile, LatencyProfile | None]:
        measured = _profile(first, simulated, of_method=True)
        compiled = simulated is None and is_compiled(first.module)
        return measured, _eager_profile(first, measured.profile) if compiled else None

    measured, eager = on_first_batch(trainer, model, config, work, **data)
    profile = measured.profile
    if trainer.is_global_zero:
        paths = [profile.save(folder / "profile.json"), folder / "profile.png"]
        plot(profile, paths[1], eager=eager)
        if eager is not None:
            paths.append(eager.save(folder / "profile_eager.json"))
        console = Console(markup=False)
        console.print(profile_table(profile))
        if measured.reused:
            when = profile.context.get("measured", "before")
            console.print(f"Measured {when} and kept; --prune.use_cache false measures it again.", soft_wrap=True)
        if eager is not None:
            console.print(against_eager(profile, eager))
        console.print(f"{shape_of(profile)} Written: {', '.join(map(str, paths))}", soft_wrap=True)
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
        profile: The file of a profile, which may be of another device; None measures one here.
        device: `simulated:...`; None for the trainer's.
        data: `datamodule` or `dataloaders`.

    Raises:
        ArgumentError: As `run_profile`, and if both `profile` and `device` are given, or a setting has no effect.
        DataError: If there is no batch to plan on.
        FileFormatError: If `profile` does not hold a profile.
    """
    if profile is not None:
        check("device", device, "left out with `profile`, which says the latencies", device is None)
    check("protocol", config.protocol, "'deployed' for `plan`", _is_deployed(config))
    check("schedule", config.schedule, "left out for `plan`, which plans one", config.schedule == "auto")
    given = None if profile is None else CachedProfile(LatencyProfile.load(profile), reused=False)
    simulated = None if device is None else SimulatedDevice.parse(device)
    folder = ensure_output_dir(output)

    def work(first: FirstBatch) -> Decision:
        latency = _profile(first, simulated) if given is None else given
        return planned(config, first.module, first.images, first.calibration(), latency)

    decision = on_first_batch(trainer, model, config, work, **data)
    made = decision.plan
    assert made is not None
    if trainer.is_global_zero:
        paths = [
            made.schedule.save(folder / "schedule.yaml"),
            write_document(folder / "plan.json", made.to_dict()),
            made.profile.save(folder / "profile.json"),
            folder / "plan.png",
        ]
        plot(made, paths[-1])
        print_decision(decision)
        Console(markup=False).print(f"Written: {', '.join(map(str, paths))}", soft_wrap=True)
    return made


def _is_deployed(config: PruningConfig) -> bool:
    return config.protocol == "deployed"


def _eager_profile(first: FirstBatch, compiled: LatencyProfile) -> LatencyProfile | None:
    """The profile of a compiled model without its graphs, at the same counts; None where a wrapper compiles it."""
    config = first.config
    with uncompiled(first.module):
        if is_compiled(first.module):
            return None
        return profile_latency(
            first.module,
            first.images,
            method=TOKEN_CURVE if config.plans_blocks else config.reduction,
            block=0 if config.plans_blocks else config.place,
            counts=compiled.tokens[:-1],
            time_limit=config.time_limit,
            protocol=config.protocol,
            module_path=config.module_path,
            verbose=config.verbose,
        )


def _profile(first: FirstBatch, simulated: SimulatedDevice | None, of_method: bool = False) -> CachedProfile:
    config = first.config
    if simulated is None:
        return profiled(config, first.module, first.images, of_method)
    # The latencies of a method in one block are known exactly, its overhead included, and can be planned on.
    general = config.plans_blocks or (config.reduction.multi_block and not of_method)
    method, block = (TOKEN_CURVE, 0) if general else (config.reduction, config.place)
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


_SHOWN = 64  # images whose tokens are counted for the report
_THRESHOLDS = (0.1, 0.2)


def learn_words(
    trainer: L.Trainer,
    model: L.LightningModule,
    config: PruningConfig,
    output: str,
    words: int,
    limit: int | None,
    seed: int,
    **data: Any,
) -> Vocabulary:
    """Learns visual words by k-means on the prediction loader, saves them and prints how many tokens images would keep.

    The module's own steps do not run, but its hooks do, so that the images are those that its transformer receives.

    Args:
        trainer: Its prediction loop runs, in one process.
        model: Contains the Vision Transformer. A `data_config` with mean and std is used if it has one.
        config: Says which transformer, and where the images of a batch are.
        output: The file, `.safetensors`.
        words: Number of words.
        limit: How many images to learn from; None for all.
        seed: Of k-means.
        data: `datamodule` or `dataloaders`, as `Trainer.predict` takes them.

    Raises:
        ArgumentError: If an argument is unusable, or there are more words than patches.
        DataError: If there are no images.
    """
    check("output", output, "a file that ends in .safetensors", Path(output).suffix == ".safetensors")
    check("limit", limit, "a number of images >= 1", limit is None or limit >= 1)
    processes = trainer.world_size
    check("trainer.devices", processes, "1, because one process learns the words", processes == 1)
    ensure_output_dir(Path(output).absolute().parent)
    reader = _Reader(config, words, limit, seed)
    vars(model)["predict_step"] = _no_step
    try:
        with command_run(trainer, config, reader):
            trainer.predict(model, return_predictions=False, **data)
    finally:
        del vars(model)["predict_step"]
    if reader.learner is None:
        raise DataError("The prediction loader must yield at least one batch, got none.")
    with Console(stderr=True).status(f"Learning the last of {words} words"):
        vocabulary = reader.learner.finish(*_normalisation(model, config.module_path, reader.last.shape[1]))
    path = vocabulary.save(output)
    _report(Console(markup=False), vocabulary, reader, path)
    return vocabulary


class _Reader(L.Callback):
    """Learns from the batches of a prediction run, and ends the run at the limit of images."""

    def __init__(self, config: PruningConfig, words: int, limit: int | None, seed: int) -> None:
        self.config, self.words, self.limit, self.seed = config, words, limit, seed
        self.learner: WordLearner | None = None
        self.last = torch.empty(0)

    def on_predict_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        images = images_from_batch(batch, self.config.images_from_batch)
        if self.learner is None:
            with trainer.precision_plugin.forward_context():
                side = _patch_size(pl_module, images, self.config.module_path)
                self.learner = WordLearner(side, self.words, self.seed)
        left = len(images) if self.limit is None else self.limit - self.learner.images
        images = images[:left].detach().cpu().float()
        self.learner.add(images)
        same = self.last.shape[1:] == images.shape[1:]
        self.last = torch.cat((self.last, images))[-_SHOWN:] if same else images[-_SHOWN:]
        if self.learner.images == self.limit:
            raise StopIteration  # Lightning's loop ends as if the loader had no more batches


def _no_step(*args: Any, **kwargs: Any) -> tuple[()]:
    return ()


def _patch_size(module: L.LightningModule, images: Tensor, target: str | None) -> int:
    """The side of the transformer's patches, computed from the number of tokens of an image."""
    transformer = find_vision_transformer(module, target)
    with ready_to_run(transformer):
        patches = transformer.count_tokens(images[:1]) - transformer.num_prefix_tokens
    return patch_side(images.shape[2], images.shape[3], patches)


def _normalisation(module: L.LightningModule, target: str | None, channels: int) -> tuple[Any, Any]:
    """Mean and std of each channel by the data config of the module, or else of its transformer; None if unknown.

    They are unknown, too, if the config is for another number of channels.
    """
    transformer: Any = find_vision_transformer(module, target).root
    config = getattr(module, "data_config", None) or getattr(transformer, "pretrained_cfg", None) or {}
    mean, std = config.get("mean"), config.get("std")
    return (mean, std) if mean is not None and std is not None and len(mean) == len(std) == channels else (None, None)


def _report(console: Console, vocabulary: Vocabulary, reader: _Reader, path: Path) -> None:
    say: Callable[[str], None] = lambda text: console.print(text, soft_wrap=True, highlight=False)  # noqa: E731
    images = reader.learner.images if reader.learner else 0
    side = vocabulary.patch_size
    say(f"{len(vocabulary)} words for patches of {vocabulary.channels} x {side} x {side}, learned from {images} images")
    for threshold in _THRESHOLDS:
        say(f"threshold {threshold}: {tokens_per_image([reader.last], vocabulary, threshold)}")
    say("The words were learned from these images among others; images that they were not learned from may keep more.")
    say(f"Written: {path}")
