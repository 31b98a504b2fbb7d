"""The planner's own choice of methods and blocks, as one method among those that are compared."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.planned import Unreached
from lightning_prune.comparing.reach import Reach
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.block_search import BlockSearch
from lightning_prune.planning.finalists import decided
from lightning_prune.planning.goals import NEAR, Goal
from lightning_prune.planning.ladder import Rung, ladder
from lightning_prune.planning.objective import LatencyBudget
from lightning_prune.planning.search_arguments import usable_methods
from lightning_prune.planning.targets import aim
from lightning_prune.profiling import DENSE, Interleaved, Variant
from lightning_prune.reduction import Reduction


class AutoReach(Reach):
    """What `auto` can do: for each target the best schedule of the best method.

    Amounts are steps of one ladder of all methods, so that a target that is missed, or reached with room to spare, is
    led to what is best there, by whatever method.

    Args:
        transformer: The Vision Transformer, dense.
        entry: `auto`.
        tokens: N.
        searching: Makes what it searches with; called once, if it comes to that.
    """

    def __init__(
        self, transformer: VisionTransformer, entry: Entry, tokens: int, searching: Callable[[], BlockSearch]
    ) -> None:
        super().__init__(transformer, entry, tokens)
        self._searching = searching
        self._ladder: list[Rung] = []
        self._first: dict[float, int] = {}  # target -> the step to try first

    def why_not(self, images: Tensor) -> str | None:
        """Why none of the methods that are searched can be used; None where one can."""
        try:
            usable_methods(self.entry.searched, self.transformer)
        except UnsupportedModelError as error:
            return str(error)
        return None

    def prepare(self, speedups: Sequence[float]) -> None:
        """Measures prices and sensitivities, and chooses a schedule for each target."""
        search = self._searching()
        fronts = search.fronts(usable_methods(self.entry.searched, self.transformer))
        chosen = {}
        for speedup in speedups:
            try:
                chosen[speedup] = decided(search, fronts, LatencyBudget(speedup=speedup))
            except ArgumentError:  # none is predicted to reach it: let the fastest try
                continue
        self._ladder = ladder(fronts, chosen.values())
        for speedup in speedups:
            own = chosen.get(speedup)
            steps = [step for step, rung in enumerate(self._ladder, 1) if own is not None and rung.entry is own.entry]
            near = [step for step, rung in enumerate(self._ladder, 1) if rung.ratio <= (1 + NEAR) / speedup]
            self._first[speedup] = next(iter(steps or near), len(self._ladder))

    def goals(
        self, race: Interleaved[Variant], speedups: Sequence[float], max_seconds: float, tick: Callable[[], None]
    ) -> list[Goal]:
        """Beginning with what was chosen."""
        most = len(self._ladder)
        goals = [Goal(self.variant_of, speedup, self._first[speedup], min(1, most), most) for speedup in speedups]
        aim(race, goals, max_seconds, tick)
        return goals

    def variant_of(self, amount: int) -> Variant:
        """The step of the ladder; 0 is dense."""
        if not amount:
            return DENSE
        rung = self._ladder[amount - 1]
        return Variant(rung.front.reduction, rung.entry.schedule)

    def reduction_of(self, goal: Goal | None) -> Reduction | None:
        """The method of the step that a goal has come to; None where it removes nothing."""
        return self._ladder[goal.amount - 1].front.reduction if goal is not None and goal.amount else None

    def unreached(self, goal: Goal) -> Unreached:
        """The fastest schedule missed the target."""
        most = f"timed up to {goal.variant_of(goal.most).schedule}"
        return Unreached(self.entry.name, goal.speedup, goal.best, most)
