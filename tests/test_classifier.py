import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_prune import evaluation as evaluation_module
from lightning_prune.classifier import ImageClassifier
from lightning_prune.errors import ArgumentError, DataError, FileFormatError, WeightsError

NAME = "vit_digits_patch4_56"
TINY = {"depth": 1, "embed_dim": 32, "num_heads": 1}


class Fixed(nn.Module):
    """Gives logits that the images carry themselves, so that every figure is known beforehand."""

    def __init__(self, num_classes: int = 6) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, : self.num_classes] * self.scale


def loader(logits: Tensor, labels: Tensor, batch_size: int = 4) -> DataLoader[Any]:
    return DataLoader(TensorDataset(logits[:, None, None, :], labels), batch_size=batch_size)


def trainer(**kwargs: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", **{**quiet, **kwargs})


def tiny(**kwargs: Any) -> ImageClassifier:
    return ImageClassifier(NAME, pretrained=False, model_kwargs=TINY, **kwargs)


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


def test_times_leave_out_warm_up_and_the_odd_last_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter([9.0, 7.0, 0.5, 1.5, 8.0])
    module = ImageClassifier(Fixed(), warmup=2)

    class Clock:
        def __init__(self) -> None:
            self.now = 0.0

        def perf_counter(self) -> float:
            return self.now

    clock = Clock()
    monkeypatch.setattr("lightning_prune.metrics.timing.time", clock)

    def slowly(*_: object) -> None:
        clock.now += next(seconds)

    module.model.register_forward_hook(slowly)
    data = loader(torch.cat([RANKED, RANKED[:8]]), torch.zeros(18, dtype=torch.long))  # four batches of 4, one of 2
    (logged,) = trainer().validate(module, data, verbose=False)
    assert logged["val/throughput"] == pytest.approx(8 / 2.0)
    assert logged["val/throughput_end_to_end"] == pytest.approx(8 / 2.0)
    assert logged["val/latency_p50"] == pytest.approx(1000.0)
    assert logged["val/latency_p95"] == pytest.approx(1450.0)


def test_what_callbacks_do_before_the_first_batch_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
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
    run = trainer(max_epochs=2)
    first = run.validate(module, data, verbose=False)[0]["val/top1"]
    run.fit(module, data, data)
    assert run.callback_metrics["train/loss"] > 0
    assert module.model.scale != 1
    assert run.validate(module, data, verbose=False)[0]["val/top1"] == first == 1.0


def test_predict_gives_logits_with_or_without_labels() -> None:
    module = ImageClassifier(Fixed())
    for data in (loader(RANKED, torch.zeros(10)), DataLoader(RANKED[:, None, None, :], batch_size=4)):
        predicted = trainer().predict(module, data)
        assert predicted is not None
        assert torch.equal(torch.cat(predicted), RANKED)


@pytest.mark.parametrize("label", [6, -1])
def test_label_out_of_range(label: int) -> None:
    labels = torch.tensor([0, 0, 0, 0, 0, label, 0, 0, 0, 0])
    message = rf"^validation batch 1: label {label} is out of range, the model's head has 6 classes \(0 to 5\)\.$"
    with pytest.raises(DataError, match=message):
        trainer().validate(ImageClassifier(Fixed()), loader(RANKED, labels))


def test_logits_that_are_not_finite() -> None:
    logits = RANKED.clone()
    logits[8, 2], logits[9, 0] = torch.nan, torch.inf
    message = r"^test batch 2: expected finite logits, got NaN or infinity for 2 of 2 images\.$"
    with pytest.raises(DataError, match=message):
        trainer().test(ImageClassifier(Fixed()), loader(logits, torch.zeros(10, dtype=torch.long)))


@pytest.mark.parametrize(
    ("labels", "classes", "message"),
    [
        (torch.zeros(10), 6, r"expected labels as a row of integers, got torch.float32 of shape \[4\]"),
        (torch.zeros(10).long(), 3, r"expected the model to give logits of shape \[4, 3\], got shape \[4, 6\]"),
    ],
)
def test_batches_that_do_not_fit(labels: Tensor, classes: int, message: str) -> None:
    with pytest.raises(DataError, match=rf"^validation batch 0: {message}"):
        trainer().validate(ImageClassifier(Fixed(), num_classes=classes), loader(RANKED, labels))


def test_batch_that_is_no_pair() -> None:
    with pytest.raises(
        DataError, match=r"^validation batch 0: expected a pair of tensors \(images, labels\), got Tensor"
    ):
        trainer().validate(ImageClassifier(Fixed()), DataLoader(RANKED, batch_size=4))


def test_weights_file_and_checkpoint_give_the_same_model(tmp_path: Path) -> None:
    source = tiny()
    save_file(source.model.state_dict(), tmp_path / "raw.safetensors")
    torch.save(source.model.state_dict(), tmp_path / "raw.pth")
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    run.strategy.connect(source)
    run.save_checkpoint(tmp_path / "last.ckpt")
    images = torch.randn(2, 1, 56, 56)
    expected = source.eval()(images)
    for name in ("raw.safetensors", "raw.pth", "last.ckpt"):
        module = ImageClassifier(NAME, weights=str(tmp_path / name), model_kwargs=TINY).eval()
        assert torch.equal(module(images), expected)


def test_checkpoint_stands_alone(tmp_path: Path) -> None:
    save_file(tiny().model.state_dict(), tmp_path / "raw.safetensors")
    module = ImageClassifier(NAME, weights=str(tmp_path / "raw.safetensors"), model_kwargs=TINY)
    run = trainer(enable_checkpointing=True, default_root_dir=tmp_path)
    run.strategy.connect(module)
    run.save_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "raw.safetensors").unlink()
    loaded = ImageClassifier.load_from_checkpoint(tmp_path / "last.ckpt", weights_only=True)
    images = torch.randn(2, 1, 56, 56)
    assert torch.equal(loaded.eval()(images), module.eval()(images))
    assert module.hparams["weights"] == str(tmp_path / "raw.safetensors")  # the run still says where it came from


def test_compile_keeps_the_keys_and_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[nn.Module] = []
    monkeypatch.setattr(nn.Module, "compile", lambda self: compiled.append(self))
    module = tiny(compile=True)
    assert compiled == [module.model]
    assert list(module.state_dict()) == list(tiny().state_dict())


def test_compiled_module_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Traced, but run by Python: inductor would need a C++ compiler, which a bare machine does not have.
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(nn.Module.compile, backend="eager"))
    module = ImageClassifier(Fixed(), compile=True)
    (logged,) = trainer().validate(module, loader(RANKED[:8], torch.zeros(8, dtype=torch.long)), verbose=False)
    assert logged["val/top1"] == 1.0
    assert list(copy.deepcopy(module).state_dict()) == ["model.scale"]


def test_copies_and_pickles() -> None:
    module = tiny().eval()
    images = torch.randn(2, 1, 56, 56)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(images), module(images))


def test_head_and_data_config() -> None:
    module = tiny(num_classes=3)
    assert module.num_classes == 3
    assert module(torch.randn(2, 1, 56, 56)).shape == (2, 3)
    assert module.data_config["input_size"] == (1, 56, 56)


def test_unknown_name_comes_with_similar_ones() -> None:
    with pytest.raises(
        ArgumentError, match=r"^model: expected the name of a timm model, got 'deit_smal_patch16_224'\. "
    ):
        ImageClassifier("deit_smal_patch16_224")
    with pytest.raises(ArgumentError, match=r"Similar: .*\bdeit_small_patch16_224\b"):
        ImageClassifier("deit_smal_patch16_224")


def test_no_pretrained_weights() -> None:
    with pytest.raises(
        WeightsError, match=rf"^model: no pretrained weights for '{NAME}.nosuchtag': Invalid pretrained tag"
    ):
        ImageClassifier(f"{NAME}.nosuchtag")


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    save_file(tiny(num_classes=4).model.state_dict(), tmp_path / "four.safetensors")
    with pytest.raises(WeightsError, match=r"2 of another shape: head.weight \(model \[10, 32\], file \[4, 32\]\)"):
        ImageClassifier(NAME, weights=str(tmp_path / "four.safetensors"), model_kwargs=TINY)
    with pytest.raises(FileFormatError, match=r"^weights: expected a file, got .*none.pth"):
        ImageClassifier(NAME, weights=str(tmp_path / "none.pth"))


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_classes": 0}, r"^num_classes: expected at least 1, got 0"),
        ({"warmup": -1}, r"^warmup: expected 0 or more, got -1"),
        ({"model": nn.Linear(3, 2)}, r"^num_classes: expected it to be given, for Linear does not say it"),
        ({"model": Fixed(), "model_kwargs": TINY}, r"^model_kwargs: expected none beside a module"),
        (
            {"model": NAME, "model_kwargs": {"colour": 3}},
            rf"^model_kwargs: {NAME} does not take \['colour'\]: .*colour",
        ),
    ],
)
def test_bad_arguments(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        ImageClassifier(pretrained=False, **kwargs) if "model" in kwargs else tiny(**kwargs)


def test_works_from_a_config_file(tmp_path: Path) -> None:
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_subclass_arguments(ImageClassifier, "model")
    config = {"class_path": "lightning_prune.ImageClassifier"}
    options = {"model": NAME, "pretrained": False, "model_kwargs": TINY, "num_classes": 4}
    parsed = parser.parse_object({"model": {**config, "init_args": options}})
    assert parser.instantiate_classes(parsed).model.num_classes == 4
