"""Errors that lightning_prune raises deliberately.

All derive from `PruneError`, so that one `except` catches them. Each also derives from the matching built-in error, so
that code written without this package in mind catches it too. A message names the argument or file, what was expected
and what was passed.
"""


class PruneError(Exception):
    """Base of every error that lightning_prune raises deliberately."""


class UnsupportedModelError(PruneError, TypeError):
    """The model contains no Vision Transformer that can be pruned, or contains several and none was selected."""


class ScheduleError(PruneError, ValueError):
    """A schedule is malformed, or does not fit the model to which it is applied."""


class ArgumentError(PruneError, ValueError):
    """An argument has an invalid value."""


class FileFormatError(PruneError, ValueError):
    """A file is unreadable or truncated, or does not have the expected format."""


class FileWriteError(PruneError, OSError):
    """A file cannot be written: the disk is full, the folder is read-only, a limit is reached."""


class WeightsError(PruneError, RuntimeError):
    """A weights file does not match the model."""


class DataError(PruneError, ValueError):
    """The data are invalid: an empty loader, labels out of range, non-finite outputs."""


class ExportError(PruneError, RuntimeError):
    """A model cannot be exported, or the exported model gives other outputs than the model."""


class RuntimeUnavailableError(PruneError, ImportError):
    """A runtime needs a package that is not installed."""
