"""Switching a transformer from one runtime to another between two runs."""

from contextlib import ExitStack

from lightning_prune.patching import VisionTransformer
from lightning_prune.runtimes.base import Runtime, applied_runtime, check_applied
from lightning_prune.runtimes.in_place import InPlace


class RuntimeSwitch:
    """Makes a transformer run in one runtime after another, in place; what each has compiled is kept until `off`.

    Args:
        transformer: The Vision Transformer in a user's model.
    """

    def __init__(self, transformer: VisionTransformer) -> None:
        self._transformer = transformer
        self._known: dict[Runtime, InPlace] = {}
        self._current: InPlace | None = None
        self._limits = ExitStack()

    def to(self, runtime: Runtime) -> None:
        """Makes the transformer run in a runtime; nothing changes where it is applied already.

        Raises:
            ArgumentError: As `Runtime.applied`.
        """
        if applied_runtime(self._transformer) == runtime:
            return
        if self._current is None:
            check_applied(runtime, self._transformer)
        self._suspend()
        if runtime in self._known:
            self._known[runtime].resume()
        else:
            installed = runtime.install(self._transformer)
            if installed is None:
                return
            self._limits.enter_context(runtime.limits())
            self._known[runtime] = installed
        self._current = self._known[runtime]

    def off(self) -> None:
        """Makes the transformer run as it did at first."""
        self._suspend()
        self._known.clear()
        self._limits.close()

    def _suspend(self) -> None:
        current, self._current = self._current, None
        if current is not None:
            current.suspend()
