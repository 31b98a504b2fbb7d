import pytest
import torch

from lightning_prune.metrics import StepTimer, drop_warmup
from lightning_prune.metrics.latency import Step


def steps(*images: int) -> list[Step]:
    return [Step(count, float(number)) for number, count in enumerate(images)]


@pytest.mark.parametrize(
    ("images", "warmup", "kept"),
    [
        ((16, 16, 16, 16, 4), 2, [2, 3]),  # neither warm-up nor the short last batch
        ((4, 16, 16, 16), 1, [2, 3]),  # the usual size, even if the first batch has another
        ((16, 16, 16), 0, [0, 1, 2]),
        ((16, 16), 5, [1]),  # one always stays
        ((16, 4), 2, [0]),  # the earlier one, where both sizes are as frequent
        ((16,), 2, [0]),
        ((), 2, []),
    ],
)
def test_drop_warmup_leaves_out_first_and_odd_batches(images: tuple[int, ...], warmup: int, kept: list[int]) -> None:
    assert [int(step.seconds) for step in drop_warmup(steps(*images), warmup)] == kept


def test_timer_has_a_forward_and_an_end_to_end_step_per_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 4.0, 10.0, 11.0, 12.0])
    monkeypatch.setattr("lightning_prune.metrics.latency.time.perf_counter", lambda: next(now))
    timer = StepTimer()
    for images in (8, 5):
        timer.start()  # 0, then without effect
        with timer.timing(images, torch.device("cpu")):  # 1 to 3, then 10 to 11
            pass
        timer.stop()  # 4, then 12
    assert timer.forward == [Step(8, 2.0), Step(5, 1.0)]
    assert timer.end_to_end == [Step(8, 4.0), Step(5, 8.0)]


def test_timer_counts_no_batch_that_failed() -> None:
    timer = StepTimer()
    timer.start()
    with pytest.raises(ValueError, match="broken"), timer.timing(8, torch.device("cpu")):
        raise ValueError("broken")
    timer.stop()
    assert timer.forward == timer.end_to_end == []
