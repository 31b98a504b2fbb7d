"""What one method of a comparison can do for one model: the schedules that it offers for the targets."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.planned import Planned, Unreached
from lightning_prune.errors import ScheduleError, UnsupportedModelError
from lightning_prune.patching import PatchHandle, VisionTransformer
from lightning_prune.planning.goals import Goal
from lightning_prune.planning.targets import aim, search
from lightning_prune.profiling import Interleaved, Timing, Variant
from lightning_prune.profiling.spreading import reducing_block, spread_schedule
from lightning_prune.quantization import int8_backend, int8_unavailable
from lightning_prune.reduction import Reduction
from lightning_prune.schedule import Schedule


class Reach(ABC):
    """What one entry of a comparison can do for one model.

    Args:
        transformer: The Vision Transformer, dense.
        entry: The method.
        tokens: N.

    Attributes:
        remark: What is to be said of its row, where it has no targets.
    """

    def __init__(self, transformer: VisionTransformer, entry: Entry, tokens: int) -> None:
        self.transformer, self.entry, self.n = transformer, entry, tokens
        self.depth = transformer.depth
        self.remark = ""

    @abstractmethod
    def why_not(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None where it can."""

    def prepare(self, speedups: Sequence[float]) -> None:  # noqa: B027  nothing, for most
        """Measures what must be known before `goals` can be asked for."""

    @abstractmethod
    def goals(
        self, race: Interleaved[Variant], speedups: Sequence[float], max_seconds: float, tick: Callable[[], None]
    ) -> list[Goal]:
        """What to try first for each of the targets."""

    @abstractmethod
    def variant_of(self, amount: int) -> Variant:
        """The variant that removes so much."""

    def reduction_of(self, goal: Goal | None) -> Reduction | None:
        """The method behind a goal."""
        return self.entry.reduction

    def unreached(self, goal: Goal) -> Unreached:
        """Why a goal is not reached."""
        most = f"timed up to {goal.most} removed tokens, the most that it can"
        return Unreached(self.entry.name, goal.speedup, goal.best, most)

    def row(
        self, goal: Goal | None, timing: Timing | None, note: str, context: Mapping[str, Any] | None = None
    ) -> Planned:
        """The variant that came of a goal, or the only one of a method without goals."""
        entry, reduction = self.entry, self.reduction_of(goal)
        name = entry.name if goal is None else f"{entry.name} {goal.speedup:g}x"
        settings = {} if reduction is None else {key: _plain(value) for key, value in reduction.settings().items()}
        chosen = "" if reduction is None or reduction is entry.reduction else reduction.name
        schedule = None
        if goal is not None:
            given = goal.variant.schedule
            counts = given if isinstance(given, Schedule) else Schedule([0] * self.depth)
            origin = {
                "method": chosen or entry.method,
                "int8": entry.int8,
                "settings": settings,
                "target_speedup": goal.speedup,
                "tokens_dense": self.n,
                "tokens": counts.tokens(self.n)[-1],
            }
            schedule = Schedule(counts.removed, origin | dict(context or {}))
            note = "; ".join(filter(None, (chosen, _shortfall(goal, timing))))
        return Planned(
            variant=name,
            entry=entry.name,
            method=entry.method,
            int8=entry.int8,
            chosen=chosen,
            target=None if goal is None else goal.speedup,
            settings=settings,
            schedule=schedule,
            timing=timing,
            note=note,
        )


class MethodReach(Reach):
    """What a reduction, or 8 bits, can do: amounts are tokens that it removes.

    Args:
        transformer: The Vision Transformer, dense.
        entry: The method.
        tokens: N.
        block: The reducing block of methods that reduce once.
    """

    def __init__(self, transformer: VisionTransformer, entry: Entry, tokens: int, block: int | float) -> None:
        super().__init__(transformer, entry, tokens)
        self.prefix = transformer.prefix_tokens
        reduction = entry.reduction
        self.block = 0 if reduction is None else reducing_block(reduction, block, transformer)
        self.most = 0
        if reduction is not None and not reduction.adaptive:
            self.most = reduction.most(self.n, self.prefix, self.depth, self.block)
        self.remark = "the images decide how many tokens go" if reduction is not None and reduction.adaptive else ""

    def schedule_of(self, amount: int) -> Schedule | None:
        """What removes so many tokens; None where nothing is removed, or the images decide."""
        reduction = self.entry.reduction
        if reduction is None or reduction.adaptive or not amount:
            return None
        return spread_schedule(reduction, amount, self.n, self.prefix, self.depth, self.block)

    def variant_of(self, amount: int) -> Variant:
        """The variant that removes so many tokens."""
        reduction, schedule = self.entry.reduction, self.schedule_of(amount)
        adaptive = reduction is not None and reduction.adaptive
        return Variant(reduction if adaptive or schedule is not None else None, schedule, self.entry.int8)

    def why_not(self, images: Tensor) -> str | None:
        """Why the method cannot be used with this model on this device; None where it can."""
        root, reduction = self.transformer.root, self.entry.reduction
        if self.entry.int8:
            why = int8_unavailable(images.device, root, images)
            if why is not None:
                return why
            self.remark = "; ".join(filter(None, (self.remark, f"8 bits by {int8_backend(images.device)}")))
        if reduction is None:
            return None
        try:
            if not reduction.adaptive and self.most < 1:
                return f"{reduction.name} can remove none of the {self.n} tokens"
            with PatchHandle(self.transformer, reduction, self.schedule_of(1)):
                root.forward(images)  # past a compiled graph: this is about whether it runs, not how fast
        except (UnsupportedModelError, ScheduleError) as error:
            return str(error)
        return None

    def goals(
        self, race: Interleaved[Variant], speedups: Sequence[float], max_seconds: float, tick: Callable[[], None]
    ) -> list[Goal]:
        """The amounts that the latency curve suggests for the targets."""
        least = 0 if self.entry.int8 else 1
        found = search(race, self.variant_of, least, self.most, speedups, max_seconds / 2, tick)
        start = {speedup: self.most if amount is None else amount for speedup, amount in found.amounts.items()}
        goals = [Goal(self.variant_of, speedup, start[speedup], least, self.most) for speedup in speedups]
        aim(race, goals, max_seconds / 2, tick)
        return goals


def _shortfall(goal: Goal, timing: Timing | None) -> str:
    if not goal.amount:
        return "8 bits alone reach it"
    if goal.reached or timing is None:
        return ""
    return f"short of its target: {1 / timing.ratio:.2f}x when planning ended"


def _plain(value: Any) -> Any:
    """Settings as a file can hold them."""
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)
