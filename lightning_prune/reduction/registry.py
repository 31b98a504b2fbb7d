"""Methods by name: those of this package, and those that other packages declare as entry points."""

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
from lightning_prune.reduction.diffrate import DiffRateMerge
from lightning_prune.reduction.energy_merging import PiToMe
from lightning_prune.reduction.pixel_variance import VWTIntra
from lightning_prune.reduction.pomt import POMT
from lightning_prune.reduction.random_drop import RandomDrop
from lightning_prune.reduction.representation_shift import RepresentationShift
from lightning_prune.reduction.resize import Resize
from lightning_prune.reduction.soft_merging import SoftMerge
from lightning_prune.reduction.tome import ToMe
from lightning_prune.reduction.visual_words import VWTInter
from lightning_prune.schedule import MethodSpec

GROUP = "lightning_prune.reductions"

METHODS: dict[str, type[Reduction]] = {
    method.name: method
    for method in (
        *(POMT, TopK, EViT, ToMe, PiToMe, DiffRateMerge, SoftMerge),
        *(RepresentationShift, VWTIntra, VWTInter, Resize, RandomDrop),
    )
}
"""The methods of this package."""

_WITH_SETTINGS: dict[str, Callable[..., Reduction]] = {"pomt-nearest": partial(POMT, dropped="nearest")}
"""Names of methods that are another method with certain settings."""


def resolve(method: str | MethodSpec | Reduction, **settings: Any) -> Reduction:
    """Creates the reduction with a given name; an instance is returned unchanged.

    A name that is not in this package is looked up among the entry points of the group `lightning_prune.reductions`;
    only the matching one is imported.

    Args:
        method: Name of a method, with optional settings (`"random:seed=3"`); a `lightning_prune.schedule.MethodSpec`;
            or an instance.
        settings: Further arguments of the method's class, if it is given by name.

    Returns:
        The reduction. Settings that are not given have their defaults.

    Raises:
        ArgumentError: If there is no method of that name (suggests a similar one), if its package fails to load or does
            not provide a reduction, or if the method has no such settings.

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
    """Converts a method to plain data; `resolve` is the inverse if the method has a registered name.

    Args:
        reduction: The method.

    Returns:
        Its name, and the settings that differ from the defaults.

    Example:
        >>> from lightning_prune.reduction import ToMe, spec_of
        >>> spec_of(ToMe()), spec_of(ToMe(proportional_attention=False))
        (MethodSpec('tome'), MethodSpec('tome:proportional_attention=False'))
    """
    settings = reduction.settings()
    build = METHODS.get(reduction.name) or _WITH_SETTINGS.get(reduction.name) or type(reduction)
    try:
        defaults = build().settings()
    except (TypeError, ArgumentError):  # a setting without a default, such as a vocabulary
        defaults = {}
    differing = {key: value for key, value in settings.items() if key not in defaults or defaults[key] != value}
    return MethodSpec(reduction.name, differing)


def names() -> list[str]:
    """The names of all available methods. Imports the packages that declare methods.

    A method that fails to load is left out with a warning.

    Returns:
        The names, those of this package first.

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
    """The entry points of other packages by name, without importing them."""
    declared: dict[str, list[EntryPoint]] = {}
    own = _own()
    for point in entry_points(group=GROUP):
        if point.name in own:
            warnings.warn(
                f"The entry point {_where(point)} is ignored: {point.name!r} is a method of lightning_prune.",
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
    """Loads the class of an entry point.

    Raises:
        ArgumentError: If several packages declare the name, or if it cannot be loaded or is not a reduction.
    """
    if len(points) > 1:
        raise ArgumentError(f"Several packages declare a method {name!r}: {', '.join(sorted(map(_where, points)))}.")
    point = points[0]
    try:
        found = point.load()
    except Exception as error:  # importing another package may raise anything
        raise ArgumentError(
            f"The method {name!r} failed to load from {_where(point)}: {type(error).__name__}: {error}"
        ) from error
    if not (isinstance(found, type) and issubclass(found, Reduction)) or isabstract(found):
        raise ArgumentError(
            f"The entry point {_where(point)} must be a subclass of Reduction with `reduce` and `max_removed`, got "
            f"{found!r}."
        )
    if getattr(found, "name", None) != name:
        raise ArgumentError(
            f"The entry point {_where(point)} must be a Reduction with the name {name!r}, got {found.__name__} with "
            f"{getattr(found, 'name', None)!r}."
        )
    return found


def _make(name: str, build: Callable[..., Reduction], settings: dict[str, Any]) -> Reduction:
    fixed = build.keywords if isinstance(build, partial) else {}
    other = [key for key, value in fixed.items() if settings.get(key, value) != value]
    try:
        signature(build).bind(**settings)
    except TypeError as error:
        raise ArgumentError(f"`settings` must be arguments of the method {name!r}, got {settings}: {error}.") from error
    if other:
        raise ArgumentError(
            f"`settings` must be arguments of the method {name!r}, got {settings}: {other[0]!r} is fixed."
        )
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
