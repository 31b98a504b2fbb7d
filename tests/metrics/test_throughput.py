import pickle

import pytest
import torch

from lightning_prune.errors import ArgumentError
from lightning_prune.metrics import Throughput
from lightning_prune.metrics.throughput import images_per_second


def filled() -> Throughput:
    metric = Throughput()
    metric.update(images=30, seconds=1.0)
    metric.update(images=10, seconds=3.0)
    return metric


def test_is_a_ratio_of_sums() -> None:
    assert filled().compute() == 10.0


def test_pure_function() -> None:
    assert images_per_second(torch.tensor(40), torch.tensor(4.0)) == 10.0
    assert images_per_second(torch.tensor(40), torch.tensor(0.0)).isnan()


def test_counts_more_images_than_a_float_can_hold() -> None:
    metric = Throughput()
    metric.update(2**24, 1.0)
    metric.update(1, 1.0)
    assert metric.images == 2**24 + 1


def test_reset_clone_and_pickle() -> None:
    metric = filled()
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.reset()
    metric.update(2, 1.0)
    assert metric.compute() == 2.0
    assert [copy.compute() for copy in copies] == [10.0, 10.0]


def test_has_no_keys_in_a_state_dict() -> None:
    assert not filled().state_dict()


def test_without_measurements_is_nan_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Throughput is NaN, because nothing was measured"):
        assert Throughput().compute().isnan()


@pytest.mark.parametrize(("images", "seconds", "name"), [(-1, 1.0, "images"), (1, -0.5, "seconds")])
def test_negative_values_are_rejected(images: int, seconds: float, name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a number >= 0, got -"):
        Throughput().update(images, seconds)


def test_two_ranks_add_images_and_take_the_slowest_rank(ranks: list[dict]) -> None:
    assert [rank["by_hand"]["rate"] for rank in ranks] == pytest.approx([40 / 6, 40 / 6])


def test_two_ranks_of_a_trainer_agree(ranks: list[dict]) -> None:
    one, other = (rank["logged"] for rank in ranks)
    assert one == other
    assert one["val/throughput"] > 0
    assert one["val/throughput_end_to_end"] > 0
