"""The schedule: how many tokens each block of a Vision Transformer removes."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_prune.errors import FileFormatError, ScheduleError
from lightning_prune.files import read_document, write_document

SCHEDULE_FORMAT = "lightning_prune.schedule"
_VERSION = 1


def _whole(value: Any) -> int | None:
    """A whole number of any library's kind as an int; None for everything else, bool included."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None


@dataclass(frozen=True, repr=False)
class Schedule:
    """Tokens removed by each block; immutable, comparable, hashable.

    Block `b` removes its tokens between its attention (with the residual) and its MLP, so attention of block `b` still
    sees them all and its MLP, and every later block, does not.

    Args:
        removed: Tokens that each block removes, one whole number >= 0 a block, in order of the blocks.
        provenance: What the schedule came from (device, batch size, precision, objective, ...): plain values that YAML
            and JSON can hold. It travels through `save` and `load` and plays no part in equality.

    Raises:
        ScheduleError: If `removed` is empty or holds anything but whole numbers >= 0.

    Example:
        >>> from lightning_prune import Schedule
        >>> schedule = Schedule.single(depth=12, block=3, remove=56)
        >>> schedule
        Schedule(depth=12, removed={3: 56})
        >>> schedule.tokens(197)[2:5]
        (197, 141, 141)
    """

    removed: tuple[int, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(self, removed: Iterable[int], provenance: Mapping[str, Any] | None = None) -> None:
        try:
            entries = tuple(removed)
        except TypeError:
            raise ScheduleError(f"`removed` must be a list with one number a block, got {removed!r}.") from None
        if not entries:
            raise ScheduleError("`removed` must hold one number for each block, got an empty list.")
        numbers = []
        for block, entry in enumerate(entries):
            number = _whole(entry)
            if number is None or number < 0:
                raise ScheduleError(f"`removed` must hold whole numbers >= 0, got {entry!r} for block {block}.")
            numbers.append(number)
        object.__setattr__(self, "removed", tuple(numbers))
        object.__setattr__(self, "provenance", dict(provenance or {}))

    @classmethod
    def single(cls, depth: int, block: int, remove: int, provenance: Mapping[str, Any] | None = None) -> "Schedule":
        """Removes `remove` tokens in one block and none elsewhere: the form of the POMT paper.

        Args:
            depth: Blocks of the model.
            block: Index of the reducing block, from 0.
            remove: Tokens that it removes.
            provenance: See the class.

        Raises:
            ScheduleError: If `block` is not one of the `depth` blocks or `remove` is not a whole number >= 0.
        """
        blocks, reducing = _whole(depth), _whole(block)
        if blocks is None or blocks < 1:
            raise ScheduleError(f"`depth` must be a whole number >= 1, got {depth!r}.")
        if reducing is None or not 0 <= reducing < blocks:
            raise ScheduleError(f"`block` must be a block index from 0 to {blocks - 1}, got {block!r}.")
        return cls([remove if index == reducing else 0 for index in range(blocks)], provenance)

    @property
    def depth(self) -> int:
        """Blocks that the schedule is made for."""
        return len(self.removed)

    @property
    def total(self) -> int:
        """Tokens removed by all blocks together."""
        return sum(self.removed)

    @property
    def reducing(self) -> dict[int, int]:
        """The blocks that remove tokens: index of the block -> tokens removed."""
        return {block: remove for block, remove in enumerate(self.removed) if remove}

    def tokens(self, n: int) -> tuple[int, ...]:
        """Tokens that leave each block when `n` (prefix tokens included) enter block 0.

        Raises:
            ScheduleError: If `n` is not a whole number >= 1, or a block would be left without a token; names block,
                tokens there and tokens asked.
        """
        tokens = _whole(n)
        if tokens is None or tokens < 1:
            raise ScheduleError(f"`n` must be a whole number >= 1, got {n!r}.")
        leaving = []
        for block, remove in enumerate(self.removed):
            if remove and remove >= tokens:
                raise ScheduleError(f"Block {block} is asked to remove {remove} tokens, but only {tokens} enter it.")
            tokens -= remove
            leaving.append(tokens)
        return tuple(leaving)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(depth={self.depth}, removed={self.reducing})"

    def to_dict(self) -> dict[str, Any]:
        """The schedule as plain values, as `save` writes them."""
        document: dict[str, Any] = {"format": SCHEDULE_FORMAT, "version": _VERSION, "removed": list(self.removed)}
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Schedule":
        """The inverse of `to_dict`.

        Raises:
            ScheduleError: If the entries of `removed` or `provenance` are not of the right kind.
        """
        removed, provenance = document.get("removed"), document.get("provenance")
        if not isinstance(removed, list):
            raise ScheduleError(f"`removed` must be a list with one number a block, got {removed!r}.")
        if provenance is not None and not isinstance(provenance, Mapping):
            raise ScheduleError(f"`provenance` must be a mapping, got {provenance!r}.")
        return cls(removed, provenance)

    def save(self, path: str | Path) -> Path:
        """Writes the schedule, as JSON where `path` ends in `.json` and as YAML elsewhere; returns the path.

        The file appears whole or not at all.

        Raises:
            ArgumentError: If the provenance has an entry that such a file cannot hold; names it.
        """
        return write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "Schedule":
        """Reads a schedule that `save` wrote, YAML or JSON, without executing anything in it.

        Raises:
            FileFormatError: If the file cannot be read or is not a schedule; names the file.
        """
        document = read_document(path, SCHEDULE_FORMAT, _VERSION)
        try:
            return cls.from_dict(document)
        except ScheduleError as error:
            raise FileFormatError(f"{path} is not a usable schedule: {error}") from error
