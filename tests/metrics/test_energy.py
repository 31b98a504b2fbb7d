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


def test_is_a_ratio_of_sums() -> None:
    assert [filled(quantity).compute() for quantity in QUANTITIES] == [4.0, 30.0]


def test_pure_function() -> None:
    assert ratio(torch.tensor(40.0), torch.tensor(4)) == 10.0
    assert ratio(torch.tensor(40.0), torch.tensor(0)).isnan()


def test_two_processes_add_joules_and_images_and_take_the_longest_time() -> None:
    """Gathered as by torchmetrics; the second process shares the counter of the first."""
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
def test_without_measurements_is_nan_with_a_warning(quantity: str) -> None:
    with pytest.warns(UserWarning, match="Energy is NaN, because nothing was measured"):
        assert Energy(quantity).compute().isnan()


@pytest.mark.parametrize(
    ("values", "name"), [((-1.0, 1, 1.0), "joules"), ((1.0, -1, 1.0), "images"), ((1.0, 1, -0.5), "seconds")]
)
def test_negative_values_are_rejected(values: tuple[float, int, float], name: str) -> None:
    with pytest.raises(ArgumentError, match=rf"`{name}` must be a number >= 0, got -"):
        Energy().update(*values)


def test_an_unknown_quantity_is_rejected() -> None:
    with pytest.raises(ArgumentError, match=r"`quantity` must be 'joules_per_image' or 'watts', got 'kWh'"):
        Energy("kWh")
