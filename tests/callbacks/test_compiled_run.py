"""A run in a quantized runtime: its ranges are those of images of the dataset, and not of the first batch."""

import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_prune as lp
from helpers.data import noise_images
from helpers.models import tiny_vit
from lightning_prune._utils.trees import tree_leaves
from lightning_prune.callbacks import TokenPruning
from lightning_prune.runtimes.calibration import CALIBRATION_IMAGES, calibrating_if_none, calibration_batches
from lightning_prune.runtimes.converted import ConvertedRuntime
from lightning_prune.runtimes.registry import RUNTIMES

IMAGES = noise_images(48)
seen: list[Tensor] = []


class Noting(ConvertedRuntime):
    """Runs the graph by PyTorch, and notes the images that it would be quantized on."""

    def __init__(self, quantize: str | None = None) -> None:
        self.quantize = quantize
        self.name = self._spec("noting", quantize=(quantize, None))

    @property
    def unquantized(self) -> "Noting":
        return Noting()

    def context(self) -> dict[str, Any]:
        return {"runtime": self.name}

    def note(self, graph: Any) -> None:
        if self.quantize is not None:
            seen.append(torch.cat([images for images, *_ in calibration_batches(graph, self.name)]))

    def load(self, graph: Any) -> Any:
        self.note(graph)
        module = graph.program.module()
        return lambda *tensors: tree_leaves(module(*tensors))

    def load_counts(self, graph: Any) -> Any:
        self.note(graph)
        return lambda count: lambda *tensors: [torch.zeros(1)]


@pytest.fixture(autouse=True)
def noting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(sys.modules, "noting_runtime", SimpleNamespace(Noting=Noting))  # type: ignore[arg-type] # no module
    monkeypatch.setitem(RUNTIMES, "noting", "noting_runtime:Noting")
    seen.clear()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* is calibrated on")
        yield
    seen.clear()


def are_of_the_dataset(images: Tensor) -> bool:
    """Whether they are as many as are used, all of the dataset, and not only its first batch."""
    found = [int((IMAGES - image).abs().amax((1, 2, 3)).argmin()) for image in images]
    return len(set(found)) == CALIBRATION_IMAGES and max(found) >= 4 and torch.equal(IMAGES[found], images)


@pytest.mark.parametrize("schedule", [4, "auto"])
def test_token_pruning(schedule: Any, tmp_path: Any) -> None:
    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.vit: nn.Module = tiny_vit(depth=1, embed_dim=16)

        def validation_step(self, batch: Any) -> None:
            self.vit(batch[0])

    pruner = TokenPruning(
        "topk",
        schedule=schedule,
        block=0,
        runtime="noting:quantize=yes",
        time_limit=0.5,
        use_cache=False,
        verbose=False,
    )
    options: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = DataLoader(TensorDataset(IMAGES), batch_size=4)
    trainer = L.Trainer(callbacks=[pruner], accelerator="cpu", limit_val_batches=2, **options)
    trainer.validate(Module(), loader, verbose=False)
    assert seen
    assert all(map(are_of_the_dataset, seen))
    assert all(torch.equal(each, seen[0]) for each in seen)


def test_plan_takes_the_images_of_its_caller() -> None:
    model = tiny_vit(depth=1, embed_dim=16)
    options: dict[str, Any] = {"time_limit": 1, "use_cache": False, "verbose": False}
    lp.plan(model, IMAGES[:2], calibration=IMAGES[8:], methods="topk", runtime="noting:quantize=yes", **options)
    assert seen
    assert all(torch.equal(each, IMAGES[8 : 8 + CALIBRATION_IMAGES]) for each in seen)


def test_latency_is_measured_with_any_ranges() -> None:
    model = tiny_vit(depth=1, embed_dim=16)
    lp.profile_latency(model, IMAGES[:2], counts=[9], runtime="noting:quantize=yes", time_limit=1, verbose=False)
    assert seen
    assert all(torch.equal(each, IMAGES[:2]) for each in seen)
    seen.clear()
    with calibrating_if_none(IMAGES[4:6]):
        lp.profile_latency(model, IMAGES[:2], counts=[9], runtime="noting:quantize=yes", time_limit=1, verbose=False)
    assert all(torch.equal(each, IMAGES[4:6]) for each in seen)
