"""Checks of arguments. All messages have the form "`name` must be A, got B."."""

import operator
from collections.abc import Collection, Sequence
from difflib import get_close_matches
from math import isfinite
from numbers import Real
from os import PathLike
from typing import Any, TypeGuard, cast

from lightning_prune.errors import ArgumentError


def check(name: str, value: object, expected: str, valid: bool) -> None:
    """Raises unless `valid`.

    Args:
        name: The argument.
        value: What was passed.
        expected: What was expected; completes the sentence "must be ...".
        valid: Whether `value` is as expected.

    Raises:
        ArgumentError: If not `valid`; names the argument, what was expected and what was passed.

    Example:
        >>> from lightning_prune._utils.validation import check
        >>> check("ratio", 0.5, "a number in [0, 1)", 0 <= 0.5 < 1)
        >>> check("ratio", 2, "a number in [0, 1)", 0 <= 2 < 1)
        Traceback (most recent call last):
        lightning_prune.errors.ArgumentError: `ratio` must be a number in [0, 1), got 2.
    """
    if not valid:
        raise ArgumentError(f"`{name}` must be {expected}, got {value!r}.")


def as_int(value: Any) -> int | None:
    """An integer of any library, such as NumPy, as an int; None for anything else, including a bool."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


def is_int(value: object, minimum: int) -> bool:
    """Whether `value` is an int >= `minimum` and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= minimum


def check_int(name: str, value: object, minimum: int, unit: str = "an integer") -> None:
    """Raises ArgumentError unless `value` is an int >= `minimum`.

    Args:
        name: The argument.
        value: What was passed.
        minimum: The smallest valid value.
        unit: What it counts, such as "a number of images".
    """
    check(name, value, f"{unit} >= {minimum}", is_int(value, minimum))


def _is_number(value: object) -> TypeGuard[float]:
    """Whether it is a number of Python or NumPy; a bool is none."""
    return isinstance(value, Real) and not isinstance(value, bool)


def check_positive(name: str, value: object, unit: str = "a number") -> None:
    """Raises ArgumentError unless `value` is an int or float > 0; NaN is not."""
    check(name, value, f"{unit} > 0", _is_number(value) and value > 0)


def check_not_negative(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` is an int, a float or a tensor of one >= 0; NaN is not."""
    is_scalar = _is_number(value) or getattr(value, "ndim", None) == 0
    check(name, value, "a number >= 0", is_scalar and bool(cast(Any, value) >= 0))


def check_between(name: str, value: object, low: float, high: float, unit: str = "a number") -> None:
    """Raises ArgumentError unless `value` is an int or float in [`low`, `high`]; NaN is not."""
    check(name, value, f"{unit} in [{low}, {high}]", _is_number(value) and low <= value <= high)


def check_half_open(name: str, value: object, low: float, high: float) -> None:
    """Raises ArgumentError unless `value` is a number in [`low`, `high`); NaN is not."""
    check(name, value, f"a number in [{low}, {high})", _is_number(value) and low <= value < high)


def check_above(name: str, value: object, minimum: float) -> None:
    """Raises ArgumentError unless `value` is a finite number > `minimum`."""
    check(name, value, f"a finite number > {minimum}", _is_number(value) and isfinite(value) and value > minimum)


def check_speedups(speedups: Sequence[float]) -> list[float]:
    """The target speed-ups in ascending order.

    Args:
        speedups: Dense latency over wanted latency, each > 1.

    Raises:
        ArgumentError: If there is none, one is not a finite number > 1 (1 is the dense model), or one occurs twice.
    """
    if not isinstance(speedups, list | tuple) or not speedups:
        raise ArgumentError(f"`speedups` must be a list of numbers > 1, got {speedups!r}.")
    for value in speedups:
        if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value) or value <= 1:
            raise ArgumentError(f"`speedups` must be finite numbers > 1 (1 is the dense model), got {value!r}.")
    names = [f"{value:g}" for value in speedups]  # as variants are called
    repeated = next((name for name in names if names.count(name) > 1), None)
    if repeated is not None:
        raise ArgumentError(f"`speedups` must differ from one another, got {repeated} twice.")
    return sorted(float(value) for value in speedups)


def check_name(argument: str, name: str, known: Collection[str], given: object = None) -> None:
    """Raises ArgumentError, with the name that was probably meant, unless `name` is one of `known`.

    Args:
        argument: The argument that holds the name.
        name: The name.
        known: Those that there are.
        given: What was passed, where that is more than the name.
    """
    if name not in known:
        near = get_close_matches(name.lower(), known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        listed = ", ".join(map(repr, known))
        raise ArgumentError(f"`{argument}` must be one of {listed}, got {(name if given is None else given)!r}.{hint}")


def check_bool(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` is a bool."""
    check(name, value, "True or False", isinstance(value, bool))


def check_path(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` is a str or a PathLike."""
    check(name, value, "a path", isinstance(value, str | PathLike))


def check_callable(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` can be called."""
    check(name, value, "a function", callable(value))


def check_images(name: str, value: object) -> None:
    """Raises ArgumentError unless `value` is a tensor of images (B, C, H, W), with at least one image."""
    shape = getattr(value, "shape", None)
    if not isinstance(shape, tuple) or len(shape) != 4 or not shape[0]:
        found = type(value).__name__ if shape is None else tuple(shape)
        raise ArgumentError(f"`{name}` must be images (B, C, H, W), got {found}.")


def check_choice(name: str, value: object, choices: Collection[Any]) -> None:
    """Raises ArgumentError unless `value` is one of `choices`."""
    *first, last = map(repr, choices)
    valid = any(type(value) is type(choice) and value == choice for choice in choices)
    check(name, value, f"{', '.join(first)} or {last}" if first else last, valid)
