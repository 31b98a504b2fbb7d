"""Swapping the class of a module in place, and back."""

import itertools
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple

from torch import nn

from lightning_prune.errors import UnsupportedModelError


class Setting(NamedTuple):
    """The value of a module's attribute before a patch changed it."""

    module: nn.Module
    name: str
    value: Any

    def restore(self) -> None:
        """Restores the value."""
        vars(self.module)[self.name] = self.value


def change_settings(changes: Sequence[tuple[nn.Module, str, Any]]) -> list[Setting]:
    """Changes plain attributes of modules; returns their values before.

    Args:
        changes: Module, name of the attribute, new value.
    """
    before = [Setting(module, name, vars(module)[name]) for module, name, _ in changes]
    for module, name, value in changes:
        vars(module)[name] = value
    return before


class PatchedModule(nn.Module):
    """Base of the mixins that change the forward pass of patched modules.

    A patched module is the same object with the same parameters, names and hooks. Its class is replaced by a subclass
    of its own class and the mixin. Unlike forward hooks, this works with `copy.deepcopy`, `pickle`,
    `torch.compile(fullgraph=True)`, even if the model was compiled before, and `torch.export`.

    Attributes:
        keeps_name: Whether the patched class has the name of the original one.
    """

    keeps_name: ClassVar[bool] = False

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles via the two base classes, because the patched class cannot be imported."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, _parts(type(self)), *reduced[2:])


_changes = itertools.count(1)
_last_change = 0
_classes: dict[tuple[type, type], type[nn.Module]] = {}


def patched_class(base: type[nn.Module], mixin: type[PatchedModule]) -> type[nn.Module]:
    """The subclass of `mixin` and `base`; one for each pair, so that all copies of a model share it."""
    if (base, mixin) not in _classes:
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__, "_prune_classes": (base, mixin)}
        if mixin.keeps_name:
            attributes["__qualname__"] = base.__qualname__
        name = base.__name__ if mixin.keeps_name else f"{mixin.__name__}{base.__name__}"
        _classes[base, mixin] = type(name, (mixin, base), attributes)
    return _classes[base, mixin]


def is_patched_module(module: nn.Module) -> bool:
    """Whether the class of the module is a patched class."""
    return "_prune_classes" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The class of the module without a patch."""
    return _parts(type(module))[0] if is_patched_module(module) else type(module)


def swap_class(module: nn.Module, mixin: type[PatchedModule], site: Any = None) -> None:
    """Replaces the class of the module by the patched class; `site` becomes its attribute `_prune_patch`.

    Raises:
        UnsupportedModelError: If `forward` is an attribute of the module itself, which overrides that of any class.
    """
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"The `forward` of this {type(module).__name__} was replaced on the module itself (as accelerate does for "
            "models on several devices), so patching its class has no effect. Undo that first."
        )
    module.__dict__["_prune_patch"] = site
    module.__class__ = patched_class(type(module), mixin)
    _note_change()


def patch_generation() -> int:
    """A number that changes whenever any module is patched or restored: whoever depends on a patch looks at it first.

    It is one number for all models, so that reading it takes no time.
    """
    return _last_change


def _note_change() -> None:
    global _last_change
    _last_change = next(_changes)


def restore_class(module: nn.Module) -> None:
    """Restores the class of the module; does nothing if it is not patched.

    Raises:
        UnsupportedModelError: If the class or `forward` was replaced again after patching.
    """
    if is_patched_module(module) and "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"The `forward` of a patched {original_class(module).__name__} was replaced after patching; undo it first."
        )
    if is_patched_module(module):
        module.__class__ = original_class(module)
        module.__dict__.pop("_prune_patch", None)
        _note_change()
    elif isinstance(module, PatchedModule):
        raise UnsupportedModelError(
            f"The class of a patched block was replaced by {type(module).__name__} after patching, for example by a "
            "parametrization. Undo that first."
        )


def _parts(cls: type) -> tuple[type[nn.Module], type[PatchedModule]]:
    parts: tuple[type[nn.Module], type[PatchedModule]] = cls.__dict__["_prune_classes"]
    return parts


def _rebuild(base: type[nn.Module], mixin: type[PatchedModule]) -> nn.Module:
    cls = patched_class(base, mixin)
    return cls.__new__(cls)
