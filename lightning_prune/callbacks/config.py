"""What a `TokenPruning` callback was asked for."""

from collections.abc import Callable, Iterable
from os import PathLike
from typing import Any, Literal, get_args

from lightning_prune.errors import ArgumentError
from lightning_prune.planning import Objective
from lightning_prune.planning.api import AUTO
from lightning_prune.profiling.measurement import Protocol
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import KeepRates, Schedule, load_schedule


class Refreshing:
    """Whether to measure anew; set between runs, it makes the next run decide anew, once.

    Runs after that keep what was decided, or a validation in every epoch would measure every time.
    """

    _refresh: bool = False
    _due: bool = False

    @property
    def refresh(self) -> bool:
        """Whether latency is measured anew even where a profile is kept."""
        return self._refresh

    @refresh.setter
    def refresh(self, value: bool) -> None:
        self._due = value and (self._due or not self._refresh)
        self._refresh = value


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {  # argument -> what it must be, and whether a value is
    "objective": ("an Objective such as Utility(0.5), or None", lambda v: v is None or isinstance(v, Objective)),
    "block": (
        "an index >= 0, a fraction of the depth in [0, 1) or 'auto'",
        lambda v: v == "auto" or _whole(v, 0) or (isinstance(v, float) and 0 <= v < 1),
    ),
    "calibration": (
        "a number of images >= 1, a tensor of images or a loader",
        lambda v: _whole(v, 1) or (isinstance(v, Iterable) and not isinstance(v, str | bytes)),
    ),
    "time_limit": ("a number > 0", lambda v: _whole(v, 1) or (isinstance(v, float) and v > 0)),
    "target": ("a dotted path or None", lambda v: v is None or isinstance(v, str)),
    "protocol": ("'deployed' or 'paper'", lambda v: isinstance(v, str) and v in get_args(Protocol)),
    "cache_dir": ("a folder, 'auto' or None", lambda v: v is None or isinstance(v, str | PathLike)),
    "enabled": ("True or False", lambda v: isinstance(v, bool)),
    "refresh": ("True or False", lambda v: isinstance(v, bool)),
    "verbose": ("True or False", lambda v: isinstance(v, bool)),
    "seed": ("a whole number >= 0", lambda v: _whole(v, 0)),
}


def check_arguments(**given: Any) -> None:
    """Refuses what no model and no data could make usable.

    Raises:
        ArgumentError: Names the argument, what it must be and what came.
    """
    for name, value in given.items():
        expected, fits = _RULES[name]
        if not fits(value):
            raise ArgumentError(f"`{name}` must be {expected}, got {value!r}.")


def check_together(
    reduction: Reduction | None, block: Any, schedule: Any, objective: Any, alpha: float, protocol: str
) -> None:
    """Refuses arguments of which one would play no part beside another; `reduction` is None where it is searched for.

    Raises:
        ArgumentError: Names the argument, what came and why.
    """
    if objective is not None and alpha != 0.5:
        raise ArgumentError(f"`alpha` belongs to the default objective; got alpha={alpha} and {objective!r}.")
    check_place(reduction, block)
    if reduction is not None and reduction.adaptive:
        check_adaptive(reduction, schedule=schedule, objective=objective, alpha=alpha, protocol=protocol)
    elif reduction is None or block == "auto":
        check_search("method" if reduction is None else "block", schedule=schedule, protocol=protocol)


def check_adaptive(reduction: Reduction, **given: Any) -> None:
    """Refuses what would play no part with a reduction of which the images decide how many tokens go.

    Raises:
        ArgumentError: Names the argument, what came and why.
    """
    defaults = {"schedule": "auto", "objective": None, "alpha": 0.5, "protocol": "deployed"}
    for name, value in given.items():
        if type(value) is not type(defaults[name]) or value != defaults[name]:
            raise ArgumentError(
                f"With {reduction.name} the images decide how many tokens go, and nothing is planned: `{name}` must be "
                f"left out, got {value!r}."
            )


def check_place(reduction: Reduction | None, block: int | float | str) -> None:
    """Refuses a block that would play no part, and a search over blocks for a method that does not act in them.

    Args:
        reduction: The method; None where it is searched for.
        block: What came for it.

    Raises:
        ArgumentError: Names the argument, what came and why.
    """
    if reduction is None and block not in (0.25, "auto"):
        raise ArgumentError(f"`block` must be left out with method='auto', which searches all blocks; got {block!r}.")
    if reduction is not None and block == "auto" and (reduction.site != "block" or reduction.adaptive):
        raise ArgumentError(
            f"`block` must be left out with {reduction.name}, which does not act in blocks that could be searched; got "
            "'auto'."
        )


def check_search(which: str, schedule: Any, protocol: str) -> None:
    """Refuses what would play no part where blocks, or methods and blocks, are searched.

    Args:
        which: The argument that is `"auto"`.
        schedule: What came for it.
        protocol: What came for it.

    Raises:
        ArgumentError: Names the argument, what came and why.
    """
    if not (isinstance(schedule, str) and schedule == "auto"):
        raise ArgumentError(f"`schedule` leaves nothing to search for with {which}='auto'; got {schedule!r}.")
    if protocol != "deployed":
        raise ArgumentError(f"`protocol` must be 'deployed' with {which}='auto', got {protocol!r}.")


def readable_schedule(schedule: Any) -> Literal["auto"] | int | float | list[int] | Schedule | KeepRates:
    """Loads a schedule that is given as a path, and refuses what can never be one.

    Raises:
        ArgumentError: If it is of no usable type.
        ScheduleError: If it is a list that is no schedule.
        FileFormatError: If the file holds none.
    """
    if schedule == "auto" or isinstance(schedule, Schedule | KeepRates):
        return schedule
    if isinstance(schedule, float) and 0 < schedule <= 1:
        return schedule
    if isinstance(schedule, int) and not isinstance(schedule, bool):
        return schedule
    if isinstance(schedule, list | tuple):
        return list(Schedule(schedule).removed)
    if isinstance(schedule, str) or hasattr(schedule, "__fspath__"):
        return load_schedule(schedule)
    raise ArgumentError(
        f"`schedule` must be 'auto', a number of tokens, a keep rate in (0, 1], a list with one number a block, a "
        f"Schedule, KeepRates or the path of either, got {schedule!r}."
    )


class MethodChoice:
    """Method and block, as one of each or to be searched for.

    Attributes:
        block: An index, a fraction of the depth, or `"auto"`.
    """

    block: int | float | Literal["auto"]
    _reduction: Reduction | None  # None: to be searched for

    @property
    def reduction(self) -> Reduction:
        """The method.

        Raises:
            ArgumentError: If it is searched for.
        """
        if self._reduction is None:
            raise ArgumentError("`method` must name one method for this; got 'auto', which only planning can use.")
        return self._reduction

    @property
    def place(self) -> int | float:
        """The reducing block, as an index or a fraction of the depth.

        Raises:
            ArgumentError: If it is searched for.
        """
        if self.block == "auto":
            raise ArgumentError(
                "`block` must be an index or a fraction for this; got 'auto', which only planning can use."
            )
        return self.block

    @property
    def label(self) -> str:
        """What to call the method: its name, or `auto`."""
        return "auto" if self._reduction is None else self._reduction.name

    @property
    def methods(self) -> tuple[str | Reduction, ...]:
        """The methods that are searched."""
        return AUTO if self._reduction is None else (self._reduction,)

    @property
    def searches(self) -> bool:
        """Whether it is searched over blocks, and perhaps methods."""
        return self._reduction is None or self.block == "auto"
