"""Run by the tests as a program: several runs of the callback in two gloo processes, and one of them alone.

Says as JSON what each rank found.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from tiny import OPTIONS, TOKENS, Tiny, loader, pruner
from torchmetrics.classification import MulticlassAccuracy

from lightning_prune.callbacks import TokenPruning, token_pruning


class Scored(Tiny):
    """Logs an accuracy that is summed over the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.accuracy = MulticlassAccuracy(self.vit.num_classes, average="micro")

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        logits = self.step("val", batch)
        self.accuracy.update(logits, batch[1])
        self.log("accuracy", self.accuracy, on_epoch=True)
        self.log("loss", torch.nn.functional.cross_entropy(logits, batch[1]), sync_dist=True)


def run(callback: TokenPruning, **options: Any) -> dict[str, Any]:
    """One validation: what was decided, seen and logged; `measured` counts what this process measured."""
    measured: list[str] = []
    real = {name: getattr(token_pruning, name) for name in ("plan", "measure_given")}
    for name in real:

        def counted(*args: Any, _name: str = name, **kwargs: Any) -> Any:
            measured.append(_name)
            return real[_name](*args, **kwargs)

        setattr(token_pruning, name, counted)
    module = Scored()
    trainer = L.Trainer(callbacks=[callback], **{**OPTIONS, **options})
    error = None
    try:
        trainer.validate(module, loader(32), verbose=False)
    except Exception as caught:
        error = f"{type(caught).__name__}: {caught}"
    for name, function in real.items():
        setattr(token_pruning, name, function)
    decision = callback.decision
    return {
        "rank": trainer.global_rank,
        "measured": measured,
        "removed": list(decision.schedule.removed) if decision else None,
        "tokens": sorted(module.tokens()),
        "images": module.seen(),
        "metrics": {name: float(value) for name, value in trainer.callback_metrics.items()},
        "error": error,
        "block": type(module.vit.blocks[1]).__name__,
    }


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
    # Lightning starts rank 1 as this program with LOCAL_RANK set; alone means before there is a process group.
    found = {} if "LOCAL_RANK" in os.environ else {"alone": run(pruner(schedule=6))}
    ddp = {"devices": 2, "strategy": "ddp"}
    found |= {"planned": run(pruner(), **ddp), "given": run(pruner(schedule=6), **ddp)}
    found["dense"] = run(pruner(enabled=False), **ddp)
    found["refused"] = run(pruner(schedule=TOKENS), **ddp)
    real, token_pruning.plan = token_pruning.plan, unlucky
    found["failed"] = run(pruner(), **ddp)
    token_pruning.plan = real
    found["unreadable"] = run(pruner(images_from_batch=only_unlucky_on(0)), **ddp)
    found["tolerated"] = run(pruner(schedule=6, images_from_batch=only_unlucky_on(1)), **ddp)
    rank = found["planned"]["rank"]
    path.with_suffix(f".{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
