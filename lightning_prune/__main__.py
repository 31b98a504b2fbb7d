"""Entry point of `lightning-prune` and `python -m lightning_prune`: answers the cheap questions without torch."""

import sys

from lightning_prune import __version__

_HELP = """\
usage: lightning-prune COMMAND [--config FILE] [--KEY VALUE ...]

Makes Vision Transformers faster on the device at hand, without training: measures latency against tokens, chooses how
many to remove, patches the model, and validates it.

commands:
  compare    validate dense and pruned in one run; table, results.csv, schedule.yaml, profile.png
  profile    measure latency against tokens on this device
  validate   validate pruned on the validation set
  test       the same on the test set
  vocabulary learn visual words for vwt-inter from unlabelled images
  models     say which of timm's transformers can be pruned

options (all of them: lightning-prune COMMAND --help):
  --config FILE            YAML with the keys below; later files and options win
  --model.model NAME       a timm name; --model.weights FILE for weights of your own
  --data CLASS             DigitsData, ImageFolderData, or any LightningDataModule by its import path
  --prune.method NAME      the reduction: pomt, random
  --prune.schedule VALUE   auto, a number of tokens, a keep rate, a list with one number a block, or a file
  --prune.block VALUE      the reducing block: an index, or a fraction of the depth
  --prune.alpha NUMBER     weight of latency against accuracy in [0, 1]
  --output DIR             folder for the files (compare, profile)
  --max_drop SHARE         accuracy budget: share of the accuracy proxy that may be lost (compare)
  --trainer.KEY VALUE      any option of lightning.Trainer: accelerator, precision, devices, ...
  --print_config           print the configuration and stop

example:
  lightning-prune compare --model.model vit_digits_patch4_56 --data DigitsData --output results/digits
"""


def main(args: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Command and options; those of the process if None.

    Returns:
        Exit status.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning-prune {__version__}")
        return 0
    if words[0] == "models":
        from lightning_prune.report.models import models

        return models(words[1:])
    from lightning_prune.cli import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
