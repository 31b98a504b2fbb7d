"""Watching modules without hooks, which are not called while a model is measured."""

from collections.abc import Callable
from typing import Any

from torch import nn


def before_forward(module: nn.Module, receive: Callable[[nn.Module, tuple[Any, ...]], object]) -> Callable[[], None]:
    """Calls a function with a module and its arguments before each forward pass, as a forward pre-hook would.

    Args:
        module: Of a class that is not replaced by a patch: a part of a block, or a normalisation.
        receive: What to call.

    Returns:
        Ends watching.
    """
    forward = module.forward

    def watched(*args: Any, **kwargs: Any) -> Any:
        receive(module, args)
        return forward(*args, **kwargs)

    vars(module)["forward"] = watched
    return lambda: vars(module).pop("forward", None)
