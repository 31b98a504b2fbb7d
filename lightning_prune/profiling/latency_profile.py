"""The latency profile: measured latency against token count on one device, with its cliffs and plateaus.

It needs the standard library alone, as `lightning_prune.bundle` copies this file to devices without torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from math import hypot, sqrt
from os import PathLike
from statistics import NormalDist, median
from typing import Any, ClassVar, NamedTuple

from lightning_prune._utils.documents import SavedDocument, load_saved
from lightning_prune.errors import ArgumentError, FileFormatError
from lightning_prune.profiling.interleaved_timer import MEDIAN_STDERR, NORMAL_QUARTILE
from lightning_prune.profiling.page_faults import unequal_faults

SAVING = 0.02
"""Share of the dense latency; a smaller saving is not worth any accuracy."""


@dataclass(frozen=True)
class _CliffTest:
    """Thresholds that decide what is a cliff or a plateau.

    Attributes:
        min_drop_of_dense: Smallest drop that is called a cliff, as a share of the dense latency.
        false_positive_rate: Probability that noise alone makes a cliff anywhere on the curve.
        reference_inflation: Factor on the threshold, since the slope that a step is compared with is noisy too.
        neighbours: Steps on each side that give the reference slope.
        plateau_of_mean: A stretch that saves less than this share of the mean saving per token is a plateau.
        min_plateau_of_tokens: Smallest width of a plateau, as a share of the dense token count.
        quartile_bias_rounds: The interquartile range of n rounds is too small by the factor (n - this) / n.
    """

    min_drop_of_dense: float = 0.01
    false_positive_rate: float = 0.01
    reference_inflation: float = 1.25
    neighbours: int = 3
    plateau_of_mean: float = 0.25
    min_plateau_of_tokens: float = 0.05
    quartile_bias_rounds: float = 1.3


_TEST = _CliffTest()


class CountStep(NamedTuple):
    """A stretch of the curve between two measured token counts.

    Attributes:
        above: The larger token count.
        below: The smaller one.
        saved: Milliseconds saved by going from `above` to `below`.
    """

    above: int
    below: int
    saved: float


class OverheadProbe(NamedTuple):
    """A schedule of a method that was timed, from which the overhead of the method follows.

    Attributes:
        method: The method as a spec: its name, and the settings that differ from its defaults.
        removed: Tokens that each block removes, of the model or of a copy of its first blocks.
        depth_ratio: Latency of the dense model with that many blocks, over that of the whole dense model.
        ratio: Latency of the schedule, over that of the dense model with that many blocks.
        ratio_spread: Half the interquartile range of that ratio.
        rounds: Number of measurements.
    """

    method: str
    removed: tuple[int, ...]
    depth_ratio: float
    ratio: float
    ratio_spread: float
    rounds: int


@dataclass(frozen=True)
class LatencyProfile(SavedDocument):
    """Latency against token count, measured at one batch size and precision.

    Attributes:
        tokens: Token counts, ascending; the last is N, the dense count. They leave the last reducing block and enter
            all later ones.
        milliseconds: Median latency of the whole model on one batch, for each count.
        spread: Half the interquartile range, in milliseconds.
        rounds: Number of measurements behind each median.
        method: The reduction that removed the tokens; its overhead is part of the latency.
        block: The reducing block; for methods that reduce in many blocks, the first of them.
        depth: Number of blocks of the model.
        protocol: `"deployed"`: measured as it will be deployed. `"paper"`: random tokens dropped before block 0.
        seconds: How long measuring took.
        context: Device, threads, batch, precision and versions.
        converged: Whether measuring ended because more time would not change the result.
        low_ms: Lower quartile of the latencies, for each count, in milliseconds, the drift of the machine taken out as
            from the median. Empty where it is not known, as in profiles of earlier releases.
        high_ms: Upper quartile.
        probes: Timings from which the overheads of methods follow, where planning cannot time them: the profile is of
            another device. Empty in others.
        p90_ms: 90th percentile of the latencies, for each count, without the drift. Empty where it is not known, as in
            profiles of earlier releases.
        faults: Median of the page faults of a pass, for each count; empty where they are not known.
        drift: How far the speed of the machine moved while it was measured: half the interquartile range over the
            rounds, over their median. None where it is not known.
    """

    FORMAT: ClassVar[str] = "lightning_prune.profile"
    VERSIONS: ClassVar[tuple[int, ...]] = (1, 2, 3, 4, 5)

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
    low_ms: tuple[float, ...] = ()
    high_ms: tuple[float, ...] = ()
    probes: tuple[OverheadProbe, ...] = ()
    p90_ms: tuple[float, ...] = ()
    faults: tuple[float, ...] = ()
    drift: float | None = None

    def __post_init__(self) -> None:
        """Raises ArgumentError if an entry is impossible, or the columns do not fit together."""
        _check_entries(self)

    @property
    def dense_tokens(self) -> int:
        """N, the token count of the dense model."""
        return self.tokens[-1]

    @property
    def dense_ms(self) -> float:
        """Latency of the dense model, measured in the same run."""
        return self.milliseconds[-1]

    def latency_ms(self, tokens: int) -> float:
        """Milliseconds at a measured token count.

        Raises:
            ArgumentError: If that count was not measured; nothing is interpolated.
        """
        if tokens not in self.tokens:
            raise ArgumentError(f"`tokens` must be one of the measured counts {self.tokens}, got {tokens}.")
        return self.milliseconds[self.tokens.index(tokens)]

    def stderr_ms(self, tokens: int) -> float:
        """Standard error of the median at a measured count, in milliseconds, from the quartiles and the rounds.

        No count is assumed to be less noisy than the median count: the quartiles of few rounds may be small by chance.
        """
        index = self.tokens.index(tokens)
        noise = max(self._relative_spreads[index] or 0.0, self._typical_relative_spread)
        return MEDIAN_STDERR * noise * self.milliseconds[index] / NORMAL_QUARTILE / sqrt(self.rounds[index])

    @cached_property
    def _relative_spreads(self) -> list[float | None]:
        """Spread over latency of each count; None for counts with too few rounds.

        The interquartile range of few rounds is biased low, and the level was fitted to the same rounds.
        """
        columns = zip(self.spread, self.milliseconds, self.rounds, strict=True)
        bias = _TEST.quartile_bias_rounds
        return [spread / ms * rounds / (rounds - bias) if rounds > 2 else None for spread, ms, rounds in columns]

    @cached_property
    def _typical_relative_spread(self) -> float:
        """Median over the counts; infinite unless most counts have one."""
        known = [noise for noise in self._relative_spreads if noise is not None]
        return median(known) if 2 * len(known) > len(self.tokens) else float("inf")

    def is_faster_than_dense(self, tokens: int) -> bool:
        """Whether a count is faster than dense by more than noise (two standard errors) and by more than 2%."""
        noise = self.step_stderr(CountStep(self.dense_tokens, tokens, 0.0))
        return self.dense_ms - self.latency_ms(tokens) > max(SAVING * self.dense_ms, 2 * noise)

    @property
    def fault_remark(self) -> str:
        """What is said where page faults change a latency over dense by more than 2%, of the worst count; else empty.

        `context` then says what a page fault takes on that machine, in microseconds, as `fault_us`.
        """
        fault_us = self.context.get("fault_us")
        if not self.faults or not _is_number(fault_us) or self.context.get("device_type") != "cpu":
            return ""
        dense = self.dense_ms, self.faults[-1]
        rates = [faults / ms for faults, ms in zip(self.faults, self.milliseconds, strict=True)]
        worst = max(range(len(rates)), key=lambda place: abs(rates[place] - rates[-1]))
        remark = unequal_faults(self.milliseconds[worst], self.faults[worst], *dense, fault_us)
        return f"With {self.tokens[worst]} tokens {remark}" if remark else ""

    @property
    def is_inconclusive(self) -> bool:
        """Whether a count seems faster than dense by more than 2% but none is beyond noise; measure again."""
        saving = 1 - min(self.milliseconds) / self.dense_ms
        return saving > SAVING and not any(self.is_faster_than_dense(count) for count in self.tokens)

    @property
    def ms_per_token(self) -> float:
        """Mean milliseconds saved per removed token over the whole curve; 0 where nothing is saved."""
        removed = self.tokens[-1] - self.tokens[0]
        return max(self.milliseconds[-1] - self.milliseconds[0], 0.0) / removed if removed else 0.0

    def steps(self) -> list[CountStep]:
        """Stretches between neighbouring measured counts, from dense downwards."""
        return list(self._steps)

    @cached_property
    def _steps(self) -> list[CountStep]:
        columns = list(zip(self.tokens, self.milliseconds, strict=True))
        pairs = list(zip(columns[1:], columns[:-1], strict=True))[::-1]
        return [CountStep(above, below, high - low) for (above, high), (below, low) in pairs]

    def step_stderr(self, step: CountStep) -> float:
        """Standard error of the saving of a step, in milliseconds."""
        return hypot(self.stderr_ms(step.above), self.stderr_ms(step.below))

    def step_excess(self, step: CountStep) -> float:
        """Saving of a step in excess of its neighbours' median saving per token, in milliseconds.

        The median is taken over tokens, so that a cliff among the neighbours, which is narrow, has no influence. The
        side that saves more counts, so that the beginning or end of a slope is not a cliff.
        """
        steps = self._steps
        place = steps.index(step)
        before = steps[max(place - _TEST.neighbours, 0) : place]
        after = steps[place + 1 : place + 1 + _TEST.neighbours]
        return step.saved - max(_median_slope(before), _median_slope(after), 0.0) * (step.above - step.below)

    @property
    def significance(self) -> float:
        """Threshold in standard errors: Bonferroni-corrected 1% level over all steps, times 1.25.

        The factor accounts for the noise of the reference slope.
        """
        steps = max(len(self.tokens) - 1, 1)
        return _TEST.reference_inflation * NormalDist().inv_cdf(1 - _TEST.false_positive_rate / steps)

    def cliffs(self) -> list[CountStep]:
        """Steps at which latency drops by more than at their neighbours, beyond noise.

        This is a test at the measured noise: of the curves without cliffs, one in a hundred has a step that passes.
        Drops of less than 1% of the dense latency are left out. At a cliff it pays to prune down to `below`, and not to
        stop at `above`.
        """
        smallest = _TEST.min_drop_of_dense * self.dense_ms
        return [
            step
            for step in self.steps()
            if self.step_excess(step) > max(self.significance * self.step_stderr(step), smallest)
        ]

    def plateaus(self) -> list[CountStep]:
        """Stretches of at least a twentieth of the tokens over which pruning saves next to nothing.

        They save less than a quarter of the mean per token, and the difference is beyond noise.
        """
        stretches: list[CountStep] = []
        for step in self.steps():
            if step.saved >= _TEST.plateau_of_mean * max(self.ms_per_token, 1e-12) * (step.above - step.below):
                continue
            if stretches and stretches[-1].below == step.above:
                step = CountStep(stretches[-1].above, step.below, stretches.pop().saved + step.saved)
            stretches.append(step)
        width = _TEST.min_plateau_of_tokens * self.dense_tokens
        wide = [stretch for stretch in stretches if stretch.above - stretch.below >= width]
        missing = {stretch: self.ms_per_token * (stretch.above - stretch.below) - stretch.saved for stretch in wide}
        return [stretch for stretch in wide if missing[stretch] > self.significance * self.step_stderr(stretch)]

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "LatencyProfile":
        """Reads a profile that `save` wrote.

        Raises:
            FileFormatError: If the file cannot be read or is not a profile; names the file.
        """
        return load_saved(path, cls)

    def _to_values(self) -> dict[str, Any]:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}
        probes = [{**probe._asdict(), "removed": list(probe.removed)} for probe in self.probes]
        return {**plain, "context": dict(self.context), "probes": probes}

    @classmethod
    def _from_values(cls, values: Mapping[str, Any], version: int) -> "LatencyProfile":
        if version == 1:  # `converged` was called `settled`, and could be left out
            values = {"converged": values.get("settled", False), **values}
        if version < 3:  # without quartiles
            values = {"low_ms": [], "high_ms": [], **values}
        if version < 4:  # without probes
            values = {"probes": [], **values}
        if version < 5:  # without the 90th percentile, page faults and drift
            values = {"p90_ms": [], "faults": [], "drift": None, **values}
        try:
            entries = {f.name: values[f.name] for f in fields(cls)}
            plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in entries.items()}
            return cls(**plain | {"probes": tuple(map(_probe, entries["probes"]))})
        except KeyError as error:
            raise FileFormatError(f"A profile must have the entry {error}, got none.") from error
        except (TypeError, ArgumentError) as error:
            raise FileFormatError(str(error)) from error


def _median_slope(steps: list[CountStep]) -> float:
    """Milliseconds saved per token: the median over all tokens of these steps; 0 without steps."""
    slopes = sorted((step.saved / (step.above - step.below), step.above - step.below) for step in steps)
    passed, half = 0, sum(width for _, width in slopes) / 2
    for slope, width in slopes:
        passed += width
        if passed >= half:
            return slope
    return 0.0


def _check_entries(profile: LatencyProfile) -> None:
    """Raises ArgumentError if an entry is impossible, or the columns do not fit together."""
    lengths = {len(profile.tokens), len(profile.milliseconds), len(profile.spread), len(profile.rounds)}
    if len(lengths) != 1 or not profile.tokens:
        raise ArgumentError(f"`tokens` and the measurements must be of one length >= 1, got {sorted(lengths)}.")
    numbers = (*profile.milliseconds, *profile.spread, *profile.low_ms, *profile.high_ms, *profile.p90_ms)
    numbers = (*numbers, *profile.faults, 0.0 if profile.drift is None else profile.drift)
    integers = (*profile.tokens, *profile.rounds, profile.block, profile.depth)
    for number in (*numbers, *integers):
        if not _is_number(number):
            raise ArgumentError(f"The entries of a profile must be numbers, got {number!r}.")
    for number in integers:
        if not isinstance(number, int):
            raise ArgumentError(f"`tokens`, `rounds`, `block` and `depth` must be integers, got {number!r}.")
    if list(profile.tokens) != sorted(set(profile.tokens)) or profile.tokens[0] < 1:
        raise ArgumentError(f"`tokens` must be positive and strictly ascending, got {list(profile.tokens)}.")
    if not all(0 < ms < float("inf") for ms in profile.milliseconds):
        raise ArgumentError(f"`milliseconds` must be positive and finite, got {list(profile.milliseconds)}.")
    if not all(0 <= spread < float("inf") for spread in profile.spread):
        raise ArgumentError(f"`spread` must be finite and >= 0, got {list(profile.spread)}.")
    _check_quartiles(profile)
    for name, column, least in (("p90_ms", profile.p90_ms, 1e-300), ("faults", profile.faults, 0.0)):
        if len(column) not in (0, len(profile.tokens)) or not all(least <= each < float("inf") for each in column):
            raise ArgumentError(f"`{name}` must be one figure for each count, or empty, got {list(column)}.")
    if profile.drift is not None and not 0 <= profile.drift < float("inf"):
        raise ArgumentError(f"`drift` must be finite and >= 0, got {profile.drift}.")
    _check_probes(profile)
    if min(profile.rounds) < 1:
        raise ArgumentError(f"`rounds` must be >= 1, got {min(profile.rounds)}.")
    for name, valid, expected in (
        ("method", isinstance(profile.method, str), "a name"),
        ("protocol", profile.protocol in ("deployed", "paper"), "'deployed' or 'paper'"),
        ("seconds", _is_number(profile.seconds), "a number"),
        ("context", isinstance(profile.context, Mapping), "a mapping"),
        ("converged", isinstance(profile.converged, bool), "true or false"),
    ):
        if not valid:
            raise ArgumentError(f"`{name}` of a profile must be {expected}, got {getattr(profile, name)!r}.")


def _check_quartiles(profile: LatencyProfile) -> None:
    low, high = profile.low_ms, profile.high_ms
    if {len(low), len(high)} not in ({0}, {len(profile.tokens)}):
        raise ArgumentError(
            f"`low_ms` and `high_ms` must be one for each of {len(profile.tokens)} counts, or empty, got {len(low)} "
            f"and {len(high)}."
        )
    if not all(0 < below <= above < float("inf") for below, above in zip(low, high, strict=True)):
        raise ArgumentError(
            f"`low_ms` must be positive and at most `high_ms`, which must be finite, got {list(low)} and {list(high)}."
        )


def _probe(values: Any) -> OverheadProbe:
    return OverheadProbe(**{**values, "removed": tuple(values["removed"])})


def _check_probes(profile: LatencyProfile) -> None:
    for probe in profile.probes:
        numbers = (probe.depth_ratio, probe.ratio, probe.ratio_spread)
        valid = (
            isinstance(probe.method, str)
            and all(_is_number(number) and 0 <= number < float("inf") for number in numbers)
            and min(probe.depth_ratio, probe.ratio) > 0
            and 0 < len(probe.removed) <= profile.depth
            and all(isinstance(each, int) and each >= 0 for each in (*probe.removed, probe.rounds - 1))
        )
        if not valid:
            raise ArgumentError(
                f"`probes` must be timings of schedules of at most {profile.depth} blocks, got {probe}."
            )


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
