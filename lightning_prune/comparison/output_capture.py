"""The outputs of a module while it runs, without changing what it does."""

from collections.abc import Callable
from typing import Any

from torch import nn


def capture_outputs(module: nn.Module, receive: Callable[[Any], None]) -> Callable[[], None]:
    """Calls a function with every output of a module, also where that was compiled in place.

    Args:
        module: The module.
        receive: Called with each output, as the module returns it.

    Returns:
        What ends it.
    """
    compiled = vars(module).get("_compiled_call_impl")
    if compiled is None:
        return module.register_forward_hook(lambda _, __, output: receive(output)).remove

    def call(*args: Any, **kwargs: Any) -> Any:  # a hook would become part of the graph, or be skipped by it
        output = compiled(*args, **kwargs)
        receive(output)
        return output

    vars(module)["_compiled_call_impl"] = call

    def stop() -> None:
        vars(module)["_compiled_call_impl"] = compiled

    return stop
