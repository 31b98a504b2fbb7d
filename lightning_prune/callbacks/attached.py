"""The callbacks of a Trainer, which sets them at run time where type checkers do not see them."""

import lightning as L


def attached_callbacks(trainer: L.Trainer) -> list[L.Callback]:
    """The trainer's own list of callbacks: what is added to it takes part in the next run."""
    callbacks: list[L.Callback] = vars(trainer)["callbacks"]
    return callbacks
