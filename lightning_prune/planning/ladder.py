"""The schedules of several methods as one ladder: every step is faster, and costs more."""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_prune.planning.blocks_plan import FrontEntry
from lightning_prune.planning.finalists import Finalist
from lightning_prune.planning.method_front import MethodFront


class Rung(NamedTuple):
    """A schedule of a method.

    Attributes:
        front: Of the method.
        entry: The schedule.
        ratio: Its latency over dense, timed or predicted.
        accuracy: Its proxy, measured or estimated.
    """

    front: MethodFront
    entry: FrontEntry
    ratio: float
    accuracy: float


def ladder(fronts: Sequence[MethodFront], decided: Iterable[Finalist]) -> list[Rung]:
    """Schedules of all methods, from the slowest to the fastest, none of them beaten in both latency and proxy.

    Args:
        fronts: Of the methods.
        decided: What was decided after it had been timed, which none that is merely predicted drives out.
    """
    firm = _unbeaten(Rung(f.front, f.entry, f.ratio(), f.front.accuracy(f.entry)) for f in decided if f.removes)
    predicted = [
        Rung(front, entry, front.ratio(entry), front.estimate(entry))
        for front in fronts
        for entry in front.entries
        if entry.schedule.total
    ]
    fitting = [rung for rung in predicted if not any(_beats(rung, each) or _beats(each, rung) for each in firm)]
    return _unbeaten([*firm, *fitting])


def _beats(one: Rung, other: Rung) -> bool:
    return one.ratio <= other.ratio and one.accuracy >= other.accuracy


def _unbeaten(rungs: Iterable[Rung]) -> list[Rung]:
    found: list[Rung] = []
    for rung in sorted(rungs, key=lambda rung: (rung.ratio, -rung.accuracy)):
        if not found or rung.accuracy > found[-1].accuracy:
            found.append(rung)
    return found[::-1]
