"""Run by the tests as a program: several runs of the callback in two gloo processes, and one of them alone.

Says as JSON what each rank found.
"""

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny import OPTIONS, Tiny, pruner
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
)
from torchmetrics.classification import MulticlassAccuracy

import lightning_prune as lp
from helpers.data import loader, noise_images
from helpers.models import TOKENS, tiny_vit
from lightning_prune import ImageClassifier
from lightning_prune.callbacks import TokenPruning, decider, planned_schedule
from lightning_prune.comparison.step_values import StepValues
from lightning_prune.patching.class_swap import is_patched_module


class Scored(Tiny):
    """Logs an accuracy that is summed over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(self.vit.num_classes, average="micro")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.step("sanity" if self.trainer.sanity_checking else "val", batch)
        self.accuracy.update(logits, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("loss", torch.nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)


class Halving(Tiny):
    """Halves the size of the images in its step, and in `forward` only if asked; this rank may skip its first step."""

    def __init__(self, in_forward: bool = False, skips: bool = False) -> None:
        super().__init__(dynamic_img_size=True)
        self.in_forward, self.skips = in_forward, skips

    def half(self, images: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(images, 32)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.vit(self.half(images) if self.in_forward else images)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if not (self.skips and batch_idx == 0):
            self.step("val", batch if self.in_forward else self.half(batch))


def large(count: int = 16) -> DataLoader[Any]:
    """Images of twice the size that reaches the transformer."""
    return DataLoader(noise_images(count, size=64, seed=1), 4)


class UnevenLarge(IterableDataset[Any]):
    """A stream of eight large images for rank 0, and of four for rank 1."""

    def __iter__(self) -> Any:
        yield from noise_images(8 if torch.distributed.get_rank() == 0 else 4, size=64, seed=1)


def halved(**ddp: Any) -> dict[str, Any]:
    """Runs of modules whose step passes other images to the transformer than those of the batch."""
    found, callback, module = {}, pruner(schedule=0.5, time_limit=0.01), Halving()
    for name in ("first", "second"):  # with one callback and one module, as in fit
        found[name] = run(callback, large(), module, **ddp)
    found["planned"] = run(pruner(time_limit=0.01), large(), Halving(), **ddp)
    found["in forward"] = run(pruner(schedule=0.5), large(), Halving(in_forward=True), **ddp)
    skips = os.environ["LOCAL_RANK"] == "1"
    found["one rank skips"] = run(pruner(schedule=0.5), large(), Halving(skips=skips), **ddp)
    uneven = {**ddp, "use_distributed_sampler": False}
    found["uneven"] = run(pruner(schedule=0.5), DataLoader(UnevenLarge(), 4), Halving(), **uneven)
    return found


def run(callback: TokenPruning, data: Any = None, module: Any = None, **options: Any) -> dict[str, Any]:
    """One validation: what was decided, seen and logged; `measured` counts what this process measured."""
    measured: list[str] = []
    places: dict[str, Any] = {"plan_many": planned_schedule, "time_given": decider}
    real = {name: getattr(place, name) for name, place in places.items()}
    for name, place in places.items():

        def counted(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            measured.append(_name)
            return real[_name](*args, **kwargs)

        setattr(place, name, counted)
    if module is None:
        module = Scored() if data is None else Tiny()  # what a step logs, Lightning expects of each rank
    trainer = L.Trainer(callbacks=[callback], **{**OPTIONS, **options})
    error = None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        try:
            trainer.validate(module, loader(32) if data is None else data, verbose=False)
        except Exception as caught:
            error = f"{type(caught).__name__}: {caught}"
    for name, function in real.items():
        setattr(places[name], name, function)
    decision = callback.decision
    return {
        "rank": trainer.global_rank,
        "measured": measured,
        "removed": list(decision.schedule.removed) if decision else None,
        "tokens": sorted(module.tokens()),
        "steps": [step.tokens for step in module.steps],
        "dense_tokens": decision.dense_tokens if decision else None,
        "warned": [str(each.message) for each in told if "Vision Transformer" in str(each.message)],
        "images": module.seen(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "error": error,
        "block": type(module.vit.blocks[1]).__name__,
    }


class Uneven(IterableDataset[Any]):
    """A stream of eight images for some ranks, and none for the others."""

    def __init__(self, *ranks: int) -> None:
        self.ranks = ranks

    def __iter__(self) -> Any:
        if torch.distributed.get_rank() in self.ranks:
            yield from zip(noise_images(8, seed=1), range(8), strict=True)


def without_batches(*ranks: int) -> dict[str, Any]:
    """Runs of the callback, of ImageClassifier and of a comparison on a stream that only some ranks have."""
    ddp: dict[str, Any] = {"devices": 2, "strategy": "ddp", "use_distributed_sampler": False}
    found = run(pruner(schedule=6), DataLoader(Uneven(*ranks), 4), **ddp)
    trainer = L.Trainer(callbacks=[pruner(schedule=6, time_limit=0.01)], **{**OPTIONS, **ddp})
    module = ImageClassifier(tiny_vit(num_classes=8))
    found["errors"] = []
    for work in (
        lambda: trainer.validate(module, DataLoader(Uneven(*ranks), 4), verbose=False),
        lambda: trainer.predict(module, DataLoader(Uneven(*ranks), 4)),
        lambda: lp.compare(trainer, module, DataLoader(Uneven(*ranks), 4), methods=["topk"], controls=False),
    ):
        try:
            done = work()
            found["errors"].append(None)
        except Exception as caught:
            found["errors"].append(f"{type(caught).__name__}: {caught}")
    found["rows"] = [(row.variant, row.top1, row.images) for row in done.rows] if ranks == (0,) else None
    return found


class Bucketed(BatchSampler):
    """Batches in its own way."""


def odd(count: int = 21, batch_size: int = 4, **options: Any) -> DataLoader[Any]:
    """Images for seven classes, as many as two processes cannot share evenly."""
    return DataLoader(
        TensorDataset(noise_images(count, seed=1), torch.arange(count) % 7), batch_size=batch_size, **options
    )


def own_shards() -> DataLoader[Any]:
    """A distributed sampler of the user's own making: each rank has eleven, and the last of rank 1 is a copy."""
    rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
    return odd(sampler=[*range(rank, 21, 2), 0][:11])


LOADERS: dict[str, Any] = {
    "one odd": odd,
    "a batch of one": lambda: odd(17),
    "one image": lambda: odd(1),
    "even": lambda: odd(20),
    "shuffled": lambda: odd(sampler=RandomSampler(range(21), generator=torch.Generator().manual_seed(4))),
    "dropped last": lambda: odd(26, drop_last=True),
    "a part": lambda: odd(sampler=SubsetRandomSampler(range(13), generator=torch.Generator().manual_seed(4))),
    "several": lambda: [odd(), odd(7, batch_size=2)],
    "own batches": lambda: DataLoader(odd().dataset, batch_sampler=Bucketed(SequentialSampler(range(21)), 4, False)),
}


def classified(data: Any, test: bool = False, **options: Any) -> dict[str, Any]:
    """What ImageClassifier says of odd data, dense and pruned, in validate and if asked in test; and its warnings."""
    found: dict[str, Any] = {}
    for name, callbacks in (("dense", []), ("pruned", [pruner(schedule=6, time_limit=0.01)])):
        trainer = L.Trainer(callbacks=[*callbacks], **{**OPTIONS, **options})
        module = ImageClassifier(tiny_vit(num_classes=7), num_classes=7)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            trainer.validate(module, data(), verbose=False)
            found[name] = {key: float(value) for key, value in trainer.callback_metrics.items()}
            if test:
                trainer.test(module, data(), verbose=False)
                found[name] |= {key: float(value) for key, value in trainer.callback_metrics.items()}
        found[name]["warned"] = [str(each.message) for each in told if "count these items twice" in str(each.message)]
    return found


def fitted(callback: TokenPruning, **options: Any) -> dict[str, Any]:
    """Fit on this rank: tokens of each stage, the weights in one number, and whether anything is left patched."""
    module = Scored()
    trainer = L.Trainer(callbacks=[callback], max_epochs=2, **{**OPTIONS, **options})
    trainer.fit(module, loader(16, batch_size=2), loader(16))
    return {
        "tokens": {stage: sorted(module.tokens(stage)) for stage in ("train", "val", "sanity")},
        "removed": list(callback.decision.schedule.removed) if callback.decision else None,
        "weights": sum(float(p.double().abs().sum()) for p in module.parameters()),
        "patched": any(is_patched_module(part) for part in module.modules()),
    }


def predicted(callback: TokenPruning, **options: Any) -> list[list[float]]:
    """The logits of this rank for an odd number of images."""
    logits = L.Trainer(callbacks=[callback], **{**OPTIONS, **options}).predict(
        Tiny(), DataLoader(noise_images(21, seed=1), 4)
    )
    return torch.cat(logits).tolist()


class PerImage(Tiny):
    """Its validation step returns the loss of each image."""

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        images, labels = batch
        logits = self.vit(images)
        return {"losses": torch.nn.functional.cross_entropy(logits, labels % logits.shape[1], reduction="none")}


def step_values(data: Any, **options: Any) -> list[float]:
    """The loss of each image, as a comparison with `metric_from_step` collects it."""
    values = StepValues("losses")
    L.Trainer(callbacks=[values], **{**OPTIONS, **options}).validate(PerImage(), data, verbose=False)
    return values.values


def unlucky(*args: Any, **kwargs: Any) -> Any:
    raise ValueError("the abacus is broken")


def only_unlucky_on(rank: int) -> Any:
    """Finds the images of a batch, but fails on one rank."""

    def extract(batch: Any) -> Any:
        if torch.distributed.get_rank() == rank:
            raise ValueError(f"no images on rank {rank}")
        return batch[0]

    return extract


def main(path: Path) -> None:
    torch.set_num_threads(1)
    # Alone means before there is a process group, for which rank 1 waits.
    found: dict[str, Any] = {}
    counted: dict[str, Any] = {"two": {}}
    if os.environ["LOCAL_RANK"] == "0":
        found = {"alone": run(pruner(schedule=6))}
        counted["one"] = {name: classified(data, name == "one odd") for name, data in LOADERS.items()}
        counted["predicted alone"] = predicted(pruner(schedule=6))
        counted["step values alone"] = [step_values(odd()), step_values(odd(1))]
    ddp = {"devices": 2, "strategy": "ddp"}
    found |= {"planned": run(pruner(), **ddp), "given": run(pruner(schedule=6), **ddp)}
    found["dense"] = run(pruner(enabled=False), **ddp)
    found["refused"] = run(pruner(schedule=TOKENS), **ddp)
    real, planned_schedule.plan_many = planned_schedule.plan_many, unlucky
    found["failed"] = run(pruner(), **ddp)
    planned_schedule.plan_many = real
    found["unreadable"] = run(pruner(images_from_batch=only_unlucky_on(0)), **ddp)
    found["tolerated"] = run(pruner(schedule=6, images_from_batch=only_unlucky_on(1)), **ddp)
    counted["empty"] = {str(ranks): without_batches(*ranks) for ranks in ((0,), (1,), ())}
    counted["halved"] = halved(**ddp)
    for name, data in LOADERS.items():
        counted["two"][name] = classified(data, name == "one odd", **ddp)
    counted["own shards"] = classified(own_shards, use_distributed_sampler=False, **ddp)
    counted["fitted"] = fitted(pruner(schedule=6, time_limit=0.01), **ddp)
    counted["fitted dense"] = fitted(pruner(enabled=False), **ddp)
    counted["predicted"] = predicted(pruner(schedule=6), **ddp)
    counted["step values"] = [step_values(odd(), **ddp), step_values(odd(1), **ddp)]
    rank = found["planned"]["rank"]
    path.with_suffix(f".counted.{rank}").write_text(json.dumps(counted))
    path.with_suffix(f".{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
