"""Images out of batches, and the calibration sample: which images it is and what it leaves alone."""

from collections import OrderedDict
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.utilities.distributed import DistributedSamplerWrapper
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler, UnrepeatedDistributedSamplerWrapper
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
)

import lightning_prune as lp
from helpers.data import labelled, loader, noise_images
from helpers.models import TOKENS
from lightning_prune._utils.time_limit import TimeLimit
from lightning_prune.callbacks import batches as images_module
from lightning_prune.callbacks.batches import Calibration, images_from_batch, labels_from_batch
from lightning_prune.callbacks.first_batch import FirstBatch, on_first_batch

from .tiny import Spying, Stream, Tiny, pruner, trainer, validated

IMAGES, LABELS = noise_images(4, seed=1), torch.arange(4)


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Calibration]:
    """Every calibration sample that the callback takes in the test."""
    from lightning_prune.callbacks import first_batch

    taken: list[Calibration] = []

    def spying(*args: Any, **kwargs: Any) -> Calibration:
        taken.append(images_module.calibration_images(*args, **kwargs))
        return taken[-1]

    monkeypatch.setattr(first_batch, "calibration_images", spying)
    return taken


@pytest.mark.parametrize(
    "batch",
    [
        IMAGES,
        (IMAGES, LABELS),
        [IMAGES],
        {"image": IMAGES},
        {"label": LABELS, "images": IMAGES},
        OrderedDict(pixel_values=IMAGES, labels=LABELS),
        {"inputs": IMAGES},
    ],
    ids=["tensor", "tuple", "list", "image", "images", "pixel_values", "inputs"],
)
def test_images_from_batch_finds_the_images(batch: Any) -> None:
    assert images_from_batch(batch) is IMAGES


@pytest.mark.parametrize(
    ("batch", "described"),
    [
        ({"picture": IMAGES, "y": LABELS}, "a mapping with the keys 'picture', 'y'"),
        (LABELS, r"a tensor of shape \(4,\), int64"),
        (IMAGES.byte(), r"a tensor of shape \(4, 3, 32, 32\), uint8"),
        (IMAGES[0], r"a tensor of shape \(3, 32, 32\), float32"),
        (([IMAGES], LABELS), "a tuple of list, Tensor"),
        ([], "an empty list"),
        ("text", "of type str"),
        (None, "of type NoneType"),
    ],
)
def test_images_from_batch_refuses_batches_without_images(batch: Any, described: str) -> None:
    message = f"{described}.*`images_from_batch=`"
    with pytest.raises(lp.ArgumentError, match=message):
        images_from_batch(batch)


def test_images_from_batch_uses_a_given_function() -> None:
    assert images_from_batch({"deep": [LABELS, IMAGES]}, lambda batch: batch["deep"][1]) is IMAGES
    with pytest.raises(
        lp.ArgumentError,
        match=r"`images_from_batch` .* got a tensor of shape \(4,\), int64",
    ):
        images_from_batch({"deep": [LABELS, IMAGES]}, lambda batch: batch["deep"][0])


@pytest.mark.parametrize("key", ["label", "labels", "target", "targets"])
def test_labels_from_batch_finds_the_labels(key: str) -> None:
    assert labels_from_batch({"image": IMAGES, key: LABELS}) is LABELS
    assert labels_from_batch((IMAGES, LABELS)) is LABELS


@pytest.mark.parametrize(
    "batch", [IMAGES, (IMAGES,), {"image": IMAGES}, (IMAGES, IMAGES), (IMAGES, LABELS.float()), None]
)
def test_labels_from_batch_is_none_without_labels(batch: Any) -> None:
    assert labels_from_batch(batch) is None


class Keyed(Dataset[Any]):
    def __init__(self, key: str) -> None:
        self.key = key

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {self.key: noise_images(12, seed=1)[index], "y": index}


@pytest.mark.parametrize("key", ["image", "images", "pixel_values", "inputs"])
@pytest.mark.usefixtures("clockwork")
def test_a_loop_of_mappings_is_pruned(key: str) -> None:
    module, _ = validated(pruner(), data=DataLoader(Keyed(key), batch_size=4))
    assert [step.images for step in module.steps] == [4, 4, 4]
    assert TOKENS not in module.tokens()


@pytest.mark.usefixtures("clockwork")
def test_a_loop_of_unknown_mappings_needs_images_from_batch(sampled: list[Calibration]) -> None:
    data = DataLoader(Keyed("picture"), batch_size=4)
    with pytest.raises(lp.ArgumentError, match=r"'picture', 'y'.*`images_from_batch=`"):
        validated(pruner(), data=data)
    module, _ = validated(pruner(images_from_batch=lambda batch: batch["picture"]), data=data)
    assert TOKENS not in module.tokens()
    assert sampled[0].images.shape == (8, 3, 32, 32)


@pytest.mark.usefixtures("clockwork")
def test_sample_is_seeded_and_not_the_first_images(sampled: list[Calibration]) -> None:
    for seed in (0, 0, 1):
        callback = pruner(seed=seed)
        validated(callback)
        assert callback.decision.calibration == f"8 images sampled from the dataset, seed {seed}"
    first, again, other = (sample.images for sample in sampled)
    assert first.shape == (8, 3, 32, 32)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert not torch.equal(first, noise_images(24, seed=1)[:8])
    everything = {tuple(image.flatten()[:3].tolist()) for image in noise_images(24, seed=1)}
    drawn = {tuple(image.flatten()[:3].tolist()) for image in first}
    assert len(drawn) == 8
    assert drawn <= everything


@pytest.mark.usefixtures("clockwork")
def test_sample_is_never_larger_than_the_dataset(sampled: list[Calibration]) -> None:
    callback = pruner(calibration=512)
    validated(callback)
    assert sampled[0].images.shape[0] == 24
    assert callback.decision.calibration == "24 images sampled from the dataset, seed 0"


@pytest.mark.usefixtures("clockwork")
def test_sample_takes_no_batch_of_the_running_loader() -> None:
    class Counting(DataLoader[Any]):
        iterations = 0

        def __iter__(self) -> Any:
            self.iterations += 1
            return super().__iter__()

    dataset = Spying()
    data = Counting(dataset, batch_size=4, shuffle=False)
    module, _ = validated(pruner(), data=data)
    assert data.iterations == 1
    assert module.seen() == 24
    assert len(dataset.asked) == 24 + 8
    assert sorted(set(dataset.asked)) == list(range(24))


@pytest.mark.usefixtures("clockwork")
def test_sample_is_collated_as_in_the_loop(sampled: list[Calibration]) -> None:
    def halved(items: list[Any]) -> tuple[Tensor, Tensor]:
        images, labels = torch.utils.data.default_collate(items)
        return images / 2, labels

    validated(pruner(), data=loader())
    validated(pruner(), data=loader(collate_fn=halved))
    assert torch.equal(sampled[1].images, sampled[0].images / 2)


@pytest.mark.usefixtures("clockwork")
def test_sample_from_a_loader_with_a_batch_sampler(sampled: list[Calibration]) -> None:
    batches = BatchSampler(SequentialSampler(range(24)), 6, drop_last=False)
    module, _ = validated(pruner(), data=DataLoader(labelled(), batch_sampler=batches))
    assert [step.images for step in module.steps] == [6] * 4
    assert sampled[0].images.shape[0] == 8


WHOLE = DistributedSampler(labelled(), num_replicas=2, rank=1)
PART = SubsetRandomSampler(range(12, 24))
FIRST_BATCH = "the first batch, since the dataset cannot be sampled"


class Bucketed(BatchSampler):
    """Batches in its own way."""


@pytest.mark.parametrize(
    "data",
    [
        loader(sampler=RandomSampler(labelled(), num_samples=10)),
        loader(sampler=WHOLE),
        loader(sampler=UnrepeatedDistributedSampler(labelled(), num_replicas=2, rank=0)),
        loader(sampler=DistributedSamplerWrapper(RandomSampler(range(24)), num_replicas=2, rank=0)),
        DataLoader(labelled(), batch_sampler=BatchSampler(WHOLE, 4, drop_last=False)),
    ],
    ids=["random", "distributed", "unrepeated", "wrapped", "batches"],
)
@pytest.mark.usefixtures("clockwork")
def test_loaders_that_visit_all_items_are_sampled(data: Any) -> None:
    callback = pruner()
    trainer(callback).validate(Tiny(), data, verbose=False)
    assert callback.decision.calibration == "8 images sampled from the dataset, seed 0"
    trainer(callback).predict(Tiny(), data)
    assert callback.decision.calibration == "8 images sampled from the dataset, seed 0"


@pytest.mark.parametrize(
    "data",
    [
        loader(sampler=PART),
        loader(sampler=SequentialSampler(range(12))),
        loader(sampler=DistributedSamplerWrapper(PART, num_replicas=2, rank=0)),
        loader(sampler=UnrepeatedDistributedSamplerWrapper(PART, num_replicas=2, rank=0)),
        DataLoader(labelled(), batch_sampler=BatchSampler(PART, 4, drop_last=False)),
        DataLoader(labelled(), batch_sampler=Bucketed(SequentialSampler(range(24)), 4, drop_last=False)),
        DataLoader([noise_images(4, seed=1), noise_images(4, seed=1)], batch_size=None),
    ],
    ids=["subset", "beginning", "wrapped", "wrapped to predict", "batches", "own batches", "no batches"],
)
@pytest.mark.usefixtures("clockwork")
def test_other_loaders_give_the_first_batch_for_calibration(data: Any, sampled: list[Calibration]) -> None:
    callback = pruner()
    validated(callback, data=data)
    assert callback.decision.calibration == FIRST_BATCH
    assert sampled[0].images.shape == (4, 3, 32, 32)


@pytest.mark.usefixtures("clockwork")
def test_a_sampler_that_skips_items_in_predict_gives_the_first_batch_for_calibration() -> None:
    callback = pruner()
    trainer(callback).predict(Tiny(), loader(sampler=PART))
    assert callback.decision.calibration == FIRST_BATCH


@pytest.mark.usefixtures("clockwork")
def test_sample_of_a_subset_stays_within_it(sampled: list[Calibration]) -> None:
    validated(pruner(calibration=24), data=DataLoader(Subset(labelled(), range(12, 24)), batch_size=4))
    found, expected = sampled[0].images, noise_images(24, seed=1)[12:]
    assert torch.equal(found[found[:, 0, 0, 0].argsort()], expected[expected[:, 0, 0, 0].argsort()])


class Hooked(Tiny):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 1, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 3, batch[1]]


class HookedData(L.LightningDataModule):
    def val_dataloader(self) -> Any:
        return loader()

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] + 2, batch[1]]

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return [batch[0] * 5, batch[1]]


@pytest.mark.usefixtures("clockwork")
def test_batch_transfer_hooks_are_applied_to_the_sample(sampled: list[Calibration]) -> None:
    validated(pruner())
    validated(pruner(), Hooked())
    trainer(pruner()).validate(Tiny(), datamodule=HookedData(), verbose=False)
    plain, module, datamodule = (sample.images for sample in sampled)
    assert torch.equal(module, (plain + 1) * 3)
    assert torch.equal(datamodule, (plain + 2) * 5)


@pytest.mark.usefixtures("clockwork")
def test_sample_is_converted_to_the_precision_of_the_run(sampled: list[Calibration]) -> None:
    validated(pruner(), precision="bf16-true")
    assert sampled[0].images.dtype == torch.bfloat16


@pytest.mark.usefixtures("clockwork")
def test_sample_comes_from_the_loader_of_this_run(sampled: list[Calibration]) -> None:
    """After fit the trainer still holds fit's validation loader."""
    module, running = Tiny(), trainer(pruner(), max_epochs=1)
    running.fit(module, loader(8), loader(12))
    other = DataLoader(
        torch.utils.data.TensorDataset(noise_images(20, seed=1) + 100, torch.zeros(20).long()), batch_size=5
    )
    running.validate(module, other, verbose=False)
    assert len(sampled) == 2
    assert sampled[1].images.min() > 50
    running.test(module, loader(24, batch_size=6), verbose=False)
    running.predict(module, DataLoader(noise_images(20, seed=1) - 100, batch_size=7))
    assert sampled[2].images.abs().max() < 50
    assert sampled[3].images.max() < -50


@pytest.mark.parametrize("count", [6, 20])
@pytest.mark.usefixtures("clockwork")
def test_given_calibration_images_are_used_and_the_dataset_is_not_sampled(
    count: int, sampled: list[Calibration]
) -> None:
    callback, dataset = pruner(calibration=noise_images(count, seed=1)), Spying()
    validated(callback, data=DataLoader(dataset, batch_size=4))
    assert torch.equal(sampled[0].images, noise_images(count, seed=1))
    assert callback.decision.calibration == f"{count} images given"
    assert dataset.asked == list(range(24))


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16-true", torch.bfloat16), ("16-true", torch.float16), ("bf16-mixed", torch.float32)]
)
@pytest.mark.usefixtures("clockwork")
def test_given_calibration_images_are_converted_to_the_precision_of_the_run(
    precision: Any, dtype: torch.dtype, sampled: list[Calibration]
) -> None:
    module, _ = validated(pruner(calibration=noise_images(6, seed=1)), precision=precision)
    assert sampled[0].images.dtype == dtype
    assert TOKENS not in module.tokens()


@pytest.mark.parametrize(("protocol", "count"), [("deployed", 512), ("paper", 1024)])
def test_a_calibration_loader_gives_as_many_images_as_the_protocol_needs(protocol: Any, count: int) -> None:
    shown = torch.rand(1100, 1, 2, 2)
    callback = pruner(calibration=DataLoader(shown, batch_size=100), protocol=protocol)
    running = trainer()
    running.strategy.connect(module := Tiny())
    assert FirstBatch(running, module, None, callback.config).calibration().images.shape[0] == count


@pytest.mark.usefixtures("clockwork")
def test_a_given_calibration_loader_is_used(sampled: list[Calibration]) -> None:
    callback = pruner(calibration=loader(10, batch_size=5))
    validated(callback, Hooked())
    assert callback.decision.calibration == "the loader given as `calibration`"
    assert torch.equal(sampled[0].images, (noise_images(10, seed=1) + 1) * 3)


class Batches:
    """A loader of another kind."""

    def __iter__(self) -> Any:
        return iter(loader())


@pytest.mark.parametrize("data", [DataLoader(Stream(), batch_size=4), Batches()], ids=["stream", "batches"])
@pytest.mark.usefixtures("clockwork")
def test_a_stream_gives_its_first_batch_for_calibration(
    data: Any, sampled: list[Calibration], capsys: pytest.CaptureFixture[str]
) -> None:
    callback = pruner(verbose=True)
    module, _ = validated(callback, data=data)
    assert module.seen() == 24
    assert torch.equal(sampled[0].images, noise_images(24, seed=1)[:4])
    assert callback.decision.calibration == FIRST_BATCH
    told = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "judged by the first batch, since the dataset cannot be sampled" in told


@pytest.mark.usefixtures("clockwork")
def test_a_stream_is_read_once() -> None:
    stream = Stream()
    validated(pruner(), data=DataLoader(stream, batch_size=4))
    assert stream.given == 24


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "`calibration` must yield images, got none"),
        (
            [noise_images(2, seed=1), noise_images(2, size=24, seed=1)],
            r"`calibration` must have images of one size, got \[\(3, 24, 24\), \(3, 32, 32\)\]",
        ),
    ],
)
def test_calibration_batches_without_images_or_of_several_sizes_are_refused(calibration: Any, message: str) -> None:
    with pytest.raises(lp.DataError, match=message):
        validated(pruner(calibration=calibration))


def test_calibration_images_of_three_dimensions_are_refused() -> None:
    with pytest.raises(lp.ArgumentError, match=r"tensor of shape \(3, 32, 32\)"):
        validated(pruner(calibration=noise_images(1, seed=1)[0]))


@pytest.mark.parametrize(("limit", "count"), [(2, 8), (1, 4), (0.5, 12), (1.0, 16), (100, 16)])
@pytest.mark.usefixtures("clockwork")
def test_no_more_images_are_sampled_than_the_run_reads(
    limit: int | float, count: int, sampled: list[Calibration]
) -> None:
    """Images of the whole dataset, though: the first batches may be of one class."""
    callback = pruner(calibration=16)
    validated(callback, data=loader(24, batch_size=4), limit_val_batches=limit)
    assert len(sampled[0].images) == count
    assert callback.decision.calibration == f"{count} images sampled from the dataset, seed 0"
    first = labelled(24).tensors[0][: 4 * int(limit)]
    inside = [any(torch.equal(image, other) for other in first) for image in sampled[0].images]
    assert not all(inside) or limit == 100


@pytest.mark.parametrize(("limit", "count"), [(2, 8), (1.0, 16)])
def test_a_command_samples_what_its_validations_read_and_not_its_one_batch(
    limit: int | float, count: int, sampled: list[Calibration]
) -> None:
    running = trainer(pruner(calibration=16), limit_val_batches=limit)
    config = pruner(calibration=16).config
    seen = on_first_batch(
        running, Tiny(), config, lambda first: len(first.calibration().images), dataloaders=loader(24, batch_size=4)
    )
    assert seen == len(sampled[0].images) == count
    assert running.limit_val_batches == limit


def test_sampling_ends_when_its_share_of_the_time_has_passed(sampled: list[Calibration]) -> None:
    class Slow(Dataset[Any]):
        """A second for each image."""

        now = 0.0

        def __len__(self) -> int:
            return 24

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            Slow.now += 1.0
            return noise_images(1, seed=index)[0], index % 5

    running = trainer(pruner())
    limit = TimeLimit(40.0, lambda: Slow.now)  # a quarter of which are ten seconds
    config = pruner(calibration=24).config
    data = DataLoader(Slow(), batch_size=4)
    on_first_batch(
        running, Tiny(), config, lambda first: (first.calibration(limit), first.calibration()), dataloaders=data
    )
    assert [len(taken.images) for taken in sampled] == [12, 24]
    assert "there was no time to load 24" in sampled[0].source
    assert "time" not in sampled[1].source
