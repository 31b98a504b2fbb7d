"""The overhead of a patch that removes nothing: dense, patched with R = 0, and dense again, in one interleaved run.

A patch changes only the blocks that reduce, so with R = 0 it changes none; the second dense run shows how much two runs
of the same model differ.

    python examples/benchmarks/overhead.py --models deit_tiny_patch16_224 vit_small_patch16_dinov3
"""

import argparse
import csv
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table

import lightning_prune as lp
from lightning_prune.patching.class_swap import is_patched_module
from lightning_prune.profiling import InterleavedTimer, between_runs, measurement_context

RATIOS = (("patched_over_dense", "spread"), ("again_over_dense", "again_spread"))
MODELS = ["deit_tiny_patch16_224", "deit_small_patch16_224", "vit_small_patch16_dinov3", "beit_base_patch16_224"]


def measure(name: str, batch_size: int, rounds: int, device: torch.device) -> dict[str, object]:
    model = timm.create_model(name, pretrained=False).eval().to(device)
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(device)
    handle = lp.patch(model, "pomt", [0] * len(model.blocks))
    touched = sum(is_patched_module(module) for module in model.modules())

    def prepare(variant: str) -> None:
        if variant == "patched, R = 0":
            handle.update([0] * len(model.blocks))
        else:
            handle.remove()

    with torch.inference_mode():
        timer = InterleavedTimer(prepare, lambda: model(images), between_runs(device), reference="dense")
        timer.measure(["dense", "patched, R = 0", "dense again"], rounds)
        context = measurement_context(model, images)
    patched, again = timer.result("patched, R = 0"), timer.result("dense again")
    return {
        "model": name,
        "batch_size": batch_size,
        "touched_modules": touched,
        "dense_ms": round(timer.result("dense").milliseconds, 3),
        "patched_over_dense": round(patched.ratio, 4),
        "spread": round(patched.ratio_spread, 4),
        "again_over_dense": round(again.ratio, 4),
        "again_spread": round(again.ratio_spread, 4),
        "rounds": patched.rounds,
        **{key: context[key] for key in ("device", "threads", "precision", "torch", "timm")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [measure(name, args.batch_size, args.rounds, torch.device(args.device)) for name in args.models]
    table = Table(title=f"R = 0, batch {args.batch_size}, {rows[0]['device']}")
    for heading in ("model", "touched modules", "dense ms", "patched / dense", "dense again / dense"):
        table.add_column(heading, justify="left" if heading == "model" else "right", overflow="fold")
    for row in rows:
        patched, again = (f"{row[key]} ± {row[spread]}" for key, spread in RATIOS)
        table.add_row(str(row["model"]), str(row["touched_modules"]), str(row["dense_ms"]), patched, again)
    Console().print(table)
    if args.output:
        with args.output.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
