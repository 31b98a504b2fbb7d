"""Classes of other libraries, by name and without importing them."""

import sys
from collections.abc import Iterable

from torch import nn


def loaded_class(name: str) -> type[nn.Module] | None:
    """The class of another library with a given name, such as `"timm.models.eva:Eva"`; None if it is not loaded.

    The module is not imported: if it has not been, no model can have this class. If a release of the library renames
    the class, only the adapter that looks it up stops working.
    """
    module, _, attribute = name.partition(":")
    kind = getattr(sys.modules.get(module), attribute, None)
    return kind if isinstance(kind, type) else None


def loaded_classes(names: Iterable[str]) -> tuple[type[nn.Module], ...]:
    """The classes of these names that are loaded; see `loaded_class`."""
    return tuple(kind for kind in map(loaded_class, names) if kind is not None)
