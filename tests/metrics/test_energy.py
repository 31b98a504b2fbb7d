import pickle

import pytest
import torch

from lightning_prune.errors import ArgumentError
from lightning_prune.metrics import Energy
from lightning_prune.metrics.energy import QUANTITIES, ratio


def filled(quantity: str) -> Energy:
    metric = Energy(quantity)
    metric.update(joules=30.0, images=10, seconds=1.0)
    metric.update(joules=90.0, images=20, seconds=3.0)
    return metric


def test_is_sum_over_sum_and_not_a_mean_of_rates() -> None:
    assert [filled(quantity).compute() for quantity in QUANTITIES] == [4.0, 30.0]


def test_pure_function() -> None:
    assert ratio(torch.tensor(40.0), torch.tensor(4)) == 10.0
    assert ratio(torch.tensor(40.0), torch.tensor(0)).isnan()


def test_two_processes_add_joules_and_images_and_take_the_longest_time() -> None:
    """As torchmetrics gathers them; the second process shares the counter of the first."""
    one, other = filled("watts"), Energy("watts")
    other.update(joules=0.0, images=30, seconds=5.0)
    for quantity, expected in (("watts", 120.0 / 5.0), ("joules_per_image", 120.0 / 60)):
        metric = Energy(quantity)
        for name, reduction in metric._reductions.items():
            setattr(metric, name, reduction(torch.stack([getattr(one, name), getattr(other, name)])))
        metric._update_count = 1
        assert metric.compute() == pytest.approx(expected)


def test_reset_clone_and_pickle() -> None:
    metric = filled("watts")
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.reset()
    metric.update(2.0, 1, 1.0)
    assert metric.compute() == 2.0
    assert [copy.compute() for copy in copies] == [30.0, 30.0]
    assert not metric.state_dict()


@pytest.mark.filterwarnings("ignore:The ``compute`` method of metric Energy was called before")
@pytest.mark.parametrize("quantity", QUANTITIES)
def test_nothing_measured_is_nan_and_warned_of(quantity: str) -> None:
    with pytest.warns(UserWarning, match="Energy: nothing was measured, so it is NaN"):
        assert Energy(quantity).compute().isnan()


@pytest.mark.parametrize(
    ("values", "name"), [((-1.0, 1, 1.0), "joules"), ((1.0, -1, 1.0), "images"), ((1.0, 1, -0.5), "seconds")]
)
def test_negative_values_are_refused(values: tuple[float, int, float], name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"`{name}` must be 0 or more, got -"):
        Energy().update(*values)


def test_unknown_quantity() -> None:
    with pytest.raises(ArgumentError, match=r"`quantity` must be one of joules_per_image, watts, got 'kWh'"):
        Energy("kWh")
