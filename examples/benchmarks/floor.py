"""How near a patched model comes to its floor: the same dense blocks, run on a mere slice of the tokens.

The floor knows for nothing which tokens to keep, so measured / floor is the price of the method and of the machinery
around it. Dense, pruned and floor run in turn in one interleaved run; ratios are medians over rounds.

    python examples/benchmarks/floor.py --batch-sizes 1 4 --output floor.csv
"""

import argparse
import csv
from pathlib import Path

import timm
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import lightning_prune as lp
from lightning_prune.profiling import Interleaved, measurement_context


def floor_forward(model: nn.Module, images: Tensor, block: int, remove: int) -> Tensor:
    """The model's own forward, cut by a slice between attention and MLP of one block; no code of the package."""
    x = model.norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(images))))
    for index, layer in enumerate(model.blocks):
        if index == block:
            x = x + layer.drop_path1(layer.ls1(layer.attn(layer.norm1(x))))
            x = x[:, : x.shape[1] - remove].contiguous()
            x = x + layer.drop_path2(layer.ls2(layer.mlp(layer.norm2(x))))
        else:
            x = layer(x)
    return model.forward_head(model.norm(x))


def measure(args: argparse.Namespace, batch_size: int) -> dict[str, object]:
    device = torch.device(args.device)
    model = timm.create_model(args.model, pretrained=False).eval().to(device)
    size = model.pretrained_cfg["input_size"]
    images = torch.randn(batch_size, *size, generator=torch.Generator().manual_seed(0)).to(device)
    schedule = lp.Schedule.single(len(model.blocks), args.block, args.remove)
    handle = lp.patch(model, args.method, schedule)
    current = ["dense"]

    def prepare(variant: str) -> None:
        current[0] = variant
        if variant == "pruned":
            handle.update(schedule)
        else:
            handle.remove()

    def run() -> Tensor:
        if current[0] == "floor":
            return floor_forward(model, images, args.block, args.remove)
        return model(images)

    with torch.inference_mode():
        race = Interleaved(prepare, run, device, reference="dense")
        race.measure(["dense", "pruned", "floor"], args.rounds)
        over = Interleaved(prepare, run, device, reference="floor")
        over.measure(["pruned", "floor"], args.rounds)
        context = measurement_context(model, images)
    dense, pruned, floor = (race.result(name) for name in ("dense", "pruned", "floor"))
    ratio = over.result("pruned")
    return {
        "model": args.model,
        "method": args.method,
        "block": args.block,
        "removed": args.remove,
        "batch_size": batch_size,
        "dense_ms": round(dense.milliseconds, 3),
        "pruned_ms": round(pruned.milliseconds, 3),
        "floor_ms": round(floor.milliseconds, 3),
        "pruned_over_dense": round(pruned.ratio, 4),
        "pruned_over_floor": round(ratio.ratio, 4),
        "spread": round(ratio.ratio_spread, 4),
        "rounds": ratio.rounds,
        **{key: context[key] for key in ("device", "threads", "precision", "torch", "timm")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="deit_small_patch16_224")
    parser.add_argument("--method", default="pomt")
    parser.add_argument("--block", type=int, default=3)
    parser.add_argument("--remove", type=int, default=56)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--rounds", type=int, default=41)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    rows = [measure(args, batch_size) for batch_size in args.batch_sizes]
    table = Table(title=f"{args.model}, {args.method}, R {args.remove} at block {args.block}, {rows[0]['device']}")
    for heading in ("batch", "dense ms", "pruned ms", "floor ms", "pruned / dense", "pruned / floor"):
        table.add_column(heading, justify="right")
    for row in rows:
        cells = (row[key] for key in ("batch_size", "dense_ms", "pruned_ms", "floor_ms", "pruned_over_dense"))
        table.add_row(*map(str, cells), f"{row['pruned_over_floor']} ± {row['spread']}")
    Console().print(table)
    if args.output:
        with args.output.open("w", newline="") as stream:
            writer = csv.DictWriter(stream, fieldnames=list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
