"""Which method and which block a user wants, either of which may be left to the planner."""

from typing import Literal

from lightning_prune.errors import ArgumentError
from lightning_prune.planning.several import AUTO
from lightning_prune.reduction import Reduction


class MethodWishes:
    """Method and block, as one of each or to be searched for.

    Attributes:
        block: An index, a fraction of the depth, or `"auto"`.
    """

    block: int | float | Literal["auto"]
    _reduction: Reduction | None  # None: to be searched for

    @property
    def reduction(self) -> Reduction:
        """The method.

        Raises:
            ArgumentError: If it is searched for.
        """
        if self._reduction is None:
            raise ArgumentError("`method` must name one method for this; got 'auto', which only planning can use.")
        return self._reduction

    @property
    def place(self) -> int | float:
        """The reducing block, as an index or a fraction of the depth.

        Raises:
            ArgumentError: If it is searched for.
        """
        if self.block == "auto":
            raise ArgumentError(
                "`block` must be an index or a fraction for this; got 'auto', which only planning can use."
            )
        return self.block

    @property
    def label(self) -> str:
        """What to call the method: its name, or `auto`."""
        return "auto" if self._reduction is None else self._reduction.name

    @property
    def methods(self) -> tuple[str | Reduction, ...]:
        """The methods that are searched."""
        return AUTO if self._reduction is None else (self._reduction,)

    @property
    def searches(self) -> bool:
        """Whether it is searched over blocks, and perhaps methods."""
        return self._reduction is None or self.block == "auto"
