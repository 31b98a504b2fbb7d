"""A program run by the tests: validates in two gloo processes, then uses the metrics in them directly."""

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, Dataset

from helpers.models import digits_module
from lightning_prune.classification.datamodules import DigitsData
from lightning_prune.classification.image_classifier import ImageClassifier
from lightning_prune.metrics import Latency, Throughput


def by_hand(rank: int) -> dict[str, float]:
    rate, p50, p95, empty = Throughput(), Latency(0.5), Latency(0.95), Latency()
    # Rank 0: 3 batches in 3 s. Rank 1: one batch in 6 s. Together 40 images in 6 s.
    for seconds in [1.0, 1.0, 1.0] if rank == 0 else [6.0]:
        rate.update(10, seconds)
        p50.update(seconds)
        p95.update(seconds)
    one_sided = Latency()
    if rank == 1:
        one_sided.update(0.25)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        metrics = {"rate": rate, "p50": p50, "p95": p95, "empty": empty, "one_sided": one_sided}
        return {name: metric.compute().item() for name, metric in metrics.items()}


class Grouped(Dataset):
    """Seven images, a number that two ranks cannot share equally: rank 1 gets one of them twice."""

    group_names = ("small", "large", "empty")
    RIGHT = (True, False, True, True, False, False, True)
    GROUPS = (0, 0, 0, 1, 1, 1, 1)

    def __len__(self) -> int:
        return len(self.RIGHT)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"image": torch.eye(3)[:, :1, None] + index, "label": index % 3, "group": self.GROUPS[index]}


class Answers(nn.Module):
    """Says the class that makes each of these images right or wrong."""

    num_classes = 3

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        index = images[:, 1, 0, 0].long()
        return functional.one_hot((index + 1 - torch.tensor(Grouped.RIGHT)[index].long()) % 3, 3).float()


def groups(**options: Any) -> dict[str, float]:
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", **options)
    loader = DataLoader(Grouped(), batch_size=2)
    (logged,) = trainer.validate(ImageClassifier(Answers(), warmup=0), loader, verbose=False)
    return {name: value for name, value in logged.items() if "group" in name or name == "val/top1"}


def main(path: Path) -> None:
    torch.set_num_threads(1)
    L.seed_everything(0)
    model = digits_module(shape={"depth": 1, "num_heads": 1})
    options: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", devices=2, strategy="ddp", limit_val_batches=3, **options)
    (logged,) = trainer.validate(model, DigitsData(batch_size=20, placements=1), verbose=False)
    found = {"logged": logged, "by_hand": by_hand(trainer.global_rank), "groups": groups(**options)}
    path.with_suffix(f".{trainer.global_rank}").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()  # its threads, left alone, now and then abort the process at its exit


if __name__ == "__main__":
    main(Path(sys.argv[1]))
