import pytest

from lightning_prune.callbacks.together import decided_by_rank_zero

from .tiny import trainer


def test_a_single_process_gets_its_own_decision_and_its_own_error() -> None:
    value = object()
    assert decided_by_rank_zero(trainer(), lambda: value) is value
    assert decided_by_rank_zero(trainer(), lambda: None) is None

    def fail() -> None:
        raise KeyError("as it was")

    with pytest.raises(KeyError, match="as it was"):
        decided_by_rank_zero(trainer(), fail)


def test_ctrl_c_is_not_held_back() -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        decided_by_rank_zero(trainer(), interrupt)
