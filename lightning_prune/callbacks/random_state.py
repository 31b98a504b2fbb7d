"""Leaving the random numbers of a run alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserving_random_state() -> Iterator[None]:
    """Whatever happens inside, also an error, the global generators of torch, NumPy and Python go on as if not.

    Lightning's `isolate_rng` leaves them as they are when the block raises.
    """
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002  # users draw from the global one
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
