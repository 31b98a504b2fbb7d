"""Entry point of `lightning-prune` and `python -m lightning_prune`: answers the cheap questions without torch."""

import sys

from lightning_prune import __version__

_HELP = """\
usage: lightning-prune COMMAND [--config FILE] [--KEY VALUE ...]

Makes Vision Transformers faster on the device at hand, without training: measures latency against tokens, chooses how
many to remove, patches the model, and validates it.

commands:
  compare    validate dense and pruned in one run; table, results.csv, schedule.yaml, profile.png; with --methods
             every method at every speed-up: also pareto.png, tokens.png and report.html
  profile    measure latency against tokens on this device
  validate   validate pruned on the validation set
  test       the same on the test set
  vocabulary learn visual words for vwt-inter from unlabelled images
  models     say which of timm's transformers can be pruned

options (all of them: lightning-prune COMMAND --help):
  --config FILE            YAML with the keys below; later files and options win
  --model.model NAME       a timm name; --model.weights FILE for weights of your own
  --data CLASS             DigitsData, ImageFolderData, or any LightningDataModule by its import path
  --prune.method NAME      the reduction: pomt, pomt-nearest, topk, evit, tome, shift, vwt-intra, random, or a class
  --prune.schedule VALUE   auto, a number of tokens, a keep rate, a list with one number a block, or a file
  --prune.block VALUE      the reducing block: an index, or a fraction of the depth
  --output DIR             folder for the files (compare, profile)
  --max_drop SHARE         accuracy budget: share of the accuracy proxy that may be lost (compare)
  --methods NAME ...       methods to compare, such as pomt tome int8 pomt+int8 (compare)
  --speedups NUMBER ...    what they are to reach on this device: 1.1 1.25 1.5 2 if not given (compare)
  --fresh                  with --methods: measure again what was finished before an interruption (compare)
  --trainer.KEY VALUE      any option of lightning.Trainer: accelerator, precision, devices, ...
  --print_config           print the configuration and stop

examples:
  lightning-prune compare --model.model vit_digits_patch4_56 --data DigitsData --output results/digits
  lightning-prune compare --config configs/digits.yaml --methods pomt tome random int8 --speedups 1.25 1.5 2
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
        from lightning_prune.cli.models_command import models

        return models(words[1:])
    from lightning_prune.cli.main import run

    return run(args)


if __name__ == "__main__":
    sys.exit(main())
