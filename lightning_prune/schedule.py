"""Schedules: how many tokens each block of a Vision Transformer removes, and by which method."""

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from numbers import Real
from os import PathLike
from typing import Any, ClassVar, NamedTuple, Protocol, TypeAlias, runtime_checkable

from lightning_prune._utils.documents import SavedDocument, load_saved
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune._utils.spec import Spec
from lightning_prune._utils.validation import as_int
from lightning_prune.errors import ArgumentError, ScheduleError


class MethodSpec(Spec):
    """A reduction method as plain data; `lightning_prune.reduction.resolve` turns it into a `Reduction`.

    Example:
        >>> from lightning_prune.schedule import MethodSpec
        >>> MethodSpec("tome", {"proportional_attention": False})
        MethodSpec('tome:proportional_attention=False')
    """


Method: TypeAlias = MethodSpec | Mapping[str, Any] | str
"""One method, in any of the forms that `MethodSpec.of` reads."""


def _normalised(
    method: Method | Iterable[Method | None] | None, depth: int, reducing: Iterable[int]
) -> MethodSpec | tuple[MethodSpec | None, ...] | None:
    """A single spec if all reducing blocks have the same method, so that schedules with the same effect are equal."""
    if method is None:
        return None
    if isinstance(method, MethodSpec | Mapping | str) or not isinstance(method, Iterable):
        return MethodSpec.of(method, "method")
    specs = [None if entry is None else MethodSpec.of(entry, "method") for entry in method]
    if len(specs) != depth:
        raise ScheduleError(f"`method` must have an entry for each of the {depth} blocks, got {len(specs)}.")
    blocks = set(reducing)
    for block in sorted(blocks):
        if specs[block] is None:
            raise ScheduleError(f"`method` must name a method for block {block}, which removes tokens, got None.")
    used = [spec if block in blocks else None for block, spec in enumerate(specs)]
    different = {spec for spec in (used if blocks else specs) if spec is not None}
    if len(different) <= 1:
        return different.pop() if different else None
    return tuple(used) if blocks else None


class _BlockSchedule(SavedDocument):
    """Base of `Schedule` and `KeepRates`: the method of each block, and what the schedule was measured on."""

    method: MethodSpec | tuple[MethodSpec | None, ...] | None
    made_on: MeasurementSource | None

    @property
    def methods(self) -> dict[int, MethodSpec]:
        """Reducing block -> its method; empty if `method` is None."""
        if self.method is None:
            return {}
        specs = dict(enumerate(self.method)) if isinstance(self.method, tuple) else {}
        found = {block: specs.get(block, self.method) for block in self._reducing_blocks()}
        return {block: spec for block, spec in found.items() if isinstance(spec, MethodSpec)}

    @property
    def method_label(self) -> str:
        """The method as people read it; of several each with its blocks, `"topk 3, tome 6+9"`. Empty if it is None."""
        if not isinstance(self.method, tuple):
            return "" if self.method is None else str(self.method)
        blocks: dict[str, list[int]] = {}
        for block, spec in self.methods.items():
            blocks.setdefault(str(spec), []).append(block)
        return ", ".join(f"{method} {'+'.join(map(str, own))}" for method, own in blocks.items())

    @abstractmethod
    def _reducing_blocks(self) -> tuple[int, ...]:
        """Indices of the blocks that remove tokens."""

    def _set_method(self, method: Any, depth: int, made_on: MeasurementSource | None) -> None:
        if not isinstance(made_on, MeasurementSource | None):
            raise ScheduleError(f"`made_on` must be a MeasurementSource or None, got {made_on!r}.")
        object.__setattr__(self, "method", _normalised(method, depth, self._reducing_blocks()))
        object.__setattr__(self, "made_on", made_on)

    def _method_text(self) -> str:
        if isinstance(self.method, tuple):
            return f", method={ {block: str(spec) for block, spec in self.methods.items()} }"
        return "" if self.method is None else f", method={str(self.method)!r}"

    def _method_values(self) -> dict[str, Any]:
        if isinstance(self.method, tuple):
            return {"method": [None if spec is None else spec.to_plain() for spec in self.method]}
        return {} if self.method is None else {"method": self.method.to_plain()}

    def _source_values(self) -> dict[str, Any]:
        source = {} if self.made_on is None else self.made_on.to_plain()
        return {"made_on": source} if source else {}


def _saved_method_and_source(values: Mapping[str, Any], version: int) -> tuple[Any, MeasurementSource | None]:
    if version == 1:
        return _from_provenance(values.get("provenance"))
    made_on = values.get("made_on")
    return values.get("method"), None if made_on is None else MeasurementSource.from_plain(made_on)


def _from_provenance(provenance: Any) -> tuple[MethodSpec | None, MeasurementSource | None]:
    """Method and source from the entry `provenance`, which documents of version 1 have instead of the two."""
    if provenance is None:
        return None, None
    if not isinstance(provenance, Mapping):
        raise ScheduleError(f"`provenance` must be a mapping, got {provenance!r}.")
    entries = dict(provenance)
    name, settings = entries.pop("method", None), entries.pop("settings", None)
    method = MethodSpec(name, settings or {}) if isinstance(name, str) and name else None
    entries.pop("tokens", None)  # follows from the schedule
    if "tokens_dense" in entries:
        entries["dense_tokens"] = entries.pop("tokens_dense")
    return method, MeasurementSource.from_plain(entries) if entries else None


@dataclass(frozen=True, repr=False)
class Schedule(_BlockSchedule):
    """Tokens removed by each block; immutable, comparable, hashable.

    Block `b` removes its tokens between its attention (with the residual) and its MLP, so its attention processes all
    of them, and its MLP and all later blocks do not. Equal schedules have the same effect.

    Args:
        removed: Number of tokens that each block removes, an integer >= 0, in the order of the blocks.
        method: The reduction that removes them: a name (`"tome"`), a name with settings (`"tome:order=kept"`, a
            `MethodSpec` or a mapping), or one of these for each block. If None, the method is chosen where the schedule
            is used.
        made_on: What its latency was measured on. It is saved, but comparisons for equality ignore it. A schedule that
            is used on something else leads to a warning.

    Raises:
        ScheduleError: If `removed` is empty or holds anything but integers >= 0, or `method` has another form.

    Example:
        >>> from lightning_prune import Schedule
        >>> schedule = Schedule.single(depth=12, block=3, remove=56)
        >>> schedule
        Schedule(depth=12, removed={3: 56})
        >>> schedule.tokens(197)[2:5]
        (197, 141, 141)
        >>> Schedule([0, 8, 8], "tome") == Schedule([0, 8, 8], ["tome"] * 3)
        True
    """

    FORMAT: ClassVar[str] = "lightning_prune.schedule"
    VERSIONS: ClassVar[tuple[int, ...]] = (1, 2)

    removed: tuple[int, ...]
    method: MethodSpec | tuple[MethodSpec | None, ...] | None = None
    made_on: MeasurementSource | None = field(default=None, compare=False)

    def __init__(
        self,
        removed: Iterable[int],
        method: Method | Iterable[Method | None] | None = None,
        made_on: MeasurementSource | None = None,
    ) -> None:
        try:
            entries = tuple(removed)
        except TypeError:
            raise ScheduleError(f"`removed` must be a list with one number per block, got {removed!r}.") from None
        if not entries:
            raise ScheduleError("`removed` must hold one number per block, got an empty list.")
        numbers = []
        for block, entry in enumerate(entries):
            number = as_int(entry)
            if number is None or number < 0:
                raise ScheduleError(f"`removed` must hold integers >= 0, got {entry!r} for block {block}.")
            numbers.append(number)
        object.__setattr__(self, "removed", tuple(numbers))
        self._set_method(method, len(numbers), made_on)

    @classmethod
    def single(
        cls,
        depth: int,
        block: int,
        remove: int,
        method: Method | None = None,
        made_on: MeasurementSource | None = None,
    ) -> "Schedule":
        """Creates a schedule that removes `remove` tokens in one block, as in the POMT paper.

        Args:
            depth: Number of blocks of the model.
            block: Index of the reducing block, from 0.
            remove: Number of tokens that it removes.
            method: See the class.
            made_on: See the class.

        Raises:
            ScheduleError: If `block` is not a block index below `depth`, or `remove` is not an integer >= 0.
        """
        blocks, reducing = as_int(depth), as_int(block)
        if blocks is None or blocks < 1:
            raise ScheduleError(f"`depth` must be an integer >= 1, got {depth!r}.")
        if reducing is None or not 0 <= reducing < blocks:
            raise ScheduleError(f"`block` must be a block index from 0 to {blocks - 1}, got {block!r}.")
        return cls([remove if index == reducing else 0 for index in range(blocks)], method, made_on)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.removed)

    @property
    def total_removed(self) -> int:
        """Number of tokens removed by all blocks together."""
        return sum(self.removed)

    @property
    def reducing(self) -> dict[int, int]:
        """Index of each block that removes tokens -> number of tokens removed."""
        return {block: remove for block, remove in enumerate(self.removed) if remove}

    def tokens(self, n: int) -> tuple[int, ...]:
        """Number of tokens that leave each block if `n` (prefix tokens included) enter block 0.

        Raises:
            ScheduleError: If `n` is not an integer >= 1, or no token would leave a block; names the block, the tokens
                that enter it and the tokens that it should remove.
        """
        tokens = as_int(n)
        if tokens is None or tokens < 1:
            raise ScheduleError(f"`n` must be an integer >= 1, got {n!r}.")
        leaving = []
        for block, remove in enumerate(self.removed):
            if remove and remove >= tokens:
                raise ScheduleError(f"`removed` must be < {tokens}, the tokens that enter block {block}, got {remove}.")
            tokens -= remove
            leaving.append(tokens)
        return tuple(leaving)

    def with_method(self, method: Method | Iterable[Method | None] | None) -> "Schedule":
        """The same counts with another method."""
        return type(self)(self.removed, method, self.made_on)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(depth={self.depth}, removed={self.reducing}{self._method_text()})"

    def _reducing_blocks(self) -> tuple[int, ...]:
        return tuple(self.reducing)

    def _to_values(self) -> dict[str, Any]:
        # The method comes first, so that a file truncated after `removed` still holds the same schedule.
        return {**self._method_values(), "removed": list(self.removed), **self._source_values()}

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], version: int) -> "Schedule":
        removed = values.get("removed")
        if not isinstance(removed, list):
            raise ScheduleError(f"`removed` must be a list with one number per block, got {removed!r}.")
        return cls(removed, *_saved_method_and_source(values, version))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Schedule | KeepRates":
        """Reads a file written by `Schedule.save`, `KeepRates.save` or `Plan.save`, without executing anything in it.

        Files of earlier releases can be read too.

        Raises:
            FileFormatError: If the file cannot be read or holds no schedule; names the file.
        """
        found = load_saved(path, Schedule, KeepRates)
        assert isinstance(found, Schedule | KeepRates)
        return found


class Rate(NamedTuple):
    """A keep rate as a ratio of integers: exact, and traceable with symbolic token counts."""

    numerator: int
    denominator: int

    def removes(self, tokens: int, num_prefix_tokens: int) -> int:
        """Number of tokens to remove from `tokens`; the number of patch tokens kept is rounded up."""
        patches = tokens - num_prefix_tokens
        return patches + (-self.numerator * patches // self.denominator)


def _is_rate(value: Any) -> bool:
    return not isinstance(value, bool) and isinstance(value, Real) and 0 < float(value) <= 1


@dataclass(frozen=True, repr=False)
class KeepRates(_BlockSchedule):
    """Keep rate of each block; immutable, comparable, hashable.

    A `Schedule` holds numbers of tokens, which fit one image size. Keep rates are converted to a schedule for each
    image size: of the M patch tokens that enter block b, ceil(rate * M) leave it, fused tokens counted. Prefix tokens
    are not counted, and all of them are kept.

    Args:
        rates: Keep rate of each block, in (0, 1], in the order of the blocks. Decimals are exact: 0.7 is 7 / 10.
        method: See `Schedule`.
        made_on: See `Schedule`.

    Raises:
        ScheduleError: If `rates` is empty or holds anything but numbers in (0, 1], or `method` has another form.

    Example:
        >>> from lightning_prune import KeepRates
        >>> rates = KeepRates.single(depth=12, block=3, rate=0.7)
        >>> rates
        KeepRates(depth=12, rates={3: 0.7})
        >>> rates.schedule(197), rates.schedule(577)
        (Schedule(depth=12, removed={3: 58}), Schedule(depth=12, removed={3: 172}))
    """

    FORMAT: ClassVar[str] = "lightning_prune.keep_rates"
    VERSIONS: ClassVar[tuple[int, ...]] = (1, 2)

    rates: tuple[float, ...]
    method: MethodSpec | tuple[MethodSpec | None, ...] | None = None
    made_on: MeasurementSource | None = field(default=None, compare=False)

    def __init__(
        self,
        rates: Iterable[float],
        method: Method | Iterable[Method | None] | None = None,
        made_on: MeasurementSource | None = None,
    ) -> None:
        try:
            entries = tuple(rates)
        except TypeError:
            raise ScheduleError(f"`rates` must be a list with one keep rate per block, got {rates!r}.") from None
        if not entries:
            raise ScheduleError("`rates` must hold one keep rate per block, got an empty list.")
        for block, entry in enumerate(entries):
            if not _is_rate(entry):
                raise ScheduleError(f"`rates` must hold keep rates in (0, 1], got {entry!r} for block {block}.")
        object.__setattr__(self, "rates", tuple(float(entry) for entry in entries))
        self._set_method(method, len(entries), made_on)

    @classmethod
    def single(
        cls,
        depth: int,
        block: int,
        rate: float,
        method: Method | None = None,
        made_on: MeasurementSource | None = None,
    ) -> "KeepRates":
        """Creates keep rates of `rate` in one block and 1 in all others.

        Raises:
            ScheduleError: If `block` is not a block index below `depth`, or `rate` is not in (0, 1].
        """
        reducing = Schedule.single(depth, block, 1).reducing  # checks `depth` and `block`
        return cls([rate if index in reducing else 1.0 for index in range(depth)], method, made_on)

    @classmethod
    def of(cls, schedule: Schedule, tokens: int, num_prefix_tokens: int = 1) -> "KeepRates":
        """Converts a schedule for `tokens` to keep rates; for the same `tokens` they give the same schedule.

        Args:
            schedule: The schedule.
            tokens: N, tokens that enter block 0, prefix tokens included.
            num_prefix_tokens: P.

        Raises:
            ScheduleError: If no patch token would leave a block.
        """
        rates = []
        for block, (remove, left) in enumerate(zip(schedule.removed, schedule.tokens(tokens), strict=True)):
            patches = left - num_prefix_tokens
            if patches < 1:
                raise ScheduleError(f"`schedule` must leave a patch token of {tokens}, got none after block {block}.")
            rates.append(patches / (patches + remove))
        made_on = schedule.made_on
        return cls(rates, schedule.method, None if made_on is None else replace(made_on, dense_tokens=None))

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.rates)

    @property
    def reducing(self) -> dict[int, float]:
        """Index of each block that removes tokens -> keep rate."""
        return {block: rate for block, rate in enumerate(self.rates) if rate < 1}

    def exact(self, block: int) -> Rate:
        """The keep rate of a block as a ratio of integers."""
        decimal = Fraction(repr(self.rates[block]))
        ratio = decimal.limit_denominator(1_000_000)  # 0.3333333333333333 becomes 1 / 3
        if abs(ratio - decimal) > Fraction(1, 10**15):
            ratio = decimal
        return Rate(ratio.numerator, ratio.denominator)

    def schedule(self, tokens: int, num_prefix_tokens: int = 1) -> Schedule:
        """The schedule of these keep rates if `tokens` enter block 0.

        Args:
            tokens: N, prefix tokens included.
            num_prefix_tokens: P.

        Raises:
            ScheduleError: If there is no patch token.
        """
        if tokens <= num_prefix_tokens:
            raise ScheduleError(f"`tokens` must be > {num_prefix_tokens}, the number of prefix tokens, got {tokens}.")
        removed, count = [], tokens
        for block in range(self.depth):
            removed.append(self.exact(block).removes(count, num_prefix_tokens))
            count -= removed[-1]
        return Schedule(removed, self.method, self.made_on)

    def with_method(self, method: Method | Iterable[Method | None] | None) -> "KeepRates":
        """The same keep rates with another method."""
        return type(self)(self.rates, method, self.made_on)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(depth={self.depth}, rates={self.reducing}{self._method_text()})"

    def _reducing_blocks(self) -> tuple[int, ...]:
        return tuple(self.reducing)

    def _to_values(self) -> dict[str, Any]:
        return {**self._method_values(), "rates": list(self.rates), **self._source_values()}

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], version: int) -> "KeepRates":
        rates = values.get("rates")
        if not isinstance(rates, list):
            raise ScheduleError(f"`rates` must be a list with one keep rate per block, got {rates!r}.")
        return cls(rates, *_saved_method_and_source(values, version))

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "KeepRates":
        """Reads keep rates written by `save`, YAML or JSON, without executing anything in the file.

        Raises:
            FileFormatError: If the file cannot be read or holds no keep rates; names the file.
        """
        return load_saved(path, KeepRates)


@runtime_checkable
class PlannedSchedule(Protocol):
    """Protocol of a `Plan`, for packages that `planning` imports: a schedule with a method, and why it was chosen."""

    @property
    def schedule(self) -> Schedule | KeepRates:
        """The schedule, which names its method."""
        ...

    @property
    def reason(self) -> str:
        """Why this schedule was chosen."""
        ...


ScheduleLike: TypeAlias = Schedule | KeepRates | PlannedSchedule | Sequence[int] | int | float | str | PathLike[str]
"""Every form in which a schedule can be given; see `read_schedule`."""


def read_schedule(value: ScheduleLike, name: str = "schedule") -> Schedule | KeepRates | int | float:
    """Reads a schedule in any form. Numbers are returned as they are; `patching.resolve_schedule` resolves them.

    Args:
        value: A `Schedule`; `KeepRates`; a `Plan`; a list of the numbers of tokens that the blocks remove; an int, the
            total number of tokens to remove; a float in (0, 1), the share of patch tokens that are left at the end; or
            the path of a file written by `Schedule.save`, `KeepRates.save` or `Plan.save`.
        name: Name of the argument in error messages.

    Returns:
        The schedule, or the number.

    Raises:
        ArgumentError: If `value` has none of these forms.
        ScheduleError: If it is a list but not a valid schedule.
        FileFormatError: If the file cannot be read or holds no schedule.

    Example:
        >>> from lightning_prune.schedule import read_schedule
        >>> read_schedule([0, 8, 0]), read_schedule(0.7)
        (Schedule(depth=3, removed={1: 8}), 0.7)
    """
    if isinstance(value, Schedule | KeepRates):
        return value
    if isinstance(value, str | PathLike):
        return Schedule.load(value)
    if isinstance(value, PlannedSchedule):
        return read_schedule(value.schedule, name)
    number: Any = value
    count = as_int(number)
    if count is not None and count >= 0:
        return count
    if count is None and not isinstance(number, bool) and isinstance(number, Real):
        if 0 < float(number) < 1:
            return float(number)
        hint = "Write 0 to keep all tokens, 1 to remove one" if value == 1 else "Write an int for a number of tokens"
        raise ArgumentError(f"`{name}` must be a share of the patch tokens in (0, 1), got {value!r}. {hint}.")
    if isinstance(value, Iterable) and not isinstance(value, bytes | Mapping):
        return Schedule(value)
    raise ArgumentError(
        f"`{name}` must be a Schedule, KeepRates, a Plan, a list with one number per block, a number of tokens >= 0, a "
        f"share of the patch tokens in (0, 1) or the path of a saved schedule, got {value!r}."
    )
