"""The speed-up of pruning against the number of tokens, the batch size and the depth.

One of the three is varied at a time, from ViT-Ti at 224 pixels and batch 1, while POMT keeps 70% of the tokens from a
quarter of the depth on. Dense and pruned are timed alternately in one interleaved run.

    python examples/benchmarks/scaling.py --output results/scaling
"""

import argparse
import time
from pathlib import Path

import timm
import torch
from matplotlib.figure import Figure
from tables import Row, context_of, print_table, write_table

import lightning_prune as lp
from lightning_prune.profiling import InterleavedTimer, between_runs

KEEP = 0.7
SIZES = (112, 160, 224, 320, 448, 640, 1024)  # 49 to 4096 patches of 16 pixels
BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
DEPTHS = (4, 8, 12, 18, 24)
FEWEST = 5  # rounds of the slowest case
BASE = {"size": 224, "batch": 1, "depth": 12}


def measure(model_name: str, size: int, batch: int, depth: int, args: argparse.Namespace) -> Row:
    model = timm.create_model(model_name, img_size=size, depth=depth).eval().to(args.device)
    images = torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(args.device)
    tokens = model.pos_embed.shape[1]
    removed = round((1 - KEEP) * (tokens - 1))
    block = depth // 4
    handle = lp.patch(model, args.method, lp.Schedule.single(depth, block, removed))
    schedule = handle.schedule

    def switch(variant: str) -> None:
        handle.update(schedule) if variant == "pruned" else handle.remove()

    with torch.inference_mode():
        timer = InterleavedTimer(
            switch, lambda: model(images), between_runs(torch.device(args.device)), reference="dense"
        )
        timer.measure(["pruned"], min(FEWEST, args.rounds))
        timer.measure(["pruned"], args.rounds - FEWEST, time.perf_counter() + args.seconds)
    dense, pruned = timer.result("dense"), timer.result("pruned")
    # If latency were proportional to tokens: of 12 blocks, 8 and the MLP of the reducing one run on fewer tokens.
    late = depth - block
    linear = 1 - (late - 1 / 3) / depth * removed / tokens
    return {
        "patches": tokens - 1, "batch": batch, "depth": depth, "removed": removed,
        "dense_ms": round(dense.milliseconds, 2), "pruned_ms": round(pruned.milliseconds, 2),
        "pruned_over_dense": round(pruned.ratio, 4), "spread": round(pruned.ratio_spread, 4),
        "error": round(1.2533 * pruned.ratio_spread / 0.6745 / pruned.rounds**0.5, 4),
        "in_proportion_to_tokens": round(linear, 4), "rounds": pruned.rounds,
    }  # fmt: skip


def draw(tables: dict[str, list[Row]], title: str, path: Path) -> None:
    """Draws the speed-up against each of the three, and what it would be in proportion to the tokens."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    for axes, (name, rows) in zip(figure.subplots(1, 3, sharey=True), tables.items(), strict=True):
        at, ratio = [row[name] for row in rows], [row["pruned_over_dense"] for row in rows]
        error = [2 * row["error"] / row["pruned_over_dense"] ** 2 for row in rows]
        linear = [1 / row["in_proportion_to_tokens"] for row in rows]
        axes.errorbar(
            at, [1 / r for r in ratio], yerr=error, marker="o", ms=4, lw=1.4, color="#1f5fa8", label="measured"
        )
        axes.plot(at, linear, "--", lw=0.9, color="#7f8c8d", label="in proportion to tokens")
        axes.axhline(1, color="#c0392b", lw=0.8)
        axes.set_xscale("log", base=2)
        axes.set_xticks(at, map(str, at), fontsize=7)
        axes.minorticks_off()
        axes.set_xlabel({"patches": "patch tokens", "batch": "batch size", "depth": "blocks"}[name])
        axes.grid(alpha=0.25)
    figure.axes[0].set_ylabel("speed-up over dense")
    figure.axes[0].legend(fontsize=7, loc="lower right")
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="vit_tiny_patch16_224")
    parser.add_argument("--method", default="pomt")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="pixels")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=BATCHES)
    parser.add_argument("--depths", type=int, nargs="+", default=DEPTHS)
    parser.add_argument("--rounds", type=int, default=61)
    parser.add_argument("--seconds", type=float, default=12.0, help="limit of each case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, required=True, help="folder")
    args = parser.parse_args()
    context = context_of(args.device)
    varied = {"patches": ("size", args.sizes), "batch": ("batch", args.batch_sizes), "depth": ("depth", args.depths)}
    tables: dict[str, list[Row]] = {}
    for name, (what, values) in varied.items():
        tables[name] = [measure(args.model, **{**BASE, what: value}, args=args) for value in values]
        write_table(args.output / f"by_{name}.csv", tables[name], context)
        shown = ("patches", "batch", "depth", "dense_ms", "pruned_over_dense", "error", "in_proportion_to_tokens")
        print_table(f"By {name}, {context['device']}", tables[name], *shown)
    short = args.model.split("_patch")[0]
    title = f"{short}, {args.method}: 70% of the tokens from a quarter of the depth on; {context['device']}"
    draw(tables, title, args.output / "scaling.png")


if __name__ == "__main__":
    main()
