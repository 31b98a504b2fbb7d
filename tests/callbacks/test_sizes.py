"""Keep rates, and images of several sizes in one run."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

import lightning_prune as lp
from helpers.data import loader
from helpers.models import DEPTH, TOKENS
from lightning_prune._utils.measurement_source import MeasurementSource
from lightning_prune.callbacks.batches import BatchShape, batch_shape

from .tiny import Snapshot, Tiny, pruner, trainer, validated

pytestmark = pytest.mark.usefixtures("clockwork")
SIZES = {32: 16, 48: 36, 24: 9}  # pixels -> patches


def batches(*sizes: int) -> DataLoader[Any]:
    """One batch of four images for each size."""
    made: Any = [torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(size)) for size in sizes]
    return DataLoader(made, batch_size=None)


class TestKeepRates:
    @pytest.mark.parametrize(
        ("schedule", "left"),
        [
            (0.5, [TOKENS, 9, 9, 9]),
            (lp.KeepRates([1, 0.5, 1, 0.7]), [TOKENS, 9, 9, 7]),
        ],
    )
    def test_on_images_of_one_size_rates_become_counts(self, schedule: Any, left: list[int]) -> None:
        callback = pruner(schedule=schedule)
        module, _ = validated(callback)
        assert callback.decision.schedule.tokens(TOKENS) == tuple(left)
        assert module.tokens() == {left[-2]}, "tokens that enter the last block"
        assert callback.decision.keep_rates is not None

    @pytest.mark.parametrize("name", ["rates.yaml", "rates.json"])
    def test_from_a_file_made_elsewhere_warns(self, name: str, tmp_path: Path) -> None:
        path = lp.KeepRates([1, 0.5, 1, 1], made_on=MeasurementSource(device="Abacus", batch_size=4)).save(
            tmp_path / name
        )
        with pytest.warns(UserWarning, match="made elsewhere: device Abacus there"):
            module, _ = validated(pruner(schedule=path))
        assert module.tokens() == {9}

    @pytest.mark.parametrize("rate", [0.0, -0.5, 1.0, 1.5])
    def test_a_rate_outside_0_and_1_is_refused(self, rate: float) -> None:
        with pytest.raises(lp.ArgumentError, match=rf"share of the patch tokens in \(0, 1\), got {rate}"):
            pruner(schedule=rate)

    def test_rates_for_another_depth_are_refused(self) -> None:
        module = Tiny()
        before = Snapshot(module)
        with pytest.raises(lp.ScheduleError, match="`schedule` must have 4 blocks, as the model, got 3"):
            trainer(pruner(schedule=lp.KeepRates([1, 0.5, 1]))).validate(module, loader(), verbose=False)
        before.assert_unchanged()


class TestSeveralSizes:
    @pytest.mark.parametrize("schedule", [0.5, lp.KeepRates.single(DEPTH, 1, 0.5)])
    def test_keep_rates_hold_at_every_size(self, schedule: Any) -> None:
        module = Tiny(dynamic_img_size=True)
        with pytest.warns(UserWarning, match=r"Batch 1 .* 48 x 48; .* 32 x 32"):
            trainer(pruner(schedule=schedule)).validate(module, batches(*SIZES), verbose=False)
        assert [step.tokens for step in module.steps] == [1 + (patches + 1) // 2 for patches in SIZES.values()]

    def test_a_planned_schedule_keeps_the_same_share_at_every_size(self) -> None:
        """A plan is made for the first size; at others the same share of the tokens stays."""
        module, callback = Tiny(dynamic_img_size=True), pruner(calibration=batches(32))
        with pytest.warns(UserWarning, match="Batch 1 has images of 48 x 48"):
            trainer(callback).validate(module, batches(32, 48, 32), verbose=False)
        first, other, again = (step.tokens for step in module.steps)
        assert first == again == callback.decision.tokens < TOKENS
        rate = (first - 1) / 16
        assert rate * 36 + 1 <= other < rate * 36 + 2

    def test_counts_are_the_same_at_every_size(self) -> None:
        module = Tiny(dynamic_img_size=True)
        before = Snapshot(module)
        with pytest.warns(UserWarning, match=r"Batch 1 has images of 48 x 48"):
            trainer(pruner(schedule=8)).validate(module, batches(32, 48), verbose=False)
        assert [step.tokens for step in module.steps] == [TOKENS - 8, 37 - 8]
        before.assert_unchanged()

    def test_another_size_in_the_next_run(self) -> None:
        module, callback = Tiny(dynamic_img_size=True), pruner(schedule=8)
        for size, tokens in ((32, 17), (48, 37)):
            with warnings.catch_warnings():
                warnings.filterwarnings("error", message="Batch")
                trainer(callback).validate(module, batches(size), verbose=False)
            assert module.steps[-1].tokens == tokens - 8
            assert callback.decision.dense_tokens == tokens


def test_batch_shapes_and_their_differences() -> None:
    form = BatchShape(4, 32, 48)
    assert batch_shape(torch.zeros(4, 3, 32, 48), None) == form
    assert batch_shape({"labels": 1}, None) is None
    assert form.difference(form) is None
    assert form.difference(BatchShape(2, 8, 8)) == "has 2 images; the profile was made at a batch size of 4"
    assert form.difference(BatchShape(4, 48, 32)) == "has images of 48 x 32; the profile was made for 32 x 48"
