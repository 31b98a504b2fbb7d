"""The command line: LightningCLI with pruning under a flat `prune:` key."""

import logging
import shlex
import sys
from typing import Any

import lightning as L
import yaml
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from rich.console import Console

from lightning_prune.callbacks import TokenPruning
from lightning_prune.callbacks.hooks import trainer_callbacks
from lightning_prune.classification.datamodules import DigitsData, ImageFolderData
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.classification.image_table import ImageTableData
from lightning_prune.cli.endings import BUDGET_MISSED, run_to_end
from lightning_prune.cli.evaluation_commands import run_evaluation
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.cli.usage import COMMANDS, OWN_PARSERS
from lightning_prune.cli.words import parser_words, values_of
from lightning_prune.comparison.exported_files import RightImages, exported_rows, exported_table
from lightning_prune.errors import ArgumentError, PruneError
from lightning_prune.exporting import ExportedModel, load_exported
from lightning_prune.exporting.instructions import figures

_LOWEST_LEVELS = {  # what is below is not about the run
    "lightning.pytorch.utilities.rank_zero": logging.WARNING,
    "lightning.pytorch.trainer.connectors.signal_connector": logging.WARNING,
    "lightning.fabric.utilities.seed": logging.WARNING,
    "lightning.fabric.utilities.distributed": logging.WARNING,
    "torch.utils._pytree": logging.ERROR,  # deprecations in torchao, which transformers imports
}
_PASSED_BY_CODE = {"model", "dataloaders", "datamodule"}

__all__ = [
    "DigitsData",
    "ImageFolderData",
    "ImageTableData",
    "PruneCLI",
    "run",
]  # data classes can be given by name


class PruneCLI(LightningCLI):
    """The commands of `lightning_prune.cli.usage.COMMANDS` except those of `OWN_PARSERS`.

    Args:
        words: The command line after `lightning-prune`.
        kwargs: See `lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, words: list[str], **kwargs: Any) -> None:
        self._command = shlex.join(["lightning-prune", *words])
        commands = [command for command in COMMANDS if command not in OWN_PARSERS]
        self._commands = words[:1] if words and words[0] in commands else commands
        self.exported = values_of(words, "exported")
        self.right_images = RightImages()
        super().__init__(args=parser_words(words), **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds the options of pruning at the top level, where error messages do not include all callbacks."""
        parser.add_lightning_class_args(TokenPruning, "prune")

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # Lightning's is a static method
        """The methods of the trainer that are commands, with the arguments that are not options.

        The command alone that the command line begins with, if it does: the parser of each takes long to build. Static
        in LightningCLI, which calls it on the object only; here it depends on the command line.
        """
        return dict.fromkeys(self._commands, _PASSED_BY_CODE)

    def instantiate_classes(self) -> None:
        """Creates the objects. If a class of this package raises an error, that error is raised, not jsonargparse's."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # raised by jsonargparse from the error of the first allowed type
            cause = error.__cause__
            while cause is not None and not isinstance(cause, PruneError):
                cause = cause.__cause__
            if cause is None or isinstance(error, PruneError):
                raise
            raise cause from None
        self.other_files = [self._classifier_of(folder) for folder in self.exported[1:]]

    def _classifier_of(self, folder: str) -> ImageClassifier:
        return ImageClassifier(load_exported(folder), warmup=self.model.hparams["warmup"])

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Creates the trainer. Errors of Lightning about its options are raised as ArgumentError."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, TypeError, ValueError) as error:
            raise ArgumentError(f"trainer: {error}") from error
        if len(self.exported) > 1:
            trainer_callbacks(trainer).append(self.right_images)
        if isinstance(trainer, PruneTrainer):
            trainer.command = self._command
            parser, config = self._parser(self.subcommand), self.config[self.subcommand]
            trainer.settings = {"command_line": yaml.safe_load(parser.dump(config, skip_none=False))}
        return trainer

    def validate(self, model: L.LightningModule, **arguments: Any) -> None:
        """Runs the command `validate`; LightningCLI calls this in place of the method of the trainer."""
        run_evaluation(self.trainer, "validate", model, **arguments)

    def test(self, model: L.LightningModule, **arguments: Any) -> None:
        """Runs the command `test`; see `validate`."""
        run_evaluation(self.trainer, "test", model, **arguments)

    def _parse_ckpt_path(self) -> None:
        """Ignores hyperparameters of a checkpoint, because those of other modules are not options of this parser."""


def run(args: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: Command and options; those of the process if None.

    Returns:
        Exit status: 0; 2 after an error in the input, which is printed on one line; 3 if the budget is missed, by
        every variant of a comparison; 130 after SIGINT, 143 after SIGTERM.
    """
    for name, level in _LOWEST_LEVELS.items():
        logging.getLogger(name).setLevel(level)
    return run_to_end(lambda: _run(sys.argv[1:] if args is None else args))


def _print_export(exported: ExportedModel) -> None:
    """Prints what was found when a model was exported, the dense one next to it, after the figures of the file."""
    console = Console(markup=False)
    for line in (f"{exported.report.model}, when it was exported:", *figures(exported.report)):
        console.print(line, soft_wrap=True, highlight=False)


def _compare_exported(cli: PruneCLI) -> None:
    """Validates the other exported folders of a command line, and prints a table of all."""

    def run(module: L.LightningModule) -> Any:
        return run_evaluation(cli.trainer, str(cli.subcommand), module, verbose=False, datamodule=cli.datamodule)

    rows = exported_rows(cli.trainer, cli.model, cli.right_images, cli.other_files, run)
    if cli.trainer.is_global_zero:
        Console(markup=False).print(exported_table(rows))


def _run(words: list[str]) -> int:
    cli = PruneCLI(
        words,
        model_class=ImageClassifier,
        datamodule_class=L.LightningDataModule,
        subclass_mode_data=True,
        trainer_class=PruneTrainer,
        trainer_defaults={"logger": False, "enable_checkpointing": False},
        save_config_callback=None,
        seed_everything_default=0,
        parser_kwargs={
            "prog": "lightning-prune",
            "description": "Prune the tokens of Vision Transformers, measured on this device.",
            "exit_on_error": False,  # else a page of options is printed before the error
        },
    )
    missed = isinstance(cli.trainer, PruneTrainer) and cli.trainer.budget_missed
    if cli.subcommand in ("validate", "test"):
        pruners = [each for each in trainer_callbacks(cli.trainer) if isinstance(each, TokenPruning)]
        plans = [pruner.decision.plan for pruner in pruners if pruner.decision is not None]
        missed = any(plan is not None and not plan.met for plan in plans)
        exported = getattr(cli.model, "model", None)
        if isinstance(exported, ExportedModel) and cli.trainer.is_global_zero:
            _print_export(exported)
        if len(cli.exported) > 1:
            _compare_exported(cli)
    return BUDGET_MISSED if missed else 0
