"""The command line: LightningCLI with pruning under a flat `prune:` key."""

import argparse
import json
import logging
import shlex
import sys
import warnings
from itertools import takewhile
from math import isfinite
from typing import Any

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from lightning_prune.callbacks import TokenPruning
from lightning_prune.classification.datamodules import DigitsData, ImageFolderData
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.cli.trainer import PruneTrainer
from lightning_prune.errors import ArgumentError, PruneError

_PASSED_BY_CODE = {"model", "dataloaders", "datamodule"}
_SEVERAL = ("--methods", "--speedups")
_SWITCHES = ("--fresh",)

__all__ = ["DigitsData", "ImageFolderData", "PruneCLI", "run"]  # the data classes are found by their bare names


class PruneCLI(LightningCLI):
    """`lightning-prune validate | test | profile | plan | compare | vocabulary`.

    Args:
        words: What was typed after the name of the command.
        kwargs: Of `lightning.pytorch.cli.LightningCLI`.
    """

    def __init__(self, words: list[str], **kwargs: Any) -> None:
        self._command = shlex.join(["lightning-prune", *words])
        super().__init__(args=join_list_options(words), **kwargs)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Pruning options stand at the top level, where errors are one line and not a dump of all callbacks."""
        parser.add_lightning_class_args(TokenPruning, "prune")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """The methods of the trainer that are commands, with the arguments that code fills in."""
        return dict.fromkeys(("validate", "test", "profile", "plan", "compare", "vocabulary"), _PASSED_BY_CODE)

    def instantiate_classes(self) -> None:
        """Creates the objects; where a class refuses its arguments, in its own words."""
        try:
            super().instantiate_classes()
        except ValueError as error:  # of jsonargparse, which lists what each type that is allowed there says
            said = str(error).partition("\nErrors:\n  - ")[2].partition("\nGiven value type:")[0].split("\n  - ")
            own = [line for line in said if line and not line.startswith("Expected a ")]
            if isinstance(error, PruneError) or not own:
                raise
            raise ArgumentError("; ".join(own)) from error

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Creates the trainer; what Lightning says of its options in errors of Python's is the user's to mend."""
        try:
            trainer = super().instantiate_trainer(**kwargs)
        except (ImportError, TypeError, ValueError) as error:
            raise ArgumentError(f"trainer: {error}") from error
        if isinstance(trainer, PruneTrainer):
            trainer.command = self._command
        return trainer

    def _parse_ckpt_path(self) -> None:
        """Leaves hyperparameters of a checkpoint alone: those of a foreign module are no options of ours."""


def join_list_options(words: list[str]) -> list[str]:
    """Words after an option that takes several are gathered into one list, as `--methods dense pomt tome`.

    jsonargparse wants `--methods=["dense", "pomt", "tome"]`, and `--fresh=true`; so given, an option is left as it is.

    Args:
        words: Of the command line.

    Raises:
        ArgumentError: If a speed-up is no number.

    Example:
        >>> from lightning_prune.cli.main import join_list_options
        >>> join_list_options(["compare", "--speedups", "1.5", "2", "--fresh=true"])
        ['compare', '--speedups=["1.5", "2"]', '--fresh=true']
    """
    found: list[str] = []
    position = 0
    while position < len(words):
        word, position = words[position], position + 1
        name, given, value = word.partition("=")
        more = list(takewhile(_is_value, words[position:])) if name in _SEVERAL else []
        values = [value, *more] if given and name in _SEVERAL else more
        if values and not values[0].startswith("[") and values != ["null"]:
            if name == "--speedups":
                _check_numbers(values)
            position += len(more)
            word = f"{name}={json.dumps(values)}"
        elif word in _SWITCHES and (position == len(words) or words[position].startswith("--")):
            word = f"{word}=true"
        found.append(word)
    return found


def _check_numbers(values: list[str]) -> None:
    """Before the parser, whose words for it name Python's types and not what is wanted."""
    for value in values:
        try:
            known = isfinite(float(value))
        except ValueError:
            known = False
        if not known:
            raise ArgumentError(f"`speedups` must be finite numbers > 1, as in --speedups 1.25 2; got {value!r}.")


def _is_value(word: str) -> bool:
    """Not an option; negative numbers are none."""
    return not word.startswith("-") or word[1:2].isdigit() or word[1:2] == "."


def run(args: list[str] | None = None) -> int:
    """Runs one command.

    Args:
        args: Command and options; those of the process if None.

    Returns:
        Exit status: 0, or 2 after an error that the user can mend, which is then told in one line.
    """
    _quieten()
    try:
        PruneCLI(
            sys.argv[1:] if args is None else args,
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
                "exit_on_error": False,  # it would print the usage, a page of Trainer's options, before the error
            },
        )
    except (PruneError, argparse.ArgumentError, MisconfigurationException, FileNotFoundError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _quieten() -> None:
    """Leaves out what Lightning says about itself, not what it says about the run."""
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.WARNING)
    for known in (
        ".*`isinstance\\(treespec, LeafSpec\\)` is deprecated.*",
        "LightningCLI's args parameter is intended to run from within Python.*",  # what was typed, gathered
    ):
        warnings.filterwarnings("ignore", message=known)
