"""What a latency profile may hold, refused where it is made or read."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lightning_prune.errors import ArgumentError

if TYPE_CHECKING:
    from lightning_prune.profiling.curve import LatencyProfile


def check_profile_entries(profile: "LatencyProfile") -> None:
    """Raises ArgumentError if an entry is impossible, or the columns do not fit together."""
    lengths = {len(profile.tokens), len(profile.milliseconds), len(profile.spread), len(profile.rounds)}
    if len(lengths) != 1 or not profile.tokens:
        raise ArgumentError(f"`tokens` and the measurements must be of one length >= 1, got {sorted(lengths)}.")
    numbers = (*profile.milliseconds, *profile.spread)
    whole = (*profile.tokens, *profile.rounds, profile.block, profile.depth)
    if not all(map(_is_number, numbers)) or not all(_is_number(n) and isinstance(n, int) for n in whole):
        raise ArgumentError("`milliseconds` and `spread` must be numbers, all else in a profile whole numbers.")
    if list(profile.tokens) != sorted(set(profile.tokens)) or profile.tokens[0] < 1:
        raise ArgumentError("`tokens` must be positive and strictly ascending.")
    if not all(0 < ms < float("inf") for ms in profile.milliseconds):
        raise ArgumentError("`milliseconds` must be positive and finite.")
    if not all(0 <= spread < float("inf") for spread in profile.spread):
        raise ArgumentError(f"`spread` must be finite and >= 0, got {list(profile.spread)}.")
    if min(profile.rounds) < 1:
        raise ArgumentError(f"`rounds` must be >= 1, got {min(profile.rounds)}.")
    for name, fits, expected in (
        ("method", isinstance(profile.method, str), "a name"),
        ("protocol", profile.protocol in ("deployed", "paper"), "'deployed' or 'paper'"),
        ("seconds", _is_number(profile.seconds), "a number"),
        ("context", isinstance(profile.context, Mapping), "a mapping"),
        ("settled", isinstance(profile.settled, bool), "true or false"),
    ):
        if not fits:
            raise ArgumentError(f"`{name}` of a profile must be {expected}, got {getattr(profile, name)!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
