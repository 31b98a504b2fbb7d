"""The planner's own choice of method and blocks, as one method among those that are compared."""

from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_prune.comparing.entries import Entry
from lightning_prune.comparing.planned import Unreached
from lightning_prune.comparing.reach import Reach
from lightning_prune.errors import ArgumentError, UnsupportedModelError
from lightning_prune.patching import VisionTransformer
from lightning_prune.planning.block_search import BlockSearch
from lightning_prune.planning.finalists import decided
from lightning_prune.planning.goals import Goal
from lightning_prune.planning.method_front import MethodFront
from lightning_prune.planning.objective import LatencyBudget
from lightning_prune.planning.search_arguments import usable_methods
from lightning_prune.planning.targets import aim
from lightning_prune.profiling import DENSE, Interleaved, Variant
from lightning_prune.reduction import Reduction


class AutoReach(Reach):
    """What `auto` can do: for each target the best schedule of the best method, and amounts are steps of its front.

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
        self._chosen: dict[float, tuple[MethodFront, int]] = {}  # target -> front, steps from dense

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
        for speedup in speedups:
            try:
                front, found = decided(search, fronts, LatencyBudget(speedup=speedup))
                steps = front.dense - found.tokens
            except ArgumentError:  # none is predicted to reach it: let the fastest try
                front = min(fronts, key=lambda each: each.entry(1).milliseconds)
                steps = front.dense - 1
            self._chosen[speedup] = front, steps

    def goals(
        self, race: Interleaved[Variant], speedups: Sequence[float], max_seconds: float, tick: Callable[[], None]
    ) -> list[Goal]:
        """Beginning with what was chosen."""
        goals = []
        for speedup in speedups:
            front, steps = self._chosen[speedup]
            most = front.dense - 1
            least = min(1, most)
            goals.append(Goal(_variants(front), speedup, max(steps, least), least, most))
        aim(race, goals, max_seconds, tick)
        return goals

    def variant_of(self, amount: int) -> Variant:
        """Dense alone: other amounts mean something to a front only."""
        return DENSE

    def reduction_of(self, goal: Goal | None) -> Reduction | None:
        """The method that was chosen for a target."""
        return None if goal is None else self._chosen[goal.speedup][0].reduction

    def unreached(self, goal: Goal) -> Unreached:
        """The fastest schedule of the front missed the target."""
        most = f"timed up to {goal.variant_of(goal.most).schedule}"
        return Unreached(self.entry.name, goal.speedup, goal.best, most)


def _variants(front: MethodFront) -> Callable[[int], Variant]:
    def variant_of(steps: int) -> Variant:
        return Variant(front.reduction, front.entry(front.dense - steps).schedule) if steps else DENSE

    return variant_of
