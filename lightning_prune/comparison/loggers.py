"""What a comparison writes to the loggers of a trainer: the figures of its rows, and nothing of its validations."""

import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L

from lightning_prune.report.rows import Row, number


@contextmanager
def muted_loggers(trainer: L.Trainer) -> Iterator[None]:
    """A context in which runs of the trainer log no metrics to its loggers.

    The module logs the same names at the same step in every validation: of dense, of each variant, and of the single
    batch that is planned on. The loggers stay in place, as the module and callbacks may use their folders.

    Args:
        trainer: Whose runs they are.
    """
    with ExitStack() as stack:
        for logger in trainer.loggers:
            attributes = vars(logger)
            stack.callback(_restore, attributes, "log_metrics" in attributes, attributes.get("log_metrics"))
            attributes["log_metrics"] = _ignore
        yield


def log_rows(trainer: L.Trainer, rows: Sequence[Row]) -> None:
    """Logs every known figure of each row as `compare/<variant>/<column>`, at the trainer's step.

    Args:
        trainer: Its loggers get the figures.
        rows: Of a comparison.
    """
    figures = {
        f"compare/{_key_of(row.variant)}/{column}": value
        for row in rows
        for column, figure in row.to_dict().items()
        if (value := number(figure)) is not None
    }
    for logger in trainer.loggers:
        logger.log_metrics(figures, step=trainer.global_step)
        logger.save()
        logger.finalize("success")


def _key_of(variant: str) -> str:
    """The name of a variant without the characters that some loggers refuse, as in `pomt+int8 2x [torch.compile]`."""
    return re.sub(r"[^\w.\- ]", "_", variant)


def _ignore(*_: Any, **__: Any) -> None:
    pass


def _restore(attributes: dict[str, Any], had: bool, before: Any) -> None:
    del attributes["log_metrics"]
    if had:
        attributes["log_metrics"] = before
