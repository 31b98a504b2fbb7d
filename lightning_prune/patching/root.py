"""The root of a patched model: what a guard that is laid over it must know."""

import inspect

from torch import nn


class RootSite:
    """What the guard of a root must know: where its `forward_intermediates` takes the layout of what it returns."""

    def __init__(self, root: nn.Module) -> None:
        function = getattr(root, "forward_intermediates", None)
        names = list(inspect.signature(function).parameters) if function is not None else []
        self.layout = names.index("output_fmt") if "output_fmt" in names else -1
