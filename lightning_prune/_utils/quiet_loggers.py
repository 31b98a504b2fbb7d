"""Loggers of other packages, kept from remarks that say nothing of the user's model."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """A context in which loggers pass on errors only.

    Args:
        names: Of the loggers; `""` is the root.

    Example:
        >>> import logging
        >>> from lightning_prune._utils.quiet_loggers import errors_only
        >>> with errors_only("onnxscript"):
        ...     logging.getLogger("onnxscript").isEnabledFor(logging.WARNING)
        False
    """
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
