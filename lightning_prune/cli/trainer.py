"""A Lightning Trainer with the methods profile, plan, compare, export, bundle and vocabulary."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import lightning as L
from rich.console import Console

from lightning_prune.callbacks import PruningConfig, config_of
from lightning_prune.classification.evaluation_data import PreparedData
from lightning_prune.cli.bundle_command import run_bundle
from lightning_prune.cli.export_command import run_export
from lightning_prune.cli.plan_commands import run_plan, run_profile
from lightning_prune.cli.vocabulary_command import learn_words
from lightning_prune.comparison.api import compare
from lightning_prune.comparison.comparison_results import Comparison
from lightning_prune.exporting import DeviceBundle, ExportReport
from lightning_prune.exporting.export_report import GraphForm
from lightning_prune.exporting.exported_graph import BatchSize
from lightning_prune.exporting.image_input import InputForm
from lightning_prune.exporting.precision import Precision
from lightning_prune.planning import Plan
from lightning_prune.profiling import LatencyProfile
from lightning_prune.reduction.vocabulary import Vocabulary
from lightning_prune.report.tables import comparison_table, remarks


class PruneTrainer(L.Trainer):
    """`lightning.Trainer` with `profile`, `plan`, `compare`, `export`, `bundle` and `vocabulary`, which are commands.

    The settings are those of the `TokenPruning` callback among its callbacks, or the defaults of that callback.

    Example:
        >>> from lightning_prune import DigitsData, ImageClassifier
        >>> from lightning_prune.cli.trainer import PruneTrainer
        >>> trainer = PruneTrainer(logger=False)
        >>> # trainer.compare(ImageClassifier("vit_digits_patch4_56"), datamodule=DigitsData(), output="results")

    Attributes:
        command: The command line, for the report of a comparison; empty if called from Python.
        budget_missed: Whether the last plan, or every variant of the last comparison, misses the budget.
        settings: The configuration of the command line, as plain values; empty if called from Python.
    """

    command: str = ""
    budget_missed: bool = False
    settings: Mapping[str, Any] = MappingProxyType({})

    @property
    def config(self) -> PruningConfig:
        """The settings of the `TokenPruning` among the callbacks, or the default ones."""
        return config_of(self)

    def profile(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/profile",
        device: str | None = None,
        runtimes: list[str] | None = None,
        clock: str | None = None,
    ) -> LatencyProfile:
        """Measure latency against tokens on the first validation batch; writes profile.json and profile.png.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Provides the validation loader.
            output: Folder for the files.
            device: A device to simulate, such as simulated:multiprocessors=8,tile=64; default: this device.
            runtimes: What executes the model, such as torch onnxruntime openvino: all curves in one picture.
            clock: wall, or cpu for the CPU time of this process, at one thread; default: that of the pruner.

        Raises:
            ArgumentError: If `output` cannot be written to, `device` is invalid, or the paper's protocol is used with a
                simulated device.
            DataError: If there is no batch to profile on.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return run_profile(self, model, self.config, output, device, runtimes, clock, **data)

    def plan(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/plan",
        profile: str | None = None,
        device: str | None = None,
    ) -> Plan:
        """Plan a schedule, also for another device; writes schedule.yaml, plan.json and plan.png.

        Accuracy is estimated on this device, on images of the validation data. Latency is measured on this device,
        simulated, or read from a profile of the device on which the schedule will be used.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Provides the validation loader.
            output: Folder for the files.
            profile: A profile.json written by `profile`, or by a bundle, on any device.
            device: A device to simulate, such as simulated:multiprocessors=8,tile=64.

        Raises:
            ArgumentError: See `profile`; also if `profile` and `device` are both given, or the pruner has a schedule.
            FileFormatError: If `profile` does not hold a profile.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        made = run_plan(self, model, self.config, output, profile, device, **data)
        self.budget_missed = not made.met
        return made

    def compare(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/compare",
        methods: list[str] | None = None,
        speedups: list[float] | None = None,
        runtimes: list[str] | None = None,
        resume: bool = True,
        per_class: bool = False,
        controls: bool = True,
        metric_from_step: str | None = None,
    ) -> Comparison:
        """Validate dense and pruned in one run; writes tables, schedules, plots and report.html.

        Each method is planned for every target speed-up or, without `speedups`, by the objective. Without `methods` the
        method of the pruner is compared with the POMT paper's own choice, or with a schedule of the pruner. What is
        finished is kept under `output/state`, and a run that was interrupted goes on from there.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Provides the validation loader.
            output: Folder for the files.
            methods: Names of methods to compare: reductions, auto, exact (dense without what no head reads), int8,
                and both, as in pomt+int8; dense is always there.
            speedups: Dense latency over theirs that the methods are to reach; planned by the objective if not given.
            runtimes: What executes the model: torch, torch.compile:mode=blocks, ...; each variant in each of them, and
                in that of the pruner if not given.
            resume: Whether to go on from what was finished before.
            per_class: Whether to say the change of each class, too, and the worst of each variant.
            controls: Whether random and resize, which methods are to beat, are planned likewise and added.
            metric_from_step: Key of a metric of each image in the mapping that validation_step returns; its change
                then has an interval, paired by image.

        Raises:
            ArgumentError: If `output` cannot be written to, a method is not known, or a speed-up is not above 1.
            DataError: If there is nothing to validate on.
            UnsupportedModelError: If none of the methods can be used with the model.
        """
        typed = f"methods={methods}, speedups={speedups}, runtimes={runtimes}{'' if controls else ', controls=False'}"
        command = self.command or f"trainer.compare({typed})"
        data = dataloaders if datamodule is None else datamodule
        settings = {**self.settings}
        if isinstance(datamodule, PreparedData):
            settings["images"] = datamodule.config_for(model)[0]
        found = compare(
            self,
            model,
            data,
            methods,
            speedups,
            runtimes=runtimes,
            output=output,
            resume=resume,
            per_class=per_class,
            command=command,
            settings=settings,
            on_results=_print_comparison,
            controls=controls,
            metric_from_step=metric_from_step,
        )
        self.budget_missed = found.best is not None and not found.best.met
        if self.is_global_zero:
            written = ", ".join(str(path) for path in found.files)
            Console(markup=False).print(f"Planning took {found.plan.seconds:.0f} s. Written: {written}", soft_wrap=True)
        return found

    def export(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/export",
        schedule: str | None = None,
        format: str = "onnx",
        batch: BatchSize = "static",
        batch_size: int | None = None,
        inputs: InputForm = "float32",
        precision: Precision = "float32",
        reduce_range: bool | None = None,
        min_agreement: float | None = None,
        graph: GraphForm | Literal["auto"] = "native",
        opset: int | None = None,
        overwrite: bool = False,
    ) -> ExportReport:
        """Write the pruned model as a folder that a runtime loads, and check it against PyTorch in float32.

        The model is checked on images of the validation data, at most `prune.calibration` of them, and nothing is
        written if it gives other outputs. Latency is that of the runtime, dense and pruned.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Provides the validation loader.
            output: Folder for the files, new or empty.
            schedule: File of a schedule that names its method; default: that of the pruner, which must have one.
            format: onnx, openvino, torch-export, aotinductor or executorch.
            batch: static, for batches of one size, or dynamic, for any.
            batch_size: Number of images in a batch; default: that of the validation loader.
            inputs: float32 for normalised images, or uint8 for images of 0 to 255, which the file normalises itself.
            precision: float32, float16, bfloat16, int8 (quantized on images of the validation data) or int8-dynamic.
            reduce_range: true for 8-bit weights in 7 bits, for x86 without VNNI; default: what this machine needs.
            min_agreement: Least share of the images with the same class as in PyTorch, in lower precisions than
                float32; default: 0.995, 0.9 for int8.
            graph: native; portable for accelerators that refuse TopK, Gather or Scatter; auto for the faster one here.
            opset: Version of ONNX's operators, from 17 on; default: that of PyTorch's exporter.
            overwrite: Whether an existing folder is replaced.

        Raises:
            ArgumentError: If an argument is invalid, the folder exists, or there is no schedule.
            DataError: If there is nothing to validate on.
            ExportError: If the model cannot be converted, or the file gives other outputs.
            FileFormatError: If `schedule` does not hold a schedule.
            RuntimeUnavailableError: If the runtime of the format is not installed.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        options = (schedule, format, batch, batch_size, inputs, precision, reduce_range, min_agreement, graph, opset)
        return run_export(self, model, self.config, output, *options, overwrite, **data)

    def bundle(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/bundle",
        runtime: str | None = None,
        batch_size: int | None = None,
        overwrite: bool = False,
    ) -> DeviceBundle:
        """Write a folder that measures the latency profile on a device that has a runtime, but no torch.

        On the device `python profile.py` writes profile.json, on which `plan --profile` plans for that device.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Provides the validation loader.
            output: Folder for the files, new or empty.
            runtime: onnxruntime or openvino, with settings; default: that of the pruner, else onnxruntime.
            batch_size: Number of images in a batch; default: that of the validation loader.
            overwrite: Whether an existing folder is replaced.

        Raises:
            ArgumentError: If an argument is invalid, the folder exists, or the runtime needs torch.
            DataError: If there is no batch.
            ExportError: If the model or a method cannot be converted.
            RuntimeUnavailableError: If the runtime is not installed.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return run_bundle(self, model, self.config, output, runtime, batch_size, overwrite, **data)

    def vocabulary(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "words.safetensors",
        words: int = 1000,
        limit: int | None = None,
        seed: int = 0,
    ) -> Vocabulary:
        """Learn visual words for `VWTInter` from the unlabelled images of the prediction loader.

        Args:
            model: The module that contains the Vision Transformer, which determines patch size and normalisation.
            dataloaders: Prediction loaders, if there is no datamodule.
            datamodule: Provides the prediction loader.
            output: The file to write, `.safetensors`.
            words: Number of words.
            limit: Number of images to learn from; default: all.
            seed: Seed of k-means.

        Raises:
            ArgumentError: If an argument is invalid, or there are more words than patches.
            DataError: If there are no images.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return learn_words(self, model, self.config, output, words, limit, seed, **data)


def _print_comparison(found: Comparison) -> None:
    console = Console(markup=False)  # names of files and methods may contain brackets
    console.print(comparison_table(found.rows))
    for remark in remarks(found.to_dict()):
        console.print(remark, soft_wrap=True, highlight=False)
