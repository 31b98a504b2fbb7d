"""What a comparison found, in sentences made from its figures: which method won where, and what not to read into it."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from lightning_prune.report.rows import (
    TOP1,
    Row,
    Score,
    by_target,
    change_of,
    dense_of,
    interval_of,
    missed,
    number,
    percent,
    points,
    rows_of,
    score_of,
    series_name,
)


class Summary(NamedTuple):
    """Sentences of plain text.

    Attributes:
        findings: What was gained at which price, the most important first.
        cautions: Where nothing was gained, what could not be reached or is not known.
    """

    findings: list[str]
    cautions: list[str]


def summary(document: Mapping[str, Any]) -> Summary:
    """Says what the figures of a comparison say and no more.

    Args:
        document: What `compare` writes as `results.json`.

    Raises:
        DataError: If the document has no rows.

    Example:
        >>> dense = {"variant": "dense", "method": "", "top1": 0.9, "speedup": 1.0}
        >>> pruned = {"variant": "pomt given", "method": "pomt", "top1": 0.89, "speedup": 1.5}
        >>> summary({"rows": [dense, pruned]}).findings
        ['pomt given: 1.50x as fast as dense, 89.00% top-1, \u22121.00 points against dense.']
    """
    rows = rows_of(document)
    score, dense = score_of(rows), dense_of(rows)
    ranked = {target: group for target, group in by_target(rows, score).items() if target is not None}
    groups = {target: [row for row in group if not missed(row)] or group for target, group in ranked.items()}
    findings = [*_winners(groups, score), *(_at_target(target, group, score) for target, group in groups.items())]
    loose = [row for row in rows if row.get("target") is None and row is not dense and number(row, "speedup")]
    findings += [_alone(row, dense, score) for row in loose]
    return Summary(
        [sentence for sentence in findings if sentence],
        [
            *_unknown_accuracy(score),
            *_not_faster(rows, dense),
            *_place_of("pomt", groups, score),
            *_beaten_by_random(groups, score),
            *_missed(rows),
            *_unreached(document),
        ],
    )


def _against_dense(row: Row, dense: Row | None) -> str:
    """` -0.80 points against dense (95% interval ...)`, with what the interval says; empty where nothing is known."""
    change, interval = change_of(row, dense), interval_of(row)
    if change is None:
        return ""
    said = f", {points(change)} points against dense"
    if interval is None:
        return said
    low, high = interval
    said += f" (95% interval {points(low)} to {points(high)})"
    return said + (": no difference that 95% would bear out" if low <= 0 <= high else "")


def _winners(groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """The first sentence: who is ahead at how many targets."""
    won: dict[str, list[str]] = {}
    for target, group in groups.items():
        for row in _best(group, score):
            won.setdefault(series_name(row), []).append(f"{target:g}x")
    if not won:
        return []
    order = sorted(won.items(), key=lambda item: -len(item[1]))
    told = _listed([f"{name} at {len(at)} ({', '.join(at)})" for name, at in order])
    what = "accuracy" if score == TOP1 else "agreement with dense"
    return [f"Of {len(groups)} speed-up targets, the most {what} is kept by {told}."]


def _best(group: Sequence[Row], score: Score | None) -> list[Row]:
    """The rows of the best figure: several where it is the same."""
    known = [row for row in group if score is not None and number(row, score.key) is not None]
    return [row for row in known if score is not None and row[score.key] == known[0][score.key]]


def _at_target(target: float, group: Sequence[Row], score: Score | None) -> str:
    best = _best(group, score)
    if not best or score is None:
        return ""
    first = best[0]
    names = _listed([series_name(row) for row in best])
    said = f"At {target:g}x {names} kept the most: {percent(first[score.key])} {score.label}"
    said += _against_dense(first, None) + "."
    low = interval_of(first)
    if low is not None:
        close = [row for row in group if row not in best and (end := interval_of(row)) and end[1] >= low[0]]
        if close:
            names = _listed([f"{series_name(row)} ({percent(row.get(score.key))})" for row in close])
            said += f" Too close to call, for their intervals overlap with its: {names}."
    return said


def _alone(row: Row, dense: Row | None, score: Score | None) -> str:
    """A row without a target: a schedule that was planned or given, or int8."""
    speedup = number(row, "speedup") or 0.0
    figure = None if score is None else number(row, score.key)
    known = "" if figure is None or score is None else f", {percent(figure)} {score.label}"
    return f"{row.get('variant')}: {speedup:.2f}x as fast as dense{known}{_against_dense(row, dense)}."


def _unknown_accuracy(score: Score | None) -> list[str]:
    if score is None:
        return ["Accuracy is not known: the module logs no val/top1. The speed-ups below say nothing of its price."]
    if score != TOP1:
        return ["The module logs no val/top1. Variants are ranked by agreement with dense."]
    return []


def _not_faster(rows: Sequence[Row], dense: Row | None) -> list[str]:
    """Variants whose speed-up is not beyond its own spread."""
    timed = [row for row in rows if row is not dense and number(row, "speedup") is not None]
    slow = [row for row in timed if row["speedup"] - (number(row, "speedup_spread") or 0.0) <= 1]
    if timed and len(slow) == len(timed):
        return ["No variant is faster than dense by more than the spread of the timing: nothing is to be gained here."]
    return [_told_slow(row) for row in slow]


def _told_slow(row: Row) -> str:
    """Slower than dense, or faster by so little that another run might say otherwise."""
    variant, speedup = row.get("variant"), row["speedup"]
    if speedup <= 1:
        return f"{variant} does not help here: it is {speedup:.2f}x as fast as dense."
    spread = number(row, "speedup_spread") or 0.0
    return f"{variant} may not help here: it is {speedup:.2f}x as fast as dense, with a spread of {spread:.2f}."


def _place_of(method: str, groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """Where the named method, the package's own choice, is not the best."""
    behind = []
    for target, group in groups.items():
        best = _best(group, score)
        known = [row for row in group if score is not None and number(row, score.key) is not None]
        own = next((row for row in known if series_name(row) == method), None)
        if score is None or own is None or own in best:
            continue
        place = 1 + sum(row[score.key] > own[score.key] for row in known)
        gap = 100 * (best[0][score.key] - own[score.key])
        behind.append(f"place {place} of {len(known)} at {target:g}x, {gap:.2f} points behind {series_name(best[0])}")
    return [f"{method} is not the best everywhere: {'; '.join(behind)}."] if behind else []


def _beaten_by_random(groups: Mapping[float, Sequence[Row]], score: Score | None) -> list[str]:
    """Methods that end below the floor that each must beat."""
    beaten = []
    for target, group in groups.items():
        floor = next((row for row in group if series_name(row) == "random"), None)
        least = None if floor is None or score is None else number(floor, score.key)
        if least is None or score is None:
            continue
        for row in group:
            share = number(row, score.key)
            if share is not None and share < least and not series_name(row).startswith("random"):
                beaten.append(f"{series_name(row)} at {target:g}x ({percent(share)} against {percent(least)})")
    return [f"Removing tokens at random does better than {_listed(beaten)}."] if beaten else []


def _missed(rows: Sequence[Row]) -> list[str]:
    short = [f"{row.get('variant')} ({row['speedup']:.2f}x)" for row in rows if missed(row)]
    return [f"Targets that the final timing did not bear out: {_listed(short)}."] if short else []


def _unreached(document: Mapping[str, Any]) -> list[str]:
    """Targets beyond what a method can do."""
    told = []
    for entry in document.get("unreached") or []:
        target, best, reason = number(entry, "target"), number(entry, "best"), entry.get("reason")
        most = "" if best is None else f": at most {best:.2f}x"
        what = "its target" if target is None else f"{target:g}x"
        why = f" ({str(reason).rstrip('.')})" if reason else ""
        told.append(f"{entry.get('method')} cannot reach {what}{most}{why}.")
    return told


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
