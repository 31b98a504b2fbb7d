"""The example of a dense head on the embedded digits."""

import importlib.util
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader, Subset

import lightning_prune as lp
from lightning_prune.callbacks import TokenPruning

_PATH = Path(__file__).parents[2] / "examples" / "segment_digits.py"
_spec = importlib.util.spec_from_file_location("segment_digits", _PATH)
assert _spec is not None
assert _spec.loader is not None
example: Any = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(example)


def test_masks_are_where_the_digit_is() -> None:
    data = example.SegmentedDigits("held_out")
    for index in (3, 77):
        image, mask = data[index]
        drawing = data.digits.render(index)
        top, left, side = drawing.box
        rows, columns = mask[0].nonzero(as_tuple=True)
        assert 20 < len(rows) < 500
        assert rows.min() >= top - 1
        assert rows.max() <= top + side + 1
        assert columns.min() >= left - 4  # digits are slanted
        assert columns.max() <= left + side + 4
        assert image.shape == mask.shape == (1, 56, 56)
        assert torch.from_numpy(drawing.canvas)[mask[0] > 0].min() > 0.25


def test_iou() -> None:
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.rand(3, 1, 5, 5, generator=generator) > 0.5 for _ in range(2))
    expected = [int((a & b).sum()) / int((a | b).sum()) for a, b in zip(one, other, strict=True)]
    assert example.soft_iou(one.float(), other.float()).tolist() == pytest.approx(expected, abs=1e-5)


def test_training_and_pruning(tmp_path: Path) -> None:
    weights = tmp_path / "head.safetensors"
    module = example.trained(weights, epochs=1, images=64).eval()
    again = example.trained(weights, epochs=1).eval()
    images = torch.stack([example.SegmentedDigits("held_out")[i][0] for i in range(2)])
    with torch.no_grad():
        dense = module(images)
        assert dense.shape == (2, 1, 56, 56)
        assert torch.equal(again(images), dense)
    data = DataLoader(Subset(example.SegmentedDigits("held_out"), range(8)), 4)
    schedule = lp.Schedule.single(depth=12, block=4, remove=80, method="topk")
    pruner = TokenPruning(schedule=schedule, restore="auto", time_limit=1, verbose=False)
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "accelerator": "cpu"}
    found = L.Trainer(callbacks=[pruner], **options).validate(module, data, verbose=False)[0]["val/iou"]
    with torch.no_grad(), lp.patch(module, schedule, restore="auto"):
        by_hand = [float(example.soft_iou((module(x) > 0).float(), y).mean()) for x, y in data]
    assert found == pytest.approx(sum(by_hand) / 2, rel=1e-4)
