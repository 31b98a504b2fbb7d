"""The text of `lightning-prune --help`. This file has no imports, so that the text is printed at once."""

COMMANDS = {
    "compare": "validate the dense and pruned models in one run; writes tables, plots and a report",
    "profile": "measure latency against the number of tokens on this device",
    "plan": "plan a schedule without validating it, also for another device",
    "validate": "run the pruned model on the validation set",
    "test": "run the pruned model on the test set",
    "export": "write the pruned model for ONNX Runtime, OpenVINO or PyTorch, and check it against PyTorch",
    "bundle": "write a folder that measures the profile on a device without torch, for plan --profile",
    "vocabulary": "learn visual words for vwt-inter from unlabelled images",
    "models": "list timm's transformers that can be pruned, and why others cannot",
    "doctor": "describe the machine, what is installed, and how noisy the machine is now, for an issue",
}
"""Command -> what it does."""

OWN_PARSERS = {"models": ("--markdown",), "doctor": ("--json", "--no-timing")}
"""Command that runs no model -> its options. Its file in this folder has its parser."""

_OPTIONS = {
    "--config FILE": "YAML with the keys below; later files and options take precedence; paths in it are\n"
    "relative to the working folder, as those of options are",
    "--model.model NAME": "a timm model, hf:FOLDER_OR_NAME of Hugging Face, or an import path such as\n"
    "my_module.MyModel; --model.weights FILE for your own weights",
    "--data CLASS": "DigitsData, ImageFolderData, ImageTableData, or any LightningDataModule by its\nimport path",
    "--prune.method NAME": "auto, tome, pomt, pomt-nearest, topk, evit, shift, vwt-intra, random, or a class",
    "--prune.schedule VALUE": "auto, a number of tokens to remove, a share of patch tokens to keep, a list with one\n"
    "number for each block, or a file",
    "--prune.block VALUE": "the reducing block: an index, or a fraction of the depth",
    "--prune.objective CLASS": "AccuracyBudget, LatencyBudget or Utility; two short forms follow",
    "--budget 1.5x | 12ms": "the most accurate schedule with that speed-up, or with at most that latency; 12ms@p90\n"
    "bounds the 90th percentile; status 3 if it is missed",
    "--max-drop 0.5%": "the fastest schedule that loses at most that share of the accuracy proxy",
    "--prune.time_limit S": "seconds for measuring and planning",
    "--prune.clock cpu": "time by CPU time of the process instead of wall time, at one thread",
    "--output DIR": "folder for the files (compare, profile, plan, export, bundle)",
    "--schedule FILE": "a schedule that names its method, as plan writes it (export)",
    "--format NAME": "onnx, openvino, torch-export, aotinductor or executorch (export)",
    "--exported DIR ...": "run the model of an exported folder instead of --model.model; of several, such as the\n"
    "dense one first, a table (validate, test)",
    "--profile FILE": "plan on the latency profile of another device, as a bundle measures it (plan)",
    "--device simulated:...": "profile, or plan for, a simulated device (profile, plan)",
    "--methods NAME ...": "methods to compare, such as pomt tome int8 pomt+int8 (compare)",
    "--speedups NUMBER ...": "target speed-ups; without them, methods are planned by the objective (compare)",
    "--runtimes NAME ...": "what executes the model, such as torch torch.compile:mode=blocks (compare)",
    "--per-class": "the change of each class, too, and the worst of each variant (compare)",
    "--controls false": "without random and resize, which methods are to beat (compare)",
    "--resume false": "start again instead of resuming from the output folder (compare)",
    "--trainer.KEY VALUE": "any option of lightning.Trainer: accelerator, precision, devices, ...",
    "--print_config": "print the configuration and stop",
}

_USAGE = """\
usage: lightning-prune COMMAND [--config FILE] [--KEY VALUE ...]

Makes Vision Transformers faster on this device, without training: measures latency against the number of tokens, plans
how many to remove, patches the model, and validates it.

commands:
{commands}

options (all of them: lightning-prune COMMAND --help; hyphens and underscores in names are equivalent):
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
