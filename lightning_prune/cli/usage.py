"""What `lightning-prune --help` says; it imports nothing, so that it is printed at once."""

COMMANDS = {
    "compare": "validate dense and pruned in one run, by an objective or at speed-ups; writes tables, plots, report",
    "profile": "measure latency against the number of tokens on this device",
    "plan": "plan a schedule without validating it, also for another device",
    "validate": "validate pruned on the validation set",
    "test": "validate pruned on the test set",
    "vocabulary": "learn visual words for vwt-inter from unlabelled images",
    "models": "list the transformers of timm that can be pruned, and say why others cannot",
}
"""Command -> what it does."""

_OPTIONS = {
    "--config FILE": "YAML with the keys below; later files and options win",
    "--model.model NAME": "a timm name; --model.weights FILE for weights of your own",
    "--data CLASS": "DigitsData, ImageFolderData, or any LightningDataModule by its import path",
    "--prune.method NAME": "auto, tome, pomt, pomt-nearest, topk, evit, shift, vwt-intra, random, or a class",
    "--prune.schedule VALUE": "auto, a number of tokens to remove, a share of patch tokens to keep, a list with one\n"
    "number for each block, or a file",
    "--prune.block VALUE": "the reducing block: an index, or a fraction of the depth",
    "--prune.objective CLASS": "AccuracyBudget, LatencyBudget or Utility; two short forms follow",
    "--budget 1.5x | 12ms": "the most accurate schedule that is that much faster, or takes that long at most",
    "--max-drop 0.5%": "the fastest schedule that loses at most that share of the accuracy proxy",
    "--prune.time_limit S": "seconds for measuring and planning",
    "--output DIR": "folder for the files (compare, profile, plan)",
    "--profile FILE": "plan on the latency profile of another device (plan)",
    "--device simulated:...": "plan for, or profile, a device that is simulated (profile, plan)",
    "--methods NAME ...": "methods to compare, such as pomt tome int8 pomt+int8 (compare)",
    "--speedups NUMBER ...": "the speed-ups that they have to reach; by the objective if not given (compare)",
    "--resume false": "start again instead of going on from what is kept in the output folder (compare)",
    "--trainer.KEY VALUE": "any option of lightning.Trainer: accelerator, precision, devices, ...",
    "--print_config": "print the configuration and stop",
}

_USAGE = """\
usage: lightning-prune COMMAND [--config FILE] [--KEY VALUE ...]

Makes Vision Transformers faster on the device at hand, without training: measures latency against tokens, chooses how
many to remove, patches the model, and validates it.

commands:
{commands}

options (all of them: lightning-prune COMMAND --help; a hyphen and an underscore are the same in their names):
{options}

examples:
  lightning-prune compare --model.model vit_digits_patch4_56 --data DigitsData --output results/digits
  lightning-prune compare --config configs/digits.yaml --methods pomt tome random int8 --speedups 1.25 1.5 2
"""


def help_text() -> str:
    """The text of `lightning-prune --help`."""
    return _USAGE.format(commands=_table(COMMANDS, 10), options=_table(_OPTIONS, 24))


def _table(rows: dict[str, str], width: int) -> str:
    lines = []
    for name, text in rows.items():
        first, *more = text.split("\n")
        lines += [f"  {name:<{width}} {first}", *(f"  {'':<{width}} {line}" for line in more)]
    return "\n".join(lines)
