from typing import Any

import lightning as L
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune.classification import evaluation as evaluation_module
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.errors import DataError


class Fixed(nn.Module):
    """Returns logits stored in the images, so that all results are known."""

    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_classes] * self.scale


def loader(logits: Tensor, labels: Tensor, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(logits[:, None, None, :], labels), batch_size=batch_size)


def trainer(**kwargs: Any) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, **kwargs)


# Class 0 first, class 5 last: label 0 is top-1, labels 1 to 4 top-5, label 5 neither.
RANKED = torch.arange(6.0, 0.0, -1.0).expand(10, 6).clone()


def test_accuracy_and_loss_over_batches_of_unequal_size() -> None:
    labels = torch.tensor([0, 0, 1, 4, 5, 0, 5, 5, 5, 1])
    (logged,) = trainer().validate(ImageClassifier(Fixed()), loader(RANKED, labels), verbose=False)
    assert logged["val/top1"] == pytest.approx(0.3)
    assert logged["val/top5"] == pytest.approx(0.6)
    assert logged["val/loss"] == pytest.approx(nn.functional.cross_entropy(RANKED, labels).item())


def test_test_logs_the_same_under_test() -> None:
    data, module, run = loader(RANKED, torch.zeros(10, dtype=torch.long)), ImageClassifier(Fixed()), trainer()
    (val,), (test,) = run.validate(module, data, verbose=False), run.test(module, data, verbose=False)
    assert {key.split("/")[1] for key in val} == {key.split("/")[1] for key in test}
    assert test["test/top1"] == val["val/top1"] == 1.0


def test_no_top5_for_five_classes_or_fewer() -> None:
    data = loader(RANKED[:, :5], torch.zeros(10, dtype=torch.long))
    (logged,) = trainer().validate(ImageClassifier(Fixed(5)), data, verbose=False)
    assert "val/top5" not in logged
    assert "val/top1" in logged


def test_several_dataloaders_are_pooled() -> None:
    data = [loader(RANKED, torch.zeros(10, dtype=torch.long)), loader(RANKED[:2], torch.tensor([5, 5]))]
    (logged, *_) = trainer().validate(ImageClassifier(Fixed()), data, verbose=False)
    assert logged["val/top1"] == pytest.approx(10 / 12)


def test_times_leave_out_warm_up_and_a_short_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 7.0, 0.5, 1.5, 8.0])
    module = ImageClassifier(Fixed(), warmup=2)

    class Clock:
        def __init__(self) -> None:
            self.now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("lightning_prune.metrics.latency.time", clock)

    def slowly(*_: object) -> None:
        clock.now += next(seconds)

    module.model.register_forward_hook(slowly)
    data = loader(torch.cat([RANKED, RANKED[:8]]), torch.zeros(18, dtype=torch.long))  # four batches of 4, one of 2
    (logged,) = trainer().validate(module, data, verbose=False)
    assert logged["val/throughput"] == pytest.approx(8 / 2.0)
    assert logged["val/throughput_end_to_end"] == pytest.approx(8 / 2.0)
    assert logged["val/latency_p50"] == pytest.approx(1000.0)
    assert logged["val/latency_p90"] == pytest.approx(1400.0)


def test_time_of_callbacks_before_the_first_batch_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []

    class Profiler(L.Callback):
        def on_validation_batch_start(self, *_: object) -> None:
            order.append("callback")

    module = ImageClassifier(Fixed())
    monkeypatch.setattr(evaluation_module.StepTimer, "start", lambda self: order.append("clock"))
    trainer(callbacks=[Profiler()]).validate(module, loader(RANKED, torch.zeros(10).long(), 10), verbose=False)
    assert order == ["callback", "clock"]


def test_validate_fit_and_validate_again_with_one_module() -> None:
    class Trainable(ImageClassifier):
        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, data = Trainable(Fixed()), loader(RANKED, torch.zeros(10, dtype=torch.long))
    run = trainer(max_epochs=2, enable_checkpointing=False)
    first = run.validate(module, data, verbose=False)[0]["val/top1"]
    run.fit(module, data, data)
    assert run.callback_metrics["train/loss"] > 0
    assert module.model.scale != 1
    assert run.validate(module, data, verbose=False)[0]["val/top1"] == first == 1.0


def test_predict_returns_logits_with_or_without_labels() -> None:
    module = ImageClassifier(Fixed())
    for data in (loader(RANKED, torch.zeros(10)), DataLoader(RANKED[:, None, None, :], batch_size=4)):
        predicted = trainer().predict(module, data)
        assert predicted is not None
        assert torch.equal(torch.cat(predicted), RANKED)


@pytest.mark.parametrize("label", [6, -1])
def test_a_label_out_of_range_is_rejected(label: int) -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, label, 0, 0, 0, 0])
    message = rf"validation batch 1 must be in 0 to 5.*got {label}\.$"
    with pytest.raises(DataError, match=message):
        trainer().validate(ImageClassifier(Fixed()), loader(RANKED, labels))


def test_non_finite_logits_are_rejected() -> None:
    logits = RANKED.clone()
    logits[8, 2], logits[9, 0] = torch.nan, torch.inf
    message = r"test batch 2 must be finite.*2 of 2 images"
    with pytest.raises(DataError, match=message):
        trainer().test(ImageClassifier(Fixed()), loader(logits, torch.zeros(10, dtype=torch.long)))


def test_checking_a_batch_synchronises_once() -> None:
    waits, aten = [], torch.ops.aten

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            # What brings a value to the CPU: item(), shapes that depend on values, copies.
            if func.overloadpacket in (aten._local_scalar_dense, aten.index, aten.nonzero, aten._to_copy):
                waits.append(func)
            return func(*args, **(kwargs or {}))

    labels = torch.arange(6)
    with Watch():
        evaluation_module.check_batch(RANKED[:6], labels, 6, "test batch 0")
    assert len(waits) <= 1, waits
