"""The latency profile: latency against token count, with its cliffs and plateaus."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from math import exp, hypot, log, sqrt
from pathlib import Path
from statistics import NormalDist, median
from typing import Any, NamedTuple

from lightning_prune._utils.files import read_document, write_document
from lightning_prune.errors import ArgumentError, FileFormatError


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
        ("settled", isinstance(profile.converged, bool), "true or false"),
    ):
        if not fits:
            raise ArgumentError(f"`{name}` of a profile must be {expected}, got {getattr(profile, name)!r}.")


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_FORMAT = "lightning_prune.profile"
_VERSION = 1
_LOST = 1.3  # of the rounds: by what share of them the spread of few is too small
_NAMED = 0.01  # of the dense latency: a drop of less is not worth a name, however sure
_CHANCE = 0.01  # that noise alone makes a cliff anywhere on the curve
_BESIDE = 3  # steps on each side that say what a step would save if it were like them
SAVING = 0.02  # of the dense latency: a saving of less is not worth any accuracy
_PLATEAU = 0.25  # of the mean saving a token: a run of counts that saves less is a plateau


class CountStep(NamedTuple):
    """A stretch of the curve between two measured token counts.

    Attributes:
        above: The larger token count.
        below: The smaller one.
        saved: Milliseconds that going from `above` to `below` saves.
    """

    above: int
    below: int
    saved: float


@dataclass(frozen=True)
class LatencyProfile:
    """Latency against tokens, measured at the batch size and precision of the user.

    Attributes:
        tokens: Token counts, ascending; the last is N, dense. They leave the last reducing block and enter all later
            ones.
        milliseconds: Median latency of the whole model on one batch, for each count.
        spread: Half the distance between the quartiles, in milliseconds.
        rounds: Measurements behind each median.
        method: The reduction that made the tokens go, and so is part of the cost.
        block: The reducing block; the first that may reduce, of methods that reduce in many.
        depth: Blocks of the model.
        protocol: `"deployed"`: the cut that will be deployed. `"paper"`: random tokens dropped before block 0.
        seconds: How long measuring took.
        context: Device, threads, batch, precision and versions.
        converged: Whether all was known well enough before the time was up, so that more time would not say more.
    """

    tokens: tuple[int, ...]
    milliseconds: tuple[float, ...]
    spread: tuple[float, ...]
    rounds: tuple[int, ...]
    method: str
    block: int
    depth: int
    protocol: str = "deployed"
    seconds: float = 0.0
    context: Mapping[str, Any] = field(default_factory=dict)
    converged: bool = False

    def __post_init__(self) -> None:
        """Raises ArgumentError if an entry is impossible, or the columns do not fit together."""
        check_profile_entries(self)

    @property
    def dense_tokens(self) -> int:
        """N, tokens of the unpruned model."""
        return self.tokens[-1]

    @property
    def dense_ms(self) -> float:
        """Latency of the unpruned model, measured in the same run."""
        return self.milliseconds[-1]

    def at(self, tokens: int) -> float:
        """Milliseconds at a measured token count.

        Raises:
            ArgumentError: If that count was not measured; nothing is interpolated.
        """
        if tokens not in self.tokens:
            raise ArgumentError(f"`tokens` must be one of the measured counts {self.tokens}, got {tokens}.")
        return self.milliseconds[self.tokens.index(tokens)]

    def error(self, tokens: int) -> float:
        """Standard error of the median at a measured count, in milliseconds, from the quartiles and the rounds.

        No count is trusted to be less noisy than most others: the quartiles of a few lucky rounds say little.
        """
        index = self.tokens.index(tokens)
        noise = max(self._noises[index] or 0.0, self._usual_noise)
        return 1.2533 * noise * self.milliseconds[index] / 0.6745 / sqrt(self.rounds[index])

    @cached_property
    def _noises(self) -> list[float | None]:
        """Relative spread of each count; None where it was not measured often enough to have one.

        The quartiles of few rounds lie closer together than those of many, and the level was fitted to the same rounds.
        """
        columns = zip(self.spread, self.milliseconds, self.rounds, strict=True)
        return [spread / ms * rounds / (rounds - _LOST) if rounds > 2 else None for spread, ms, rounds in columns]

    @cached_property
    def _usual_noise(self) -> float:
        """That of the middling count; not known unless most have one."""
        known = [noise for noise in self._noises if noise is not None]
        return median(known) if 2 * len(known) > len(self.tokens) else float("inf")

    def saves(self, tokens: int) -> bool:
        """Whether a count is faster than dense by more than noise (two standard errors) and by more than 2%."""
        noise = self.noise(CountStep(self.dense_tokens, tokens, 0.0))
        return self.dense_ms - self.at(tokens) > max(SAVING * self.dense_ms, 2 * noise)

    @property
    def is_inconclusive(self) -> bool:
        """Whether a count seems faster than dense by more than 2%, and none is beyond the noise: measure again."""
        gained = 1 - min(self.milliseconds) / self.dense_ms
        return gained > SAVING and not any(self.saves(count) for count in self.tokens)

    @property
    def per_token(self) -> float:
        """Mean milliseconds saved by each removed token over the whole curve; 0 where nothing is saved."""
        removed = self.tokens[-1] - self.tokens[0]
        return max(self.milliseconds[-1] - self.milliseconds[0], 0.0) / removed if removed else 0.0

    def steps(self) -> list[CountStep]:
        """Neighbouring measured counts, from dense downwards."""
        return list(self._steps)

    @cached_property
    def _steps(self) -> list[CountStep]:
        columns = list(zip(self.tokens, self.milliseconds, strict=True))
        pairs = list(zip(columns[1:], columns[:-1], strict=True))[::-1]
        return [CountStep(above, below, high - low) for (above, high), (below, low) in pairs]

    def noise(self, span: CountStep) -> float:
        """Standard error of what a stretch saves, in milliseconds."""
        return hypot(self.error(span.above), self.error(span.below))

    def excess(self, step: CountStep) -> float:
        """What a step saves beyond what it would save if it were like the steps beside it, in milliseconds.

        Their saving a token is a median over tokens, so that a cliff among them, which is narrow, does not count. Of
        the two sides the one that saves more counts, so that where a slope begins or ends there is no cliff.
        """
        steps = self._steps
        place = steps.index(step)
        before, after = steps[max(place - _BESIDE, 0) : place], steps[place + 1 : place + 1 + _BESIDE]
        return step.saved - max(_slope(before), _slope(after), 0.0) * (step.above - step.below)

    @property
    def significance(self) -> float:
        """Standard errors that noise exceeds at one of the steps, of as many as there are, once in a hundred curves.

        A fourth more, since what a step is compared with is measured as well.
        """
        return 1.25 * NormalDist().inv_cdf(1 - _CHANCE / max(len(self.tokens) - 1, 1))

    def cliffs(self) -> list[CountStep]:
        """Steps where latency drops sharply: by more than the steps beside them, beyond the noise.

        It is a test of the measured noise: on a curve without cliffs, one in a hundred has a step that passes. Drops
        by less than 1% of the dense latency are left out. A cliff between `above` and `below` says: pruning down to
        `below` pays, stopping at `above` does not.
        """
        return [
            s for s in self.steps() if self.excess(s) > max(self.significance * self.noise(s), _NAMED * self.dense_ms)
        ]

    def plateaus(self) -> list[CountStep]:
        """Stretches of at least a twentieth of the tokens over which pruning saves next to nothing.

        That is less than a quarter of the mean, and too little to be noise.
        """
        found: list[CountStep] = []
        for step in self.steps():
            if step.saved >= _PLATEAU * max(self.per_token, 1e-12) * (step.above - step.below):
                continue
            if found and found[-1].below == step.above:
                step = CountStep(found[-1].above, step.below, found.pop().saved + step.saved)
            found.append(step)
        wide = [span for span in found if span.above - span.below >= self.dense_tokens / 20]
        lacking = {span: self.per_token * (span.above - span.below) - span.saved for span in wide}
        return [span for span in wide if lacking[span] > self.significance * self.noise(span)]

    def joined(self, other: "LatencyProfile") -> "LatencyProfile":
        """This profile with the counts that only `other` has, on the scale of this one.

        The scale is that of all counts that both have, dense among them: the two runs find the machine in different
        states.

        Args:
            other: Measured of the same model, device and batch, later.
        """
        common = sorted(set(self.tokens) & set(other.tokens))
        scale = exp(sum(log(self.at(count) / other.at(count)) for count in common) / len(common))
        columns = {
            count: (ms, spread, rounds)
            for count, ms, spread, rounds in zip(self.tokens, self.milliseconds, self.spread, self.rounds, strict=True)
        }
        for count, ms, spread, rounds in zip(other.tokens, other.milliseconds, other.spread, other.rounds, strict=True):
            columns.setdefault(count, (scale * ms, scale * spread, rounds))
        tokens = sorted(columns)
        milliseconds, spreads, repeats = zip(*(columns[count] for count in tokens), strict=True)
        return replace(
            self,
            tokens=tuple(tokens),
            milliseconds=milliseconds,
            spread=spreads,
            rounds=repeats,
            seconds=self.seconds + other.seconds,
        )

    def to_dict(self) -> dict[str, Any]:
        """The profile as plain values, as `save` writes them."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        return {"format": _FORMAT, "version": _VERSION, **plain, "context": dict(self.context)}

    def save(self, path: str | Path) -> Path:
        """Writes the profile, as JSON where `path` ends in `.json` and as YAML elsewhere; returns the path."""
        return write_document(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> "LatencyProfile":
        """Reads a profile that `save` wrote.

        Raises:
            FileFormatError: If the file cannot be read or is not a profile; names the file.
        """
        document = read_document(path, _FORMAT, _VERSION)
        try:
            return cls.from_dict(document)
        except FileFormatError as error:
            raise FileFormatError(f"{path} is not a usable profile: {error}") from error

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "LatencyProfile":
        """The inverse of `to_dict`.

        Raises:
            FileFormatError: If an entry is missing, or they do not fit together.
        """
        try:
            document = {"settled": False, **document}  # which a profile may leave out
            values = {f.name: document[f.name] for f in fields(cls)}
            plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            return cls(**plain)
        except KeyError as error:
            raise FileFormatError(f"no entry {error}") from error
        except (TypeError, ArgumentError) as error:
            raise FileFormatError(str(error)) from error


def _slope(steps: list[CountStep]) -> float:
    """Milliseconds saved by a token, in the middle of all tokens of these steps; 0 of none."""
    slopes = sorted((step.saved / (step.above - step.below), step.above - step.below) for step in steps)
    passed, half = 0, sum(width for _, width in slopes) / 2
    for slope, width in slopes:
        passed += width
        if passed >= half:
            return slope
    return 0.0
