"""The latency profile: what each token count costs on a device, and where its cliffs and plateaus are."""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from math import hypot, sqrt
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning_prune.errors import ArgumentError, FileFormatError
from lightning_prune.files import read_document, write_document

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_FORMAT = "lightning_prune.profile"
_VERSION = 1
CLIFF = 0.03  # of the dense latency: a drop of less is not worth a name
SAVING = 0.02  # of the dense latency: a saving of less is not worth any accuracy
_PLATEAU = 0.25  # of the mean saving a token: a run of counts that saves less is a plateau


class Span(NamedTuple):
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

    def __post_init__(self) -> None:
        """Raises ArgumentError if the columns do not fit together."""
        lengths = {len(self.tokens), len(self.milliseconds), len(self.spread), len(self.rounds)}
        if len(lengths) != 1 or not self.tokens:
            raise ArgumentError(f"`tokens` and the measurements must be of one length >= 1, got {sorted(lengths)}.")
        numbers = (*self.milliseconds, *self.spread)
        whole = (*self.tokens, *self.rounds, self.block, self.depth)
        if not all(isinstance(n, int | float) for n in numbers) or not all(isinstance(n, int) for n in whole):
            raise ArgumentError("`milliseconds` and `spread` must be numbers, all else in a profile whole numbers.")
        if list(self.tokens) != sorted(set(self.tokens)) or self.tokens[0] < 1:
            raise ArgumentError("`tokens` must be positive and strictly ascending.")
        if not all(0 < ms < float("inf") for ms in self.milliseconds):
            raise ArgumentError("`milliseconds` must be positive and finite.")

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
        spread = max(self.spread[index], self._usual_noise * self.milliseconds[index])
        return 1.2533 * spread / 0.6745 / sqrt(self.rounds[index])

    @property
    def _usual_noise(self) -> float:
        """Relative spread of the middling count, of those that were measured often enough to have one."""
        columns = zip(self.spread, self.milliseconds, self.rounds, strict=True)
        known = [spread / ms for spread, ms, rounds in columns if rounds > 2]
        return median(known) if known else float("inf")

    def saves(self, tokens: int) -> bool:
        """Whether a count is faster than dense by more than noise (two standard errors) and by more than 2%."""
        noise = hypot(self.error(tokens), self.error(self.dense_tokens))
        return self.dense_ms - self.at(tokens) > max(SAVING * self.dense_ms, 2 * noise)

    @property
    def per_token(self) -> float:
        """Mean milliseconds saved by each removed token over the whole curve; 0 where nothing is saved."""
        removed = self.tokens[-1] - self.tokens[0]
        return max(self.milliseconds[-1] - self.milliseconds[0], 0.0) / removed if removed else 0.0

    def steps(self) -> list[Span]:
        """Neighbouring measured counts, from dense downwards."""
        columns = list(zip(self.tokens, self.milliseconds, strict=True))
        pairs = list(zip(columns[1:], columns[:-1], strict=True))[::-1]
        return [Span(above, below, high - low) for (above, high), (below, low) in pairs]

    def excess(self, step: Span) -> float:
        """What a step saves beyond its share, less three standard errors: positive on a cliff, in milliseconds."""
        noise = hypot(self.error(step.above), self.error(step.below))
        return step.saved - self.per_token * (step.above - step.below) - 3 * noise

    def cliffs(self) -> list[Span]:
        """Steps where latency drops sharply: more than 3% of dense beyond the step's share and beyond the noise.

        A cliff between `above` and `below` says: pruning down to `below` pays, stopping at `above` does not.
        """
        return [step for step in self.steps() if self.excess(step) > CLIFF * self.dense_ms]

    def plateaus(self) -> list[Span]:
        """Stretches of at least a twentieth of the tokens over which pruning saves next to nothing."""
        found: list[Span] = []
        for step in self.steps():
            if step.saved >= _PLATEAU * max(self.per_token, 1e-12) * (step.above - step.below):
                continue
            if found and found[-1].below == step.above:
                step = Span(found[-1].above, step.below, found.pop().saved + step.saved)
            found.append(step)
        return [span for span in found if span.above - span.below >= self.dense_tokens / 20]

    def plot(self, path: str | Path | None = None) -> "Figure":
        """Draws the curve with its spread, cliffs and plateaus; saves it where a path is given."""
        from lightning_prune.report.plots import plot_profile, save_figure

        figure = plot_profile(self)
        if path is not None:
            save_figure(figure, path)
        return figure

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
            values = {f.name: document[f.name] for f in fields(cls)}
            plain: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()}
            return cls(**plain)
        except (KeyError, TypeError, ArgumentError) as error:
            raise FileFormatError(f"{path} is not a usable profile: {error}") from error
