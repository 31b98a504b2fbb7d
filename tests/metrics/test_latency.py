import pickle

import pytest
import torch

from lightning_prune.errors import ArgumentError
from lightning_prune.metrics import Latency
from lightning_prune.metrics.latency import slowest_quantile


def filled(quantile: float) -> Latency:
    metric = Latency(quantile)
    for milliseconds in (4, 1, 2, 3, 5):
        metric.update(milliseconds / 1000)
    return metric


@pytest.mark.parametrize(("quantile", "expected"), [(0.0, 1.0), (0.5, 3.0), (0.95, 4.8), (1.0, 5.0)])
def test_percentiles_in_milliseconds(quantile: float, expected: float) -> None:
    assert filled(quantile).compute().item() == pytest.approx(expected)


def test_pure_function_takes_the_slowest_rank() -> None:
    milliseconds, ranks = torch.tensor([1.0, 2.0, 3.0, 9.0]), torch.tensor([0.0, 0.0, 0.0, 1.0])
    assert slowest_quantile(milliseconds, ranks, 0.5) == 9.0
    assert slowest_quantile(torch.empty(0), torch.empty(0), 0.5).isnan()


def test_reset_clone_and_pickle() -> None:
    metric = filled(0.5)
    copies = [metric.clone(), pickle.loads(pickle.dumps(metric))]
    metric.reset()
    metric.update(0.1)
    assert metric.compute().item() == pytest.approx(100.0)
    assert [copy.compute().item() for copy in copies] == pytest.approx([3.0, 3.0])


def test_without_measurements_is_nan_with_a_warning() -> None:
    with pytest.warns(UserWarning, match="Latency is NaN, because nothing was measured"):
        assert Latency().compute().isnan()


def test_invalid_arguments_are_rejected() -> None:
    with pytest.raises(ArgumentError, match=r"`quantile` must be a number in \[0, 1\], got 95"):
        Latency(95)
    with pytest.raises(ArgumentError, match=r"`seconds` must be a number >= 0, got -1"):
        Latency().update(-1.0)


@pytest.mark.long
def test_two_ranks_report_the_slowest(ranks: list[dict]) -> None:
    for rank in ranks:
        found = rank["by_hand"]
        assert found["p50"] == pytest.approx(6000.0)  # over all batches it would be 1000
        assert found["p95"] == pytest.approx(6000.0)


def test_two_ranks_of_which_none_or_one_has_measured(ranks: list[dict]) -> None:
    for rank in ranks:
        assert rank["by_hand"]["empty"] != rank["by_hand"]["empty"]  # NaN
        assert rank["by_hand"]["one_sided"] == pytest.approx(250.0)
