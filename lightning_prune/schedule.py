"""Schedules: how many tokens, or what share of its patch tokens, each block removes."""

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from lightning_prune._utils.files import read_document, write_document
from lightning_prune.errors import FileFormatError, ScheduleError

SCHEDULE_FORMAT = "lightning_prune.schedule"
_SCHEDULE_VERSION = 1


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
        document: dict[str, Any] = {
            "format": SCHEDULE_FORMAT,
            "version": _SCHEDULE_VERSION,
            "removed": list(self.removed),
        }
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
        document = read_document(path, SCHEDULE_FORMAT, _SCHEDULE_VERSION)
        try:
            return cls.from_dict(document)
        except ScheduleError as error:
            raise FileFormatError(f"{path} is not a usable schedule: {error}") from error


RATES_FORMAT = "lightning_prune.keep_rates"
_RATES_VERSION = 1


S = TypeVar("S", "KeepRates", Schedule)


class Rate(NamedTuple):
    """A keep rate as a ratio of whole numbers: exact, and traceable where token counts are symbolic."""

    numerator: int
    denominator: int

    def removes(self, tokens: int, prefix_tokens: int) -> int:
        """Tokens that go of `tokens`: the patch tokens but their share, which is rounded up."""
        patches = tokens - prefix_tokens
        return patches + (-self.numerator * patches // self.denominator)


def _is_rate(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) <= 1


@dataclass(frozen=True, repr=False)
class KeepRates:
    """Keep rate of each block; immutable, comparable, hashable.

    Where `Schedule` counts tokens, which fits images of one size, keep rates are resolved for each size by itself: of
    the M patch tokens that enter block b, ceil(rate * M) leave it, fused tokens counted. Prefix tokens are not counted
    and stay.

    Args:
        rates: Keep rate of each block, in (0, 1], in order of the blocks. Decimals are taken as they are written: 0.7
            is seven tenths.
        provenance: As of `Schedule`.

    Raises:
        ScheduleError: If `rates` is empty or holds anything but numbers in (0, 1].

    Example:
        >>> from lightning_prune import KeepRates
        >>> rates = KeepRates.single(depth=12, block=3, rate=0.7)
        >>> rates
        KeepRates(depth=12, rates={3: 0.7})
        >>> rates.schedule(197), rates.schedule(577)
        (Schedule(depth=12, removed={3: 58}), Schedule(depth=12, removed={3: 172}))
    """

    rates: tuple[float, ...]
    provenance: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __init__(self, rates: Iterable[float], provenance: Mapping[str, Any] | None = None) -> None:
        try:
            entries = tuple(rates)
        except TypeError:
            raise ScheduleError(f"`rates` must be a list with one keep rate a block, got {rates!r}.") from None
        if not entries:
            raise ScheduleError("`rates` must hold one keep rate for each block, got an empty list.")
        for block, entry in enumerate(entries):
            if not _is_rate(entry):
                raise ScheduleError(f"`rates` must hold keep rates in (0, 1], got {entry!r} for block {block}.")
        object.__setattr__(self, "rates", tuple(float(entry) for entry in entries))
        object.__setattr__(self, "provenance", dict(provenance or {}))

    @classmethod
    def single(cls, depth: int, block: int, rate: float, provenance: Mapping[str, Any] | None = None) -> "KeepRates":
        """Keeps `rate` of the patch tokens in one block and all elsewhere.

        Raises:
            ScheduleError: If `block` is not one of the `depth` blocks or `rate` is not in (0, 1].
        """
        reducing = Schedule.single(depth, block, 1).reducing  # the same checks of depth and block
        return cls([rate if index in reducing else 1.0 for index in range(depth)], provenance)

    @classmethod
    def of(cls, schedule: Schedule, tokens: int, prefix_tokens: int = 1) -> "KeepRates":
        """The keep rates that a schedule amounts to for `tokens`; for them they give exactly this schedule back.

        Args:
            schedule: Tokens removed by each block.
            tokens: N, tokens that enter block 0, prefix tokens included.
            prefix_tokens: P.

        Raises:
            ScheduleError: If a block would be left without a patch token.
        """
        rates = []
        for block, (remove, left) in enumerate(zip(schedule.removed, schedule.tokens(tokens), strict=True)):
            patches = left - prefix_tokens
            if patches < 1:
                raise ScheduleError(f"Block {block} would be left without a patch token of {tokens} tokens.")
            rates.append(patches / (patches + remove))
        return cls(rates, {k: v for k, v in schedule.provenance.items() if k not in ("tokens_dense", "tokens")})

    @property
    def depth(self) -> int:
        """Blocks that the keep rates are made for."""
        return len(self.rates)

    @property
    def reducing(self) -> dict[int, float]:
        """The blocks that remove tokens: index of the block -> keep rate."""
        return {block: rate for block, rate in enumerate(self.rates) if rate < 1}

    def exact(self, block: int) -> Rate:
        """The keep rate of a block as a ratio."""
        written = Fraction(repr(self.rates[block]))
        ratio = written.limit_denominator(1_000_000)  # 0.3333333333333333 stands for a third
        if abs(ratio - written) > Fraction(1, 10**15):
            ratio = written
        return Rate(ratio.numerator, ratio.denominator)

    def schedule(self, tokens: int, prefix_tokens: int = 1) -> Schedule:
        """Tokens that each block removes when `tokens` enter block 0.

        Args:
            tokens: N, prefix tokens included.
            prefix_tokens: P.

        Raises:
            ScheduleError: If there is no patch token.
        """
        if tokens <= prefix_tokens:
            raise ScheduleError(f"`tokens` must be more than the {prefix_tokens} prefix tokens, got {tokens}.")
        removed, count = [], tokens
        for block in range(self.depth):
            removed.append(self.exact(block).removes(count, prefix_tokens))
            count -= removed[-1]
        return Schedule(removed, self.provenance)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(depth={self.depth}, rates={self.reducing})"

    def to_dict(self) -> dict[str, Any]:
        """The keep rates as plain values, as `save` writes them."""
        document: dict[str, Any] = {"format": RATES_FORMAT, "version": _RATES_VERSION, "rates": list(self.rates)}
        if self.provenance:
            document["provenance"] = dict(self.provenance)
        return document

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "KeepRates":
        """The inverse of `to_dict`.

        Raises:
            ScheduleError: If the entries of `rates` or `provenance` are not of the right kind.
        """
        rates, provenance = document.get("rates"), document.get("provenance")
        if not isinstance(rates, list):
            raise ScheduleError(f"`rates` must be a list with one keep rate a block, got {rates!r}.")
        if provenance is not None and not isinstance(provenance, Mapping):
            raise ScheduleError(f"`provenance` must be a mapping, got {provenance!r}.")
        return cls(rates, provenance)

    def save(self, path: str | Path) -> Path:
        """Writes the keep rates as `Schedule.save` writes a schedule."""
        return write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "KeepRates":
        """Reads keep rates that `save` wrote, YAML or JSON, without executing anything in it.

        Raises:
            FileFormatError: If the file cannot be read or holds no keep rates; names the file.
        """
        return _read(cls, read_document(path, RATES_FORMAT, _RATES_VERSION), path)


def load_schedule(path: str | Path) -> Schedule | KeepRates:
    """Reads what `Schedule.save` or `KeepRates.save` wrote.

    Raises:
        FileFormatError: If the file cannot be read or is neither; names the file.

    Example:
        >>> path = Schedule([0, 8, 0]).save("schedule.yaml")
        >>> load_schedule(path).removed
        (0, 8, 0)
    """
    document = read_document(path, (SCHEDULE_FORMAT, RATES_FORMAT), _RATES_VERSION)
    return _read(KeepRates, document, path) if document["format"] == RATES_FORMAT else _read(Schedule, document, path)


def _read(kind: type[S], document: Mapping[str, Any], path: str | Path) -> S:
    try:
        return kind.from_dict(document)
    except ScheduleError as error:
        what = "keep rates" if kind is KeepRates else "schedule"
        raise FileFormatError(f"{path} holds no usable {what}: {error}") from error
