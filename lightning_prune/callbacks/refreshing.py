"""Measuring anew where something was measured before."""


class Refreshing:
    """Whether to measure anew; set between runs, it makes the next run decide anew, once.

    Runs after that keep what was decided, or a validation in every epoch would measure every time.
    """

    _refresh: bool = False
    _due: bool = False

    @property
    def refresh(self) -> bool:
        """Whether latency is measured anew even where a profile is kept."""
        return self._refresh

    @refresh.setter
    def refresh(self, value: bool) -> None:
        self._due = value and (self._due or not self._refresh)
        self._refresh = value
