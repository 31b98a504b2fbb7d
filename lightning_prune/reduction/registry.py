"""Methods by name: those of this package, and those that other packages declare by an entry point."""

import warnings
from collections.abc import Callable
from difflib import get_close_matches
from functools import partial
from importlib.metadata import EntryPoint, entry_points
from inspect import isabstract, signature
from typing import Any

from lightning_prune.errors import ArgumentError
from lightning_prune.reduction.base import Reduction
from lightning_prune.reduction.cls_attention import EViT, TopK
from lightning_prune.reduction.pomt import POMT
from lightning_prune.reduction.random_drop import RandomDrop
from lightning_prune.reduction.representation_shift import RepresentationShift
from lightning_prune.reduction.tome import ToMe
from lightning_prune.reduction.visual_words import VWTInter, VWTIntra
from lightning_prune.schedule import MethodSpec

GROUP = "lightning_prune.reductions"

METHODS: dict[str, type[Reduction]] = {
    method.name: method for method in (POMT, TopK, EViT, ToMe, RepresentationShift, VWTIntra, VWTInter, RandomDrop)
}
"""The methods of this package."""

_WITH_SETTINGS: dict[str, Callable[..., Reduction]] = {"pomt-nearest": partial(POMT, dropped="nearest")}
"""Names for a method with settings that make it one of its own."""


def resolve(method: str | MethodSpec | Reduction, **settings: Any) -> Reduction:
    """The reduction that a name stands for; an instance stands for itself.

    A name that this package does not have is looked up among the entry points of the group
    `lightning_prune.reductions`; only the one asked for is imported.

    Args:
        method: Name of a method, with settings if need be (`"random:seed=3"`), the same as a
            `lightning_prune.schedule.MethodSpec`, or an instance.
        settings: Arguments of the method's class, where it is given by name.

    Returns:
        The reduction, with its default settings but for those given.

    Raises:
        ArgumentError: If there is no method of that name (suggests the nearest), its package fails to load or gives
            something else than a reduction, or it does not take these settings.

    Example:
        >>> from lightning_prune.reduction import resolve
        >>> resolve("random", seed=3)
        RandomDrop(seed=3, site='block')
        >>> resolve("random:seed=3") == resolve("random", seed=3)
        True
    """
    if isinstance(method, Reduction):
        if settings:
            raise ArgumentError(f"`settings` must be left out with a Reduction, got {settings} and {method!r}.")
        return method
    if not isinstance(method, str | MethodSpec):
        raise _unknown(method)
    spec = MethodSpec.of(method, "method")
    return _make(spec.name, _find(spec.name), {**spec.settings, **settings})


def spec_of(reduction: Reduction) -> MethodSpec:
    """The method as plain data, from which `resolve` makes an equal one where its name is known.

    Args:
        reduction: The method.

    Returns:
        Its name, and the settings that differ from the defaults of that name.

    Example:
        >>> from lightning_prune.reduction import ToMe, spec_of
        >>> spec_of(ToMe()), spec_of(ToMe(proportional_attention=False))
        (MethodSpec('tome'), MethodSpec('tome:proportional_attention=False'))
    """
    settings = reduction.settings()
    build = METHODS.get(reduction.name) or _WITH_SETTINGS.get(reduction.name) or type(reduction)
    try:
        defaults = build().settings()
    except (TypeError, ArgumentError):  # there are settings without a default, such as a vocabulary
        defaults = {}
    differing = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    return MethodSpec(reduction.name, differing)


def names() -> list[str]:
    """The names of all methods that can be used here; imports the packages that declare some.

    One that fails to load is left out, with a warning that names it.

    Returns:
        Those of this package first.

    Example:
        >>> from lightning_prune.reduction import names
        >>> names()[0]
        'pomt'
    """
    usable = _own()
    for name, declared in _declared().items():
        try:
            _load(name, declared)
        except ArgumentError as error:
            warnings.warn(str(error), stacklevel=2)
        else:
            usable.append(name)
    return usable


def _own() -> list[str]:
    return [*METHODS, *_WITH_SETTINGS]


def _declared() -> dict[str, list[EntryPoint]]:
    """The entry points of other packages by name; nothing is imported."""
    declared: dict[str, list[EntryPoint]] = {}
    own = _own()
    for point in entry_points(group=GROUP):
        if point.name in own:
            warnings.warn(
                f"The entry point {_where(point)} is not used: {point.name!r} is a method of lightning_prune.",
                stacklevel=3,
            )
        elif point not in declared.setdefault(point.name, []):
            declared[point.name].append(point)
    return declared


def _find(name: str) -> Callable[..., Reduction]:
    if name in METHODS:
        return METHODS[name]
    if name in _WITH_SETTINGS:
        return _WITH_SETTINGS[name]
    declared = _declared()
    if name not in declared:
        raise _unknown(name, tuple(declared))
    return _load(name, declared[name])


def _load(name: str, points: list[EntryPoint]) -> type[Reduction]:
    """The class that an entry point leads to.

    Raises:
        ArgumentError: If several packages declare the name, or what it leads to does not load or is no reduction.
    """
    if len(points) > 1:
        raise ArgumentError(f"Several packages declare a method {name!r}: {', '.join(sorted(map(_where, points)))}.")
    point = points[0]
    try:
        found = point.load()
    except Exception as error:  # of whatever kind the module of another package raises
        raise ArgumentError(
            f"The method {name!r} failed to load from {_where(point)}: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Reduction)) or isabstract(found):
        raise ArgumentError(
            f"The entry point {_where(point)} must lead to a subclass of Reduction with `reduce` and `max_removed`, "
            f"got {found!r}."
        )
    if getattr(found, "name", None) != name:
        raise ArgumentError(
            f"The entry point {_where(point)} is called {name!r}, so `{found.__name__}.name` must be {name!r}, got "
            f"{getattr(found, 'name', None)!r}."
        )
    return found


def _make(name: str, build: Callable[..., Reduction], settings: dict[str, Any]) -> Reduction:
    fixed = build.keywords if isinstance(build, partial) else {}
    other = [key for key, value in fixed.items() if settings.get(key, value) != value]
    try:
        signature(build).bind(**settings)
    except TypeError as error:
        raise ArgumentError(f"The method {name!r} cannot be made with the settings {settings}: {error}.") from error
    if other:
        raise ArgumentError(f"The method {name!r} cannot be made with the settings {settings}: {other[0]!r} is fixed.")
    return build(**settings)


def _unknown(method: object, declared: tuple[str, ...] = ()) -> ArgumentError:
    known = [*_own(), *declared]
    near = get_close_matches(str(method).lower(), known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    listed = ", ".join(repr(name) for name in known)
    return ArgumentError(f"`method` must be a Reduction or one of {listed}, got {method!r}.{hint}")


def _where(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    return f"{point.name} = {point.value!r}{package}"
