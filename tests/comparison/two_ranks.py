"""A program run by the tests: compares in one process, then in two, in which planning takes a while."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

import lightning_prune as lp
from helpers.models import digits_module
from lightning_prune import ImageClassifier, ImageTableData
from lightning_prune.callbacks import TokenPruning
from lightning_prune.comparison.comparison_planning import ComparisonPlanner

OPTIONS: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
PLANNING = 2.0  # seconds


class Scored(ImageClassifier):
    """Its validation step returns the confidence in each image."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.logits = super().forward(images)
        return self.logits

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> Any:
        super().validation_step(batch, batch_idx, dataloader_idx)
        return {"confidence": self.logits.softmax(1).amax(1)}


def compared(folder: Path, output: Path, **options: Any) -> dict[str, Any]:
    """What this rank knows of a comparison: its rows, its messages, its files, and how long it was in collectives."""
    messages: list[str] = []
    shape = {"input_size": (1, 56, 56), "mean": (0.5,), "std": (0.5,), "crop_pct": 1.0}
    data = ImageTableData(str(folder), group=["label", "side"], batch_size=4, num_workers=0, data_config=shape)
    pruner = TokenPruning("topk", schedule=120, time_limit=0.01, calibration=8, verbose=False)
    trainer = L.Trainer(accelerator="cpu", callbacks=[pruner], **OPTIONS, **options)
    waited = [0.0]
    broadcast = trainer.strategy.broadcast

    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return broadcast(*args, **kwargs)
        finally:
            waited[0] += time.perf_counter() - start

    trainer.strategy.broadcast = timed
    found = lp.compare(
        trainer,
        digits_module(Scored),
        data,
        output=output,
        per_class=True,
        metric_from_step="confidence",
        on_message=messages.append,
        on_results=lambda _: None,
        controls=False,
    )
    return {
        "rows": [row.to_dict() for row in found.rows],
        "messages": messages,
        "files": [path.name for path in found.files],
        "waited": waited[0],
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    if os.environ["LOCAL_RANK"] == "0":  # before there is a process group, for which rank 1 waits
        found["alone"] = compared(folder, folder / "one")
    plan = ComparisonPlanner.plan

    def slow(self: ComparisonPlanner) -> Any:
        time.sleep(PLANNING)
        return plan(self)

    ComparisonPlanner.plan = slow
    ddp = {"devices": 2, "strategy": "ddp"}
    found["together"] = compared(folder, folder / "two", **ddp)
    found["again"] = compared(folder, folder / "two", **ddp)
    rank = torch.distributed.get_rank()
    (folder / f"found.{rank}").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
