"""A Lightning Trainer with four more verbs: profile, plan, compare and vocabulary."""

from pathlib import Path
from typing import Any

import lightning as L
from rich.console import Console
from rich.markup import escape

from lightning_prune.callbacks import PruningConfig, config_of
from lightning_prune.cli.commands import learn_words, run_plan, run_profile
from lightning_prune.comparison.api import compare_methods
from lightning_prune.comparison.objective_comparison import compare, ensure_output_dir
from lightning_prune.errors import ArgumentError
from lightning_prune.planning import Plan
from lightning_prune.profiling import LatencyProfile
from lightning_prune.reduction.vocabulary import Vocabulary


class PruneTrainer(L.Trainer):
    """`lightning.Trainer` with `profile`, `plan`, `compare` and `vocabulary`; the command line runs its methods.

    Settings of the pruning come from the `TokenPruning` callback among its callbacks, or are that callback's defaults.

    Example:
        >>> from lightning_prune import DigitsData, ImageClassifier
        >>> from lightning_prune.cli.trainer import PruneTrainer
        >>> trainer = PruneTrainer(logger=False)
        >>> # trainer.compare(ImageClassifier("vit_digits_patch4_56"), datamodule=DigitsData(), output="results")

    Attributes:
        command: What was typed, for the report of a comparison; empty where code calls.
    """

    command: str = ""

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
    ) -> LatencyProfile:
        """Measure latency against tokens on the first validation batch; writes profile.json and profile.png.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Gives the validation loader.
            output: Folder for the files.
            device: A device to simulate, as simulated:multiprocessors=8,tile=64; this one if not given.

        Raises:
            ArgumentError: If `output` cannot be written to, `device` is not a device, or the paper's protocol is asked
                for on a simulated one.
            DataError: If there is no batch to profile on.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return run_profile(self, model, self.config, output, device, **data)

    def plan(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/plan",
        profile: str | None = None,
        device: str | None = None,
    ) -> Plan:
        """Plan a schedule, also for a device that is elsewhere; writes schedule.yaml, plan.json and plan.png.

        Accuracy is estimated here, on images of the validation data; latency is measured here too, or taken from a
        profile that was measured where the schedule is to be used, or simulated.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Gives the validation loader.
            output: Folder for the files.
            profile: A profile.json that `profile` wrote, here or elsewhere.
            device: A device to simulate, as simulated:multiprocessors=8,tile=64.

        Raises:
            ArgumentError: As `profile`, if both `profile` and `device` are given, or if the pruner has a schedule.
            FileFormatError: If `profile` is no profile.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return run_plan(self, model, self.config, output, profile, device, **data)

    def compare(
        self,
        model: L.LightningModule,
        dataloaders: Any = None,
        datamodule: L.LightningDataModule | None = None,
        output: str = "results/compare",
        max_drop: float | None = None,
        methods: list[str] | None = None,
        speedups: list[float] | None = None,
        fresh: bool = False,
    ) -> list[dict[str, Any]]:
        """Validate dense and pruned in one run; writes results.csv, results.json and the schedules.

        Without `methods` the pruned variants are the best schedule by the pruner's objective (POMT's utility by
        default) and the fastest inside an accuracy budget; or, if the pruner has a schedule, that schedule; the profile
        is written beside them. With `methods` each is pruned until it is as much faster as `speedups` say, on this
        device, and pareto.png, tokens.png and report.html are written. What is finished is kept under `output/state`,
        and a run that was interrupted goes on from there.

        Args:
            model: The module that contains the Vision Transformer.
            dataloaders: Validation loaders, if there is no datamodule.
            datamodule: Gives the validation loader.
            output: Folder for the files.
            max_drop: The accuracy budget: share of the dense model's proxy that may be lost; 0.005 if not given.
            methods: Names of methods to compare: reductions, int8, and both, as in pomt+int8; dense is always there.
            speedups: Dense latency over theirs that the methods are to reach; 1.1, 1.25, 1.5 and 2 if not given.
            fresh: With `methods`: measure again what was finished before.

        Raises:
            ArgumentError: If `output` cannot be written to, a method is not known, a speed-up is not above 1, or an
                argument is given that would play no part.
            DataError: If there is nothing to validate on.
            UnsupportedModelError: If none of the methods can be used with the model.
        """
        from lightning_prune.comparison.output import write_comparison
        from lightning_prune.report.tables import comparison_table

        if methods is not None:
            return self._compare_methods(
                model, dataloaders, datamodule, Path(output), max_drop, methods, speedups, fresh
            )
        if speedups is not None or fresh:
            idle = f"speedups={speedups}" if speedups is not None else "fresh=True"
            raise ArgumentError(f"`{idle.split('=')[0]}` plays no part without `methods`; got {idle}.")
        folder = ensure_output_dir(output)
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        rows, decisions, seconds = compare(self, model, self.config, max_drop, **data)
        if self.is_global_zero:
            paths = write_comparison(folder, rows, decisions, seconds)
            console = Console()
            console.print(comparison_table(rows))
            for name, decision in decisions.items():
                console.print(f"[bold]{escape(name)}[/bold]: {escape(decision.reason)}", highlight=False)
            reused = next((decision.reused for decision in decisions.values() if decision.reused), "")
            if reused:
                console.print(
                    f"The latency profile is of {reused}, and kept; --prune.use_cache false measures it again."
                )
            written = escape(", ".join(map(str, paths)))
            console.print(f"Profiling and planning took {seconds:.0f} s. Written: {written}", soft_wrap=True)
            self._log_comparison([row.to_dict() for row in rows])
        return [row.to_dict() for row in rows]

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
            model: The module that contains the Vision Transformer, which has the patch size and the normalisation.
            dataloaders: Prediction loaders, if there is no datamodule.
            datamodule: Gives the prediction loader.
            output: The file to write, `.safetensors`.
            words: How many words.
            limit: How many images to learn from; all if not given.
            seed: Of k-means.

        Raises:
            ArgumentError: If an argument is unusable, or there are more words than patches.
            DataError: If there are no images.
        """
        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        return learn_words(self, model, self.config, output, words, limit, seed, **data)

    def _compare_methods(
        self,
        model: L.LightningModule,
        dataloaders: Any,
        datamodule: L.LightningDataModule | None,
        output: Path,
        max_drop: float | None,
        methods: list[str],
        speedups: list[float] | None,
        fresh: bool,
    ) -> list[dict[str, Any]]:
        from lightning_prune.comparison.output import check_room, document_of, write_methods
        from lightning_prune.report.tables import comparison_table, remarks

        if max_drop is not None:
            raise ArgumentError(f"`max_drop` plays no part where `methods` are compared; got max_drop={max_drop}.")
        folder, console = (
            ensure_output_dir(output),
            Console(markup=False),
        )  # names of files and methods may hold brackets
        check_room(folder)

        def tell(text: str) -> None:
            if self.is_global_zero:
                console.print(text, soft_wrap=True, highlight=False)

        data = {"dataloaders": dataloaders, "datamodule": datamodule}
        found = compare_methods(self, model, self.config, methods, speedups, folder, fresh, tell, **data)
        table = [row.to_dict() for row in found.rows]
        if self.is_global_zero:
            command = self.command or f"trainer.compare(methods={methods}, speedups={speedups})"
            paths = write_methods(folder, found, command, _normalisation(model))
            console.print(comparison_table(found.rows))
            for remark in remarks(document_of(found, command)):
                console.print(remark, soft_wrap=True, highlight=False)
            console.print(
                f"Planning took {found.decided.seconds:.0f} s. Written: {', '.join(map(str, paths))}", soft_wrap=True
            )
            self._log_comparison(table)
        return table

    def _log_comparison(self, rows: list[dict[str, Any]]) -> None:
        """Every run logs the same keys at step 0, so each variant gets keys of its own."""
        figures = {
            f"compare/{row['variant']}/{key}": value
            for row in rows
            for key, value in row.items()
            if isinstance(value, int | float)
        }
        for logger in self.loggers:
            logger.log_metrics(figures, step=0)
            logger.save()
            logger.finalize("success")


def _normalisation(model: L.LightningModule) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Mean and standard deviation that the images were normalised by, where the module says what its model wants."""
    config: Any = getattr(model, "data_config", None)
    try:
        mean, std = (tuple(float(value) for value in config[name]) for name in ("mean", "std"))
    except (KeyError, TypeError, ValueError):
        return None
    return mean, std
