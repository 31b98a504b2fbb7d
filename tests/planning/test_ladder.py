"""One ladder of all methods."""

from types import SimpleNamespace

from lightning_prune import Schedule
from lightning_prune.planning.candidates import Candidate, ladder
from lightning_prune.planning.results import FrontEntry
from lightning_prune.profiling import LatencyStats


def front(name, *steps):
    """Latency over dense and proxy of each of its schedules."""
    entries = [FrontEntry(name, Schedule([n, 0]), 100 * ratio, 0.0) for n, (ratio, _) in enumerate(steps, 1)]
    known = {entry: proxy for entry, (_, proxy) in zip(entries, steps, strict=True)}
    dense = FrontEntry(name, Schedule([0, 0]), 100.0, 0.0)
    return SimpleNamespace(
        label=name,
        entries=[*entries, dense],
        ratio=lambda entry: entry.milliseconds / 100,
        estimate=lambda entry: known[entry],
        accuracy=lambda entry: known.get(entry, 1.0),
    )


def told(rungs):
    return [(rung.front.label, round(rung.ratio, 3), rung.accuracy) for rung in rungs]


ONE = front("one", (0.5, 0.7), (0.7, 0.9), (0.9, 0.99))
OTHER = front("other", (0.4, 0.6), (0.6, 0.85), (0.8, 0.88))


def test_steps_of_all_methods_are_faster_and_cost_more():
    assert told(ladder([ONE, OTHER], [])) == [
        ("one", 0.9, 0.99),
        ("one", 0.7, 0.9),
        ("other", 0.6, 0.85),
        ("one", 0.5, 0.7),
        ("other", 0.4, 0.6),
    ]


def test_what_was_timed_is_not_driven_out_by_what_is_predicted():
    entry = OTHER.entries[2]
    timed = Candidate(OTHER, entry, "why", LatencyStats(100, 0, 1, 0, 9), LatencyStats(72, 0, 0.72, 0, 9))
    made = ladder([ONE, OTHER], [timed])
    assert told(made) == [
        ("one", 0.9, 0.99),
        ("other", 0.72, 0.88),
        ("other", 0.6, 0.85),
        ("one", 0.5, 0.7),
        ("other", 0.4, 0.6),
    ]
    assert made[1].entry is entry


def test_dense_is_no_step():
    dense = Candidate(ONE, ONE.entries[-1], "why")
    assert told(ladder([ONE], [dense])) == [("one", 0.9, 0.99), ("one", 0.7, 0.9), ("one", 0.5, 0.7)]
    assert ladder([front("none")], []) == []
