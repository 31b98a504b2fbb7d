"""Swapping the class of a module in place, and back."""

import inspect
from typing import Any

from torch import nn

from lightning_prune.errors import UnsupportedModelError


class PatchedModule(nn.Module):
    """Base of the mixins that change how a module runs while a patch lasts.

    The module stays the same object with the same parameters, names and hooks; only its class becomes a subclass of
    its own class with the mixin in front. Unlike forward hooks this survives `copy.deepcopy`, `pickle`,
    `torch.compile(fullgraph=True)`, also when the model was compiled before, and `torch.export`.
    """

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles by the module's own class and the mixin: the class made of the two has no import path."""
        reduced: Any = super().__reduce_ex__(protocol)
        return (_rebuild, _parts(type(self)), *reduced[2:])


_classes: dict[tuple[type, type], type[nn.Module]] = {}


def patched_class(base: type[nn.Module], mixin: type[PatchedModule]) -> type[nn.Module]:
    """The class made of `mixin` in front of `base`; one a pair, so that all copies of a model share it."""
    if (base, mixin) not in _classes:
        attributes = {"__module__": base.__module__, "__doc__": base.__doc__, "_prune_classes": (base, mixin)}
        _classes[base, mixin] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), attributes)
    return _classes[base, mixin]


def is_patched_module(module: nn.Module) -> bool:
    """Whether an overlay is on."""
    return "_prune_classes" in type(module).__dict__


def original_class(module: nn.Module) -> type[nn.Module]:
    """The module's class without any overlay."""
    return _parts(type(module))[0] if is_patched_module(module) else type(module)


def swap_class(module: nn.Module, mixin: type[PatchedModule], site: Any = None) -> None:
    """Puts the mixin over the module's class, with what it works on as `_prune_patch`.

    Raises:
        UnsupportedModelError: If the module would not run what its class says, and go on unpruned, in silence.
    """
    if "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"The `forward` of {type(module).__name__} was replaced on the module itself (accelerate does so for "
            f"models spread over devices), where a patch of its class has no effect; undo that first."
        )
    module.__dict__["_prune_patch"] = site
    module.__class__ = patched_class(type(module), mixin)


def restore_class(module: nn.Module) -> None:
    """Gives the module its own class back; does nothing where no overlay is on.

    Raises:
        UnsupportedModelError: If something else has since put a class of its own over ours.
    """
    if is_patched_module(module) and "forward" in module.__dict__:
        raise UnsupportedModelError(
            f"The `forward` of a patched {original_class(module).__name__} was replaced on the module; undo that first."
        )
    if is_patched_module(module):
        module.__class__ = original_class(module)
        module.__dict__.pop("_prune_patch", None)
    elif isinstance(module, PatchedModule):
        raise UnsupportedModelError(
            f"A {type(module).__name__} was put over a patched block (by a parametrization, say); undo that first."
        )


def _parts(cls: type) -> tuple[type[nn.Module], type[PatchedModule]]:
    parts: tuple[type[nn.Module], type[PatchedModule]] = cls.__dict__["_prune_classes"]
    return parts


def _rebuild(base: type[nn.Module], mixin: type[PatchedModule]) -> nn.Module:
    cls = patched_class(base, mixin)
    return cls.__new__(cls)


class RootPatch:
    """What the guard of a root must know: where its `forward_intermediates` takes the layout of what it returns."""

    def __init__(self, root: nn.Module) -> None:
        function = getattr(root, "forward_intermediates", None)
        names = list(inspect.signature(function).parameters) if function is not None else []
        self.layout = names.index("output_fmt") if "output_fmt" in names else -1
