"""The best class of every image, whatever the LightningModule does; None where it is not known."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.data import noise_images
from helpers.dense import FeatureNet
from helpers.models import tiny_vit
from lightning_prune.comparison.output_capture import capture_outputs
from lightning_prune.comparison.predictions import PredictionRecorder, Predictions
from lightning_prune.patching.models import restoring

IMAGES = noise_images(10)
LABELS = torch.arange(10) % 5
OPTIONS: dict[str, Any] = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
}


class Inner(L.LightningModule):
    """Calls the transformer in its step."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__()
        self.net = tiny_vit() if net is None else net

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.net(batch[0])


class Own(Inner):
    """Has a forward of its own, with a head that the transformer knows nothing of."""

    def __init__(self) -> None:
        super().__init__(tiny_vit(num_classes=0))
        self.head = nn.Linear(32, 5)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.net(images))

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])


class Wrapped(Own):
    def forward(self, images: Tensor) -> Any:
        return type("Output", (), {"logits": super().forward(images)})()


class Twice(Own):
    """Test-time augmentation: no call of these is the answer."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self(batch[0])
        self(batch[0].flip(-1))


class Features(Inner):
    def __init__(self) -> None:
        super().__init__(tiny_vit(num_classes=0))


def loader(*parts: Tensor) -> DataLoader[Any]:
    return DataLoader(TensorDataset(*parts), batch_size=4)


def recorded(module: L.LightningModule, loaders: Any = None, **options: Any) -> PredictionRecorder:
    recorder = PredictionRecorder()
    trainer = L.Trainer(callbacks=[recorder], **{**OPTIONS, **options})
    trainer.validate(module, loaders or loader(IMAGES, LABELS), verbose=False)
    return recorder


@pytest.mark.parametrize("kind", [Inner, Own, Wrapped])
def test_classes_are_those_of_the_module(kind: type[Inner]) -> None:
    module = kind()
    found = recorded(module)
    with torch.no_grad():
        output = module.net(IMAGES) if kind is Inner else module(IMAGES)
    expected = getattr(output, "logits", output).argmax(1).tolist()
    assert found.predictions == Predictions(expected, LABELS.tolist())
    assert found.predictions.labelled
    assert found.predictions.correct == [a == b for a, b in zip(expected, LABELS.tolist(), strict=True)]
    assert found.images == 10
    assert not module.net._forward_hooks
    assert not module._forward_hooks


@pytest.mark.parametrize("kind", [Twice, Features])
def test_what_cannot_be_told_is_not_guessed(kind: type[Inner]) -> None:
    found = recorded(kind())
    assert (found.predictions, found.images) == (None, 10)


def test_without_labels_there_are_still_classes() -> None:
    found = recorded(Inner(), loader(IMAGES))
    assert not found.predictions.labelled
    assert found.predictions.labels == [-1] * 10
    assert len(found.predictions.predicted) == 10


def test_of_several_loaders_the_first_counts() -> None:
    found = recorded(Inner(), [loader(IMAGES[:6], LABELS[:6]), loader(IMAGES, LABELS)])
    assert found.predictions.labels == LABELS[:6].tolist()
    assert found.images == 6


def test_each_run_is_recorded_by_itself() -> None:
    recorder, module = PredictionRecorder(), Inner()
    trainer = L.Trainer(callbacks=[recorder], **OPTIONS)
    trainer.validate(module, loader(IMAGES, LABELS), verbose=False)
    first = recorder.predictions
    trainer.validate(module, loader(IMAGES[:4], LABELS[:4]), verbose=False)
    assert recorder.predictions == Predictions(first.predicted[:4], first.labels[:4])


@pytest.mark.parametrize("how", ["in place", "wrapped"])
def test_compiled_transformers_are_heard(how: str) -> None:
    net = tiny_vit()
    compiled: Any = net
    if how == "in place":
        net.compile(backend="eager")
    else:
        compiled = torch.compile(net, backend="eager")
    found = recorded(Inner(compiled))
    assert found.predictions.predicted == tiny_vit()(IMAGES).argmax(1).tolist()
    if how == "in place":
        assert net._compiled_call_impl.__name__ != "told"


def test_listening_ends_after_an_error() -> None:
    class Failing(Inner):
        def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
            raise ValueError("in the step")

    module = Failing()
    with pytest.raises(ValueError, match="in the step"):
        recorded(module)
    assert not module.net._forward_hooks


def test_listen_passes_on_and_stops() -> None:
    heard: list[Any] = []
    module = nn.Identity()
    stop = capture_outputs(module, heard.append)
    module(3)
    stop()
    module(4)
    assert heard == [3]


def test_broken_outputs_of_a_dense_model_are_seen() -> None:
    module = Inner(FeatureNet(tiny_vit()))  # returns several tensors
    images = IMAGES.clone()
    images[3, 0, 0, 0] = float("nan")
    with restoring("auto"):
        found = recorded(module, loader(images, LABELS))
    assert found.broken == [3]


def test_a_broken_value_anywhere_in_a_large_grid_is_seen() -> None:
    class Broken(FeatureNet):
        def forward(self, images: Tensor) -> dict[str, Tensor]:
            found = {name: grid.repeat(1, 16, 8, 8) for name, grid in super().forward(images).items()}
            found["tap3"][:, 3, 7, 5] = torch.where(images[:, 0, 0, 0] > 100, float("inf"), 0.0)
            return found

    module = Inner(Broken(tiny_vit()))
    images = IMAGES.clone()
    images[:, 0, 0, 0] = 1.0
    images[4, 0, 0, 0] = 200.0
    with restoring("auto"):
        assert recorded(module, loader(images, LABELS)).broken == [4]


def test_images_in_another_order_each_time_are_not_paired() -> None:
    recorder = PredictionRecorder()
    trainer = L.Trainer(callbacks=[recorder], **OPTIONS)
    loader = DataLoader(TensorDataset(IMAGES, LABELS), batch_size=5, shuffle=True)
    with pytest.warns(UserWarning, match="The validation loader shuffles, so that images of two runs cannot be paired"):
        trainer.validate(Inner(), loader, verbose=False)
    assert (recorder.predictions, recorder.images) == (None, 10)
