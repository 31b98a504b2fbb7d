"""Errors that lightning_prune raises on purpose.

All derive from `PruneError`, so one `except` catches them, and each also derives from the built-in that fits,
so code that knows nothing of this package still catches it. A message names the argument or file, says what was
expected and what came.
"""


class PruneError(Exception):
    """Base of every error that lightning_prune raises on purpose."""


class UnsupportedModelError(PruneError, TypeError):
    """The model has no Vision Transformer that can be pruned, or several and none was named."""


class ScheduleError(PruneError, ValueError):
    """A schedule is malformed, or does not fit the model that it is applied to."""


class ArgumentError(PruneError, ValueError):
    """An argument has a value that cannot be used."""


class FileFormatError(PruneError, ValueError):
    """A file is unreadable, truncated, or not of the expected kind."""


class WeightsError(PruneError, RuntimeError):
    """A weights file does not match the model."""


class DataError(PruneError, ValueError):
    """Input data cannot be used: an empty loader, labels out of range, non-finite outputs."""


class ExportError(PruneError, RuntimeError):
    """A model cannot be exported, or the exported model does not compute what the model does."""


class RuntimeUnavailableError(PruneError, ImportError):
    """A runtime needs a package that is not installed here."""
