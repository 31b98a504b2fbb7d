"""Entry point of `lightning-prune` and `python -m lightning_prune`: `--help` and `--version` need no torch."""

import os
import sys

from lightning_prune import __version__
from lightning_prune.cli.usage import COMMANDS, OWN_PARSERS, help_text


def main(args: list[str] | None = None) -> int:
    """Runs the command line.

    Args:
        args: Command and options; those of the process if None.

    Returns:
        Exit status.
    """
    words = sys.argv[1:] if args is None else args
    if not words or words[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if words else 2
    if words[0] == "--version":
        print(f"lightning-prune {__version__}")
        return 0
    if {"-h", "--help"} & set(words[1:]) and words[0] in COMMANDS and words[0] not in OWN_PARSERS:
        from lightning_prune.cli.help_page import command_help

        print(command_help(words[0]), end="")
        return 0
    from lightning_prune.cli.typos import missing_in, mistake_in

    mistake = mistake_in(words) or missing_in(words)
    if mistake:
        print(f"error: {mistake}", file=sys.stderr)
        return 2
    try:
        if words[0] == "models":
            from lightning_prune.cli.models_command import models

            return models(words[1:])
        if words[0] == "doctor":
            from lightning_prune.cli.doctor_command import doctor

            return doctor(words[1:])
        if not {"", os.getcwd()} & set(sys.path):
            sys.path.append(os.getcwd())  # modules of one's own; last, so that a file there hides no installed package
        from lightning_prune.cli.main import run

        return run(args)
    except KeyboardInterrupt:  # while modules are imported, which takes seconds
        print("stopped by Ctrl-C before the end. Start the same command again.", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
