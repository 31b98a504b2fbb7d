"""The text of `lightning-prune COMMAND --help`: pruning first, and each class of the options of Lightning on demand."""

import textwrap
from collections.abc import Iterable

from lightning_prune.cli.options import (
    DATA_CLASSES,
    EVERYWHERE,
    Option,
    data_options,
    groups_of,
    names_of,
    objective_options,
)
from lightning_prune.cli.usage import COMMANDS

_WIDTH = 112
# Options of the trainer that matter to these commands; the others are named only.
_TRAINER: tuple[str, ...] = (
    "accelerator",
    "devices",
    "strategy",
    "precision",
    "limit_val_batches",
    "limit_test_batches",
)
_TRAINER += ("limit_predict_batches", "callbacks", "logger", "enable_progress_bar", "default_root_dir")


def command_help(command: str) -> str:
    """The help of a command, made without importing torch.

    Args:
        command: One of `lightning_prune.cli.usage.COMMANDS`, except those of `OWN_PARSERS`.

    Example:
        >>> from lightning_prune.cli.help_page import command_help
        >>> command_help("validate").splitlines()[0]
        'usage: lightning-prune validate [--config FILE] [--KEY VALUE ...]'
    """
    groups = groups_of(command)
    others = [name for name in names_of(groups["trainer"]) if name not in _TRAINER]
    about = COMMANDS[command][0].upper() + COMMANDS[command][1:]
    lines = [f"usage: lightning-prune {command} [--config FILE] [--KEY VALUE ...]", "", f"{about}.", ""]
    lines += ["pruning:", *_entries(groups["prune"], "prune.")]
    lines += _entry("budget", "1.5x, 12ms or 12ms@p90: --prune.objective LatencyBudget; exit status 3 if it is missed")
    lines += _entry("max-drop", "0.5%: --prune.objective AccuracyBudget")
    if command in ("validate", "test"):
        lines += _entry(
            "exported",
            "folders of exported models, run instead of --model.model; the first is what others are compared with",
        )
    lines += ["", "objectives (--prune.objective CLASS --prune.objective.KEY VALUE):"]
    for kind, options in objective_options().items():
        lines += [f"  {kind}", *(line for option in options for line in _entry(f"  {option.name}", _first(option)))]
    lines += ["", f"{command}:", *_entries(groups[""], "")]
    lines += ["", "model:", *_entries(groups["model"], "model.")]
    lines += ["", "data (--data CLASS --data.KEY VALUE; CLASS may be any LightningDataModule by its import path):"]
    for kind in DATA_CLASSES:
        lines += [
            f"  {kind}",
            *(ln for option in data_options(kind) for ln in _entry(f"  {option.name}", _first(option))),
        ]
    lines += ["", "trainer (--trainer.KEY VALUE, as of lightning.Trainer):"]
    lines += [ln for o in groups["trainer"] if o.name in _TRAINER for ln in _entry(f"trainer.{o.name}", _first(o))]
    lines += textwrap.wrap(f"also {', '.join(others)}", _WIDTH, initial_indent="  ", subsequent_indent="  ")
    lines += ["", "everywhere:", *(line for name, text in EVERYWHERE.items() for line in _entry(name, text))]
    lines += ["", "The options of a class: --trainer.logger.help CLASS, --data.help CLASS and so on."]
    return "\n".join(lines) + "\n"


def _entries(options: Iterable[Option], prefix: str) -> list[str]:
    lines: list[str] = []
    for option in options:
        default = f" (default: {option.default})" if option.default else ""
        lines += _entry(f"{prefix}{option.name}", f"{option.text}{default}")
    return lines


def _entry(name: str, text: str) -> list[str]:
    """An option and its text, on one line if there is room."""
    depth = len(name) - len(name.lstrip())
    head = f"  {' ' * depth}--{name.lstrip()}" if not depth else f"  {name}"
    return textwrap.wrap(f"{head}  {text}", _WIDTH, initial_indent="  ", subsequent_indent=" " * 8)


def _first(option: Option) -> str:
    """The first sentence of an option's text, and its default."""
    default = f" (default: {option.default})" if option.default else ""
    return f"{option.text.split('. ')[0].rstrip('.')}.{default}"
