"""A metric of each image, as the step returns it, dense against pruned."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images
from helpers.dense import DenseModule, dense_net
from lightning_prune.callbacks import TokenPruning
from lightning_prune.comparison.comparison_results import Comparison
from lightning_prune.comparison.paired_statistics import paired_mean_difference
from lightning_prune.comparison.variant_runs import Deployment
from lightning_prune.errors import ArgumentError, DataError
from lightning_prune.report.tables import comparison_table

from .conftest import OPTIONS

SCHEDULE = lp.Schedule([0, 5, 0, 3], method="topk")
IMAGES, TARGETS = noise_images(14), noise_images(14, 1, 4, seed=2)

pytestmark = pytest.mark.usefixtures("clockwork")


class Scored(DenseModule):
    """Returns the error of each image, or what `returned` makes of that."""

    def __init__(self, net: nn.Module, returned: Callable[[dict[str, Tensor]], Any] = lambda found: found) -> None:
        super().__init__(net)
        self.returned = returned

    def validation_step(self, batch: Any, batch_idx: int) -> Any:
        images, targets = batch
        errors = (self.net(images) - targets).square().mean(dim=(1, 2, 3))
        self.log("val/loss", errors.mean())
        return self.returned({"loss": errors.mean(), "mse": errors})


def compared(module: L.LightningModule, output: Path | None = None, **more: Any) -> Comparison:
    pruner = TokenPruning(schedule=SCHEDULE, restore="auto", verbose=False, calibration=8, time_limit=5)
    trainer = L.Trainer(callbacks=[pruner], **{**OPTIONS, "limit_val_batches": None})
    data = more.pop("data", DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=4))
    options: dict[str, Any] = {"methods": ["exact"], "controls": False, "metric_from_step": "mse", **more}
    return lp.compare(trainer, module, data, output=output, **options)


@torch.no_grad()
def errors_of(module: Scored) -> list[float]:
    return [float((module.net(x[None]) - y).square().mean()) for x, y in zip(IMAGES, TARGETS, strict=True)]


def test_the_change_is_paired_by_image(tmp_path: Path) -> None:
    module = Scored(dense_net())
    found = compared(module, tmp_path / "out")
    dense = errors_of(module)
    with lp.patch(module, SCHEDULE, restore="auto"):
        pruned = errors_of(module)
    rows = {row.variant: row for row in found.rows}
    row = next(row for name, row in rows.items() if row.removed)
    assert rows["dense"].metric_name == row.metric_name == "mse"
    assert rows["dense"].metric == pytest.approx(sum(dense) / 14, rel=1e-5)
    change, low, high = paired_mean_difference(dense, pruned)
    figures = (row.metric, row.metric_change, row.metric_low, row.metric_high)
    assert figures == pytest.approx((sum(pruned) / 14, change, low, high), rel=1e-3, abs=1e-6)
    assert rows["dense"].metric_low is None
    assert "95% interval" in [column.header for column in comparison_table(found.rows).columns]
    saved = json.loads((tmp_path / "out" / "results.json").read_text())
    assert any(
        each["metric_low"] == pytest.approx(low, rel=1e-3, abs=1e-6) for each in saved["rows"] if each["removed"]
    )


def test_values_are_kept_for_a_run_that_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = Scored(dense_net())
    first = compared(module, tmp_path / "out")

    def never(*args: Any) -> None:
        raise AssertionError("validated again")

    monkeypatch.setattr(Deployment, "_before_batch", never)
    again = compared(module, tmp_path / "out")
    assert [row.metric_low for row in again.rows] == [row.metric_low for row in first.rows]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (lambda found: None, r"'mse'; the step returned NoneType"),
        (lambda found: found["mse"], r"'mse'; the step returned Tensor"),
        (lambda found: {"iou": found["mse"]}, r"'mse'; the step returned the keys 'iou'"),
        (lambda found: {"mse": found["loss"]}, r"one number for each image, a tensor \(B,\), got .* \(\)"),
    ],
)
def test_what_the_step_returns_must_hold_it(returned: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        compared(Scored(dense_net(), returned))


def test_values_that_are_no_numbers_end_the_run() -> None:
    with pytest.raises(DataError, match="finite"):
        compared(Scored(dense_net(), lambda found: {"mse": found["mse"] * float("nan")}))
    with pytest.raises(ArgumentError, match=r"\(8,\)"):
        compared(Scored(dense_net(), lambda found: {"mse": found["mse"].repeat(2)}))


def test_shuffled_images_are_not_paired() -> None:
    module = Scored(dense_net())
    data = DataLoader(TensorDataset(IMAGES, TARGETS), batch_size=4, shuffle=True)
    row = next(row for row in compared(module, data=data).rows if row.removed)
    assert row.metric is not None
    assert row.metric_low is None


def test_the_name_must_be_one() -> None:
    with pytest.raises(ArgumentError, match="metric_from_step"):
        compared(Scored(dense_net()), metric_from_step="")


def test_intervals_of_means() -> None:
    first, second = [0.5, 0.7, 0.9, 0.2], [0.4, 0.7, 0.7, 0.4]
    differences = torch.tensor(second).double() - torch.tensor(first).double()
    half = 1.959964 * float(differences.std()) / 2
    found = paired_mean_difference(first, second)
    assert found == pytest.approx((float(differences.mean()), *(float(differences.mean()) + s * half for s in (-1, 1))))
    assert paired_mean_difference([1.0], [3.0]) == (2.0, 2.0, 2.0)
    with pytest.raises(ArgumentError, match="second"):
        paired_mean_difference([1.0], [1.0, 2.0])
    with pytest.raises(ArgumentError, match="confidence"):
        paired_mean_difference([1.0], [1.0], confidence=1.0)
