"""What is to be compared, from the words of the user."""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import NamedTuple

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.api import AUTO
from lightning_prune.reduction import Reduction, names, resolve

DENSE_NAME, INT8_NAME, AUTO_NAME = "dense", "int8", "auto"
_AND_INT8 = "+int8"


class MethodSpec(NamedTuple):
    """A method of a comparison.

    Attributes:
        name: As the user calls it: `pomt`, `int8`, `pomt+int8`.
        reduction: The reduction; None where no token goes.
        int8: Whether the model runs in 8 bits.
        searched: The methods of which the planner chooses; none where the name says which it is.
    """

    name: str
    reduction: Reduction | None
    int8: bool
    searched: tuple[str, ...] = ()

    @property
    def searches(self) -> bool:
        """Whether method and blocks are left to the planner."""
        return bool(self.searched)

    @property
    def method(self) -> str:
        """What the column `method` says."""
        if self.reduction is None and not self.searches:
            return INT8_NAME if self.int8 else ""
        return self.name.removesuffix(_AND_INT8)

    @property
    def has_targets(self) -> bool:
        """Whether its latency can be chosen, so that it gets a row for each target."""
        return self.searches or (self.reduction is not None and not self.reduction.adaptive)


def read_methods(methods: Sequence[str], own: Reduction) -> list[MethodSpec]:
    """The entries that the names stand for; dense comes first and is added where it is missing.

    Args:
        methods: Names of reductions, `auto`, `dense`, `int8`, and names of reductions with `+int8`.
        own: The reduction of the pruner: its name means this instance, with its settings.

    Raises:
        ArgumentError: If there is no such method (suggests the nearest), one occurs twice, or none is left to compare
            with dense.

    Example:
        >>> from lightning_prune.comparison.method_specs import read_methods
        >>> from lightning_prune.reduction import POMT
        >>> [entry.name for entry in read_methods(["pomt+int8", "int8"], own=POMT())]
        ['dense', 'pomt+int8', 'int8']
    """
    if isinstance(methods, str) or not isinstance(methods, Sequence) or not methods:
        raise ArgumentError(f"`methods` must be a list of names, got {methods!r}.")
    twice = sorted({str(name) for name in methods if list(methods).count(name) > 1})
    if twice:
        raise ArgumentError(f"`methods` must differ from one another, got {twice[0]!r} twice.")
    entries = [_read(name, own) for name in methods if name != DENSE_NAME]
    if not entries:
        raise ArgumentError(f"`methods` must name one to compare with dense, got {list(methods)!r}.")
    return [MethodSpec(DENSE_NAME, None, False), *entries]


def _read(name: object, own: Reduction) -> MethodSpec:
    if not isinstance(name, str):
        raise ArgumentError(f"`methods` must hold names, got {name!r}.")
    if name == INT8_NAME:
        return MethodSpec(name, None, True)
    if name == AUTO_NAME:
        return MethodSpec(name, None, False, AUTO)
    plain = name.removesuffix(_AND_INT8)
    try:
        reduction = own if plain == own.name else resolve(plain)
    except ArgumentError as error:
        known = names()
        if plain in known:  # it exists, but needs what a name cannot say, as a vocabulary
            raise
        near = get_close_matches(plain.lower(), [*known, AUTO_NAME, DENSE_NAME, INT8_NAME], n=1)
        with_int8 = name != plain
        meant = [
            close + _AND_INT8 * with_int8 if close in known else INT8_NAME if with_int8 else close for close in near
        ]
        hint = f" Did you mean {meant[0]!r}?" if meant else ""
        listed = ", ".join([DENSE_NAME, *known, AUTO_NAME, INT8_NAME])
        raise ArgumentError(
            f"`methods` must be of {listed}, or two of them as pomt+int8; got {name!r}.{hint}"
        ) from error
    return MethodSpec(name, reduction, name != plain)
